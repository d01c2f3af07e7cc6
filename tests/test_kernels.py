"""The kernels, interpreted on a CPU, with small tiles: against loops in float64, and against worked examples.

The time here goes to compiling interpreted kernels, seven seconds for a case with gradients. So a case is one program, of which
one test asks all it can, and a case whose gradients are formed as another's has none here (`FORWARD_ONLY`).
"""

import dataclasses
import functools
import importlib
import itertools
import json
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import print_saved_residuals

import pallas_kernels
from nsa_jax import NSAConfig, nsa_attention, ops, reference, save_attention
from nsa_jax.ops import Implementation
from nsa_jax.testing import CASES, SMALL, Case, Inputs, assert_as_accurate, assert_best_blocks, make_inputs
from pallas_kernels import block_selection, flash, inverse_lists, range_attention, support, tiles
from pallas_kernels.block_selection import outside_units, select
from pallas_kernels.flash import Ranges, Tile, head_parts, over_tiles
from pallas_kernels.inverse_lists import Lists, cut, invert
from pallas_kernels.positions import (
    BlockRanges,
    Positions,
    candidate_blocks,
    compressed_ranges,
    forced_ranges,
    positions,
    token_ranges,
    window_ranges,
)
from pallas_kernels.range_attention import deltas
from pallas_kernels.selected_by_block import goes_by_block
from tests import oracle
from tests.posed import Solution, assert_solves, pose, read_keys, with_nan
from tests.programs import QUICK

pytestmark = pytest.mark.usefixtures("quick_compilation")

attention = importlib.import_module("pallas_kernels.attention")

# No two alike where kernels could mistake one for another.
SIZES = dict(
    window_forward=(32, 16),
    window_dkv=(32, 16),
    compressed_forward=(32, 16),
    range_dq=(16, 32),
    compressed_dkv=(16, 16),
    selected_forced=(32, 16),
    scores=(32, 16),
    choice=(4, 0),
)


def kernels_of(*, by_block: bool, selected_rows: int = 16) -> Implementation:
    """Small tiles; the selected branch by query or by block."""
    rule = tiles.rule("float32", 16, 16, 1)
    small = {name: Tile(rows, keys, 4, 2) for name, (rows, keys) in SIZES.items()}
    selected = {
        name: tile._replace(rows=min(selected_rows, tile.rows))
        for name, tile in vars(rule).items()
        if name[:8] == "selected"
    }
    if not by_block:
        # Then dk and dv learn ahead which rows come next.
        selected["selected_dkv"] = selected["selected_dkv"]._replace(stages=3)
    options = dict(tiles=dataclasses.replace(rule, **(selected | small), by_block=by_block), interpret=True)
    return Implementation(
        *(functools.partial(getattr(pallas_kernels, name), **options) for name in Implementation._fields)
    )


BY_QUERY, BY_BLOCK = kernels_of(by_block=False), kernels_of(by_block=True)
ONE_QUERY = kernels_of(by_block=False, selected_rows=1)
REFERENCE = Implementation(reference.select_blocks, reference.attend, None)


@pytest.fixture
def cut_small(monkeypatch):
    """What is cut into chunks and pieces at lengths of thousands is cut at 70 tokens; a piece is at least a block long."""

    def cut_small(config: NSAConfig) -> None:
        monkeypatch.setattr(block_selection, "MAX_SCRATCH", 4096)
        monkeypatch.setattr(inverse_lists, "PIECE", config.select_block)

    return cut_small


def program(case: Case, implementation: Implementation, *, gradients: bool = True) -> Callable[..., Solution]:
    """Attention to the given blocks (inputs, blocks, cotangent), compiled; each call of this function traces anew."""

    def run(inputs, blocks, cotangent):
        where = dict(config=case.config, scale=case.head_dim**-0.5)
        where.update(query_start=inputs.query_start, segment_ids=inputs.segment_ids)
        own = implementation.select_blocks(inputs.query, inputs.compressed.key, num_keys=case.keys, **where)

        def attend(*tensors):
            return implementation.attend(*tensors, blocks, window_start=inputs.window_start, **where)

        if not gradients:
            return Solution(attend(*inputs[:5]), (), own)
        out, backward = jax.vjp(attend, *inputs[:5])
        return Solution(out, backward(cotangent), own)

    return jax.jit(run, compiler_options=QUICK)


# Every case.

