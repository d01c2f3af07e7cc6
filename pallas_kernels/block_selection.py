"""Which blocks each query reads (eq. 8-11 of arXiv 2502.11089), from the log-sum-exp of the compressed branch.

    p[i] = 2^(s_i - lse),  score[j] = sum over the group and over i of p[i] * (units of d tokens that i and j share)

A block is b = l'/d units long, a compressed token a = l/d <= b: token i = j*b + r shares `min(a, b - r)` units with block j
and the rest of a with block j + 1. So `scores` writes two sums for each block, what its own tokens give it and what they
give the next; no array of compressed tokens for each query exists.

Scores: grid (tile of queries, key/value head, sequence). The compressed keys lie by their place r in the block, so that the
weight is the same for a whole tile of products `[rows, blocks]`, and a block's tokens add up in registers.

Choice: a program holds whole rows of scores, as long as its queries have candidates, grid (tile of queries, key/value head,
sequence). The bits of a number >= 0 order like the number; at most 31 counts find the n-th highest key of the row bit by
bit, whatever n is. What lies above it is chosen, then, from the left, as many that equal it as n has room for; a running
count puts them in ascending order.

Both run on chunks of queries, so that the scores stay under `MAX_SCRATCH` bytes: at any length, unless those of one query of
each sequence take more.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from pallas_kernels import flash
from pallas_kernels.flash import Config, Launch, Ranges, Tile
from pallas_kernels.positions import BlockRanges
from pallas_kernels.range_attention import Grouped, RowValues

MAX_SCRATCH = 240 * 2**20
MAX_BLOCKS = 2**16  # a program holds a row of scores
MAX_SELECTED = 1024
FORCED = 0x7F800000  # the bits of infinity
PACKED = 4
UNROLLED = 8
MOST_WIDTHS = 3
NARROWEST = 128  # blocks; a row of fewer takes no less time


def select(
    query: Grouped,
    compressed_key: Float[Array, "B C K H"],
    lse: RowValues,
    visible: Ranges,
    candidates: BlockRanges,
    *,
    config: Config,
    num_blocks: int,
    scale: float,
    scores_launch: Launch,
    choice_launch: Launch,
) -> Int32[Array, "B T K A"]:
    """Ascending block indices of each query and key/value head, then -1; A = `config.num_selected`.

    Args:
        lse: of the compressed branch, base 2.
        visible: `positions.compressed_ranges`.
        candidates: `positions.candidate_blocks`.
        num_blocks: M.
    """
    batch, length, kv_heads, group, size = query.shape
    units = config.select_block // config.compress_stride
    shared = config.compress_block // config.compress_stride
    # [B, C, K, H] -> [B, b, M, K, H]: token i = j*b + r at [r, j].
    padding = num_blocks * units - compressed_key.shape[1]
    key = jnp.pad(compressed_key, ((0, 0), (0, padding), (0, 0), (0, 0)))
    key = key.reshape(batch, num_blocks, units, kv_heads, size).swapaxes(1, 2)

    num_sums = 1 if shared == 1 else 2
    bytes_per_query = num_sums * 4 * batch * kv_heads * num_blocks
    most = max(1, MAX_SCRATCH // bytes_per_query)
    num_chunks = -(-length // most)
    chunk = -(-length // num_chunks)
    sums = jax.ShapeDtypeStruct((batch, kv_heads, chunk, num_blocks), jnp.float32)
    blocks = jax.ShapeDtypeStruct((batch, chunk, kv_heads, config.num_selected), jnp.int32)
    per_tile = max(1, scores_launch.tile.rows // flash.next_power_of_2(group))
    scores = functools.partial(
        _scores_kernel, tile=scores_launch.tile, scale=scale, chunk=chunk, per_tile=per_tile, shared=shared
    )
    # A row of scores lies in registers: a long one in those of more warps.
    held = choice_launch.tile.rows * flash.next_power_of_2(num_blocks)
    warps = max(choice_launch.tile.warps, min(16, held // 2048))
    choice_launch = Launch(choice_launch.tile._replace(warps=warps), choice_launch.interpret)
    choice = functools.partial(_choice_kernel, rows=choice_launch.tile.rows, config=config)

    def one_chunk(start: Array) -> Array:
        inputs = (start, *visible, *candidates, query, lse, key)
        shape = (None, units, num_blocks, None, size)
        key_spec = pl.BlockSpec(shape, lambda tile, head, sequence: (sequence, 0, 0, head, 0))
        found = scores_launch(
            scores,
            "nsa_scores",
            grid=(pl.cdiv(chunk, per_tile), kv_heads, batch),
            in_specs=[*flash.specs(inputs[:-1]), key_spec],
            out_specs=[flash.whole(sums, head_axis=1)] * num_sums,
            out_shape=[sums] * num_sums,
        )(*inputs)
        return choice_launch(
            choice,
            "nsa_choice",
            grid=(pl.cdiv(chunk, choice_launch.tile.rows), kv_heads, batch),
            in_specs=[*flash.specs((start, *candidates)), *[flash.whole(sums, head_axis=1)] * num_sums],
            out_specs=flash.whole(blocks, head_axis=2),
            out_shape=blocks,
        )(start, *candidates, *found)

    starts = jnp.arange(num_chunks, dtype=jnp.int32)[:, None, None] * chunk
    # One start for each sequence, as every other input of the kernels has.
    starts = jnp.broadcast_to(starts, (num_chunks, batch, 1))
    if num_chunks == 1:
        return one_chunk(starts[0])
    chosen = lax.map(one_chunk, starts)
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, num_chunks * chunk, kv_heads, -1)[:, :length]


def _scores_kernel(
    start_ref: Any,
    low_ref: Any,
    high_ref: Any,
    first_ref: Any,
    own_ref: Any,
    q_ref: Any,
    lse_ref: Any,
    k_ref: Any,
    *sums_refs: Any,
    tile: Tile,
    scale: float,
    chunk: int,
    per_tile: int,
    shared: int,
) -> None:
    num_tokens, group, size = q_ref.shape
    units, num_blocks, _ = k_ref.shape
    parts = flash.head_parts(size)
    padded = flash.next_power_of_2(group)
    in_tile, head = flash.divide(lax.iota(jnp.int32, per_tile * padded), padded)
    # The longest rows first.
    in_chunk = (pl.num_programs(0) - 1 - pl.program_id(0)) * per_tile
    begin = start_ref[0] + in_chunk
    token = begin + in_tile
    live = (token < num_tokens) & (head < group)
    query = flash.load_parts(q_ref, (token, head), parts, live)
    lse = flash.load_rows(lse_ref, (token, head), live)
    low, high = (flash.load_rows(ref, (token,), token < num_tokens) for ref in (low_ref, high_ref))

    def step(j: Any, carry: Any, masked: bool) -> Any:
        block = j * tile.keys + lax.iota(jnp.int32, tile.keys)

        def place(r: Any, sums: Any) -> Any:
            """Places r .. r + packed - 1 of each block, side by side in one product `[rows, packed * blocks]`."""
            lane = lax.iota(jnp.int32, packed * tile.keys)
            offset, index = flash.divide(lane, tile.keys)
            offset, index = offset + r, j * tile.keys + index
            key = flash.load_parts(k_ref, (offset, index), parts, index < num_blocks if masked else None)
            p = flash.exp2(flash.dot_parts(query, key) * (scale * flash.LOG2E) - lse[:, None])
            if masked:
                i = index * units + offset
                p = jnp.where((low[:, None] <= i[None, :]) & (i[None, :] < high[:, None]), p, 0.0)
            outside = outside_units(offset, units, shared)[None, :]
            total, after = sums
            return total + _over_places(p, packed), after + _over_places(p * outside, packed)

        zero = jnp.zeros((per_tile * padded, tile.keys), jnp.float32)
        sums = (zero, zero)
        packed = min(PACKED, units & -units)
        for r in range(0, units, packed) if units <= UNROLLED * packed else ():
            sums = place(r, sums)
        if units > UNROLLED * packed:
            sums = lax.fori_loop(0, units // packed, lambda i, sums: place(i * packed, sums), sums)
        total, after = sums
        query_index = in_chunk + lax.iota(jnp.int32, per_tile)
        exists = (query_index < chunk) & (start_ref[0] + query_index < num_tokens)
        shape = (per_tile, tile.keys)
        where = (jnp.broadcast_to(query_index[:, None], shape), jnp.broadcast_to(block[None, :], shape))
        written = jnp.broadcast_to(exists[:, None], shape) & jnp.broadcast_to((block < num_blocks)[None, :], shape)
        for ref, found in zip(sums_refs, (total * shared - after, after)):
            # Rows of heads that the group does not have are not counted.
            found = jnp.where(live[:, None], found, 0.0).reshape(per_tile, padded, tile.keys)
            pltriton.store(ref.at[where], jnp.sum(found, axis=1), mask=written)
        return carry

    last_token = jnp.minimum(begin + per_tile, num_tokens) - 1
    first_token = jnp.minimum(begin, last_token)
    keys = units * tile.keys
    flash.over_tiles(
        first_ref[first_token] // tile.keys,
        flash.ceil_div(low_ref[last_token], keys),
        high_ref[first_token] // keys,
        own_ref[last_token] // tile.keys + 1,
        step,
        jnp.int32(0),
    )


def outside_units(place: Array, units: int, shared: int) -> Array:
    """Of a compressed token's `shared` units, how many lie in the block after its own; `place` is its place in its own."""
    return jnp.maximum(shared - units + place, 0).astype(jnp.float32)


