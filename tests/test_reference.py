"""The reference against loops in float64, and against worked examples of each rule of the design, numbered as there."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import KeyValue, NSAConfig, mean_compress, nsa_attention, reference, select_blocks
from nsa_jax.testing import CASES, Case, Inputs, make_inputs
from tests import oracle

TOLERANCE = 2e-5  # of the largest magnitude: float32 against float64

# Small enough to write every mask by hand. Compressed token i ends at 2i + 3, block j holds 4j .. 4j + 3.
TINY = NSAConfig(
    compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_initial=1, num_local=1, window=3
)
BRANCHES = ("compressed", "selected", "window")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Nearly all of the time here goes to compiling programs that run for a millisecond."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def jitted(function, static):
    return jax.jit(on_xla(function), static_argnames=("config", "scale", *static))


def on_xla(function):
    return functools.partial(function, implementation="xla")


def attend(query, **arguments):
    """`nsa_attention`, compiled; a start given as a Python int stays one."""
    starts = tuple(name for name in ("query_start", "window_start") if isinstance(arguments.get(name), int))
    return jitted(nsa_attention, starts)(query, **arguments)


def choose(query, compressed_key, **arguments):
    """`select_blocks`, compiled once for all values of `query_start`."""
    return jitted(select_blocks, ("num_keys",))(query, compressed_key, **arguments)


compress = jax.jit(mean_compress, static_argnames="config")


# Every case against the oracle.


class Solved(NamedTuple):
    """A case, and what the library makes of it."""

    case: Case
    inputs: Inputs
    run: Callable  # of the tensors and a cotangent: (blocks, out, gradients of the tensors)
    blocks: jax.Array
    out: jax.Array
    grads: tuple

    @property
    def tensors(self):
        return self.inputs[:5]

    @property
    def options(self):
        return {name: getattr(self.inputs, name) for name in ("query_start", "window_start", "segment_ids")}

    @property
    def block_options(self):
        return {
            "config": self.case.config,
            "num_keys": self.case.keys,
            "query_start": self.inputs.query_start,
            "segment_ids": self.inputs.segment_ids,
        }


def with_window(case, window):
    return dataclasses.replace(case, config=dataclasses.replace(case.config, window=window))


# For `long_text`, each with a config that no other test has.
LONG = {
    "chunked": with_window(CASES["segments_unaligned"], 21),
    "gathered": with_window(CASES["query_start_per_sequence"], 22),
    "gathered_segments": with_window(CASES["segments_unaligned"], 23),
}


@contextlib.contextmanager
def long_text(*, gathers):
    """What the reference does with long texts, on short ones: chunks of queries, and each query's blocks gathered.

    The library keeps what it has traced, so that a config is needed that was not traced before.
    """
    asked = []

    def reads_all(*sizes):
        asked.append(sizes)
        return not gathers

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "MAX_CHUNK", 16)  # does not divide the texts
        patch.setattr(reference, "_reads_all", reads_all)
        yield
    assert asked, "an earlier trace was used"


@pytest.fixture(scope="module", params=[*CASES, *LONG])
def solved(request):
    name = request.param
    if name in CASES:
        return solve(CASES[name])
    with long_text(gathers=name != "chunked"):
        return solve(LONG[name])


def solve(case):
    inputs = make_inputs(case, seed=0, dtype=jnp.float32)
    unsolved = Solved(case, inputs, *[None] * 4)

    @jax.jit
    def run(tensors, cotangent):
        def forward(*tensors):
            return apply(tensors, attend=on_xla(nsa_attention), config=case.config, **unsolved.options)

        query, compressed, *_ = tensors
        blocks = on_xla(select_blocks)(query, compressed.key, **unsolved.block_options)
        out, backward = jax.vjp(forward, *tensors)
        return blocks, out, backward(cotangent)

    return Solved(case, inputs, run, *run(unsolved.tensors, draw_cotangent(case, specified(case))))


def positions(case):
    """Where every query stands, [B, T]."""
    return np.broadcast_to(np.asarray(case.query_start), (case.batch,))[:, None] + np.arange(case.queries)


def specified(case):
    """Queries at positions up to the last key, [B, T]: past it, outputs need only be finite."""
    return positions(case) < case.keys


def draw_cotangent(case, rows):
    """Gaussian where `rows` [B, T], zero elsewhere."""
    shape = (case.batch, case.queries, case.heads, case.value_head_dim)
    draw = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return draw * rows[..., None, None]


def assert_close(actual, expected, name):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    error = np.max(np.abs(actual - expected), initial=0)
    largest = np.max(np.abs(expected), initial=0)
    assert error <= TOLERANCE * largest, f"{name}: off by {error:.1e} where the largest magnitude is {largest:.1e}"


def assert_same_choice(actual, expected, scores):
    """The same blocks in the same slots; where they differ, by blocks whose scores are closer than 1e-6."""
    assert actual.dtype == np.int32 and actual.shape == expected.shape
    for at in np.argwhere(np.any(actual != expected, axis=-1)):
        row, expected_row, score = actual[tuple(at)].tolist(), expected[tuple(at)].tolist(), scores[tuple(at)]
        chosen = [j for j in row if j >= 0]
        assert row == sorted(set(chosen)) + [-1] * (len(row) - len(chosen)), (
            f"{at}: {row} is not ascending with -1 last"
        )
        gained, lost = set(row) - set(expected_row), set(expected_row) - set(row)
        gap = [abs(score[i] - score[j]) for i in gained for j in lost]
        assert len(gained) == len(lost) and max(gap) < 1e-6, f"{at}: {row}, not {expected_row}"


def assert_same_bits(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_blocks_equal_the_oracle(solved):
    rows = specified(solved.case)
    arguments = solved.inputs.query, solved.inputs.compressed.key
    expected = oracle.select_blocks(*arguments, **solved.block_options)
    scores = oracle.importance(*arguments, **solved.block_options)
    assert_same_choice(np.asarray(solved.blocks)[rows], expected[rows], scores[rows])


def test_outputs_and_gradients_equal_the_oracle(solved):
    rows = specified(solved.case)
    arguments = {"config": solved.case.config, "selected_blocks": solved.blocks, **solved.options}
    expected = oracle.attention(*solved.tensors, **arguments)
    assert_close(np.asarray(solved.out)[rows], expected[rows], "out")

    expected = oracle.gradients(*solved.tensors, draw_cotangent(solved.case, rows), **arguments)
    assert_close(solved.grads[0], expected.query, "query")
    for branch, actual_pair, expected_pair in zip(BRANCHES, solved.grads[1:4], expected[1:4], strict=True):
        assert_close(actual_pair.key, expected_pair.key, f"{branch} key")
        assert_close(actual_pair.value, expected_pair.value, f"{branch} value")
    assert_close(solved.grads[4], expected.gates, "gates")


def test_outputs_and_gradients_are_finite(solved):
    """Also where a query stands past the last key, and where it sees nothing."""
    everywhere = np.ones((solved.case.batch, solved.case.queries), bool)
    _, out, grads = solved.run(solved.tensors, draw_cotangent(solved.case, everywhere))
    for array in jax.tree.leaves((out, grads)):
        assert np.all(np.isfinite(array))


def test_same_inputs_same_bits(solved):
    again = solved.run(solved.tensors, draw_cotangent(solved.case, specified(solved.case)))
    assert_same_bits(again, (solved.blocks, solved.out, solved.grads))


def test_future_changes_nothing(solved):
    """With all later tokens replaced, and compressed tokens that end later, earlier rows keep their bits."""
    case, inputs = solved.case, solved.inputs
    stands = positions(case)
    now = np.minimum((stands[:, 0] + stands[:, -1]) // 2, case.keys - 1)[:, None]  # the last position that is kept
    past = stands <= now
    last = np.arange(inputs.compressed.key.shape[1]) * case.config.compress_stride + case.config.compress_block - 1
    window_start = np.broadcast_to(np.asarray(inputs.window_start), (case.batch,))[:, None]
    token = window_start + np.arange(inputs.window.key.shape[1])
    kept = (
        past,
        KeyValue(*[last <= now] * 2),
        KeyValue(*[np.arange(case.keys) <= now] * 2),
        KeyValue(*[token <= now] * 2),
        past,
    )
    noise = np.random.default_rng(2)

    def replace(array, keep):
        return np.where(keep[..., None, None], array, noise.normal(size=array.shape).astype(np.float32))

    # Rows of the future have no say in the loss either, so that nothing may flow back into it.
    cotangent = draw_cotangent(case, past)
    blocks, out, grads = solved.run(solved.tensors, cotangent)
    new_blocks, new_out, new_grads = solved.run(jax.tree.map(replace, solved.tensors, kept), cotangent)
    np.testing.assert_array_equal(np.asarray(new_blocks)[past], np.asarray(blocks)[past])
    np.testing.assert_array_equal(np.asarray(new_out)[past], np.asarray(out)[past])
    for new_grad, grad, keep in zip(*map(jax.tree.leaves, (new_grads, grads, kept)), strict=True):
        np.testing.assert_array_equal(np.asarray(new_grad)[keep], np.asarray(grad)[keep])
        assert not np.any(np.asarray(new_grad)[~keep])


def test_oracle_gradients_by_finite_differences():
    inputs, cotangent = random_inputs(queries=7, keys=11, seed=3), np.random.default_rng(4).normal(size=(2, 7, 4, 3))
    arguments = {
        "config": TINY,
        "query_start": [4, 2],
        "segment_ids": [[0] * 6 + [1] * 5, [0] * 11],
        "selected_blocks": np.tile(np.array([0, 1, 2], np.int32), (2, 7, 2, 1)),
    }
    leaves, treedef = jax.tree.flatten(inputs)
    names = [str(i) for i in range(len(leaves))]

    def forward(**arrays):
        return oracle.attention(*jax.tree.unflatten(treedef, [arrays[name] for name in names]), **arguments)

    grads = jax.tree.leaves(tuple(oracle.gradients(*inputs, cotangent, **arguments)))
    draw = np.random.default_rng(5)
    for name, leaf, grad in zip(names, leaves, grads, strict=True):
        for _ in range(3):
            index = tuple(draw.integers(size) for size in leaf.shape)
            numeric = oracle.finite_difference(
                forward, dict(zip(names, leaves, strict=True)), cotangent, name=name, index=index
            )
            np.testing.assert_allclose(grad[index], numeric, rtol=1e-6, atol=1e-8)


# What a query reads, as a matrix: with keys of zero and values of the identity, the output is 1 / count where it reads.


def mask(text):
    """One line a query, one character a key: "1" is read, "." is not."""
    return np.array([[character == "1" for character in line] for line in text.split()])


class Reads(NamedTuple):
    """Which of its keys each query reads in each branch, [B, T, length]."""

    compressed: np.ndarray
    selected: np.ndarray
    window: np.ndarray


def reads(*, queries, keys=16, config=TINY, window_keys=None, batch=1, **arguments):
    """Three heads, of which head n reads branch n alone; asserts that all that a query reads weighs the same."""
    lengths = (config.num_compressed(keys), keys, window_keys or keys)
    pairs = [
        KeyValue(np.zeros((batch, length, 1, 2), np.float32), identity(length, max(lengths), batch))
        for length in lengths
    ]
    gates = np.tile(np.eye(3, dtype=np.float32), (batch, queries, 1, 1))
    out = apply((np.zeros((batch, queries, 3, 2), np.float32), *pairs, gates), config=config, **arguments)
    masks = []
    for n, length in enumerate(lengths):
        weights = np.asarray(out[:, :, n, :length])
        masks.append(weights > 0)
        count = masks[-1].sum(-1, keepdims=True)
        np.testing.assert_allclose(weights, masks[-1] / np.maximum(count, 1), rtol=1e-6)
    return Reads(*masks)


def identity(length, size, batch=1):
    """Values [B, length, 1, size] that show in the output how much each key weighs."""
    return np.tile(np.eye(length, size, dtype=np.float32)[:, None], (batch, 1, 1, 1))


def random_inputs(*, queries, keys, config=TINY, batch=2, value_size=3, seed=0, dtype=np.float32):
    """Query, compressed, selected, window and gates, Gaussian; N = 4, K = 2, H = 2."""
    draw = np.random.default_rng(seed)

    def gaussian(*shape):
        return draw.normal(size=shape).astype(dtype)

    def pair(length):
        return KeyValue(gaussian(batch, length, 2, 2), gaussian(batch, length, 2, value_size))

    gates = draw.uniform(size=(batch, queries, 4, 3)).astype(dtype)
    return gaussian(batch, queries, 4, 2), pair(config.num_compressed(keys)), pair(keys), pair(keys), gates


def apply(inputs, *, config=TINY, attend=attend, **arguments):
    query, compressed, selected, window, gates = inputs
    return attend(
        query, compressed=compressed, selected=selected, window=window, gates=gates, config=config, **arguments
    )


@functools.partial(jax.jit, static_argnames=("query_start", "config"))
def out_and_grads(inputs, blocks=None, query_start=0, config=TINY):
    """The output, and the gradients of its sum."""
    arguments = {"selected_blocks": blocks, "query_start": query_start, "config": config}
    out, backward = jax.vjp(lambda *inputs: apply(inputs, **arguments), *inputs)
    return out, backward(jnp.ones_like(out))


def constant_values(values, gates, *, heads=1):
    """Four tokens; the three branches hold one value each for every key/value head, `values` [3, K]."""
    values = np.asarray(values, np.float32)
    kv_heads = values.shape[1]
    branches = [
        KeyValue(np.zeros((1, length, kv_heads, 2), np.float32), np.tile(value[None, None, :, None], (1, length, 1, 1)))
        for length, value in zip((1, 4, 4), values, strict=True)
    ]
    gates = np.tile(np.array(gates, np.float32), (1, 4, heads, 1))
    return np.zeros((1, 4, heads, 2), np.float32), *branches, gates


# Rule 1.


def test_output_is_the_gated_sum_of_the_branches():
    out = apply(constant_values([[1], [10], [100]], gates=[0.5, 0.25, 1]))
    # The first compressed token ends at 3, so that queries 0 to 2 see none. The gates do not sum to 1, and need not.
    np.testing.assert_allclose(out[0, :, 0, 0], [102.5, 102.5, 102.5, 103], rtol=1e-6)


def test_query_head_reads_the_head_of_its_group():
    out = apply(constant_values([[0, 0], [5, 7], [0, 0]], gates=[0, 1, 0], heads=6))
    np.testing.assert_allclose(out[0, 3, :, 0], [5, 5, 5, 7, 7, 7], rtol=1e-6)


# Rule 2.


@pytest.mark.parametrize(
    ("keys", "means"),
    [(3, []), (4, [1.5]), (5, [1.5]), (6, [1.5, 3.5]), (9, [1.5, 3.5, 5.5]), (10, [1.5, 3.5, 5.5, 7.5])],
)
def test_compressed_token_stands_for_its_block(keys, means):
    """Token i is the mean of 2i .. 2i + 3; an incomplete block does not exist."""
    key = np.arange(keys, dtype=np.float32).reshape(1, keys, 1, 1) * np.array([[1], [-2]], np.float32)
    compressed = compress(key, config=TINY)
    assert compressed.shape == (1, len(means), 2, 1)
    np.testing.assert_array_equal(compressed[0, :, 0, 0], means)
    np.testing.assert_array_equal(compressed[0, :, 1, 0], [-2 * mean for mean in means])


@pytest.mark.parametrize("sizes", [(8, 4, 16), (16, 16, 16), (12, 3, 24)])
def test_mean_compress_equals_the_oracle(sizes):
    config = NSAConfig(*sizes)
    key = np.random.default_rng(15).normal(size=(2, 59, 3, 5)).astype(np.float32)
    assert_close(compress(key, config=config), oracle.mean_compress(key, config), "mean")


# Rule 3.

SEES_COMPRESSED = mask("""
    .......
    .......
    .......
    1......
    1......
    11.....
    11.....
    111....
    111....
    1111...
    1111...
    11111..
    11111..
    111111.
    111111.
    1111111