# Their backward pass is that of "plain", "window_start", "segments_unaligned" or another case; all have theirs on a GPU.
FORWARD_ONLY = {
    "one_token",
    "exactly_compress_block",
    "one_past_select_block",
    "more_slots_than_blocks",
    "head_sizes_differ",  # has it in float16
    "no_overlap",
    "nothing_forced",
    "first_forced",
    "many_forced",
    "window_1",
    "window_longer_than_text",
    "query_start",
    "query_start_per_sequence",
    "segments_aligned",
    "deep_overlap",
    "long_block",
    "one_query_late",
}
# Of the two ways through the selected branch, by query and by block, each meets what it treats in its own way.
GO_BY_BLOCK = {
    "plain",
    "one_token",
    "shorter_than_compress_block",
    "odd_length",
    "group_1",
    "group_5",
    "group_16",
    "segments_unaligned",
    "one_query_late",
    "nothing_forced",
    "window_1",
}
RUNS = [(name, "float32", name in GO_BY_BLOCK) for name in CASES]
RUNS += [("segments_and_start", "bfloat16", True), ("head_sizes_differ", "float16", False)]


@pytest.mark.parametrize(
    ("name", "dtype", "by_block"), RUNS, ids=[f"{n}-{d}-{'by_block' if b else 'by_query'}" for n, d, b in RUNS]
)
def test_kernels_are_as_accurate_as_the_reference(name, dtype, by_block, cut_small):
    """And they read nothing that they may not: with NaN in it, every result keeps its bits."""
    cut_small(CASES[name].config)
    problem, gradients = pose(CASES[name], dtype), name not in FORWARD_ONLY or dtype != "float32"
    run = program(problem.case, BY_BLOCK if by_block else BY_QUERY, gradients=gradients)
    actual = run(*problem.arguments)
    reference = None
    if dtype != "float32":
        reference = program(problem.case, REFERENCE, gradients=gradients)(*problem.arguments)
    assert_solves(actual, problem, reference)

    unread = [~mask for mask in read_keys(problem)]
    inputs, *others = problem.arguments
    poisoned = run(with_nan(inputs, unread), *others)
    for got, want in zip(jax.tree.leaves(poisoned), jax.tree.leaves(actual), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    for mask, pair in zip(unread, actual.gradients[1:4], strict=False):
        assert not np.any(np.asarray(pair.key)[mask]) and not np.any(np.asarray(pair.value)[mask])


FORCED = (
    *("plain", "more_slots_than_blocks", "group_5", "nothing_forced", "first_forced", "many_forced"),
    *("segments_aligned", "segments_unaligned", "query_start_per_sequence"),
)
FORCED_FOR_SEVERAL = ("segments_unaligned", "many_forced", "query_start_per_sequence")
FORCED_BY_BLOCK = ("group_5", "more_slots_than_blocks", "segments_aligned")


@pytest.mark.parametrize("name", FORCED)
def test_forced_blocks_are_read_apart(name, cut_small):
    """Where the kernels chose the blocks; a program reads the others for one query, for a few at once, or by block."""
    cut_small(CASES[name].config)
    problem = pose(CASES[name])
    inputs, _, cotangent = problem.arguments
    implementation = BY_QUERY if name in FORCED_FOR_SEVERAL else BY_BLOCK if name in FORCED_BY_BLOCK else ONE_QUERY
    run = program(problem.case, implementation, gradients=False)  # of these tests/test_kernel_edges.py has some
    assert ("nsa_selected_forced" in str(run.trace(inputs, None, cotangent).jaxpr)) == (name != "nothing_forced")
    assert_solves(run(inputs, None, cotangent), problem)
    unread = [~mask for mask in read_keys(problem)]
    poisoned = run(with_nan(inputs, unread), None, cotangent)
    assert_solves(poisoned, problem)


@pytest.mark.parametrize("implementation", [BY_QUERY, BY_BLOCK], ids=["by_query", "by_block"])
def test_most_keys_are_not_read(implementation, cut_small):
    """Past the last query, before every window, in blocks that no query was given: all hold NaN."""
    cut_small(SMALL)
    problem = pose(dataclasses.replace(CASES["query_start"], query_start=50))
    case, inputs = problem.case, problem.inputs
    blocks = np.broadcast_to(np.array([1, 3, -1, -1], np.int32), problem.exact.blocks.shape)
    problem = problem._replace(exact=problem.exact._replace(blocks=blocks))
    read = read_keys(problem)
    assert [mask.sum(axis=1)[0, 0] for mask in read] == [18, 32, 48]  # of 21, 90, 90
    out = program(case, implementation, gradients=False)(with_nan(inputs, [~mask for mask in read]), blocks, None).out
    exact = oracle.attention(*inputs[:5], config=case.config, query_start=50, selected_blocks=blocks)
    assert_as_accurate(out, jnp.asarray(exact, jnp.float32), exact)


# Planted faults: each must be seen by the comparison above.


def longer_window(*arguments, **sizes):
    low, high = window_ranges(*arguments, **sizes)
    return Ranges(jnp.maximum(low - 1, 0), high)


def early_compressed_token(where, *, config):
    return compressed_ranges(where._replace(last=where.last + 1), config=config)


def token_too_many(where):
    return Ranges(where.first, where.last + 2)


def segment_without_its_first_token(*arguments, **sizes):
    where = positions(*arguments, **sizes)
    return where._replace(first=where.first + (where.first > 0))


FAULTS = {
    "window_ranges": (window_ranges, longer_window),
    "compressed_ranges": (compressed_ranges, early_compressed_token),
    "token_ranges": (token_ranges, token_too_many),
    "positions": (positions, segment_without_its_first_token),
}


def test_planted_faults_are_found(monkeypatch):
    """One program for all: `fault` is traced, and chooses among right and wrong arrays of positions."""
    problem = pose(CASES["segments_unaligned"])
    inputs, blocks, _ = problem.arguments
    faults = [None]

    def faulty(index, right, wrong):
        def function(*arguments, **sizes):
            pairs = right(*arguments, **sizes), wrong(*arguments, **sizes)
            return jax.tree.map(lambda right, wrong: jnp.where(faults[0] == index, wrong, right), *pairs)

        return function

    for index, (name, functions) in enumerate(FAULTS.items()):
        monkeypatch.setattr(attention, name, faulty(index, *functions))
    run = program(problem.case, BY_QUERY, gradients=False).__wrapped__

    def run_with(inputs, blocks, fault):
        faults[0] = fault
        return run(inputs, blocks, None)

    run_with = jax.jit(run_with, compiler_options=QUICK)
    assert_solves(run_with(inputs, blocks, -1), problem)
    for index, name in enumerate(FAULTS):
        actual = run_with(inputs, blocks, index)
        with pytest.raises(AssertionError, match=r"\[0\]: error"):
            assert_solves(actual, problem)
            pytest.fail(f"{name}: not found")
    last = blocks == blocks.max(axis=-1, keepdims=True)
    dropped = run_with(inputs, np.where(last, -1, blocks), -1)
    with pytest.raises(AssertionError, match=r"\[0\]: error"):
        assert_solves(dropped, problem)


def unmasked_edges(first, inner, outer, last, step, state):
    return over_tiles(first, inner - 1, outer + 1, last, step, state)


def no_deltas(dout, outs):
    return tuple(jnp.zeros_like(delta) for delta in deltas(dout, outs))


KERNEL_FAULTS = [
    (flash, "over_tiles", unmasked_edges, "odd_length", 0),
    (range_attention, "deltas", no_deltas, "shorter_than_compress_block", 1),
]


@pytest.mark.parametrize(("module", "name", "wrong", "case", "where"), KERNEL_FAULTS, ids=[x[1] for x in KERNEL_FAULTS])
def test_planted_faults_in_kernels_are_found(module, name, wrong, case, where, monkeypatch):
    """In the output, or in gradients alone."""
    problem = pose(CASES[case])
    monkeypatch.setattr(module, name, wrong)
    actual = program(problem.case, BY_BLOCK, gradients=where == 1)(*problem.arguments)
    with pytest.raises(AssertionError, match=rf"\[{where}\].*: error"):
        assert_solves(actual, problem)


# The choice of blocks.


def choose(case: Case, inputs: Inputs) -> jax.Array:
    where = dict(query_start=inputs.query_start, segment_ids=inputs.segment_ids, scale=case.head_dim**-0.5)
    choose = functools.partial(BY_QUERY.select_blocks, config=case.config, num_keys=case.keys)
    return jax.jit(lambda inputs: choose(inputs.query, inputs.compressed.key, **where), compiler_options=QUICK)(inputs)


@pytest.mark.parametrize(
    "config",
    [
        NSAConfig(32, 16, 48, 5, 1, 1),
        NSAConfig(4, 1, 16, 3, 1, 1),
        NSAConfig(16, 4, 40, 3, 1, 1),
        NSAConfig(9, 3, 27, 4, 1, 1),  # whose units are too many to unroll
    ],
    ids=str,
)
def test_choice_with_blocks_of_3_16_10_and_9_units(config, cut_small):
    cut_small(config)
    case = Case(config=config, queries=50, keys=260, query_start=210)
    inputs = make_inputs(case)
    wanted = oracle.select_blocks(inputs.query, inputs.compressed.key, config=config, num_keys=260, query_start=210)
    np.testing.assert_array_equal(choose(case, inputs), wanted)


@pytest.mark.parametrize("name", ["odd_length", "segments_unaligned"])
def test_choice_in_rows_as_long_as_they_need(name, cut_small, monkeypatch):
    cut_small(SMALL)
    monkeypatch.setattr(block_selection, "NARROWEST", 2)
    case, inputs = CASES[name], make_inputs(CASES[name])
    where = dict(config=case.config, num_keys=case.keys, segment_ids=inputs.segment_ids)
    wanted = oracle.select_blocks(inputs.query, inputs.compressed.key, **where)
    np.testing.assert_array_equal(choose(case, inputs), wanted)


def unweighted(*arguments, config, **sizes):
    return select(*arguments, config=dataclasses.replace(config, compress_block=config.compress_stride), **sizes)


def one_unit_too_few(place, units, shared):
    return jnp.maximum(outside_units(place, units, shared) - 1, 0)


@pytest.mark.parametrize(("name", "wrong"), [("select", unweighted), ("outside_units", one_unit_too_few)])
def test_wrong_weights_are_found(name, wrong, monkeypatch):
    """Each compressed token counted for one block alone, once; or the next block given one unit less."""
    case = Case(queries=20, keys=200, query_start=180)
    inputs = make_inputs(case)
    arguments = dict(config=case.config, num_keys=case.keys, query_start=case.query_start)
    wanted = oracle.select_blocks(inputs.query, inputs.compressed.key, **arguments)
    scores = oracle.importance(inputs.query, inputs.compressed.key, **arguments)
    assert_best_blocks(choose(case, inputs), wanted, scores)
    monkeypatch.setattr(block_selection, name, wrong)
    with pytest.raises(AssertionError, match="blocks at .* score"):
        assert_best_blocks(choose(case, inputs), wanted, scores)


def test_ties_go_to_the_lower_index():
    """In each row all scores but the forced blocks' are tied: 0 and the last two are forced, the fourth is block 1."""
    case = Case(config=SMALL, queries=5, keys=200, query_start=195)
    inputs = make_inputs(case)
    tied = inputs._replace(compressed=jax.tree.map(jnp.zeros_like, inputs.compressed))
    assert choose(case, tied)[0, :, 0].tolist() == [[0, 1, 11, 12]] * 5


# With the tiles of a GPU, through the public function.


def test_public_function_with_blocks_of_the_caller():
    """Unordered, repeated, unused, unknown and future ones."""
    case, inputs = CASES["plain"], make_inputs(CASES["plain"])
    blocks = np.random.default_rng(2).integers(-2, 9, (case.batch, case.queries, case.kv_heads, 7)).astype(np.int32)
    blocks, outs = jnp.asarray(blocks), {}
    for implementation in ("pallas_interpret", "xla"):

        def run(query, implementation=implementation):
            tensors = inputs.keywords()
            out, backward = jax.vjp(
                lambda query: nsa_attention(
                    query, **tensors, config=case.config, selected_blocks=blocks, implementation=implementation
                ),
                query,
            )
            return out, backward(out)

        outs[implementation] = jax.jit(run, compiler_options=QUICK)(inputs.query)
    for got, want in zip(*map(jax.tree.leaves, outs.values()), strict=True):
        assert_as_accurate(got, want, want)


def network(implementation: str, layer_of=lambda layer: layer):
    """Loss of two scanned layers of attention, with traced positions."""
    case = dataclasses.replace(CASES["query_start"], queries=19, keys=40)
    inputs = make_inputs(case)

    def loss(matrices, start):
        def layer(x, matrix):
            places = dict(query_start=start, window_start=start - 3, implementation=implementation, config=case.config)
            keywords = {**inputs.keywords(), **places}
            return x + nsa_attention(jnp.tanh(x @ matrix), **keywords), None

        x, _ = lax.scan(layer_of(layer), inputs.query, matrices)
        return (x**2).sum()

    matrices = np.random.default_rng(3).standard_normal((2, case.head_dim, case.head_dim), np.float32)
    return loss, jnp.asarray(matrices)


saved = functools.partial(jax.checkpoint, policy=save_attention)


def test_kernels_under_vmap_grad_scan_and_checkpoint():
    gradients = []
    for implementation, layer_of in (("pallas_interpret", saved), ("xla", lambda layer: layer)):
        loss, matrices = network(implementation, layer_of)
        batch = jnp.stack([matrices, -matrices]), jnp.asarray([21, 7], jnp.int32)
        gradients.append(jax.jit(jax.vmap(jax.value_and_grad(loss)), compiler_options=QUICK)(*batch))
    for got, want in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def test_second_derivatives_are_refused():
    """With respect to what is read and to the cotangent; those of the reference exist."""
    case, inputs = CASES["one_token"], make_inputs(CASES["one_token"])

    def attend(query, implementation):
        return nsa_attention(query, **inputs.keywords(), config=case.config, implementation=implementation)

    def of_query(query, implementation):
        return (jax.grad(lambda query: (attend(query, implementation) ** 2).sum())(query) ** 2).sum()

    def of_cotangent(cotangent, implementation):
        backward = jax.vjp(functools.partial(attend, implementation=implementation), inputs.query)[1]
        return (backward(cotangent)[0] ** 2).sum()

    for norm in (of_query, of_cotangent):
        of = {name: jax.grad(functools.partial(norm, implementation=name)) for name in ("pallas_interpret", "xla")}
        with pytest.raises(NotImplementedError, match="no second derivatives; implementation='xla'"):
            jax.eval_shape(of["pallas_interpret"], inputs.query)
        assert jax.eval_shape(of["xla"], inputs.query).shape == inputs.query.shape


def test_save_attention_keeps_what_the_kernels_computed(capsys):
    """JAX's own pass drops no kernel from a jaxpr: that none runs twice is seen in the program compiled for a GPU."""
    case, inputs = CASES["query_start"], make_inputs(CASES["query_start"])

    def layer(query):
        query = jnp.tanh(query)
        return nsa_attention(query, **inputs.keywords(), config=case.config, implementation="pallas_interpret")

    print_saved_residuals(saved(layer), inputs.query)
    lines = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line and "constant" not in line]
    # Three outputs, three log-sum-exps, the blocks: B=1, T=29, K=2, G=2, V=16, A=4.
    wanted = [*["f32[1,29,2,2,16]"] * 3, *["f32[1,29,2,2]"] * 3, "i32[1,29,2,4]"]
    assert sorted(line.split()[0] for line in lines) == sorted(wanted)


