"""Which implementation runs; one query a sequence; chunks of queries; what a checkpoint keeps; docstring examples."""

import dataclasses
import doctest
import re
import types
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import nsa_jax
import pallas_kernels
from nsa_jax import NSAConfig, nsa_attention, ops, reference, save_attention, select_blocks
from nsa_jax.testing import CASES, SMALL, input_shapes, make_inputs
from tests.posed import ring_of
from tests.programs import equations

pytestmark = pytest.mark.usefixtures("quick_compilation")


def attend(case, inputs, **arguments):
    return nsa_attention(inputs.query, config=case.config, **inputs.keywords(), **arguments)


def choose(case, inputs, **arguments):
    where = {"query_start": inputs.query_start, "segment_ids": inputs.segment_ids}
    return select_blocks(
        inputs.query, inputs.compressed.key, config=case.config, num_keys=case.keys, **where, **arguments
    )


def decode(case, inputs, **arguments):
    lengths = jnp.broadcast_to(jnp.asarray(inputs.query_start, jnp.int32) + 1, (case.batch,))
    tensors = dict(compressed=inputs.compressed, selected=inputs.selected, gates=inputs.gates, lengths=lengths)
    tensors.update(window=ring_of(inputs.window, lengths, case.config.window, unwritten=0.0))
    return ops.decode_step(inputs.query, config=case.config, **{**tensors, **arguments})


FUNCTIONS = pytest.mark.parametrize("function", [attend, choose, decode], ids=lambda function: function.__name__)
CASE = CASES["one_query_late"]


def same_bits(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize("name", CASES)
def test_shapes_of_inputs_are_known_before_they_are_drawn(name):
    shapes, inputs = input_shapes(CASES[name], dtype="bfloat16"), make_inputs(CASES[name], dtype="bfloat16")
    assert jax.tree.structure(shapes) == jax.tree.structure(inputs)
    for shape, array in zip(*map(jax.tree.leaves, (shapes, inputs)), strict=True):
        array = jnp.asarray(array)
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


# Names of implementations.


@FUNCTIONS
def test_none_is_xla_on_cpu(function):
    inputs = make_inputs(CASE)
    same_bits(function(CASE, inputs), function(CASE, inputs, implementation="xla"))


@FUNCTIONS
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there the kernels run")
def test_a_named_implementation_never_falls_back(function):
    device = re.escape(jax.devices()[0].device_kind)
    message = (
        f"implementation='pallas': the kernels run on NVIDIA GPUs, and this device is {device} .*; use 'xla' or None"
    )
    with pytest.raises(NotImplementedError, match=message):
        function(CASE, make_inputs(CASE), implementation="pallas")


REFUSED = {
    "at most 64 query heads for each key/value head, not 65": dict(heads=65, kv_heads=1),
    "head size of at most 256, not 264": dict(head_dim=264),
    "at most 1024 blocks a query, not 1025": dict(config=dataclasses.replace(SMALL, num_selected=1025)),
    "from at most 65536 blocks, and 65537 keys have 65537": dict(keys=65537, config=NSAConfig(1, 1, 1, 2, 1, 1, 1)),
}


@pytest.mark.parametrize("function", [attend, choose], ids=lambda function: function.__name__)
@pytest.mark.parametrize("reason", REFUSED)
def test_kernels_refuse_what_they_do_not_take(function, reason):
    case = dataclasses.replace(CASE, **REFUSED[reason])
    inputs = input_shapes(case)
    with pytest.raises(NotImplementedError, match=f"implementation='pallas_interpret': the kernels .*{reason}"):
        jax.eval_shape(lambda inputs: function(case, inputs, implementation="pallas_interpret"), inputs)


def test_slots_of_the_caller_count_as_far_as_there_are_blocks():
    """Of 70 keys in blocks of one there are 70; of 1100, more than the kernels read."""
    config = NSAConfig(1, 1, 1, 2, 1, 1, 1)
    for keys, slots in ((70, 5000), (1100, 1024), (1100, 1025)):
        case = dataclasses.replace(CASE, config=config, queries=2, keys=keys)
        inputs = input_shapes(case)
        blocks = jax.ShapeDtypeStruct((case.batch, 2, case.kv_heads, slots), jnp.int32)

        def run(inputs, blocks, case=case):
            return attend(case, inputs, selected_blocks=blocks, implementation="pallas_interpret")

        if slots == 1025:
            with pytest.raises(NotImplementedError, match="at most 1024 blocks a query, not 1025"):
                jax.eval_shape(run, inputs, blocks)
        else:
            assert jax.eval_shape(run, inputs, blocks).shape == (*inputs.query.shape[:3], case.value_head_dim)


def test_kernels_refuse_more_numbers_of_values_and_scales_than_they_take():
    inputs = make_inputs(dataclasses.replace(CASE, value_head_dim=257))
    with pytest.raises(NotImplementedError, match="the kernels take a value head size of at most 256, not 257"):
        attend(CASE, inputs, implementation="pallas_interpret")
    with pytest.raises(NotImplementedError, match="the kernels take a positive, finite scale, not -0.5"):
        attend(CASE, make_inputs(CASE), scale=-0.5, implementation="pallas_interpret")


@FUNCTIONS
def test_an_unknown_implementation(function, unchecked_shapes):
    message = r"implementation='cuda' is unknown: choose from \['xla', 'pallas', 'pallas_interpret'\] or None"
    with pytest.raises(ValueError, match=message):
        function(CASE, make_inputs(CASE), implementation="cuda")


GPU = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="A Thing")