""")


def test_compressed_token_is_seen_once_its_last_token_is():
    np.testing.assert_array_equal(reads(queries=16).compressed[0], SEES_COMPRESSED)


def test_query_that_sees_no_compressed_token_gets_zero():
    """Queries 0 to 2. Their gradients are finite, and zero through that branch."""
    *inputs, gates = random_inputs(queries=24, keys=24)
    gates = np.zeros_like(gates)
    gates[:, :3, :, 0] = 1
    out, grads = out_and_grads((*inputs, gates))
    assert not np.any(out[:, :3])
    for grad in jax.tree.leaves(grads[:4]):
        assert not np.any(grad)
    assert not np.any(grads[4][:, :3, :, 0]) and np.all(np.isfinite(grads[4]))


# Rule 4. One free slot shows which of two blocks scores higher; with one head of size 1, keys are log-probabilities.


ONE = np.ones((1, 1, 1, 1), np.float32)


def log_probabilities(length, masses):
    """Compressed keys [1, C, 1, 1] whose softmax is in proportion to `masses`, and next to nothing elsewhere."""
    key = np.full(length, -30.0, np.float32)
    for i, mass in masses.items():
        key[i] = np.log(mass)
    return key.reshape(1, length, 1, 1)


@pytest.mark.parametrize(
    ("offset", "rival", "best"),
    [
        (-2, 0.10, 6),  # token 10 is in block 2 alone: nothing for block 3
        (-1, 0.45, 3),  # half of 1 ...
        (-1, 0.55, 6),
        (0, 0.90, 3),  # ... and half of 2
        (0, 1.10, 6),
        (1, 0.90, 3),
        (1, 1.10, 6),
        (2, 0.90, 3),
        (2, 1.10, 6),
        (3, 0.45, 3),
        (3, 0.55, 6),
        (4, 0.10, 4),  # token 16 is in block 4 alone
    ],
)
def test_importance_weighs_1_2_2_2_1(offset, rival, best):
    """Block j scores p[4j-1] + 2 p[4j] + 2 p[4j+1] + 2 p[4j+2] + p[4j+3], with the paper's 32, 16 and 64."""
    # Blocks 0, 1, 2 and 8 are forced. Token 12 + offset has mass 1, and token 25, of weight 2 in block 6, rivals it.
    config = NSAConfig(num_selected=5, num_initial=3, num_local=1)
    key = log_probabilities(config.num_compressed(576), {4 * 3 + offset: 1.0, 4 * 6 + 1: rival})
    blocks = choose(ONE, key, config=config, num_keys=576, scale=1.0, query_start=575)
    assert blocks.tolist() == [[[[0, 1, 2, best, 8]]]]


