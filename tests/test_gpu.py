"""What the CPU's tests cannot see: the same cases compiled for a GPU, and what only fits there."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import nsa_attention, save_attention, select_blocks
from nsa_jax.testing import (
    CASES,
    LONG_CASES,
    PAPER,
    Case,
    assert_as_accurate,
    assert_best_blocks,
    block_scores,
    input_shapes,
    make_inputs,
)
from tests.posed import Solution, assert_result, assert_solves, pose, read_keys, with_nan
from tests.programs import QUICK
from train.config import PRESETS
from train.model import Network

pytestmark = pytest.mark.gpu


IMPLEMENTATIONS = ("xla", "pallas")
TARGET = "__gpu$xla.gpu.triton"


# Programs that run once or twice: what a search for faster code gains, it costs many times over.
once = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0, **QUICK})


@functools.partial(once, static_argnames=("case", "implementation"))
def solve(inputs, blocks, cotangent, *, case: Case, implementation: str) -> Solution:
    """Outputs and gradients with the blocks given, and the blocks that it would choose itself."""
    places = dict(query_start=inputs.query_start, segment_ids=inputs.segment_ids, implementation=implementation)

    def attend(query, compressed, selected, window, gates):
        tensors = dict(compressed=compressed, selected=selected, window=window, gates=gates)
        given = dict(window_start=inputs.window_start, selected_blocks=blocks, config=case.config)
        return nsa_attention(query, **tensors, **given, **places)

    out, vjp = jax.vjp(attend, *inputs[:5])
    own = select_blocks(inputs.query, inputs.compressed.key, config=case.config, num_keys=case.keys, **places)
    return Solution(out, vjp(cotangent.astype(out.dtype)), own)


@functools.partial(once, static_argnames="case")
def choose(inputs, *, case: Case) -> jax.Array:
    places = dict(query_start=inputs.query_start, segment_ids=inputs.segment_ids, implementation="xla")
    return select_blocks(inputs.query, inputs.compressed.key, config=case.config, num_keys=case.keys, **places)


@functools.partial(once, static_argnames="case")
def scores_of(inputs, *, case: Case) -> jax.Array:
    places = dict(query_start=inputs.query_start, segment_ids=inputs.segment_ids)
    return block_scores(inputs.query, inputs.compressed.key, config=case.config, num_keys=case.keys, **places)


def cotangent_of(case: Case) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (case.batch, case.queries, case.heads, case.value_head_dim))


def widened(inputs):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, inputs)


def on_device(case: Case, dtype: str, device):
    """Inputs, all of them arrays, and a cotangent."""
    return jax.device_put((jax.tree.map(jnp.asarray, make_inputs(case, dtype=dtype)), cotangent_of(case)), device)


def assert_all_as_accurate(actual: Solution, reference: Solution, exact: Solution, case: Case) -> None:
    # Every head of every query reads the first block: its gradient is the longest sum.
    terms = case.queries * case.heads // case.kv_heads
    cpu = jax.devices("cpu")[0]
    named = jax.tree_util.tree_flatten_with_path(actual[:2])[0]
    for (path, got), want, ideal in zip(named, *map(jax.tree.leaves, (reference[:2], exact[:2])), strict=True):
        got, want, ideal = jax.device_put((got, want, ideal), cpu)
        assert_result(got, want, ideal, name=jax.tree_util.keystr(path), terms=terms)


def assert_same_bits(one, other) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


CASES_16_BIT = ("plain", "head_sizes_differ", "group_16", "group_5", "segments_unaligned", "query_start_per_sequence")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CASES] + [(name, d) for name in CASES_16_BIT for d in ("bfloat16", "float16")],
)
def test_gpu_is_as_accurate_as_loops_in_float64(name: str, dtype: str, implementation: str):
    problem = pose(CASES[name], dtype)
    run = functools.partial(solve, *problem.arguments, case=problem.case)
    actual = run(implementation=implementation)
    assert {device.platform for device in actual.out.devices()} == {"gpu"}
    kernels_in_16_bits = implementation == "pallas" and dtype != "float32"
    assert_solves(actual, problem, run(implementation="xla") if kernels_in_16_bits else None)
    # XLA's gradients on a GPU add in no certain order.
    count = 1 if implementation == "xla" else 3
    assert_same_bits(run(implementation=implementation)[:count], actual[:count])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LONG_CASES)
def test_long_texts(name: str, dtype: str):
    case = LONG_CASES[name]
    inputs, cotangent = on_device(case, dtype, jax.devices("gpu")[0])
    blocks = choose(inputs, case=case)
    exact = solve(widened(inputs), blocks, cotangent, case=case, implementation="xla")
    reference = exact if dtype == "float32" else solve(inputs, blocks, cotangent, case=case, implementation="xla")
    actual = solve(inputs, blocks, cotangent, case=case, implementation="pallas")
    assert_all_as_accurate(actual, reference, exact, case)
    assert_best_blocks(actual.blocks, exact.blocks, scores_of(inputs, case=case))
    assert_same_bits(solve(inputs, blocks, cotangent, case=case, implementation="pallas"), actual)


@pytest.mark.parametrize(
    "name", ["plain", "group_16", "query_start", "one_query_late", "segments_unaligned", "window_start"]
)
def test_what_nothing_may_read_is_not_read(name: str):
    """Keys after the last query, out of every window, before position 0, in two documents, in blocks that none chose."""
    problem = pose(CASES[name])
    inputs, *others = problem.arguments
    run = functools.partial(solve, case=problem.case, implementation="pallas")
    unread = [~mask for mask in read_keys(problem)]
    actual = run(with_nan(inputs, unread), *others)
    assert_same_bits(actual, run(inputs, *others))
    for mask, pair in zip(unread, actual.gradients[1:4], strict=True):
        assert not np.any(np.asarray(pair.key)[mask]) and not np.any(np.asarray(pair.value)[mask])


def test_long_65536_tokens_against_the_reference():
    case = Case(PAPER, queries=65536, keys=65536, heads=2, kv_heads=1, head_dim=64, value_head_dim=64)
    inputs, cotangent = on_device(case, "float32", jax.devices("gpu")[0])
    blocks = choose(inputs, case=case)
    exact = solve(inputs, blocks, cotangent, case=case, implementation="xla")
    actual = solve(inputs, blocks, cotangent, case=case, implementation="pallas")
    assert_all_as_accurate(actual, exact, exact, case)
    differing = np.any(np.asarray(actual.blocks) != np.asarray(exact.blocks), axis=-1)
    assert differing.mean() < 1e-4  # of hundreds of scores, some are tied but for rounding


def test_long_262208_tokens():
    """Queries of more than 2 ** 32 bytes, which takes 64-bit offsets; rows here and there against the reference."""
    length = 2**18 + 64
    case = Case(PAPER, queries=length, keys=length, heads=64, kv_heads=4, head_dim=128, value_head_dim=128)
    shapes = input_shapes(case, dtype="bfloat16")

    @jax.jit
    def draw():
        leaves, treedef = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        drawn = [
            jax.random.normal(key, x.shape, x.dtype) if x.ndim else jnp.zeros(x.shape, x.dtype)
            for key, x in zip(keys, leaves)
        ]
        return jax.tree.unflatten(treedef, drawn)

    inputs = draw()

    @jax.jit
    def run(tensors):
        def attend(query, compressed, selected, window, gates):
            tensors = dict(compressed=compressed, selected=selected, window=window, gates=gates)
            return nsa_attention(query, **tensors, config=case.config, implementation="pallas")

        out, vjp = jax.vjp(attend, *tensors)
        gradients = vjp(out)
        return out, gradients, jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves((out, gradients))])

    out, gradients, finite = run(inputs[:5])
    assert np.all(finite)
    assert all(bool(jnp.any(x[:, -64:])) for x in jax.tree.leaves(gradients))
    for start in (0, 1000, length // 2 - 1, length - 4):
        few = slice(start, start + 4)
        arguments = dict(compressed=inputs.compressed, selected=inputs.selected, window=inputs.window)
        arguments.update(gates=inputs.gates[:, few], query_start=start, config=case.config)
        query = inputs.query[:, few]
        blocks = select_blocks(
            query,
            inputs.compressed.key,
            config=case.config,
            num_keys=length,
            query_start=start,
            implementation="pallas",
        )
        want = nsa_attention(query, **arguments, selected_blocks=blocks, implementation="xla")
        arguments.update(widened({name: arguments[name] for name in ("compressed", "selected", "window", "gates")}))
        exact = nsa_attention(query.astype(jnp.float32), **arguments, selected_blocks=blocks, implementation="xla")
        assert_as_accurate(out[:, few], want, exact, name=f"rows from {start}")


def layer_of(case: Case, inputs, implementation):
    def layer(query):
        arguments = {**inputs.keywords(), "config": case.config, "implementation": implementation}
        return jnp.tanh(nsa_attention(jnp.tanh(query), **arguments))

    return layer


def compiled(layer, x):
    return jax.jit(jax.grad(lambda x: (layer(layer(x)) ** 2).sum())).lower(x).compile().as_text()


FORWARD = ("nsa_window_forward", "nsa_compressed_forward", "nsa_scores", "nsa_choice")


@pytest.mark.parametrize("name", ["plain", "group_16"])
def test_save_attention_runs_no_forward_kernel_twice(name: str):
    case, inputs = CASES[name], make_inputs(CASES[name])
    layer = layer_of(case, inputs, "pallas")

    def calls(program: str) -> dict[str, int]:
        lines = [line for line in program.splitlines() if "custom-call(" in line and TARGET in line]
        assert lines
        counts = {kernel: sum(kernel in line for line in lines) for kernel in FORWARD}
        # Unions are no forward kernel: both passes form them from the blocks, and may do it once for both.
        return {**counts, "all": sum("nsa_unions" not in line for line in lines)}

    once = calls(compiled(layer, inputs.query))
    assert all(once[kernel] == 2 for kernel in FORWARD)  # two layers
    assert calls(compiled(jax.checkpoint(layer, policy=save_attention), inputs.query)) == once
    assert calls(compiled(jax.checkpoint(layer), inputs.query))["nsa_choice"] > 2  # what is to be avoided

    def scanned(layer):
        # As the model's layers are.
        return lambda x: jax.lax.scan(lambda x, _: (layer(x), None), x, length=3)[0]

    more = dict(prevent_cse=False)
    once = calls(compiled(scanned(layer), inputs.query))
    assert calls(compiled(scanned(jax.checkpoint(layer, policy=save_attention, **more)), inputs.query)) == once
    again = calls(compiled(scanned(jax.checkpoint(layer, **more)), inputs.query))
    assert all(again[kernel] > once[kernel] > 0 for kernel in FORWARD)


def test_none_is_pallas():
    case, inputs = CASES["plain"], make_inputs(CASES["plain"])
    assert TARGET in compiled(layer_of(case, inputs, None), inputs.query)
    assert TARGET not in compiled(layer_of(case, inputs, "xla"), inputs.query)


def test_training_uses_the_kernels():
    config = PRESETS["tiny"][1].model
    network, tokens = Network(config, 257), jax.random.randint(jax.random.key(0), (2, 128), 0, 256, jnp.int32)
    params = network.init(0)

    def loss(params):
        logits = network.model(params)(tokens)
        return -jax.nn.log_softmax(logits.astype(jnp.float32))[:, :-1].mean()

    program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    assert TARGET in program.as_text()
    value, gradients = program(params)
    chex.assert_tree_all_finite((value, gradients))


@pytest.mark.parametrize("attention", ["full", "window"])
def test_dense_attention_through_cudnn_is_dense_attention(attention: str):
    config = dataclasses.replace(PRESETS["tiny"][1].model, attention=attention, head_dim=64, value_head_dim=64)
    tokens = jax.random.randint(jax.random.key(0), (2, 256), 0, 256, jnp.int32)
    params = Network(config, 257).init(0)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        network = Network(dataclasses.replace(config, dtype=dtype), 257)
        run = jax.jit(lambda params, network=network: network.model(params)(tokens))
        logits[dtype] = np.asarray(run(params))
        program = run.lower(params).as_text()
        assert ("cudnn" in program) == (dtype == "bfloat16")
    # Logits are of size 1, and pass through four layers in bfloat16.
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.15)