# Positions, by hand. Compressed token i ends at 4i + 7, block j holds 16j .. 16j + 15, the window holds 3.

HAND = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=3)


def as_lists(arrays: Any) -> Any:
    return type(arrays)(*(np.asarray(array).tolist() for array in arrays))


def test_positions():
    found = positions(jnp.asarray([3, 0], jnp.int32), None, batch=2, num_queries=3, num_keys=5)
    # The query at 5 stands past the last key, 4.
    assert as_lists(found) == Positions([[3, 4, 5], [0, 1, 2]], [[3, 4, 4], [0, 1, 2]], [[0, 0, 0]] * 2)
    segment_ids = jnp.asarray([[2, 2, 2, 5, 5]], jnp.int32)
    found = positions(1, segment_ids, batch=1, num_queries=5, num_keys=5)
    assert as_lists(found) == Positions([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 4]], [[0, 0, 3, 3, 3]])


def at(*position: int, first: int = 0, num_keys: int = 99) -> Positions:
    position = jnp.asarray([position], jnp.int32)
    return Positions(position, jnp.minimum(position, num_keys - 1), jnp.full_like(position, first))


def test_token_ranges():
    assert as_lists(token_ranges(at(0, 5, 9))) == Ranges([[0, 0, 0]], [[1, 6, 10]])
    assert as_lists(token_ranges(at(5, 9, first=4, num_keys=8))) == Ranges([[4, 4]], [[6, 8]])


