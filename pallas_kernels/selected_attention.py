"""Attention to the tokens of the selected blocks, one softmax over all of them (eq. 12 of arXiv 2502.11089), by query.

A program holds the groups of a few adjacent queries and passes over the union of their blocks, in which each query reads
those that it chose; grid (tile of queries, key/value head, sequence). Keys come from the L2 cache anew for every tile, and
that bounds these kernels: the more of their choices neighbours share, the more a union saves. The forward program also
forms the gated sum with the other branches' outputs, and dq adds what they gave.

For small groups, which fill too little of a tile, and for dk and dv, see `selected_by_block.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from pallas_kernels import flash, range_attention
from pallas_kernels.flash import Config, Launch, Ranges, Tile
from pallas_kernels.positions import BlockRanges
from pallas_kernels.range_attention import Grouped, QuerySide, RowValues

MAX_UNION = 256  # entries of a union, before it is formed; a query has a bit of 32


class Sum(NamedTuple):
    """The gates, and the other branches' outputs, for the gated sum (eq. 5)."""

    gates: Float[Array, "B T K G 3"]  # compressed, selected, window
    out_cmp: Float[Array, "B T K G V"]
    out_win: Float[Array, "B T K G V"]


class Forced(NamedTuple):
    """Blocks that every query chooses are read by many queries at once, apart from the others."""

    ranges: tuple[Ranges, ...]  # positions.forced_ranges
    launch: Launch


def free_blocks(blocks: Int32[Array, "B T K A"], candidates: BlockRanges, *, config: Config) -> Int32[Array, "B T K F"]:
    """Of the kernels' own choice, what was not forced: of 5 with 1 first and 2 last, `0 3 6 8 9` leaves `3 6`."""
    # Blocks ascend: the first come first, and where n are chosen the last come last.
    free = blocks[..., config.num_initial : blocks.shape[-1] - config.num_local]
    if free.shape[-1] == 0:
        # Arrays have no axis of length 0 for a kernel to read.
        return jnp.full((*blocks.shape[:-1], 1), flash.NO_BLOCK, jnp.int32)
    first_local = candidates.own - config.num_local + 1
    return jnp.where(free < first_local[:, :, None, None], free, flash.NO_BLOCK)


class Kept(NamedTuple):
    """What the forward pass of the selected branch keeps for its backward pass."""

    out: Float[Array, "B T K G V"]
    lse: RowValues  # base 2


# ---------------------------------------------------------------------------------------------------------------- unions


class Unions(NamedTuple):
    """For each tile of adjacent queries, the blocks that any of them chose: ascending, -1 in unused slots."""

    blocks: Int32[Array, "B tiles K E"]
    readers: Int32[Array, "B tiles K E"]  # bit r: the tile's query r chose it


