"""Attention to the tokens of the selected blocks, one softmax over all of them (eq. 12 of arXiv 2502.11089).

Forward and dq: a program holds one query's group and passes over its blocks; grid (query, key/value head, sequence). The
forward program also forms the gated sum with the other branches' outputs, and dq adds what they gave.

dk and dv: the lists are inverted, block -> the queries that chose it, and cut into pieces of at most `PIECE` queries. A
program holds one block's keys and passes over one piece; a second kernel adds each block's pieces in their order. So work is
balanced, though every query reads the first block, and the bits are the same every time.
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
from pallas_kernels.flash import Config, Launch, Ranges
from pallas_kernels.range_attention import Grouped, QuerySide, RowValues

PIECE = 1024
MAX_KEYS = 128  # of a block that a program holds at once


class Sum(NamedTuple):
    """The other branches, for the gated sum (eq. 5)."""

    gates: Float[Array, "B T K G 3"]  # compressed, selected, window
    out_cmp: Float[Array, "B T K G V"]
    out_win: Float[Array, "B T K G V"]


# --------------------------------------------------------------------------------------------------------------- forward


def selected_forward(
    query: Grouped,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    blocks: Int32[Array, "B T K A"],
    tokens: Ranges,
    branches: Sum,
    *,
    config: Config,
    scale: float,
    launch: Launch,
) -> tuple[Float[Array, "B T K G V"], Float[Array, "B T K G V"], RowValues]:
    """The gated sum of the three branches, and the selected branch's output and log-sum-exp (base 2).

    Args:
        blocks: ascending, unused slots (-1) last.
        tokens: what a query may read of the tokens, `positions.token_ranges`.
    """
    batch, length, kv_heads, _, _ = query.shape
    out = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), value.dtype)
    lse = jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32)
    kernel = functools.partial(_forward_kernel, scale=scale, config=config)
    inputs = (*tokens, blocks, query, key, value, *branches)
    return launch(
        kernel,
        "nsa_selected_forward",
        grid=(length, kv_heads, batch),
        in_specs=_specs(inputs),
        out_specs=_specs((out, out, lse)),
        out_shape=(out, out, lse),
    )(*inputs)


def _forward_kernel(
    low_ref: Any, high_ref: Any, blocks_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any, scale, config
) -> None:
    gates_ref, cmp_ref, win_ref, out_ref, slc_ref, lse_ref = refs
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    where, live = _one_query(q_ref)
    query = flash.load_parts(q_ref, where, q_parts, live)

    def step(j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
        key_index, visible = reads.keys(j, masked)
        key = flash.load_parts(k_ref, (key_index,), q_parts, visible)
        value = flash.load_parts(v_ref, (key_index,), v_parts, visible)
        products = flash.dot_parts(query, key)
        visible = None if visible is None else jnp.broadcast_to(visible[None, :], products.shape)
        return flash.softmax_step(state, products, scale, value, visible)

    reads = _Reads(blocks_ref, low_ref, high_ref, config)
    state = flash.over_tiles(0, reads.inner, reads.outer, reads.count, step, flash.softmax_start(where[0].shape[0], v_parts))
    outs, lse = flash.softmax_end(state, scale)
    flash.store_parts(slc_ref, where, v_parts, outs, live)
    flash.store_rows(lse_ref, where, lse, live)
    g_cmp, g_slc, g_win = (
        flash.load_rows(gates_ref, (*where, jnp.full_like(where[0], i)), live).astype(jnp.float32)[:, None]
        for i in range(3)
    )
    out_cmp, out_win = (flash.load_parts(ref, where, v_parts, live) for ref in (cmp_ref, win_ref))
    total = tuple(
        g_cmp * c.astype(jnp.float32) + g_slc * s + g_win * w.astype(jnp.float32)
        for c, s, w in zip(out_cmp, outs, out_win, strict=True)
    )
    flash.store_parts(out_ref, where, v_parts, total, live)


# -------------------------------------------------------------------------------------------------------------- backward


def selected_query_gradient(
    rows: QuerySide,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    blocks: Int32[Array, "B T K A"],
    tokens: Ranges,
    added: Grouped,
    *,
    dtype: Any,
    config: Config,
    scale: float,
    launch: Launch,
) -> Grouped:
    """dq of the selected branch plus `added` (float32), in `dtype`."""
    batch, length, kv_heads, _, _ = rows.query.shape
    dq = jax.ShapeDtypeStruct(rows.query.shape, dtype)
    kernel = functools.partial(_dq_kernel, scale=scale, config=config)
    inputs = (*tokens, blocks, *rows, key, value, added)
    return launch(
        kernel,
        "nsa_selected_dq",
        grid=(length, kv_heads, batch),
        in_specs=_specs(inputs),
        out_specs=_specs(dq),
        out_shape=dq,
    )(*inputs)


def _dq_kernel(low_ref: Any, high_ref: Any, blocks_ref: Any, *refs: Any, scale, config) -> None:
    q_ref, dout_ref, gate_ref, lse_ref, delta_ref, k_ref, v_ref, added_ref, dq_ref = refs
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    where, live = _one_query(q_ref)
    query = flash.load_parts(q_ref, where, q_parts, live)
    dout = flash.load_parts(dout_ref, where, v_parts, live)
    gate, lse, delta = (flash.load_rows(ref, where, live) for ref in (gate_ref, lse_ref, delta_ref))

    def step(j: Any, sums: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
        key_index, visible = reads.keys(j, masked)
        key = flash.load_parts(k_ref, (key_index,), q_parts, visible)
        value = flash.load_parts(v_ref, (key_index,), v_parts, visible)
        weights = jnp.exp2(flash.dot_parts(query, key) * (scale * flash.LOG2E) - lse[:, None])
        if visible is not None:
            weights = jnp.where(visible[None, :], weights, 0.0)
        dscores = weights * (flash.dot_parts(dout, value) - delta[:, None])
        return tuple(total + flash.dot(dscores.astype(part.dtype), part) for total, part in zip(sums, key, strict=True))

    reads = _Reads(blocks_ref, low_ref, high_ref, config)
    sums = tuple(jnp.zeros((where[0].shape[0], part.width), jnp.float32) for part in q_parts)
    sums = flash.over_tiles(0, reads.inner, reads.outer, reads.count, step, sums)
    added = flash.load_parts(added_ref, where, q_parts, live)
    dq = tuple(total * (gate * scale)[:, None] + more for total, more in zip(sums, added, strict=True))
    flash.store_parts(dq_ref, where, q_parts, dq, live)


def selected_key_value_gradients(
    rows: QuerySide,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    blocks: Int32[Array, "B T K A"],
    tokens: Ranges,
    *,
    config: Config,
    scale: float,
    holes: bool,
    launch: Launch,
    sum_launch: Launch,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """dk and dv of the selected branch; 0 for a key that no query reads.

    Args:
        holes: whether queries may begin to read inside a block, as with packed documents.
    """
    lists = invert(blocks, num_blocks=-(-key.shape[1] // config.select_block))
    pieces = cut(lists)
    num_pieces, held = pieces.block.shape[0], _held_keys(config)
    partials = tuple(
        jax.ShapeDtypeStruct((num_pieces, config.select_block, array.shape[-1]), jnp.float32) for array in (key, value)
    )
    kernel = functools.partial(_dkv_kernel, tile=launch.tile, scale=scale, config=config, held=held, holes=holes)
    arrays = (*tokens, *rows, key, value)
    # Programs know their sequence and head from the list: the arrays are whole.
    dk, dv = launch(
        kernel,
        "nsa_selected_dkv",
        grid=(num_pieces, -(-config.select_block // held)),
        out_shape=partials,
    )(lists.query, *pieces[:-1], *arrays)
    return tuple(
        _add_pieces(partial, pieces.ends, array, config=config, held=held, launch=sum_launch)
        for partial, array in ((dk, key), (dv, value))
    )


class Lists(NamedTuple):
    """For each (sequence, key/value head, block), in this order: the queries that chose it, ascending."""

    query: Int32[Array, "L"]  # all lists, one after the other
    ends: Int32[Array, "BKM"]  # where each ends


class Pieces(NamedTuple):
    """Lists cut into pieces of at most `PIECE` queries; unused ones are empty."""

    block: Int32[Array, "P"]  # index of the list
    begin: Int32[Array, "P"]
    end: Int32[Array, "P"]
    list_begin: Int32[Array, "P"]
    ends: Int32[Array, "BKM"]  # where each list's pieces end


def invert(blocks: Int32[Array, "B T K A"], *, num_blocks: int) -> Lists:
    batch, length, kv_heads, slots = blocks.shape
    which = jnp.arange(batch * kv_heads, dtype=jnp.int32).reshape(batch, 1, kv_heads, 1) * num_blocks
    num_lists = batch * kv_heads * num_blocks
    lists = jnp.where(blocks < 0, num_lists, which + blocks).swapaxes(1, 2)
    queries = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[:, None], (length, slots))
    queries = jnp.broadcast_to(queries[None, None], lists.shape)
    lists, queries = lists.reshape(-1), queries.reshape(-1)
    if (num_lists + 1) * length < 2**32:
        # One number for both, for sorting one array is the fastest there is.
        packed = jnp.sort(lists.astype(jnp.uint32) * jnp.uint32(length) + queries.astype(jnp.uint32))
        lists, queries = (packed // length).astype(jnp.int32), (packed % length).astype(jnp.int32)
    else:
        lists, queries = lax.sort((lists, queries), num_keys=1, is_stable=True)
    ends = jnp.searchsorted(lists, jnp.arange(num_lists, dtype=jnp.int32), side="right")
    return Lists(queries, ends.astype(jnp.int32))


def cut(lists: Lists) -> Pieces:
    num_lists = lists.ends.shape[0]
    begins = jnp.concatenate([jnp.zeros((1,), jnp.int32), lists.ends[:-1]])
    ends = jnp.cumsum(-(-(lists.ends - begins) // PIECE), dtype=jnp.int32)
    num_pieces = lists.query.shape[0] // PIECE + num_lists
    piece = jnp.arange(num_pieces, dtype=jnp.int32)
    block = jnp.searchsorted(ends, piece, side="right").astype(jnp.int32)
    used = block < num_lists
    block = jnp.minimum(block, num_lists - 1)
    before = jnp.where(block > 0, ends[block - 1], 0)
    begin = begins[block] + (piece - before) * PIECE
    end = jnp.minimum(begin + PIECE, lists.ends[block])
    return Pieces(block, jnp.where(used, begin, 0), jnp.where(used, end, 0), begins[block], ends)


def _dkv_kernel(
    list_ref: Any, block_ref: Any, begin_ref: Any, end_ref: Any, list_begin_ref: Any, *refs: Any, tile, scale, config, held, holes
) -> None:
    low_ref, high_ref, q_ref, dout_ref, gate_ref, lse_ref, delta_ref, k_ref, v_ref, dk_ref, dv_ref = refs
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    num_keys, kv_heads, group = k_ref.shape[1], k_ref.shape[2], q_ref.shape[3]
    num_blocks = -(-num_keys // config.select_block)
    piece = pl.program_id(0)
    which, begin, end, list_begin = (ref[piece] for ref in (block_ref, begin_ref, end_ref, list_begin_ref))
    block, head, sequence = _place(which, num_blocks, kv_heads)

    in_block = pl.program_id(1) * held + lax.iota(jnp.int32, held)
    key_index = block * config.select_block + in_block
    exists = (in_block < config.select_block) & (key_index < num_keys) & (begin < end)
    here, there = jnp.full((held,), sequence, jnp.int32), jnp.full((held,), head, jnp.int32)
    key = flash.load_parts(k_ref, (here, key_index, there), q_parts, exists)
    value = flash.load_parts(v_ref, (here, key_index, there), v_parts, exists)
    padded = flash.next_power_of_2(group)
    per_tile = max(1, tile.rows // padded)
    in_list, in_group = flash.divide(lax.iota(jnp.int32, per_tile * padded), padded)
    here, there = jnp.full_like(in_group, sequence), jnp.full_like(in_group, head)

    def step(i: Any, sums: Any, masked: bool) -> Any:
        place = begin + i * per_tile + in_list
        live = in_group < group if padded != group else None
        if masked:
            live = (place < end) & (in_group < group)
        token = flash.load_rows(list_ref, (place,), live)
        where = (here, token, there, in_group)
        query = flash.load_parts(q_ref, where, q_parts, live)
        dout = flash.load_parts(dout_ref, where, v_parts, live)
        gate, lse, delta = (flash.load_rows(ref, where, live) for ref in (gate_ref, lse_ref, delta_ref))
        # [keys, rows]
        weights = jnp.exp2(flash.dot_parts(key, query) * (scale * flash.LOG2E) - lse[None, :]) * gate[None, :]
        dscores = flash.dot_parts(value, dout) - delta[None, :]
        if masked:
            low, high = (flash.load_rows(ref, (here, token), live) for ref in (low_ref, high_ref))
            visible = (low[None, :] <= key_index[:, None]) & (key_index[:, None] < high[None, :])
            weights = jnp.where(visible, weights, 0.0)
            dscores = jnp.where(visible, dscores, 0.0)
        dscores = weights * dscores
        dk, dv = sums
        dk = tuple(total + flash.dot(dscores.astype(x.dtype), x) for total, x in zip(dk, query, strict=True))
        dv = tuple(total + flash.dot(weights.astype(x.dtype), x) for total, x in zip(dv, dout, strict=True))
        return dk, dv

    sums = tuple(tuple(jnp.zeros((held, part.width), jnp.float32) for part in parts) for parts in (q_parts, v_parts))
    # Lists ascend, so only the first l' queries of a list can lie inside its block and see a part of it.
    count, full = flash.ceil_div(end - begin, per_tile), (end - begin) // per_tile
    inside_block = (begin == list_begin).astype(jnp.int32) * -(-config.select_block // per_tile)
    dk, dv = flash.over_tiles(0, count if holes else inside_block, full, count, step, sums)
    out, inside = (jnp.full((held,), piece, jnp.int32), in_block), in_block < config.select_block
    flash.store_parts(dk_ref, out, q_parts, tuple(x * scale for x in dk), inside)
    flash.store_parts(dv_ref, out, v_parts, dv, inside)


def _add_pieces(
    partials: Float[Array, "P X D"],
    piece_ends: Int32[Array, "BKM"],
    like: Float[Array, "B S K D"],
    *,
    config: Config,
    held: int,
    launch: Launch,
) -> Float[Array, "B S K D"]:
    """Each block's gradient, its pieces added in their order."""
    out = jax.ShapeDtypeStruct(like.shape, like.dtype)
    kernel = functools.partial(_sum_kernel, config=config, held=held)
    return launch(
        kernel,
        "nsa_selected_dkv_sum",
        grid=(piece_ends.shape[0], -(-config.select_block // held)),
        out_shape=out,
    )(partials, piece_ends)


def _sum_kernel(partials_ref: Any, ends_ref: Any, out_ref: Any, *, config, held) -> None:
    _, num_keys, kv_heads, size = out_ref.shape
    parts, num_blocks = flash.head_parts(size), -(-num_keys // config.select_block)
    which = pl.program_id(0)
    block, head, sequence = _place(which, num_blocks, kv_heads)
    in_block = pl.program_id(1) * held + lax.iota(jnp.int32, held)
    key_index, inside = block * config.select_block + in_block, in_block < config.select_block

    def step(piece: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        more = flash.load_parts(partials_ref, (jnp.full_like(in_block, piece), in_block), parts, inside)
        return tuple(total + part for total, part in zip(sums, more, strict=True))

    begin = ends_ref[jnp.maximum(which - 1, 0)] * (which > 0).astype(jnp.int32)
    sums = tuple(jnp.zeros((held, part.width), jnp.float32) for part in parts)
    sums = lax.fori_loop(begin, ends_ref[which], step, sums)
    where = (jnp.full_like(in_block, sequence), key_index, jnp.full_like(in_block, head))
    flash.store_parts(out_ref, where, parts, sums, inside & (key_index < num_keys))


# --------------------------------------------------------------------------------------------------------------- helpers


def _held_keys(config: Config) -> int:
    """Keys of a block that a program holds: a power of two; a long block is read in parts."""
    return max(16, min(MAX_KEYS, flash.next_power_of_2(config.select_block)))


def _place(which: Any, num_blocks: int, kv_heads: int) -> tuple[Any, Any, Any]:
    """Block, key/value head and sequence of a list."""
    which, block = flash.divide(which, num_blocks)
    sequence, head = flash.divide(which, kv_heads)
    return block, head, sequence


class _Reads:
    """The keys that one query reads, in tiles: a block, or a part of a long one."""

    def __init__(self, blocks_ref: Any, low_ref: Any, high_ref: Any, config: Config):
        query = pl.program_id(0)
        self.blocks_ref, self.query, self.size = blocks_ref, query, config.select_block
        self.low, self.high, self.held = low_ref[query], high_ref[query], _held_keys(config)
        self.parts = -(-self.size // self.held)
        slots = blocks_ref.shape[1]
        lane = lax.iota(jnp.int32, flash.next_power_of_2(slots))
        where = (jnp.full_like(lane, query), lane)
        chosen = pltriton.load(blocks_ref.at[where], mask=lane < slots, other=-1) >= 0
        self.count = jnp.sum(chosen.astype(jnp.int32)) * self.parts
        # Blocks ascend, so only the first may begin before the query's segment, and only the last may hold later tokens.
        whole = self.parts * self.held == self.size
        self.inner = (self.low > 0).astype(jnp.int32) * self.parts if whole else self.count
        self.outer = self.count - self.parts if whole else self.count

    def keys(self, tile: Any, masked: bool) -> tuple[Array, Array | None]:
        """Indices of a tile's keys, and which of them the query reads (None: all)."""
        slot, part = flash.divide(tile, self.parts)
        block = self.blocks_ref[self.query, slot]
        in_block = part * self.held + lax.iota(jnp.int32, self.held)
        index = block * self.size + in_block
        if not masked:
            return index, None
        return index, (in_block < self.size) & (self.low <= index) & (index < self.high)


def _one_query(q_ref: Any) -> tuple[tuple[Array, Array], Array | None]:
    """Token and head of each row of one query's group, and which rows exist (None: all)."""
    group = q_ref.shape[1]
    # Triton's dot wants 16 rows at least.
    num_rows = max(16, flash.next_power_of_2(group))
    head = lax.iota(jnp.int32, num_rows)
    return (jnp.full_like(head, pl.program_id(0)), head), None if group == num_rows else head < group


def _specs(arrays: Any) -> Any:
    return jax.tree.map(lambda array: flash.whole(array, head_axis=2 if array.ndim > 2 else None), arrays)