def test_window_ranges():
    def ranges(where, start, length=20):
        return as_lists(window_ranges(where, start, length=length, config=HAND))

    assert ranges(at(0, 1, 5), 0) == Ranges([[0, 0, 3]], [[1, 2, 6]])
    assert ranges(at(0, 1, 5), -2) == Ranges([[2, 2, 5]], [[3, 4, 8]])  # indices 0 and 1 have negative positions
    assert ranges(at(5, 9), jnp.asarray([4], jnp.int32)) == Ranges([[0, 3]], [[2, 6]])  # 3 is before the first key
    assert ranges(at(5, 9), 0, length=7) == Ranges([[3, 7]], [[6, 7]])  # the query at 9 reads nothing
    assert ranges(at(5, 6, first=5), 0) == Ranges([[5, 5]], [[6, 7]])


def test_compressed_ranges():
    assert as_lists(compressed_ranges(at(0, 6, 7, 10, 11, 12), config=HAND)) == Ranges([[0] * 6], [[0, 0, 1, 1, 2, 2]])
    # A segment from 5 on: token 2 is 8 .. 15, token 1 begins at 4. A query at 14 reads nothing, low 2 and high 2.
    assert as_lists(compressed_ranges(at(14, 15, 19, first=5), config=HAND)) == Ranges([[2, 2, 2]], [[2, 3, 4]])
    assert as_lists(compressed_ranges(at(12, 40, num_keys=13), config=HAND)) == Ranges([[0, 0]], [[2, 2]])