def test_the_default_device_is_the_one_that_jax_is_told(monkeypatch):
    """On a machine with a GPU, work that is sent to the CPU is none for the kernels."""
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "devices", lambda name=None: [cpu if name == "cpu" else GPU])
    assert pallas_kernels.default_device() is GPU and pallas_kernels.why_not_here() is None
    for chosen in (cpu, "cpu"):
        with jax.default_device(chosen):
            assert pallas_kernels.default_device() is cpu
            assert "run on NVIDIA GPUs" in pallas_kernels.why_not_here()


def test_none_on_a_gpu_warns_once(monkeypatch):
    monkeypatch.setattr(pallas_kernels, "default_device", lambda: GPU)
    ops._warn_once.cache_clear()
    inputs = make_inputs(CASE)
    message = "None uses 'xla', which is much slower on a GPU: the kernels take a positive, finite scale, not -1.0"
    monkeypatch.setattr(pallas_kernels, "why_not_here", lambda: None)
    with pytest.warns(UserWarning, match=message) as caught:
        first, second = choose(CASE, inputs, scale=-1), choose(CASE, inputs, scale=-1)
    assert len(caught) == 1
    same_bits(first, second)
    choose(CASE, inputs, scale=-1, implementation="xla")  # a warning would be an error here
    ops._warn_once.cache_clear()


def test_none_is_pallas_on_a_supported_gpu(monkeypatch, recorded):
    monkeypatch.setattr(pallas_kernels, "default_device", lambda: GPU)
    monkeypatch.setattr(pallas_kernels, "why_not_here", lambda: None)
    monkeypatch.setitem(ops.IMPLEMENTATIONS, "pallas", ops.IMPLEMENTATIONS.pop("xla"))
    choose(CASE, make_inputs(CASE))
    attend(CASE, make_inputs(CASE))
    assert [name for name, _ in recorded] == ["select_blocks", "attend"]


@pytest.mark.parametrize(
    ("platform", "capability", "reason"),
    [
        ("gpu", "9.0", None),
        ("gpu", "12.0", None),
        ("gpu", "8.0", None),
        ("gpu", "7.5", "compute capability 8.0 or more, and A Thing has 7.5"),
        ("gpu", "gfx942", "compute capability 8.0 or more, and A Thing has gfx942"),
        ("gpu", "", "compute capability 8.0 or more, and A Thing has none"),
        ("tpu", "", "run on NVIDIA GPUs, and this device is A Thing .tpu."),
    ],
)
def test_devices_that_the_kernels_run_on(platform, capability, reason, monkeypatch):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability, device_kind="A Thing")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    found = pallas_kernels.why_not_here()
    assert found is None if reason is None else re.search(reason, found)


def test_the_table_has_every_name():
    assert set(ops.IMPLEMENTATIONS) == set(get_args(ops.ImplementationName))
    for implementation in ops.IMPLEMENTATIONS.values():
        assert implementation._fields == ("select_blocks", "attend", "decode_step")
        assert all(map(callable, implementation))


