"""What interpretation cannot see: the kernels lowered for CUDA, on a machine without a GPU. They are not run."""

import contextlib
import functools
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from nsa_jax import NSAConfig
from nsa_jax.testing import CASES, Case, input_shapes
from pallas_kernels import flash, tiles

# Tests alone may look inside of jax.
from jax._src import mesh as mesh_lib  # isort: skip
from jax._src.interpreters import mlir  # isort: skip
from jax._src.lib.mlir import ir  # isort: skip
from jax._src.lib.mlir.dialects import hlo  # isort: skip
from jax._src.lib.triton import dialect as triton  # isort: skip


@pytest.fixture(scope="module", autouse=True)
def known_dialect():
    """MLIR looks for Triton's Python module at every operation, and never finds it: half of the time would go there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "jaxlib.mlir.dialects.tt", types.ModuleType("tt"))
        yield


GPU = "NVIDIA H100 80GB HBM3"
TARGET = "__gpu$xla.gpu.triton"


def for_cuda() -> contextlib.AbstractContextManager:
    """From JAX 0.11 on, the lowering asks the mesh what device it lowers for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = mesh_lib.AbstractDevice(GPU, 1, "cuda")
    axes = dict(axis_types=(mesh_lib.AxisType.Explicit,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh_lib.AbstractMesh((1,), ("x",), **axes))


def lowered(case: Case, dtype: str) -> str:
    """Forward, backward and the choice of blocks, as text."""
    shapes = input_shapes(case, dtype=dtype)

    def run(inputs):
        where = dict(query_start=inputs.query_start, window_start=inputs.window_start, segment_ids=inputs.segment_ids)
        where.update(config=case.config, scale=case.head_dim**-0.5)
        out, backward = jax.vjp(lambda *tensors: pallas_kernels.attend(*tensors, None, **where), *inputs[:5])
        return out, backward(out)

    with for_cuda():
        program = jax.jit(run).trace(shapes).lower(lowering_platforms=("cuda",))
    kernels = read_kernels(program)
    assert kernels and not any("tt.atomic" in kernel.text for kernel in kernels)
    return program.as_text()


class Kernel(NamedTuple):
    name: str
    text: str  # in Triton's dialect
    aliases: list[tuple[int, int]]  # which operand an output is: their indices


def read_kernels(program: jax.stages.Lowered) -> list[Kernel]:
    """The kernels in a program; each is read and verified as XLA will do it, before it compiles them."""
    calls, kernels = [], []

    def visit(operation: Any) -> Any:
        if "call_target_name" in operation.attributes and operation.attributes["call_target_name"].value == TARGET:
            calls.append(operation.attributes)
        return ir.WalkResult.ADVANCE

    program.compiler_ir().operation.walk(visit)
    for call in calls:
        config = call["mhlo.backend_config"]
        aliases = [hlo.OutputOperandAlias(alias) for alias in call["output_operand_aliases"]]
        aliases = [(alias.operand_index, *alias.output_tuple_indices) for alias in aliases]
        with ir.Context() as context:
            triton.register_dialect(context)
            context.append_dialect_registry(mlir.upstream_dialects)
            module = ir.Module.parse(config["ir"].value_bytes)
            assert module.operation.verify()
            kernels.append(Kernel(config["name"].value, str(module), aliases))
            assert not rounded_dots(kernels[-1].text)
    return kernels


def rounded_dots(text: str) -> list[str]:
    """Products of float32 in which its numbers would be rounded to TF32; IEEE is what Triton says nothing of."""
    dots = [line for line in text.splitlines() if "tt.dot " in line]
    return [line for line in dots if "xf32> * " in line and "inputPrecision" in line and "ieee" not in line]


def verified_kernels(program: jax.stages.Lowered) -> int:
    """How many kernels are in a program; each is verified."""
    return len(read_kernels(program))


def assert_is_in_kernels(program: str, case: Case) -> None:
    kernels = {"window_forward", "range_dq", "window_dkv", "selected"}
    if case.config.num_compressed(case.keys):
        kernels |= {"compressed_forward", "compressed_dkv", "scores"}
    for kernel in kernels | {"choice"}:
        assert f"nsa_{kernel}" in program, kernel
    assert program.count(TARGET) >= len(kernels)


TUNED = [entry for entry in json.loads(tiles.TABLE.read_text()) if entry["device"] == GPU]


@pytest.mark.parametrize("entry", TUNED, ids=lambda entry: "{head_dim}-{value_head_dim}-{group}".format(**entry))
def test_tuned_tiles_are_lowered(entry, monkeypatch):
    """As on the GPU that they are for; elsewhere here the rule's are."""
    device = types.SimpleNamespace(device_kind=GPU, compute_capability=entry["compute_capability"], platform="gpu")
    monkeypatch.setattr(tiles, "default_device", lambda: device)
    sizes = {name: entry[name] for name in ("head_dim", "value_head_dim")}
    case = Case(NSAConfig(), queries=70, keys=200, heads=entry["group"], kv_heads=1, query_start=130, **sizes)
    query = input_shapes(case, dtype=entry["dtype"]).query
    found = tiles.tiles_for(query, 1, case.value_head_dim)
    assert all(
        getattr(found, kernel) == tuple(tile) for kernel, tile in entry["tiles"].items() if "decode" not in kernel
    )
    assert tiles.why_no_room("attend", query, 1, case.value_head_dim) is None
    assert_is_in_kernels(lowered(case, entry["dtype"]), case)


# Each takes another way through the lowering: none, or odd, or several of something.
IN_FLOAT32 = (
    *("one_token", "shorter_than_compress_block", "odd_length", "window_start", "segments_and_start"),
    *("group_1", "group_5", "group_16", "long_block", "no_overlap", "nothing_forced"),
)
# It has one rounding, and little else, of its own; models, below, are in bfloat16.
IN_FLOAT16 = ("plain", "head_sizes_differ", "segments_unaligned")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in IN_FLOAT32] + [(name, "float16") for name in IN_FLOAT16],
)
def test_cases_lower_for_cuda(name, dtype):
    assert_is_in_kernels(lowered(CASES[name], dtype), CASES[name])