def _over_places(p: Array, packed: int) -> Array:
    """`[rows, packed * blocks]` summed to `[rows, blocks]`."""
    return p if packed == 1 else jnp.sum(p.reshape(p.shape[0], packed, -1), axis=1)


def _choice_kernel(start_ref: Any, first_ref: Any, own_ref: Any, *refs: Any, rows: int, config: Config) -> None:
    own_sums_ref, *after_ref, blocks_ref = refs
    num_tokens, (chunk, num_blocks) = own_ref.shape[0], own_sums_ref.shape
    query = pl.program_id(0) * rows + lax.iota(jnp.int32, rows)
    live = (query < chunk) & (start_ref[0] + query < num_tokens)
    first = flash.load_rows(first_ref, (start_ref[0] + query,), live)[:, None]
    own = flash.load_rows(own_ref, (start_ref[0] + query,), live)[:, None]
    # The candidates of these queries; the rows are as long as they need, of a few lengths.
    begin, end = (jnp.minimum(start_ref[0] + pl.program_id(0) * rows + i, num_tokens - 1) for i in (0, rows - 1))
    base, needed = first_ref[begin], own_ref[end] - first_ref[begin] + 1
    choose = functools.partial(
        _choose, own_sums_ref, after_ref, blocks_ref, Rows(query, live, first, own, base), config=config
    )
    widths = [flash.next_power_of_2(num_blocks)]
    while len(widths) < MOST_WIDTHS and widths[-1] > NARROWEST:
        widths.append(widths[-1] // 2)
    for narrower, width in zip([*widths[1:], 0], widths):
        pl.when((narrower < needed) & (needed <= width))(functools.partial(choose, width))


class Rows(NamedTuple):
    """Queries that choose."""

    query: Array  # [rows], in the chunk
    live: Array  # [rows]
    first: Array  # [rows, 1]: first candidate
    own: Array  # [rows, 1]: last candidate
    base: Array  # first block of the rows of scores


def _choose(
    own_sums_ref: Any, after_ref: list[Any], blocks_ref: Any, these: Rows, width: int, *, config: Config
) -> None:
    query, live, first, own, base = these
    shape = (query.shape[0], width)
    block = base + jnp.broadcast_to(lax.iota(jnp.int32, width)[None, :], shape)
    index = jnp.broadcast_to(query[:, None], shape)
    candidate = (first <= block) & (block <= own) & live[:, None]
    score = pltriton.load(own_sums_ref.at[index, block], mask=candidate, other=0.0)
    if after_ref:
        before = candidate & (block > first)
        previous = jnp.maximum(block - 1, 0)
        score += pltriton.load(after_ref[0].at[index, previous], mask=before, other=0.0)
    store_choice(blocks_ref, score, Choice(index, block, candidate, query, first, own, live), config=config)


class Choice(NamedTuple):
    """What the queries of a program choose from."""

    place: Array  # [rows, width], where the query's blocks are written
    block: Array  # [rows, width]
    candidate: Array  # [rows, width], whether the block is one
    query: Array  # [rows], `place` of a row
    first: Array  # [rows, 1], the first candidate
    own: Array  # [rows, 1], the last
    live: Array  # [rows]


def store_choice(blocks_ref: Any, score: Array, choice: Choice, *, config: Config) -> None:
    """Write the n blocks (eq. 11) of each query to `blocks_ref` `[T, A]`, ascending, then -1; `score` is `[rows, width]`."""
    index, block, candidate, query, first, own, live = choice
    rows, width = score.shape
    slots = config.num_selected
    # NaN counts as the best score, so that even then no block is chosen twice.
    order = jnp.where(score >= 0.0, jnp.minimum(lax.bitcast_convert_type(score, jnp.int32), FORCED - 1), FORCED - 1)
    forced = (block < first + config.num_initial) | (block > own - config.num_local)
    order = jnp.where(candidate, jnp.where(forced, FORCED, order), -1)

    def undecided(state: Any) -> Array:
        bit, _, above = state
        return (bit >= 0) & (jnp.max(jnp.abs(above - slots)) > 0)

    def narrow(state: Any) -> Any:
        """Set the bit if n candidates are still at or above the threshold; done once they are n."""
        bit, threshold, above = state
        higher = threshold | (jnp.int32(1) << bit)
        count = flash.count(order >= higher[:, None], axis=1)
        enough = count >= slots
        return bit - 1, jnp.where(enough, higher, threshold), jnp.where(enough, count, above)

    state = jnp.int32(30), jnp.zeros((rows,), jnp.int32), jnp.full((rows,), width, jnp.int32)
    threshold = lax.while_loop(undecided, narrow, state)[1][:, None]
    above = (order > threshold).astype(jnp.int32)
    equal = (order == threshold).astype(jnp.int32)
    room = slots - flash.count(above, axis=1)[:, None]
    # Two running counts in one: at most MAX_SELECTED are above, and rows are shorter than 2 ** 20.
    running = jnp.cumsum(above * 2**20 + equal, axis=1, dtype=jnp.int32)
    above_so_far, equal_so_far = running >> 20, running & (2**20 - 1)
    chosen = (above == 1) | ((equal == 1) & (equal_so_far <= room))
    slot = above_so_far + jnp.minimum(equal_so_far, room) - 1
    # Places that are masked lie outside, each its own.
    pltriton.store(blocks_ref.at[index, jnp.where(chosen, slot, slots + block)], block, mask=chosen & live[:, None])

    lanes = flash.next_power_of_2(slots)
    lane = jnp.broadcast_to(lax.iota(jnp.int32, lanes)[None, :], (rows, lanes))
    unused = (lane >= flash.count(chosen, axis=1)[:, None]) & (lane < slots) & live[:, None]
    index = jnp.broadcast_to(query[:, None], (rows, lanes))
    pltriton.store(
        blocks_ref.at[index, jnp.where(unused, lane, slots + lane)], jnp.full_like(lane, flash.NO_BLOCK), mask=unused
    )