@pytest.fixture
def recorded(monkeypatch):
    """Calls of an implementation of the name "xla" that counts them and does no more."""
    calls = []

    def select_blocks(query, compressed_key, **arguments):
        calls.append(("select_blocks", arguments))
        shape = (*query.shape[:2], compressed_key.shape[2], arguments["config"].num_selected)
        return jnp.full(shape, 1, jnp.int32)

    def attend(query, compressed, selected, window, gates, blocks, **arguments):
        calls.append(("attend", {**arguments, "blocks": blocks}))
        return jnp.zeros((*query.shape[:3], selected.value.shape[-1]), query.dtype)

    def decode_step(query, compressed, selected, window, gates, lengths, **arguments):
        calls.append(("decode_step", {**arguments, "query_start": lengths - 1}))
        return jnp.zeros((*query.shape[:3], selected.value.shape[-1]), query.dtype)

    monkeypatch.setitem(ops.IMPLEMENTATIONS, "xla", ops.Implementation(select_blocks, attend, decode_step))
    return calls


def test_the_table_alone_decides_what_runs(recorded):
    inputs = make_inputs(CASE)
    choose(CASE, inputs)
    attend(CASE, inputs)
    decode(CASE, inputs, scale=3)
    assert [name for name, _ in recorded] == ["select_blocks", "attend", "decode_step"]
    assert recorded[0][1]["num_keys"] == CASE.keys
    for _, arguments in recorded:
        assert arguments["config"] == CASE.config
        np.testing.assert_array_equal(arguments["query_start"], CASE.query_start)
    assert recorded[1][1]["scale"] == CASE.head_dim**-0.5
    assert recorded[2][1]["scale"] == 3.0 and isinstance(recorded[2][1]["scale"], float)
    assert recorded[1][1]["blocks"] is None  # to be chosen there


def test_blocks_of_the_caller_are_read_instead_of_the_selection(recorded):
    """Brought to their form at the door, of 5 blocks: row 0 stands in block 4, row 1 in block 2."""
    blocks = jnp.asarray([4, -1, 0, 4, 9, 3], jnp.int32)
    attend(CASE, make_inputs(CASE), selected_blocks=jnp.broadcast_to(blocks[None, None, None], (2, 1, 2, 6)))
    [(name, arguments)] = recorded
    assert name == "attend"
    np.testing.assert_array_equal(arguments["blocks"][0], [[[0, 3, 4, -1, -1]] * 2])
    np.testing.assert_array_equal(arguments["blocks"][1], [[[0, -1, -1, -1, -1]] * 2])


# One query a sequence.


@pytest.mark.parametrize("start", [0, 61, (76, 40), (3, 19)], ids=str)
def test_decode_step_is_nsa_attention_of_one_query(start):
    query_start = start if isinstance(start, int) else jnp.asarray(start, jnp.int32)
    inputs = make_inputs(CASE)._replace(query_start=query_start)
    np.testing.assert_allclose(decode(CASE, inputs), attend(CASE, inputs), rtol=1e-6, atol=1e-6)


CALLS = [
    (
        dict(query=jnp.zeros((2, 70, 4, 16))),
        r"decode_step reads one query a sequence, but the query's shape is \(2, 70, 4, 16\)",
    ),
    (dict(query=jnp.zeros((4, 16))), r"query must be \[B, T, N, H\], but its shape is \(4, 16\)"),
    (dict(lengths=jnp.zeros((1,), jnp.int32)), r"lengths must be \[B\] = \(2,\), but its shape is \(1,\)"),
    (dict(lengths=jnp.zeros((2,))), r"lengths has dtype float32; it must be int32"),
    (dict(window=make_inputs(CASE).window), r"the ring of the window branch has 77 rows; it must have window=20"),
]


@pytest.mark.parametrize("changed, message", CALLS, ids=[message[:40] for _, message in CALLS])
def test_decode_step_refuses(changed, message, unchecked_shapes):
    query = changed.pop("query", None)
    inputs = make_inputs(CASE)
    with pytest.raises(ValueError, match=message):
        decode(CASE, inputs if query is None else inputs._replace(query=query), **changed)


# Chunks of queries.


def count(function, *arguments, primitive):
    return sum(
        equation.primitive.name == primitive for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr)
    )


def blocks_outputs_and_gradients(case, inputs):
    """A function of the tensors, straight from the reference, whose chunks no earlier trace has fixed."""
    where = {"config": case.config, "scale": 0.3, "query_start": inputs.query_start, "segment_ids": inputs.segment_ids}
    shape = (case.batch, case.queries, case.heads, case.value_head_dim)
    weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)

    def run(tensors):
        blocks = reference.select_blocks(tensors[0], tensors[1].key, num_keys=case.keys, **where)

        def loss(tensors):
            out = reference.attend(*tensors, blocks, window_start=inputs.window_start, **where)
            return (out * weights).sum(), out

        gradients, out = jax.grad(loss, has_aux=True)(tensors)
        return blocks, out, gradients

    return run


