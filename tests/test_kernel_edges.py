"""Sizes at which the kernels take another way: long blocks, short lists, many heads, nothing to read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from nsa_jax import NSAConfig, nsa_attention
from nsa_jax.testing import SMALL, Case, assert_as_accurate, input_shapes, make_inputs
from pallas_kernels import flash, inverse_lists, selected_by_block, tiles
from pallas_kernels.flash import Launch, Ranges, Tile
from pallas_kernels.positions import BlockRanges
from pallas_kernels.range_attention import QuerySide, key_value_gradients
from pallas_kernels.selected_attention import free_blocks, queries_per_tile, unions
from pallas_kernels.selected_by_block import goes_by_block
from tests.programs import QUICK, equations
from tests.test_lowering import for_cuda, verified_kernels

pytestmark = pytest.mark.usefixtures("quick_compilation")

# By block with the rule's tile, whose rows are more than most lists have queries: those too many write nowhere.
TINY = Case(heads=2, kv_heads=1, head_dim=8, value_head_dim=8)


def solve(case: Case, inputs, attend):
    """Output and the gradients of its sum of squares."""

    def run(*tensors):
        return jax.vjp(lambda *tensors: attend(tensors, inputs), *tensors)

    def both(*tensors):
        out, backward = run(*tensors)
        return out, backward(out)

    return jax.jit(both, compiler_options=QUICK)(*inputs[:5])


def public(case: Case, implementation: str, blocks=None):
    def attend(tensors, inputs):
        names = ("compressed", "selected", "window", "gates")
        where = dict(query_start=inputs.query_start, window_start=inputs.window_start, segment_ids=inputs.segment_ids)
        where.update(config=case.config, selected_blocks=blocks, implementation=implementation)
        return nsa_attention(tensors[0], **dict(zip(names, tensors[1:])), **where)

    return attend


def kernels(case: Case, **options):
    """Traced anew by each program: no cache knows what a test has patched."""

    def attend(tensors, inputs):
        where = dict(query_start=inputs.query_start, window_start=inputs.window_start, segment_ids=inputs.segment_ids)
        where.update(config=case.config, scale=case.head_dim**-0.5, interpret=True)
        return pallas_kernels.attend(*tensors, None, **where, **options)

    return attend


def assert_agree(case: Case, inputs=None, blocks=None) -> None:
    inputs = make_inputs(case) if inputs is None else inputs
    assert_same(case, inputs, public(case, "pallas_interpret", blocks), public(case, "xla", blocks))


def assert_same(case: Case, inputs, one, other) -> None:
    got, want = (solve(case, inputs, attend) for attend in (one, other))
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(got)[0], jax.tree.leaves(want), strict=True):
        assert_as_accurate(a, b, b, name=jax.tree_util.keystr(path))


def test_a_block_longer_than_a_piece_of_its_list(monkeypatch):
    monkeypatch.setattr(inverse_lists, "PIECE", 8)
    config = NSAConfig(16, 16, 32, 2, 0, 1, 16)
    assert_agree(dataclasses.replace(TINY, config=config, queries=70, keys=70))


def test_a_block_that_one_program_cannot_hold():
    """By block, each query has one partial result of a block: a block in parts goes by query."""
    rule = tiles.rule("float32", 8, 8, 2)
    assert rule.by_block
    narrow = dataclasses.replace(rule, selected_dkv=rule.selected_dkv._replace(keys=16))
    case = dataclasses.replace(TINY, config=NSAConfig(16, 16, 32, 2, 0, 1, 16), queries=50, keys=50)
    assert not goes_by_block(narrow, case.config)
    assert_same(case, make_inputs(case), kernels(case, tiles=narrow), public(case, "xla"))


def draw_rows(group: int, *, num_keys: int) -> tuple[QuerySide, np.ndarray, np.ndarray]:
    """What dk and dv are made of, of 50 tokens and one key/value head; and keys and values."""
    random = np.random.default_rng(2)
    query, dout = random.normal(size=(2, 1, 50, 1, group, 8)).astype(np.float32)
    gate, lse, delta = random.normal(size=(3, 1, 50, 1, group)).astype(np.float32)
    key, value = random.normal(size=(2, 1, num_keys, 1, 8)).astype(np.float32)
    return QuerySide(query, dout, gate, lse, delta), key, value


def assert_gradients(found, rows: QuerySide, key, value, visible) -> None:
    """dk and dv by their equations (`flash`), in float64, with scale 0.3; `visible` `[T, S]`."""
    query, dout, gate, lse, delta, key, value = (np.asarray(x, np.float64)[0] for x in (*rows, key, value))
    key, value = key[:, 0], value[:, 0]
    weights = 2 ** (0.3 * flash.LOG2E * query @ key.T - lse[..., None]) * gate[..., None] * visible[:, None, None]
    dscores = 0.3 * weights * (dout @ value.T - delta[..., None])
    for got, want in zip(found, (dscores, weights), strict=True):
        wanted = np.einsum("tkgs,tkgd->sd", want, query if want is dscores else dout)
        np.testing.assert_allclose(np.asarray(got)[0, :, 0], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("group", "select_block", "documents", "stages"),
    [(2, 16, True, 3), (3, 16, False, 3), (1, 32, False, 3), (2, 16, True, 2)],
)
def test_rows_known_ahead_are_the_right_rows(group, select_block, documents, stages, monkeypatch):
    """With three tiles under way; pieces end within a tile, documents within a block, a block of 32 is held in two parts."""
    monkeypatch.setattr(inverse_lists, "PIECE", 36 if select_block == 32 else 20)
    over_tiles, ahead = selected_by_block._Piece.over_tiles, []

    def watched(*arguments, **options):
        ahead.append(options["ahead"])
        return over_tiles(*arguments, **options)

    monkeypatch.setattr(selected_by_block._Piece, "over_tiles", watched)
    rows, key, value = draw_rows(group, num_keys=50)
    token = np.arange(50, dtype=np.int32)
    low, own = np.where(documents & (token >= 23), np.int32(23), np.int32(0)), token // select_block
    # Each query reads the first block and its own.
    blocks = np.stack([0 * own, np.where(own > 0, own, -1)], axis=-1)[None, :, None].astype(np.int32)

    launches = dict(launch=Launch(Tile(8, 16, 4, stages), True), sum_launch=Launch(Tile(16, 0, 4, 1), True))
    more = dict(config=NSAConfig(16, 16, select_block, 2, 0, 1, 16), scale=0.3, holes=documents, **launches)
    function = functools.partial(selected_by_block.selected_gradients_by_block, added=None, **more)
    found = jax.jit(function)(rows, key, value, blocks, Ranges(low[None], token[None] + 1))
    assert ahead == [stages == 3]
    of_block = token[None] // select_block
    chosen = (of_block == 0) | (of_block == own[:, None])
    assert_gradients(found[:2], rows, key, value, chosen & (low[:, None] <= token) & (token <= token[:, None]))


@pytest.mark.parametrize("slices", [1, 3, 64])
def test_slices_of_the_rows_that_read_a_key(slices):
    """Slices of several tiles, which begin and end within one; a tile of keys may have none of their rows."""
    rows, key, value = draw_rows(3, num_keys=40)
    token, index = np.arange(50, dtype=np.int32), np.arange(40)
    low, high = np.where(token < 31, np.int32(0), np.int32(9)), np.clip(token - 5, 0, 40)
    more = dict(scale=0.3, slices=slices, launch=Launch(Tile(16, 16, 4, 2), True), name="dkv")
    function = functools.partial(key_value_gradients, **more)
    found = jax.jit(function)(rows, key, value, Ranges(low[None], high[None]))
    assert_gradients(found, rows, key, value, (low[:, None] <= index) & (index < high[:, None]))


def test_queries_past_the_last_key_have_finite_gradients():
    case = dataclasses.replace(TINY, queries=20, keys=41, query_start=30)
    out, gradients = solve(case, make_inputs(case), public(case, "pallas_interpret"))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((out, gradients)))


def test_no_blocks_and_no_window():
    """Blocks of the caller may have any number of slots, none as well; a window branch may hold no key at all."""
    case = dataclasses.replace(TINY, queries=24, keys=24)
    inputs = make_inputs(case)
    empty = inputs._replace(
        window=jax.tree.map(lambda x: x[:, :0], inputs.window), window_start=jnp.zeros((1,), jnp.int32)
    )
    assert_agree(case, empty, blocks=jnp.zeros((1, 24, 1, 0), jnp.int32))


def test_heads_in_turns(monkeypatch):
    """Partial results of few heads at a time, as if of all at once."""
    case = Case(batch=2, queries=37, keys=37, heads=6, kv_heads=6, head_dim=8, value_head_dim=16)
    inputs = make_inputs(case)
    free = SMALL.num_selected - SMALL.num_initial - SMALL.num_local
    one_head = 2 * 37 * free * 16 * 4
    monkeypatch.setattr(selected_by_block, "MAX_PARTIALS", 2 * one_head)
    assert_same(case, inputs, kernels(case), public(case, "xla"))
    program = jax.make_jaxpr(lambda *tensors: kernels(case)(tensors, inputs))(*inputs[:5])
    assert "length=3" in str(program)  # pairs of heads


def test_unions():
    blocks = jnp.asarray([[0, 3, 7], [0, 4, 7], [2, -1, -1], [0, 2, 5], [1, 2, 3]], jnp.int32)[None, :, None]
    found = unions(blocks, 2, interpret=True)
    want = [[0, 3, 4, 7, -1, -1], [0, 2, 5, -1, -1, -1], [1, 2, 3, -1, -1, -1]]
    assert found.blocks[0, :, 0].tolist() == want
    assert found.readers[0, :, 0].tolist() == [[3, 1, 2, 3, 0, 0], [2, 3, 2, 0, 0, 0], [1, 1, 1, 0, 0, 0]]


def test_free_blocks():
    """In a segment that begins in block 2; of five slots the first and the last two are forced."""
    blocks = [[2, 3, 5, 8, 9], [2, 3, 4, 5, -1], [2, 3, 4, -1, -1], [2, 3, -1, -1, -1], [2, -1, -1, -1, -1]]
    own = [9, 5, 4, 3, 2]
    candidates = BlockRanges(jnp.full((1, 5), 2, jnp.int32), jnp.asarray([own], jnp.int32))
    blocks = jnp.asarray(blocks, jnp.int32)[None, :, None]
    found = free_blocks(blocks, candidates, config=NSAConfig(1, 1, 1, 5, 1, 2))
    assert found[0, :, 0].tolist() == [[3, 5], [3, -1], [-1, -1], [-1, -1], [-1, -1]]
    only_forced = free_blocks(blocks[..., :3], candidates, config=NSAConfig(1, 1, 1, 3, 1, 2))
    assert only_forced[0, :, 0].tolist() == [[-1]] * 5


@pytest.mark.parametrize("slots", [1, 16, 64, 600, 1024])
@pytest.mark.parametrize("group", [1, 8, 64])
def test_a_union_has_room(group, slots):
    queries = queries_per_tile(tiles.rule("bfloat16", 64, 64, group).selected_forward, group, slots)
    assert 1 <= queries <= 32  # a bit each
    assert queries == 1 or queries * slots <= 256


@pytest.mark.parametrize(
    ("group", "config", "slots"),
    [
        (1, NSAConfig(32, 16, 256, 64), None),  # too long a block to go by block
        (8, NSAConfig(), 600),
        (16, NSAConfig(num_selected=64), None),
        (16, NSAConfig(4, 2, 8, 64, 1, 2, 64), None),  # 64 of 256 blocks
        (2, NSAConfig(32, 16, 128, 16), None),
    ],
)
def test_long_choices_lower_for_cuda(group, config, slots):
    case = Case(config=config, queries=2048, keys=2048, heads=2 * group, kv_heads=2, head_dim=64, value_head_dim=64)
    shapes = input_shapes(case, dtype="bfloat16")
    blocks = None if slots is None else jax.ShapeDtypeStruct((1, 2048, 2, slots), jnp.int32)

    def run(inputs, blocks):
        where = dict(config=config, scale=0.125, query_start=0, window_start=0, segment_ids=None)
        out, backward = jax.vjp(lambda *tensors: pallas_kernels.attend(*tensors, blocks, **where), *inputs[:5])
        return out, backward(out)

    with for_cuda():
        program = jax.jit(run).trace(shapes, blocks).lower(lowering_platforms=("cuda",))
    assert verified_kernels(program) >= 9


@pytest.mark.parametrize("group", [1, 16])
def test_vmap_lowers_for_cuda(group):
    """By block and by query: an axis more than a GPU's grid has."""
    case = Case(config=NSAConfig(), queries=512, keys=512, heads=2 * group, kv_heads=2, head_dim=64, value_head_dim=64)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), input_shapes(case, dtype="bfloat16")[:5]
    )

    def run(*tensors):
        where = dict(config=case.config, scale=0.125, query_start=0, window_start=0, segment_ids=None)
        out, backward = jax.vjp(lambda *tensors: pallas_kernels.attend(*tensors, None, **where), *tensors)
        return out, backward(out)

    with for_cuda():
        program = jax.jit(jax.vmap(run)).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert verified_kernels(program) >= 9