def test_candidate_blocks():
    assert as_lists(candidate_blocks(at(0, 15, 16, 40), config=HAND)) == BlockRanges([[0] * 4], [[0, 0, 1, 2]])
    assert as_lists(candidate_blocks(at(33, 60, first=31, num_keys=48), config=HAND)) == BlockRanges([[1, 1]], [[2, 2]])


def test_forced_ranges():
    def ranges(*numbers, **places):
        initial, local = numbers
        config = dataclasses.replace(HAND, num_initial=initial, num_local=local, num_selected=4)
        return [as_lists(found) for found in forced_ranges(at(*places.pop("position"), **places), config=config)]

    # Blocks 0, 1 and 2 are 0 .. 15, 16 .. 31 and 32 .. 47; no key is in both ranges.
    assert ranges(1, 1, position=(0, 15, 16, 40)) == [
        Ranges([[0] * 4], [[1, 16, 16, 16]]),
        Ranges([[1, 16, 16, 32]], [[1, 16, 17, 41]]),
    ]
    assert ranges(1, 0, position=(3, 40)) == [Ranges([[0, 0]], [[4, 16]])]
    assert ranges(0, 2, position=(3, 40)) == [Ranges([[0, 16]], [[4, 41]])]
    assert ranges(1, 2, position=(33, 60), first=31, num_keys=52) == [
        Ranges([[31, 31]], [[32, 32]]),
        Ranges([[32, 32]], [[34, 52]]),
    ]
    assert ranges(0, 0, position=(3,)) == []