@pytest.mark.parametrize("name", ["group_16", "group_1", "many_forced"])
def test_cases_lower_where_64_bit_numbers_are_on(name):
    """Sums of int32 are int64 there, unless they are told; a loop's state changes its dtype, and a kernel is none."""
    with jax.enable_x64(True):
        assert_is_in_kernels(lowered(CASES[name], "float32"), CASES[name])


# The paper's, and other head sizes and groups of today's models.
SIZES = [
    (16, 128, 128),
    (16, 192, 128),
    (8, 64, 64),
    (4, 96, 96),
    (2, 256, 256),
    (1, 32, 32),
    (12, 128, 128),
    (64, 64, 64),
]


def test_a_loop_over_the_places_in_a_block_lowers_for_cuda():
    """Of 9 units, which go one by one: too many to unroll."""
    case = Case(config=NSAConfig(9, 3, 27, 4, 1, 1), queries=50, keys=260, query_start=210)
    assert_is_in_kernels(lowered(case, "bfloat16"), case)


def test_a_dot_that_rounds_to_tf32_is_found(monkeypatch):
    monkeypatch.setattr(flash, "dot", functools.partial(jnp.dot, preferred_element_type=jnp.float32))
    with pytest.raises(AssertionError, match="tf32"):
        lowered(CASES["one_token"], "float32")


@pytest.mark.parametrize(("group", "size", "value_size"), SIZES)
def test_sizes_of_models_lower_for_cuda(group, size, value_size):
    heads = dict(heads=4 * group, kv_heads=4, head_dim=size, value_head_dim=value_size)
    case = Case(config=NSAConfig(), queries=8192, keys=8192, **heads)
    assert_is_in_kernels(lowered(case, "bfloat16"), case)


LOWER = """
import sys, warnings
sys.path[:0] = [{tests!r}]
import nsa_jax
from nsa_jax.testing import CASES
from tests.test_lowering import TARGET, lowered
assert TARGET in lowered(CASES["plain"], "float32")
warnings.warn_explicit("another of jax's", DeprecationWarning, "there.py", 1)
"""


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="this version of JAX does not announce it")
@pytest.mark.parametrize("flags", [(), ("-W", "always")], ids=str)
def test_users_hear_nothing_of_the_deprecated_backend(flags):
    """Which is this package's affair; other deprecations they hear as they asked for."""
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, *flags, "-c", LOWER.format(tests=root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    assert ("another of jax's" in done.stderr) == (flags[1:] == ("always",))


def test_only_that_warning_is_ignored():
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        lowered(CASES["one_token"], "float32")
        warnings.warn("The Pallas Triton backend is deprecated and will be removed.", DeprecationWarning, stacklevel=1)
        warnings.warn("The Pallas backend is deprecated.", DeprecationWarning, stacklevel=1)
    assert len(caught) == 1