def test_importance_is_softmax_per_head_then_summed_over_the_group():
    """Head 0 prefers block 1, head 1 block 3, and both together block 2. Head 1's larger scores weigh no more."""
    key = np.full((1, 11, 1, 2), -30.0, np.float32)
    # Token 2j lies in block j alone; the keys of dimension n are the scores of head n.
    key[0, [2, 4], 0, 0] = np.log([0.6, 0.4])
    key[0, [6, 4], 0, 1] = np.log([0.6, 0.4]) + 20
    query = np.eye(2, dtype=np.float32)[None, None]
    arguments = {"config": TINY, "num_keys": 24, "scale": 1.0, "query_start": 23}
    assert choose(query, key, **arguments).tolist() == [[[[0, 2, 5]]]]
    assert choose(query[:, :, :1], key, **arguments).tolist() == [[[[0, 1, 5]]]]
    assert choose(query[:, :, 1:], key, **arguments).tolist() == [[[[0, 3, 5]]]]


# Rule 5.


def chosen(position, masses, *, keys=32, **changes):
    """The blocks of one query at `position`, whose compressed tokens hold `masses`; TINY with `changes`."""
    config = dataclasses.replace(TINY, **changes)
    key = log_probabilities(config.num_compressed(keys), masses)
    blocks = choose(ONE, key, config=config, num_keys=keys, scale=1.0, query_start=position)
    assert blocks.dtype == jnp.int32
    return blocks[0, 0, 0].tolist()