# Inverted lists.


def chosen_at_random(shape: tuple[int, int, int, int], num_blocks: int) -> np.ndarray:
    """Ascending, some slots unused."""
    random = np.random.default_rng(4)
    blocks = np.full(shape, -1, np.int32)
    for at in np.ndindex(shape[:3]):
        count = random.integers(0, min(shape[3], num_blocks) + 1)
        blocks[at][:count] = np.sort(random.choice(num_blocks, count, replace=False))
    return blocks


@pytest.mark.parametrize("packed_below", [2**32, 1])
def test_invert_lists_the_queries_of_each_block(packed_below, monkeypatch):
    monkeypatch.setattr(inverse_lists, "PACKED_BELOW", packed_below)
    blocks, num_blocks = chosen_at_random((2, 13, 3, 4), 6), 6
    wanted = [
        [t for t in range(13) if j in blocks[b, t, k]] for b in range(2) for k in range(3) for j in range(num_blocks)
    ]
    query, ends = jax.jit(functools.partial(invert, num_blocks=num_blocks))(blocks)
    assert ends.tolist() == np.cumsum([len(row) for row in wanted]).tolist()
    assert query[: ends[-1]].tolist() == [t for row in wanted for t in row]


def test_cut_covers_each_list_once(monkeypatch):
    monkeypatch.setattr(inverse_lists, "PIECE", 4)
    lengths = [0, 9, 4, 0, 1, 5, 0]
    ends = np.cumsum(lengths).astype(np.int32)
    pieces = jax.jit(lambda lists: cut(lists))(Lists(jnp.zeros(25, jnp.int32), jnp.asarray(ends)))
    wanted = [(1, 0, 4), (1, 4, 8), (1, 8, 9), (2, 9, 13), (4, 13, 14), (5, 14, 18), (5, 18, 19)]
    used = np.asarray(pieces.begin) < np.asarray(pieces.end)
    found = np.stack([pieces.block, pieces.begin, pieces.end], axis=1)[used]
    assert list(map(tuple, found.tolist())) == wanted
    assert pieces.ends.tolist() == [0, 3, 4, 4, 5, 7, 7]
    assert pieces.list_begin[used].tolist() == [0, 0, 0, 9, 13, 14, 14]