def test_the_most_blocks_lower_for_cuda():
    config = NSAConfig(1, 1, 1, 64, 1, 2, 1)
    case = Case(config=config, queries=8, keys=2**16, heads=1, kv_heads=1, query_start=2**16 - 8)
    shapes = input_shapes(case)

    def run(inputs):
        where = dict(config=config, num_keys=case.keys, query_start=inputs.query_start, segment_ids=None, scale=0.25)
        return pallas_kernels.select_blocks(inputs.query, inputs.compressed.key, **where)

    with for_cuda():
        program = jax.jit(run).trace(shapes).lower(lowering_platforms=("cuda",))
    assert verified_kernels(program) >= 3


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "num_selected"),
    [(1, 65536, 64, 4, 16), (16, 8192, 64, 64, 16), (1, 262144, 16, 1, 64)],
)
def test_no_array_of_all_scores(batch, length, heads, kv_heads, num_selected):
    """Nor nearly: scores stay under 256 MiB, at 65536 tokens as at any length, and gradients add no larger array."""
    config = NSAConfig(num_selected=num_selected)

    def of(length, heads, *sizes):
        return jax.ShapeDtypeStruct((batch, length, heads, *sizes), jnp.bfloat16)

    num_compressed = config.num_compressed(length)
    query, keys = of(length, heads, 128), [of(size, kv_heads, 128) for size in (num_compressed, length, length)]

    def run(query, compressed, selected, window, gates):
        pairs = ((x, x) for x in (compressed, selected, window))
        where = dict(config=config, scale=0.1, query_start=0, window_start=0, segment_ids=None)
        out, backward = jax.vjp(lambda query: pallas_kernels.attend(query, *pairs, gates, None, **where), query)
        return backward(out)

    program = list(equations(jax.make_jaxpr(run)(query, *keys, of(length, heads, 3)).jaxpr))
    scores = [x for x in program if x.primitive.name == "pallas_call" and x.params["name"] == "nsa_scores"]
    held = [sum(array.aval.size * array.aval.dtype.itemsize for array in x.outvars) for x in scores]
    assert len(held) == 1 and held[0] <= 256 * 2**20
    # What there must be: queries, outputs, keys, and what goes by (query, slot).
    most = max(query.size, *(x.size for x in keys), selected_by_block.MAX_PARTIALS // 2)
    assert (
        max(array.aval.size for x in program for array in x.outvars)
        <= most
        < batch * kv_heads * length * num_compressed
    )