def test_forced_blocks_are_counted_inside_num_selected():
    # The best block is 3 (token 6 is its own), but the forced ones leave no slot, or one.
    assert chosen(31, {6: 1.0}, num_initial=1, num_local=2) == [0, 6, 7]
    assert chosen(31, {6: 1.0}, num_initial=2, num_local=1) == [0, 1, 7]
    assert chosen(31, {6: 1.0}, num_initial=1, num_local=1) == [0, 3, 7]
    assert chosen(31, {6: 1.0}, num_initial=1, num_local=2, num_selected=4) == [0, 3, 6, 7]
    # Also when a forced block is itself the best: it takes one slot.
    assert chosen(31, {14: 0.5, 6: 0.3, 4: 0.2}, num_selected=4) == [0, 2, 3, 7]


def test_last_candidate_is_the_block_of_the_query():
    # Position 15 is the last of block 3, position 16 the first of block 4.
    assert chosen(15, {0: 1.0}, num_initial=1, num_local=2) == [0, 2, 3]
    assert chosen(16, {0: 1.0}, num_initial=1, num_local=2) == [0, 3, 4]


def test_fewer_candidates_than_slots_are_all_taken_once():
    assert chosen(0, {}, num_selected=4) == [0, -1, -1, -1]
    assert chosen(7, {}, num_selected=4, num_initial=2, num_local=2) == [0, 1, -1, -1]
    assert chosen(11, {}, num_selected=4, num_initial=2, num_local=2) == [0, 1, 2, -1]
    assert chosen(15, {}, num_selected=4, num_initial=2, num_local=2) == [0, 1, 2, 3]