# Tiles.


@pytest.mark.parametrize("size", range(1, 257))
def test_parts_cover_a_head_once(size):
    parts = head_parts(size)
    assert 1 <= len(parts) <= 2 and parts[0].start == 0
    for part, following in itertools.pairwise(parts):
        assert part.start + part.width == following.start and not part.masked
    assert all(part.width >= 16 and part.width & (part.width - 1) == 0 and part.size == size for part in parts)
    last = parts[-1]
    assert last.start < size <= last.start + last.width
    assert last.masked == (last.start + last.width > size)


TABLE = """[
  {"device": "A Card", "compute_capability": "9.0", "dtype": "bfloat16", "head_dim": 128, "value_head_dim": 128, "group": 16,
   "tiles": {"window_forward": [128, 64, 4, 2]}},
  {"device": "A Card", "compute_capability": "9.0", "dtype": "bfloat16", "head_dim": 128, "value_head_dim": 128, "group": 2,
   "tiles": {"window_forward": [128, 32, 4, 2]}},
  {"device": "Another", "compute_capability": "9.0", "dtype": "bfloat16", "head_dim": 128, "value_head_dim": 128, "group": 4,
   "tiles": {"window_forward": [16, 16, 4, 2]}}
]"""


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "size", "group", "keys"),
    [
        ("A Card", "9.0", "bfloat16", 128, 16, 64),
        ("A Card", "9.0", "bfloat16", 128, 32, 64),
        ("A Card", "9.0", "bfloat16", 128, 4, 32),  # of the same device, though the other has the group itself
        ("Another", "9.0", "bfloat16", 128, 16, 16),
        ("Its Sister", "9.0", "bfloat16", 128, 12, 64),  # the capability is the same
        ("A Card", "8.0", "bfloat16", 128, 16, None),
        ("A Card", "9.0", "float32", 128, 16, None),
        ("A Card", "9.0", "bfloat16", 64, 16, None),
        ("cpu", "none", "float32", 16, 2, None),
    ],
)
def test_tiles_are_those_of_the_nearest_entry_or_the_rule(
    device, capability, dtype, size, group, keys, tmp_path, monkeypatch
):
    path = tmp_path / "tiles.json"
    path.write_text(TABLE)
    monkeypatch.setattr(tiles, "TABLE", path)
    found = tiles._lookup.__wrapped__(device, capability, dtype, size, 128, group)
    rule = tiles.rule(dtype, size, 128, group)
    if keys is not None:
        assert found.window_forward.keys == keys
        found = dataclasses.replace(found, window_forward=rule.window_forward)
    assert found == rule