def unions(blocks: Int32[Array, "B T K A"], queries: int, *, interpret: bool) -> Unions:
    """Of tiles of that many queries: with 2, `0 3 7` and `0 4 7` give `0 3 4 7 -1 -1`, read by `3 1 2 3`."""
    batch, length, kv_heads, slots = blocks.shape
    if queries == 1:
        return Unions(blocks, (blocks >= 0).astype(jnp.int32))
    num_tiles = -(-length // queries)
    width = flash.next_power_of_2(queries * slots)
    out = jax.ShapeDtypeStruct((batch, num_tiles, kv_heads, queries * slots), jnp.int32)
    launch = Launch(Tile(queries, 0, max(1, min(8, width**2 // 4096)), 1), interpret)
    return Unions(
        *launch(
            functools.partial(_unions_kernel, queries=queries),
            "nsa_unions",
            grid=(num_tiles, kv_heads, batch),
            in_specs=[flash.specs(blocks)],
            out_specs=flash.specs((out, out)),
            out_shape=(out, out),
        )(blocks)
    )


def _unions_kernel(blocks_ref: Any, union_ref: Any, readers_ref: Any, *, queries: int) -> None:
    """An entry's place is the number of lower blocks; the first of equal entries stands for all."""
    length, slots = blocks_ref.shape
    tile, most = pl.program_id(0), queries * slots
    entry = lax.iota(jnp.int32, flash.next_power_of_2(most))
    reader, slot = flash.divide(entry, slots)
    exists = (entry < most) & (tile * queries + reader < length)
    block = pltriton.load(blocks_ref.at[tile * queries + reader, slot], mask=exists, other=flash.NO_BLOCK)
    same = block[:, None] == block[None, :]
    earlier = entry[None, :] < entry[:, None]
    first = jnp.max((same & earlier).astype(jnp.int32), axis=1) == 0
    used = first & (block >= 0)
    # What stands for no block goes behind the blocks, each entry at a place of its own.
    order = jnp.where(used, block, 2**30 + entry)
    place = flash.count(order[None, :] < order[:, None], axis=1)
    readers = jnp.sum(jnp.where(same, (jnp.int32(1) << reader)[None, :], 0), axis=1, dtype=jnp.int32)
    index, written = jnp.full_like(entry, tile), entry < most
    pltriton.store(union_ref.at[index, place], jnp.where(used, block, flash.NO_BLOCK), mask=written)
    pltriton.store(readers_ref.at[index, place], jnp.where(used, readers, 0), mask=written)


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
    holes: bool,
    forced: Forced | None,
    launch: Launch,
    keep: bool,
) -> tuple[Float[Array, "B T K G V"], Kept | None]:
    """The gated sum of the three branches, and what the backward pass wants if it is to be kept.

    Args:
        blocks: ascending, unused slots (-1) last; with `forced`, `free_blocks` of the choice.
        holes: as in `range_attention.forward`.
        forced: to read beside `blocks`.
        tokens: what a query may read of the tokens, `positions.token_ranges`.
    """
    _, length, kv_heads, group, _ = query.shape
    outs = result_shapes(query, value, keep=keep)
    queries = queries_per_tile(launch.tile, group, blocks.shape[-1])
    read = unions(blocks, queries, interpret=launch.interpret)
    inputs: tuple[Any, ...] = (*read, *tokens, query, key, value, *branches)
    if forced is not None:
        inputs += forced_forward(query, key, value, forced, scale=scale, holes=holes)
    kernel = functools.partial(_forward_kernel, queries=queries, held=held_keys(config, launch.tile))
    out, *kept = launch(
        functools.partial(kernel, scale=scale, config=config, num_results=len(outs)),
        "nsa_selected_forward",
        grid=(pl.cdiv(length, queries), kv_heads, query.shape[0]),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs(outs),
        out_shape=outs,
        # A program reads its own rows of what was begun, and then writes its results there.
        input_output_aliases={} if forced is None else {len(inputs) - 2: 0},
    )(*inputs)
    return out, Kept(*kept) if keep else None


def _forward_kernel(*refs: Any, queries: int, held: int, scale: float, config: Config, num_results: int) -> None:
    *read_refs, q_ref, k_ref, v_ref, gates_ref, cmp_ref, win_ref = refs[:10]
    forced_refs, result_refs = refs[10:-num_results], refs[-num_results:]
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    rows = _Rows(q_ref, queries)
    reads = _Reads(read_refs, rows, config, held)
    query = flash.load_parts(q_ref, rows.index, q_parts, rows.live)

    def step(j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
        key_index, chosen, visible, readable = reads.keys(j, masked)
        key = flash.load_parts(k_ref, (key_index,), q_parts, readable)
        value = flash.load_parts(v_ref, (key_index,), v_parts, readable)
        return flash.softmax_step(state, flash.dot_parts(query, key), scale, value, visible, chosen)

    state = softmax_begin(forced_refs, rows.index, rows.live, v_parts, scale)
    outs, lse = flash.softmax_end(reads.over_tiles(step, state), scale)
    total = flash.gated_sum(gates_ref, rows.index, v_parts, (cmp_ref, win_ref), outs, rows.live)
    store_results(result_refs, rows.index, v_parts, total, outs, lse, rows.live)


def softmax_begin(
    forced_refs: tuple[Any, ...],
    index: tuple[Array, ...],
    live: Array | None,
    parts: tuple[flash.Part, ...],
    scale: float,
) -> flash.Softmax:
    """With what `forced_forward` read, if it did."""
    if not forced_refs:
        return flash.softmax_start(index[0].shape[0], parts)
    forced_ref, forced_lse_ref = forced_refs
    outs = flash.load_parts(forced_ref, index, parts, live)
    return flash.softmax_resume(outs, flash.load_rows(forced_lse_ref, index, live), scale)


def forced_forward(
    query: Grouped,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    forced: Forced,
    *,
    scale: float,
    holes: bool,
) -> tuple[Float[Array, "B T K G V"], RowValues]:
    """Attention to the forced blocks alone, and its log-sum-exp."""
    more: dict[str, Any] = dict(scale=scale, holes=holes, launch=forced.launch, name="nsa_selected_forced")
    return range_attention.forward(query, key, value, *forced.ranges, **more)


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
    """dq of these blocks plus `added` (float32), in `dtype`."""
    batch, length, kv_heads, group, _ = rows.query.shape
    dq = jax.ShapeDtypeStruct(rows.query.shape, dtype)
    queries = queries_per_tile(launch.tile, group, blocks.shape[-1])
    inputs = (*unions(blocks, queries, interpret=launch.interpret), *tokens, *rows, key, value, added)
    return launch(
        functools.partial(_dq_kernel, queries=queries, held=held_keys(config, launch.tile), scale=scale, config=config),
        "nsa_selected_dq",
        grid=(pl.cdiv(length, queries), kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs(dq),
        out_shape=dq,
    )(*inputs)


def _dq_kernel(*refs: Any, queries: int, held: int, scale: float, config: Config) -> None:
    *read_refs, q_ref, dout_ref, gate_ref, lse_ref, delta_ref, k_ref, v_ref, added_ref, dq_ref = refs
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    rows = _Rows(q_ref, queries)
    reads = _Reads(read_refs, rows, config, held)
    query = flash.load_parts(q_ref, rows.index, q_parts, rows.live)
    dout = flash.load_parts(dout_ref, rows.index, v_parts, rows.live)
    gate, lse, delta = (flash.load_rows(ref, rows.index, rows.live) for ref in (gate_ref, lse_ref, delta_ref))
    row = flash.gradient_rows(query, dout, gate, lse, delta, scale)

    def step(j: Any, sums: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
        key_index, chosen, visible, readable = reads.keys(j, masked)
        key = flash.load_parts(k_ref, (key_index,), q_parts, readable)
        value = flash.load_parts(v_ref, (key_index,), v_parts, readable)
        return flash.dq_step(sums, row, key, value, scale, visible, chosen)

    sums = reads.over_tiles(step, tuple(jnp.zeros((rows.count, part.width), jnp.float32) for part in q_parts))
    added = flash.load_parts(added_ref, rows.index, q_parts, rows.live)
    dq = tuple(total + more for total, more in zip(sums, added, strict=True))
    flash.store_parts(dq_ref, rows.index, q_parts, dq, rows.live)


# --------------------------------------------------------------------------------------------------------------- helpers


def result_shapes(query: Grouped, value: Array, *, keep: bool) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The gated sum, and what is kept."""
    out = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), value.dtype)
    return (out, out, jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32)) if keep else (out,)


def store_results(
    refs: tuple[Any, ...],
    index: tuple[Array, ...],
    parts: tuple[flash.Part, ...],
    total: tuple[Array, ...],
    outs: tuple[Array, ...],
    lse: Array,
    live: Array | None,
) -> None:
    """Into arrays of `result_shapes`."""
    total_ref, *kept_refs = refs
    if kept_refs:
        out_ref, lse_ref = kept_refs
        flash.store_parts(out_ref, index, parts, outs, live)
        flash.store_rows(lse_ref, index, lse, live)
    flash.store_parts(total_ref, index, parts, total, live)


def held_keys(config: Config, tile: Tile) -> int:
    """Keys of a block that a program holds at once: a power of two; a longer block is read in parts."""
    return max(16, min(tile.keys, flash.next_power_of_2(config.select_block)))


def queries_per_tile(tile: Tile, group: int, slots: int) -> int:
    """As many as the tile has rows for, and `unions` entries."""
    return max(1, min(tile.rows // flash.next_power_of_2(group), MAX_UNION // flash.next_power_of_2(slots)))


class _Rows:
    """The rows of a tile of adjacent queries."""

    def __init__(self, q_ref: Any, queries: int):
        num_tokens, group, _ = q_ref.shape
        padded = flash.next_power_of_2(group)
        # Triton's dot wants 16 rows at least.
        self.count = max(16, queries * padded)
        self.query, head = flash.divide(lax.iota(jnp.int32, self.count), padded)
        self.queries, self.first = queries, pl.program_id(0) * queries
        self.last = jnp.minimum(self.first + queries, num_tokens) - 1
        self.token = self.first + self.query
        self.index = (self.token, head)
        full = padded == group and self.count == queries * padded and num_tokens % queries == 0
        exists = (self.query < queries) & (self.token < num_tokens) & (head < group)
        self.live = None if full else exists


class _Reads:
    """The keys that a tile of queries reads, in tiles: a block of their union, or a part of a long one."""

    def __init__(self, refs: Any, rows: _Rows, config: Config, held: int):
        union_ref, self.readers_ref, low_ref, high_ref = refs
        self.union_ref, self.rows, self.size = union_ref, rows, config.select_block
        self.tile, self.held = pl.program_id(0), held
        self.parts = -(-self.size // self.held)
        self.low, self.high = (flash.load_rows(ref, (rows.token,), rows.live) for ref in (low_ref, high_ref))
        entries = union_ref.shape[1]
        lane = lax.iota(jnp.int32, flash.next_power_of_2(entries))
        where = (jnp.full_like(lane, self.tile), lane)
        union = pltriton.load(union_ref.at[where], mask=lane < entries, other=flash.NO_BLOCK)
        # A block needs a mask for its tokens if it holds one that a query of the tile may not read.
        begin, end = low_ref[rows.last], high_ref[rows.first]
        before = (union >= 0) & (union * self.size < begin)
        until = (union >= 0) & ((union + 1) * self.size <= end)
        count, inner, outer = (flash.count(these) for these in (union >= 0, before, until))
        whole = self.parts * self.held == self.size
        # Of the last block, which is most often the queries' own, the parts that begin at keys to come are left out.
        reached = jnp.clip(high_ref[rows.last] - jnp.max(union) * self.size, 0, self.size)
        self.count = (count - 1) * self.parts + flash.ceil_div(reached, self.held)
        # Parts of a block that stick out of it are masked.
        self.inner = inner * self.parts if whole else self.count
        self.outer = outer * self.parts if whole else self.count

    def over_tiles(self, step: Any, state: Any) -> Any:
        return flash.over_tiles(0, self.inner, self.outer, self.count, step, state)

    def keys(self, tile: Any, masked: bool) -> tuple[Array, Array | None, Array | None, Array | None]:
        """A tile's keys; which rows chose its block, and which of them see which key; which keys may be loaded.

        None stands for all. A key that no row reads may hold anything, and 0 * NaN is NaN.
        """
        slot, part = flash.divide(tile, self.parts)
        block = self.union_ref[self.tile, slot]
        in_block = part * self.held + lax.iota(jnp.int32, self.held)
        index = block * self.size + in_block
        shape = (self.rows.count, self.held)
        chosen = visible = readable = None
        if self.rows.queries > 1:
            chosen = ((self.readers_ref[self.tile, slot] >> self.rows.query) & 1) == 1
        if masked:
            visible = (self.low[:, None] <= index[None, :]) & (index[None, :] < self.high[:, None])
            visible &= (in_block < self.size)[None, :]
            if chosen is not None:
                visible &= jnp.broadcast_to(chosen[:, None], shape)
            readable = jnp.max(visible.astype(jnp.int32), axis=0) > 0
        return index, chosen, visible, readable