def test_there_are_num_selected_columns_when_there_are_fewer_blocks():
    assert chosen(7, {}, keys=8, num_selected=5) == [0, 1, -1, -1, -1]
    assert chosen(2, {}, keys=3, num_selected=5) == [0, -1, -1, -1, -1]  # nor any compressed token


def test_no_block_is_forced_where_the_config_forces_none():
    assert chosen(31, {6: 0.6, 2: 0.3, 10: 0.1}, num_initial=0, num_local=0) == [1, 3, 5]


def test_ties_go_to_the_lower_index():
    # Query 33 sees compressed tokens 0 to 15: 16 equal probabilities, exact in binary.
    config = dataclasses.replace(TINY, num_selected=5)
    blocks = choose(0 * ONE, np.zeros((1, 17, 1, 1), np.float32), config=config, num_keys=36, query_start=33)
    assert blocks.tolist() == [[[[0, 1, 2, 3, 8]]]]
    # All of the mass on block 5, none at all elsewhere: the other slots are tied at zero.
    key = np.full((1, 17, 1, 1), -1000, np.float32)
    key[0, 10] = 0
    blocks = choose(ONE, key, config=config, num_keys=36, scale=1.0, query_start=33)
    assert blocks.tolist() == [[[[0, 1, 2, 5, 8]]]]


def test_selection_has_no_gradient():
    *inputs, gates = random_inputs(queries=24, keys=24)
    inputs = (*inputs, np.zeros_like(gates) + np.array([0, 1, 0], np.float32))
    blocks = choose(inputs[0], inputs[1].key, config=TINY, num_keys=24)
    _, own = out_and_grads(inputs)
    _, given = out_and_grads(inputs, blocks)
    assert not np.any(own[1].key)
    assert_close(own[0], given[0], "query")


def test_blocks_given_by_the_caller():
    """In any order, of any number; a repeated one counts once; future and out-of-range ones read nothing."""
    blocks = [
        [0, 1, 2, 3, -1, -1],
        [2, -1, 0, 2, 0, -1],
        [1, 1, 1, 1, 1, 1],
        [3, 2, 7, 4, 99, -5],
        [0, 2**31 - 1, -(2**31), 0, 1, 2],
        [-1, -1, -1, -1, -1, -1],
    ]
    # The queries stand at 5 .. 10.
    expected = mask("""
        111111......
        1111........
        ....1111....
        ........1...
        1111111111..
        ............
    """)
    blocks = np.array(blocks, np.int32).reshape(1, 6, 1, 6)
    read = reads(queries=6, keys=12, selected_blocks=blocks, query_start=5)
    np.testing.assert_array_equal(read.selected[0], expected)


@pytest.mark.parametrize("gathers", [False, True])
def test_blocks_given_by_the_caller_equal_the_oracle(gathers):
    """Under a mask, and gathered for each query."""
    inputs = random_inputs(queries=17, keys=21, seed=6)
    blocks = np.random.default_rng(7).integers(-2, 7, size=(2, 17, 2, 7)).astype(np.int32)
    config = dataclasses.replace(TINY, window=5 if gathers else 4)
    with long_text(gathers=gathers):
        out, grads = out_and_grads(inputs, blocks, query_start=3, config=config)
    arguments = {"config": config, "selected_blocks": blocks, "query_start": 3}
    assert_close(out, oracle.attention(*inputs, **arguments), "out")
    expected = oracle.gradients(*inputs, np.ones(out.shape), **arguments)
    for actual, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(tuple(expected)), strict=True):
        assert_close(actual, wanted, "gradient")


# Rule 6.


def test_selected_tokens_share_one_softmax():
    """Query 9 reads 0 .. 3 and 8, 9; token s has weight s + 1, so that they sum to 1 + 2 + 3 + 4 + 9 + 10 = 29."""
    key = np.log(np.arange(1, 13, dtype=np.float32)).reshape(1, 12, 1, 1)
    pair = KeyValue(key, identity(12, 12))
    compressed = KeyValue(key[:, :5], pair.value[:, :5])
    gates = np.array([0, 1, 0], np.float32).reshape(1, 1, 1, 3)
    blocks = np.array([0, 2, -1], np.int32).reshape(1, 1, 1, 3)
    out = apply((ONE, compressed, pair, pair, gates), query_start=9, selected_blocks=blocks)
    expected = np.array([1, 2, 3, 4, 0, 0, 0, 0, 9, 10, 0, 0]) / 29
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("scale", "ratio"), [(None, 3), (1.0, 9)])
def test_scale_is_one_over_the_root_of_the_head_size(scale, ratio):
    """H = 4: a score of 2 log 3 is log 3 by default, so that token 1 weighs 3 times as much as token 0."""
    key = np.zeros((2, 6, 1, 4), np.float32)
    key[:, 1, 0, 0] = np.log(3)
    query = np.zeros((2, 1, 3, 4), np.float32)
    query[..., 0] = 2
    pair = KeyValue(key, identity(6, 6, batch=2))
    compressed = KeyValue(key[:, :2], pair.value[:, :2])
    gates = np.tile(np.eye(3, dtype=np.float32), (2, 1, 1, 1))
    # Position 5 sees compressed tokens 0 and 1; position 1 sees tokens 0 and 1 in the other branches.
    start, blocks = np.array([5, 1], np.int32), np.zeros((2, 1, 1, 1), np.int32)
    out = apply((query, compressed, pair, pair, gates), scale=scale, query_start=start, selected_blocks=blocks)
    for weights in (out[0, 0, 0], out[1, 0, 1], out[1, 0, 2]):
        np.testing.assert_allclose(weights[:2], [1 / (1 + ratio), ratio / (1 + ratio)], rtol=1e-6)