def loops(traced):
    """Lengths of the loops in a program."""
    return {equation.params["length"] for equation in equations(traced.jaxpr) if equation.primitive.name == "scan"}


@pytest.mark.parametrize(
    "name, scores, chunks",
    [
        # Scores that a chunk may hold, and the numbers of chunks which that makes, of choosing and of attending.
        ("segments_and_start", 1, {30}),  # one query is the least
        ("query_start_per_sequence", 300, {2, 11}),  # 21 queries: 15 x 19 compressed tokens; 2 x (19 + 80 + 20)
    ],
)
def test_chunks_change_nothing(name, scores, chunks, monkeypatch):
    case, inputs = CASES[name], make_inputs(CASES[name])
    whole = jax.jit(blocks_outputs_and_gradients(case, inputs)).trace(inputs[:5])
    monkeypatch.setattr(reference, "CHUNK_SCORES", scores)
    chunked = jax.jit(blocks_outputs_and_gradients(case, inputs)).trace(inputs[:5])
    assert loops(chunked) - loops(whole) == chunks

    actual, expected = (traced.lower().compile()(inputs[:5]) for traced in (chunked, whole))
    np.testing.assert_array_equal(actual[0], expected[0])
    for one, other in zip(jax.tree.leaves(actual[1:]), jax.tree.leaves(expected[1:]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_chunks_are_no_longer_than_the_greatest(monkeypatch):
    monkeypatch.setattr(reference, "MAX_CHUNK", 16)
    case, inputs = CASES["plain"], make_inputs(CASES["plain"])
    assert loops(jax.jit(blocks_outputs_and_gradients(case, inputs)).trace(inputs[:5])) == {5}  # 70 queries


# Under jax.checkpoint.


@pytest.fixture
def layer(monkeypatch):
    """Two projections around attention, in chunks; computed by the reference itself, whatever an earlier trace was."""
    monkeypatch.setattr(reference, "CHUNK_SCORES", 2000)
    monkeypatch.setattr(ops, "_select_blocks_xla", reference.select_blocks)
    monkeypatch.setattr(ops, "_attend_given_blocks_xla", reference.attend)
    case, inputs = CASES["plain"], make_inputs(CASES["plain"])
    matrix = jax.random.normal(jax.random.key(0), (case.head_dim, case.head_dim))

    def layer(x):
        out = nsa_attention(jnp.tanh(x @ matrix), config=case.config, **inputs.keywords())
        return jnp.tanh(out @ matrix)

    return layer, inputs.query


def gradient(layer):
    return jax.grad(lambda x: (layer(x) ** 2).sum())


def test_save_attention_keeps_the_blocks_and_the_output(layer, capsys):
    layer, x = layer
    print_saved_residuals(jax.checkpoint(layer, policy=save_attention), x)
    lines = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line and "constant" not in line]
    assert sorted(re.sub(r" from .*", "", line) for line in lines) == [
        "f32[2,70,4,16] named 'nsa_out'",
        "i32[2,70,2,4] named 'nsa_blocks'",
    ]


def test_save_attention_never_chooses_twice(layer):
    layer, x = layer

    def choices(layer):
        return count(gradient(layer), x, primitive="top_k")

    assert choices(layer) == 1
    assert choices(jax.checkpoint(layer)) == 2  # what is to be avoided
    assert choices(jax.checkpoint(layer, policy=save_attention)) == 1


def test_save_attention_does_not_run_attention_again(layer):
    """Of the forward pass only the two projections run again; attention's backward pass counts the same in both."""
    layer, x = layer

    def products(layer):
        return count(gradient(layer), x, primitive="dot_general")

    assert products(jax.checkpoint(layer, policy=save_attention)) == products(layer) + 2
    assert products(jax.checkpoint(layer)) > products(layer) + 2


# The examples in docstrings.

DOCUMENTED = [getattr(nsa_jax, name) for name in nsa_jax.__all__ if ">>>" in (getattr(nsa_jax, name).__doc__ or "")]


def test_every_function_has_an_example():
    names = {documented.__name__ for documented in DOCUMENTED}
    assert names >= {"nsa_attention", "select_blocks", "mean_compress", "NativeSparseAttention"}


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda documented: documented.__name__)
def test_examples_run(documented):
    name = documented.__name__
    test = doctest.DocTestParser().get_doctest(documented.__doc__, {}, name, documented.__module__, 0)
    report = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert result.attempted > 0 and result.failed == 0, "".join(report)