def test_dkv_of_small_groups_is_a_kernel_of_its_own(tmp_path, monkeypatch):
    """What else an entry has serves any G."""
    path = tmp_path / "tiles.json"
    path.write_text(
        TABLE.replace('"window_forward": [128, 64, 4, 2]', '"selected_dkv": [16, 16, 1, 1], "choice": [8, 0, 1, 1]')
    )
    monkeypatch.setattr(tiles, "TABLE", path)
    found = {group: tiles._lookup.__wrapped__("A Card", "9.0", "bfloat16", 128, 128, group) for group in (4, 8)}
    assert (
        found[8].selected_dkv == Tile(16, 16, 1, 1)
        and found[4].selected_dkv == tiles.rule("bfloat16", 128, 128, 4).selected_dkv
    )
    assert found[8].choice == found[4].choice == Tile(8, 0, 1, 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sizes", [(8, 8), (64, 64), (96, 40), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("group", [4, 20, 64])
def test_tiles_of_any_gpu_fit_in_shared_memory(dtype, sizes, group):
    """Of the smallest GPUs, 99 KiB: what stays in a program, and what passes through it, so many under way."""
    width, both = (sum(part.width for size in of for part in head_parts(size)) for of in (sizes[:1], sizes))
    itemsize, rows = jnp.dtype(dtype).itemsize, flash.next_power_of_2(group)
    by_query = {"scores", "selected_forward", "selected_dq"}
    exceeding = set()
    for name, tile in vars(tiles._lookup("A Card", "8.6", dtype, *sizes, group)).items():
        if not isinstance(tile, Tile) or name in ("choice", "selected_add", "decode_choice"):
            continue
        if name in by_query or name == "selected_dkv":
            tile = tile._replace(rows=max(tile.rows, rows))  # of the kernel, whatever it is given
        stays, passes = (tile.keys, tile.rows) if name.endswith(("_dkv", "by_block")) else (tile.rows, tile.keys)
        held = (stays + passes * tile.stages) * both
        if name == "scores":
            held = (stays + block_selection.PACKED * passes * tile.stages) * width
        if held * itemsize > 99 * 2**10:
            exceeding.add(name)
        assert all(number & (number - 1) == 0 for number in (tile.rows, tile.keys, tile.warps)), name
    # 64 rows of these alone take as much.
    known: set[str] = set()
    if dtype == "float32" and group == 64 and sizes in ((192, 128), (256, 256)):
        known = {"selected_forward", "selected_dq", "selected_dkv"} | ({"scores"} if sizes == (256, 256) else set())
    assert exceeding == known


@pytest.mark.parametrize(
    ("implementation", "outcome"), [("pallas", "raises"), (None, "xla"), ("pallas_interpret", "runs")]
)
def test_what_does_not_fit_in_shared_memory_is_refused(implementation, outcome, monkeypatch):
    """Of 99 KiB, 64 float32 heads of 256 and as many keys; never a failure of a compiler."""
    device = types.SimpleNamespace(device_kind="A Card", compute_capability="8.6", platform="gpu")
    for module in (pallas_kernels, tiles, support):
        monkeypatch.setattr(module, "default_device", lambda: device)
    case = Case(SMALL, queries=20, keys=20, heads=64, kv_heads=1, head_dim=256, value_head_dim=256)
    inputs = make_inputs(case)
    run = functools.partial(nsa_attention, **inputs.keywords(), config=case.config, implementation=implementation)
    reason = "64 float32 query heads of 256 and 256 for each key/value head take .* and A Card has 99"
    ops._warn_once.cache_clear()
    if outcome == "raises":
        with pytest.raises(NotImplementedError, match=reason):
            run(inputs.query)
    elif outcome == "xla":
        with pytest.warns(UserWarning, match=reason):
            program = str(jax.make_jaxpr(run)(inputs.query))
        assert "pallas_call" not in program
    else:
        assert "pallas_call" in str(jax.make_jaxpr(run)(inputs.query))
    # The choice holds queries and keys alone, which fit at 192; a step of decoding holds fewer of them.
    for function, size, fits in (
        ("select_blocks", 256, False),
        ("select_blocks", 192, True),
        ("decode_step", 256, True),
    ):
        query = jax.ShapeDtypeStruct((1, 20, 64, size), jnp.float32)
        assert (tiles.why_no_room(function, query, 1, size) is None) == fits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_small_groups_go_by_block_where_a_program_holds_one(dtype, sizes):
    wide = dtype == "float32" and sizes in ((192, 128), (256, 256))
    for capability in ("8.6", "9.0"):
        for group in (1, 7, 8, 16):
            found = tiles._lookup("A Card", capability, dtype, *sizes, group)
            assert goes_by_block(found, NSAConfig()) == (group < 8 and not wide)


def test_a_query_whose_heads_are_many_has_rows_and_warps_for_them():
    for group, rows in ((1, 16), (16, 16), (20, 32), (64, 64)):
        found = tiles._lookup("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 128, 128, group)
        if not found.by_block:
            assert found.selected_forward.rows >= rows == 16 * found.selected_forward.warps
        assert found.scores.rows >= rows


def test_every_entry_of_the_table_is_whole():
    for entry in json.loads(tiles.TABLE.read_text()):
        arguments = [
            entry[name] for name in ("device", "compute_capability", "dtype", "head_dim", "value_head_dim", "group")
        ]
        found = tiles._lookup(*arguments)
        for name, numbers in entry["tiles"].items():
            assert getattr(found, name) == (Tile(*numbers) if isinstance(numbers, list) else numbers)