# Rule 7.

IN_WINDOW = mask("""
    1.......
    11......
    111.....
    .111....
    ..111...
    ...111..
    ....111.
    .....111
""")


def test_window_is_the_query_and_the_two_before():
    """window=3: query 5 sees 3, 4 and 5."""
    np.testing.assert_array_equal(reads(queries=8, keys=8).window[0], IN_WINDOW)


# Rule 8.


@pytest.mark.parametrize("kind", ["int", "scalar", "rows"])
def test_query_row_stands_at_query_start_plus_row(kind):
    """Three queries at 4, 5, 6; with a start for each sequence, those of the second stand at 0, 1, 2."""
    start = {"int": 4, "scalar": np.int32(4), "rows": np.array([4, 0], np.int32)}[kind]
    stands = np.array([[4, 5, 6], [0, 1, 2] if kind == "rows" else [4, 5, 6]])
    read = reads(queries=3, keys=8, batch=2, query_start=start)
    np.testing.assert_array_equal(read.window, IN_WINDOW[stands])
    np.testing.assert_array_equal(read.compressed, SEES_COMPRESSED[stands, :3])
    np.testing.assert_array_equal(read.selected, np.tri(8, dtype=bool)[stands])


@pytest.mark.parametrize("kind", ["int", "scalar", "rows"])
def test_window_start_is_the_position_of_the_first_window_key(kind):
    """Four queries at 0 .. 3, six window keys at -2 .. 3, of which the first two are never read."""
    start = {"int": -2, "scalar": np.int32(-2), "rows": np.array([-2, 0], np.int32)}[kind]
    negative = mask("""
        ..1...
        ..11..
        ..111.
        ...111
    """)
    zero = mask("""
        1.....
        11....
        111...
        .111..
    """)
    read = reads(queries=4, keys=8, window_keys=6, batch=2, window_start=start)
    np.testing.assert_array_equal(read.window, [negative, zero if kind == "rows" else negative])


def test_window_start_above_zero_and_segments_at_positions():
    """Queries at 5, 6, 7 and window keys at 3 .. 7; with a segment from 6 on, the key at 5 is another's to 6 and 7."""
    arguments = {"queries": 3, "keys": 8, "window_keys": 5, "query_start": 5, "window_start": 3}
    alone = mask("""
        111..
        .111.
        ..111
    """)
    packed = mask("""
        111..
        ...1.
        ...11
    """)
    segment_ids = np.array([[0] * 6 + [1] * 2], np.int32)
    np.testing.assert_array_equal(reads(**arguments).window[0], alone)
    np.testing.assert_array_equal(reads(**arguments, segment_ids=segment_ids).window[0], packed)


def test_negative_positions_are_never_read():
    """Window keys and values of NaN at -2 and -1 reach neither outputs nor gradients."""
    query, compressed, selected, window, gates = random_inputs(queries=4, keys=4)

    def precede(filler):
        return KeyValue(*(np.concatenate([np.full_like(array[:, :2], filler), array], axis=1) for array in window))

    padded, unread = precede(0), precede(np.nan)

    @jax.jit
    def run(window):
        out, backward = jax.vjp(
            lambda *inputs: apply(inputs, window_start=-2), query, compressed, selected, window, gates
        )
        return out, backward(jnp.ones_like(out))

    out, grads = run(unread)
    assert_same_bits((out, grads), run(padded))
    assert np.all(np.isfinite(out))
    assert not np.any(grads[3].key[:, :2]) and not np.any(grads[3].value[:, :2])


def test_outputs_past_the_last_key_are_finite():
    """Five keys, queries at 3 .. 8: the last four stand where there is neither key nor block."""
    inputs = random_inputs(queries=6, keys=5)
    out, grads = out_and_grads(inputs, query_start=3)
    for array in jax.tree.leaves((out, grads)):
        assert np.all(np.isfinite(array))
    assert_close(out[:, :2], oracle.attention(*inputs, config=TINY, query_start=3)[:, :2], "out")


# Rule 9. Two documents of 6 and 10 tokens: the second begins in the middle of block 1 and of compressed token 2.

PACKED = np.array([[2] * 6 + [5] * 10], np.int32)


def test_packed_tokens_see_their_own_segment():
    window = mask("""
        1...............
        11..............
        111.............
        .111............
        ..111...........
        ...111..........
        ......1.........
        ......11........
        ......111.......
        .......111......
        ........111.....
        .........111....
        ..........111...
        ...........111..
        ............111.
        .............111
    """)
    # Token 2 (4 .. 7) has its first token in one document and its last in the other.
    compressed = mask("""
        .......
        .......
        .......
        1......
        1......
        11.....
        .......
        .......
        .......
        ...1...
        ...1...
        ...11..
        ...11..
        ...111.
        ...111.
        ...1111
    """)
    read = reads(queries=16, segment_ids=PACKED)
    np.testing.assert_array_equal(read.window[0], window)
    np.testing.assert_array_equal(read.compressed[0], compressed)


def test_packed_candidates_start_at_the_block_of_the_first_token():
    """One initial and one local block: 0 and the query's own; then 1, where the document begins, and the own one."""
    config = dataclasses.replace(TINY, num_selected=2)
    blocks = choose(
        np.zeros((1, 16, 1, 1), np.float32),
        np.zeros((1, 7, 1, 1), np.float32),
        config=config,
        num_keys=16,
        segment_ids=PACKED,
    )
    expected = [[0, -1]] * 4 + [[0, 1]] * 2 + [[1, -1]] * 2 + [[1, 2]] * 4 + [[1, 3]] * 4
    assert blocks[0, :, 0].tolist() == expected
    selected = mask("""
        1...............
        11..............
        111.............
        1111............
        11111...........
        111111..........
        ......1.........
        ......11........
        ......111.......
        ......1111......
        ......11111.....
        ......111111....
        ......11....1...
        ......11....11..
        ......11....111.
        ......11....1111
    """)
    np.testing.assert_array_equal(reads(queries=16, config=config, segment_ids=PACKED).selected[0], selected)


def test_packed_importance_ignores_other_segments():
    """All of the mass on tokens of the first document and on the shared one is nothing to the second."""
    segment_ids = np.array([[0] * 6 + [1] * 18], np.int32)
    # Token 8 (block 4) is the best of the second document; token 2 is shared between both.
    key = log_probabilities(11, {1: 1.0, 2: 1.0, 8: 1e-6})
    blocks = choose(ONE, key, config=TINY, num_keys=24, scale=1.0, query_start=23, segment_ids=segment_ids)
    assert blocks.tolist() == [[[[1, 4, 5]]]]


def test_packed_equals_separate():
    """Two documents of 16 tokens: with more candidates than slots, and a second one that starts on a multiple of 4."""
    query, _, *rest = random_inputs(queries=32, keys=32, batch=1)
    segment_ids = np.repeat([[0, 1]], 16, axis=1).astype(np.int32)

    @jax.jit
    def solve(query, selected, window, gates, segment_ids):
        compressed = KeyValue(*(mean_compress(array, config=TINY) for array in selected))
        arguments = {"config": TINY, "num_keys": query.shape[1], "segment_ids": segment_ids}
        blocks = choose(query, compressed.key, **arguments)
        return apply((query, compressed, selected, window, gates), segment_ids=segment_ids), blocks

    out, blocks = solve(query, *rest, segment_ids)
    for start in (0, 16):
        document = slice(start, start + 16)
        own_out, own_blocks = solve(*jax.tree.map(lambda array: array[:, document], (query, *rest)), None)  # noqa: B023
        assert_close(out[:, document], own_out, f"document at {start}")
        moved = np.where(np.asarray(own_blocks) >= 0, own_blocks + start // TINY.select_block, -1)
        np.testing.assert_array_equal(blocks[:, document], moved)


# Rule 11.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_rounds_once(dtype):
    """Against float32 from the same inputs: the result, and each gradient, is off by half a unit in its last place."""
    query, *rest = random_inputs(queries=24, keys=24, dtype=dtype, seed=9)
    inputs = (4 * query, *rest)  # larger scores, which rounding would spoil
    wide = jax.tree.map(lambda array: array.astype(np.float32), inputs)
    blocks = choose(wide[0], wide[1].key, config=TINY, num_keys=24)
    (out, grads), (wide_out, wide_grads) = out_and_grads(inputs, blocks), out_and_grads(wide, blocks)

    half_ulp = float(jnp.finfo(dtype).eps) / 2
    assert out.dtype == dtype
    np.testing.assert_array_less(np.abs(np.float32(out) - wide_out), half_ulp * np.abs(wide_out) + 2e-6)
    for array, grad, wide_grad in zip(*map(jax.tree.leaves, (inputs, grads, wide_grads)), strict=True):
        assert grad.dtype == array.dtype
        # The cotangent is a rounded output's: one rounding more than the gradient's own.
        assert np.max(np.abs(np.float32(grad) - wide_grad)) <= 2 * half_ulp * np.max(np.abs(wide_grad))
    # The scores of blocks are in float32 throughout.
    assert_same_choice(
        np.asarray(choose(inputs[0], inputs[1].key, config=TINY, num_keys=24)),
        np.asarray(blocks),
        oracle.importance(wide[0], wide[1].key, config=TINY, num_keys=24),
    )


def test_gates_may_be_float32():
    """Beside float16 inputs: 0.5 + 2**-12, which float16 would round to 0.5, is not rounded; the output is."""
    *rest, gates = constant_values([[0], [1024], [-1024]], gates=[0, 0.5 + 2**-12, 0.5])
    out = apply((*jax.tree.map(np.float16, rest), gates))
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out[0, :2, 0, 0], [0.25, 0.25])  # of one token, and of two at half weight


def test_scores_of_float16_do_not_overflow():
    """Scores of 4 * 200 * 200 / 2 = 80000 are above the largest float16; the key of the query's sign takes all."""
    key = np.full((1, 4, 1, 4), -200, np.float16)
    key[0, 1] = 200
    pair = KeyValue(key, identity(4, 4).astype(np.float16))
    compressed = KeyValue(key[:, 1:2], pair.value[:, 1:2])
    query, gates = np.full((1, 1, 3, 4), 200, np.float16), np.eye(3, dtype=np.float16)[None, None]
    out = apply((query, compressed, pair, pair, gates), query_start=3)
    np.testing.assert_array_equal(out[0, 0], np.eye(4)[[1, 1, 1]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_mean_compress_keeps_the_dtype(dtype):
    key = np.random.default_rng(10).normal(size=(1, 12, 2, 3)).astype(dtype)
    mean = compress(key, config=TINY)
    expected = oracle.mean_compress(key, TINY)
    assert mean.dtype == dtype
    tolerance = float(jnp.finfo(dtype).eps) / 2 * np.abs(expected) + 1e-6
    np.testing.assert_array_less(np.abs(np.float32(mean) - expected), tolerance)


def test_every_dot_of_float32_is_at_the_highest_precision():
    def loss(*inputs):
        return jnp.sum(apply(inputs))

    inputs = random_inputs(queries=24, keys=24)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(5))))(*inputs)
    dots = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(dots) >= 3 * (2 + 4)  # q k and p v of three branches, and for each two in the backward pass
    for dot in dots:
        assert dot.params["precision"] in (jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2), dot


def equations(jaxpr):
    """All equations of a jaxpr, those of the jaxprs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# Composition: the same numbers inside jit, vmap, checkpoint and scan.


@functools.cache
def layers():
    """Two problems of one shape, in which an output can be the next one's query (V = H), stacked on a leading axis."""
    problems = [random_inputs(queries=24, keys=24, value_size=2, seed=seed) for seed in (11, 12)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *problems)


def layer(index):
    return jax.tree.map(lambda array: array[index], layers())


def loss(inputs):
    out = apply(inputs)
    return jnp.sum(out * jnp.arange(1, out.shape[1] + 1)[None, :, None, None] / out.shape[1])


value_and_grad = jax.jit(jax.value_and_grad(loss))


def assert_trees_close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, "leaf")


def test_jit_changes_nothing():
    eager = apply(jax.tree.map(jnp.asarray, layer(0)), attend=on_xla(nsa_attention))
    assert_close(eager, apply(layer(0)), "out")


def test_vmap():
    actual = jax.jit(jax.vmap(jax.value_and_grad(loss)))(layers())
    expected = [value_and_grad(layer(i)) for i in range(2)]
    assert_trees_close(actual, jax.tree.map(lambda *arrays: np.stack(arrays), *expected))


def test_grad_of_vmap():
    actual = jax.jit(jax.grad(lambda inputs: jnp.sum(jax.vmap(loss)(inputs))))(layers())
    expected = [value_and_grad(layer(i))[1] for i in range(2)]
    assert_trees_close(actual, jax.tree.map(lambda *arrays: np.stack(arrays), *expected))


def test_vmap_over_sequences_with_their_own_positions():
    """A batch with a start for each sequence is `vmap` of one sequence with a traced scalar start."""
    inputs = random_inputs(queries=5, keys=16, seed=14)
    start = np.array([11, 2], np.int32)
    segment_ids = np.array([[0] * 6 + [1] * 10, [0] * 16], np.int32)

    @jax.jit
    @jax.vmap
    def one_by_one(inputs, query_start, segment_ids):
        inputs = jax.tree.map(lambda array: array[None], inputs)
        return apply(inputs, query_start=query_start, segment_ids=segment_ids[None])[0]

    assert_close(
        one_by_one(inputs, start, segment_ids), apply(inputs, query_start=start, segment_ids=segment_ids), "out"
    )


def test_checkpoint_gives_the_same_gradients():
    assert_trees_close(jax.jit(jax.grad(jax.checkpoint(loss)))(layer(0)), value_and_grad(layer(0))[1])


def test_scan_over_checkpointed_layers():
    """The output of a layer is the query of the next."""

    def step(query, rest):
        return apply((query, *rest)), None

    def scanned(query, rest):
        return jnp.sum(jax.lax.scan(jax.checkpoint(step), query, rest)[0] ** 2)

    def unrolled(query, rest):
        for i in range(2):
            query, _ = step(query, jax.tree.map(lambda array: array[i], rest))  # noqa: B023
        return jnp.sum(query**2)

    query, *rest = layers()
    actual = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(query[0], rest)
    assert_trees_close(actual, jax.value_and_grad(unrolled, argnums=(0, 1))(query[0], rest))


# Memory: compiled, never run.


def peak_memory(length):
    """Temporary bytes of a forward and a backward pass over `length` tokens with the paper's config."""
    config = NSAConfig()

    def array(length, heads, size=64):
        return jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)

    def pair(length):
        return KeyValue(array(length, 2), array(length, 2))

    def loss(*inputs):
        return jnp.sum(apply(inputs, config=config) ** 2)

    inputs = (array(length, 8), pair(config.num_compressed(length)), pair(length), pair(length), array(length, 8, 3))
    analysis = jax.jit(jax.grad(loss, argnums=tuple(range(5)))).lower(*inputs).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_its_square():
    assert peak_memory(8192) <= 4.5 * peak_memory(2048)
    assert peak_memory(32768) < 2**30
