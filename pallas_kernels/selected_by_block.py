"""Attention to the selected blocks, by block: a program holds one block's keys and passes over queries that chose it.

So keys are read once, and the rows of many queries fill the tensor cores even if a group has one head. What a query reads
from its blocks then comes in parts: each (query, slot) has a partial output with its log-sum-exp, or a partial dq, which a
second kernel sums in the order of the slots,

    o = sum_a w_a o_a,  w_a = 2^(lse_a - lse),  lse = log2 sum_a 2^lse_a;      dq = sum_a dq_a

Partial results are kept in the values' dtype, for as many heads at a time as `MAX_PARTIALS` bytes hold, at least one.

dk and dv come by block whatever the group: one program for each piece of a block's list of queries, and the block's pieces
are summed in their order. Work is balanced, though every query reads the first block, and there are no atomics.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from pallas_kernels import flash
from pallas_kernels.flash import Config, Launch, Ranges, Tile
from pallas_kernels.inverse_lists import Pieces, cut, invert
from pallas_kernels.range_attention import Grouped, QuerySide
from pallas_kernels.selected_attention import (
    Forced,
    Kept,
    Sum,
    forced_forward,
    held_keys,
    result_shapes,
    softmax_begin,
    store_results,
)
from pallas_kernels.tiles import Tiles

MAX_PARTIALS = 2**30


def goes_by_block(tiles: Tiles, config: Config) -> bool:
    """Whether the forward pass and dq do; where one program cannot hold a block, they go by query."""
    held = min(held_keys(config, tile) for tile in (tiles.selected_by_block, tiles.selected_dkv))
    return tiles.by_block and config.select_block <= held


class Gradients(NamedTuple):
    """Of the selected branch; `dq` is None where it is not formed by block."""

    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K V"]
    dq: Grouped | None


# --------------------------------------------------------------------------------------------------------------- forward


def selected_forward_by_block(
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
    sum_launch: Launch,
    keep: bool,
) -> tuple[Float[Array, "B T K G V"], Kept | None]:
    """As `selected_attention.selected_forward`."""
    size = value.shape[-1]
    kernel = functools.partial(_partial_forward_kernel, tile=launch.tile, scale=scale, config=config, holes=holes)

    def some_heads(head: Array, blocks: Array, query: Array, branches: Sum, apart: tuple[Array, ...]) -> Any:
        outs = result_shapes(query, value, keep=keep)
        lists, pieces = _lists(blocks, key, config)
        partial = (*blocks.shape, query.shape[3])
        partials = (
            jax.ShapeDtypeStruct((*partial, size), value.dtype),
            jax.ShapeDtypeStruct(partial, jnp.float32),
        )
        found = launch(kernel, "nsa_selected_partial_forward", grid=pieces.block.shape, out_shape=partials)(
            lists.query, *pieces[:-1], head, *tokens, blocks, query, key, value
        )
        out, *kept = _by_rows(
            functools.partial(_sum_forward_kernel, tile=sum_launch.tile, num_results=len(outs)),
            "nsa_selected_sum_forward",
            (blocks, *found, *branches, *apart),
            outs,
            launch=sum_launch,
        )
        return out, Kept(*kept) if keep else None

    bytes_per_head = blocks[:, :, 0].size * query.shape[3] * size * value.dtype.itemsize
    apart = () if forced is None else forced_forward(query, key, value, forced, scale=scale, holes=holes)
    return _over_heads(some_heads, bytes_per_head, blocks, query, branches, apart)


def _partial_forward_kernel(*refs: Any, tile: Tile, scale: float, config: Config, holes: bool) -> None:
    *piece_refs, low_ref, high_ref, blocks_ref, q_ref, k_ref, v_ref, out_ref, lse_ref = refs
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    piece = _Piece(piece_refs, low_ref, high_ref, q_ref, k_ref, tile, config, part=jnp.int32(0))
    key, value = piece.load_keys(k_ref, q_parts), piece.load_keys(v_ref, v_parts)

    def step(rows: _PieceRows, carry: Any, masked: bool) -> Any:
        query = flash.load_parts(q_ref, rows.where, q_parts, rows.live)
        visible = piece.visible(rows).T if masked else None
        state = flash.softmax_start(rows.token.shape[0], v_parts)
        seen_value = value if visible is None else piece.seen(value, visible)
        state = flash.softmax_step(state, flash.dot_parts(query, key), scale, seen_value, visible)
        outs, lse = flash.softmax_end(state, scale)
        where = piece.slot(rows, blocks_ref)
        flash.store_parts(out_ref, where, v_parts, outs, rows.live)
        flash.store_rows(lse_ref, where, lse, rows.live)
        return carry

    piece.over_tiles(step, jnp.int32(0), holes=holes, ahead=False)


def _sum_forward_kernel(
    blocks_ref: Any, partial_ref: Any, partial_lse_ref: Any, *refs: Any, tile: Tile, num_results: int
) -> None:
    gates_ref, cmp_ref, win_ref = refs[:3]
    forced_refs, result_refs = refs[3:-num_results], refs[-num_results:]
    num_tokens, slots, group, size = partial_ref.shape
    parts = flash.head_parts(size)
    rows = flash.rows_from(pl.program_id(0) * tile.rows, tile.rows, group, num_tokens)
    where = (rows.token, rows.head)

    def step(slot: Any, state: flash.Softmax) -> flash.Softmax:
        at = jnp.full_like(rows.token, slot)
        used = rows.live & (flash.load_rows(blocks_ref, (rows.token, at), rows.live) >= 0)
        lse = jnp.where(used, flash.load_rows(partial_lse_ref, (rows.token, at, rows.head), used), flash.MASKED)
        values = flash.load_parts(partial_ref, (rows.token, at, rows.head), parts, used)
        highest = jnp.maximum(state.highest, lse)
        weight, shrink = jnp.where(used, flash.exp2(lse - highest), 0.0), flash.exp2(state.highest - highest)
        sums = tuple(
            total * shrink[:, None] + weight[:, None] * more.astype(jnp.float32)
            for total, more in zip(state.sums, values, strict=True)
        )
        return flash.Softmax(highest, state.total * shrink + weight, sums)

    # The scores are in base 2 already.
    scale = 1.0 / flash.LOG2E
    state = lax.fori_loop(0, slots, step, softmax_begin(forced_refs, where, rows.live, parts, scale))
    outs, lse = flash.softmax_end(state, scale)
    total = flash.gated_sum(gates_ref, where, parts, (cmp_ref, win_ref), outs, rows.live)
    store_results(result_refs, where, parts, total, outs, lse, rows.live)


# -------------------------------------------------------------------------------------------------------------- backward


def selected_gradients_by_block(
    rows: QuerySide,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    blocks: Int32[Array, "B T K A"],
    tokens: Ranges,
    added: Grouped | None,
    *,
    config: Config,
    scale: float,
    holes: bool,
    launch: Launch,
    sum_launch: Launch,
) -> Gradients:
    """dk and dv of the selected branch, 0 for a key that no query reads; with `added` also dq plus that, rounded.

    Args:
        holes: whether queries may begin to read inside a block, as with packed documents.
    """
    held = held_keys(config, launch.tile)
    kernel = functools.partial(
        _dkv_kernel, tile=launch.tile, scale=scale, config=config, holes=holes, with_dq=added is not None
    )

    def some_heads(head: Array, blocks: Array, rows: QuerySide, added: Grouped | None) -> Gradients:
        batch, _, kv_heads, group, size = rows.query.shape
        lists, pieces = _lists(blocks, key, config)
        num_pieces = pieces.block.shape[0]
        partials = [
            jax.ShapeDtypeStruct((num_pieces, config.select_block, array.shape[-1]), jnp.float32)
            for array in (key, value)
        ]
        if added is not None:
            partials.append(jax.ShapeDtypeStruct((*blocks.shape, group, size), key.dtype))
        found = launch(
            kernel,
            "nsa_selected_dkv",
            grid=(num_pieces, -(-config.select_block // held)),
            out_shape=partials,
        )(lists.query, *pieces[:-1], head, *tokens, *(() if added is None else (blocks,)), *rows, key, value)
        adding: dict[str, Any] = dict(dtype=key.dtype, config=config, held=held, launch=sum_launch)
        dk, dv = (
            _add_pieces(partial, pieces, shape=(batch, array.shape[1], kv_heads, array.shape[3]), **adding)
            for partial, array in zip(found, (key, value))
        )
        if added is None:
            return Gradients(dk, dv, None)
        [dq] = _by_rows(
            functools.partial(_sum_dq_kernel, tile=sum_launch.tile),
            "nsa_selected_sum_dq",
            (blocks, found[2], added),
            (jax.ShapeDtypeStruct(added.shape, key.dtype),),
            launch=sum_launch,
        )
        return Gradients(dk, dv, dq)

    if added is None:
        return some_heads(jnp.zeros((1,), jnp.int32), blocks, rows, None)
    bytes_per_head = blocks[:, :, 0].size * rows.query.shape[3] * rows.query.shape[4] * key.dtype.itemsize
    return _over_heads(some_heads, bytes_per_head, blocks, rows, added)


def _dkv_kernel(*refs: Any, tile: Tile, scale: float, config: Config, holes: bool, with_dq: bool) -> None:
    *piece_refs, low_ref, high_ref = refs[:8]
    blocks_ref, refs = (refs[8], refs[9:]) if with_dq else (None, refs[8:])
    q_ref, dout_ref, gate_ref, lse_ref, delta_ref, k_ref, v_ref, dk_ref, dv_ref, *dq_refs = refs
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    piece = _Piece(piece_refs, low_ref, high_ref, q_ref, k_ref, tile, config, part=pl.program_id(1))
    key, value = piece.load_keys(k_ref, q_parts), piece.load_keys(v_ref, v_parts)

    def step(rows: _PieceRows, sums: Any, masked: bool) -> Any:
        query = flash.load_parts(q_ref, rows.where, q_parts, rows.live)
        dout = flash.load_parts(dout_ref, rows.where, v_parts, rows.live)
        gate, lse, delta = (flash.load_rows(ref, rows.where, rows.live) for ref in (gate_ref, lse_ref, delta_ref))
        # [keys, rows]
        weights = flash.exp2(flash.dot_parts(key, query) * (scale * flash.LOG2E) - lse[None, :]) * gate[None, :]
        dscores = flash.dot_parts(value, dout) * scale - (delta * scale)[None, :]
        visible = piece.visible(rows) if masked else None
        if visible is not None:
            weights = jnp.where(visible, weights, 0.0)
            dscores = jnp.where(visible, dscores, 0.0)
        dscores = (weights * dscores).astype(key[0].dtype)
        if with_dq:
            seen_key = key if visible is None else piece.seen(key, visible.T)
            dq = tuple(flash.dot(dscores.T, part) for part in seen_key)
            flash.store_parts(dq_refs[0], piece.slot(rows, blocks_ref), q_parts, dq, rows.live)
        dk, dv = sums
        dk = tuple(total + flash.dot(dscores, x) for total, x in zip(dk, query, strict=True))
        dv = tuple(total + flash.dot(weights.astype(x.dtype), x) for total, x in zip(dv, dout, strict=True))
        return dk, dv

    sums = tuple(
        tuple(jnp.zeros((piece.held, part.width), jnp.float32) for part in parts) for parts in (q_parts, v_parts)
    )
    # To know rows ahead takes registers: on an H100 it saves 4 to 14% with three tiles under way, and costs 5% with two.
    dk, dv = piece.over_tiles(step, sums, holes=holes, ahead=tile.stages > 2 and not with_dq)
    out, inside = (
        (jnp.full_like(piece.in_block, pl.program_id(0)), piece.in_block),
        piece.in_block < config.select_block,
    )
    flash.store_parts(dk_ref, out, q_parts, dk, inside)
    flash.store_parts(dv_ref, out, v_parts, dv, inside)


def _sum_dq_kernel(blocks_ref: Any, partial_ref: Any, added_ref: Any, dq_ref: Any, *, tile: Tile) -> None:
    num_tokens, slots, group, size = partial_ref.shape
    parts = flash.head_parts(size)
    rows = flash.rows_from(pl.program_id(0) * tile.rows, tile.rows, group, num_tokens)
    where = (rows.token, rows.head)

    def step(slot: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        at = jnp.full_like(rows.token, slot)
        used = rows.live & (flash.load_rows(blocks_ref, (rows.token, at), rows.live) >= 0)
        more = flash.load_parts(partial_ref, (rows.token, at, rows.head), parts, used)
        return tuple(total + part.astype(jnp.float32) for total, part in zip(sums, more, strict=True))

    dq = lax.fori_loop(0, slots, step, flash.load_parts(added_ref, where, parts, rows.live))
    flash.store_parts(dq_ref, where, parts, dq, rows.live)


def _add_pieces(
    partials: Float[Array, "P X D"],
    pieces: Pieces,
    *,
    shape: tuple[int, int, int, int],
    dtype: Any,
    config: Config,
    held: int,
    launch: Launch,
) -> Float[Array, "B S K D"]:
    """Each block's gradient, its pieces added in their order."""
    return launch(
        functools.partial(_add_pieces_kernel, config=config, held=held),
        "nsa_selected_add_pieces",
        grid=(pieces.ends.shape[0], -(-config.select_block // held)),
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
    )(partials, pieces.ends)


def _add_pieces_kernel(partials_ref: Any, ends_ref: Any, out_ref: Any, *, config: Config, held: int) -> None:
    _, num_keys, kv_heads, size = out_ref.shape
    parts = flash.head_parts(size)
    which = pl.program_id(0)
    block, head, sequence = _place(which, -(-num_keys // config.select_block), kv_heads)
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


class _PieceRows(NamedTuple):
    """A tile of a piece's rows; `where` finds them in arrays `[B, T, K, G, ...]`."""

    where: tuple[Array, Array, Array, Array]
    token: Array
    live: Array | None


class _Piece:
    """One piece of a block's list of queries, and the block's keys (or a part of a long block's)."""

    def __init__(
        self, refs: Any, low_ref: Any, high_ref: Any, q_ref: Any, k_ref: Any, tile: Tile, config: Config, *, part: Any
    ):
        self.list_ref, which_ref, begin_ref, end_ref, list_begin_ref, head_ref = refs
        self.low_ref, self.high_ref, self.size = low_ref, high_ref, config.select_block
        num_keys = self.num_keys = k_ref.shape[1]
        _, _, kv_heads, group, _ = q_ref.shape
        piece = pl.program_id(0)
        self.begin, self.end, self.list_begin = begin_ref[piece], end_ref[piece], list_begin_ref[piece]
        self.block, self.head, self.sequence = _place(which_ref[piece], -(-num_keys // self.size), kv_heads)
        self.key_head = head_ref[0] + self.head
        self.held = held_keys(config, tile)
        self.in_block = part * self.held + lax.iota(jnp.int32, self.held)
        self.key_index = self.block * self.size + self.in_block
        self.exists = (self.in_block < self.size) & (self.key_index < num_keys) & (self.begin < self.end)
        self.group, padded = group, flash.next_power_of_2(group)
        self.per_tile = max(1, tile.rows // padded)
        self.in_list, self.in_group = flash.divide(lax.iota(jnp.int32, self.per_tile * padded), padded)

    def load_keys(self, ref: Any, parts: tuple[flash.Part, ...]) -> tuple[Array, ...]:
        where = (
            jnp.full_like(self.key_index, self.sequence),
            self.key_index,
            jnp.full_like(self.key_index, self.key_head),
        )
        return flash.load_parts(ref, where, parts, self.exists)

    def places(self, tile: Any) -> Array:
        return self.begin + tile * self.per_tile + self.in_list

    def live(self, tile: Any, masked: bool) -> Array | None:
        if masked:
            return (self.places(tile) < self.end) & (self.in_group < self.group)
        return self.in_group < self.group if self.group & (self.group - 1) else None

    def tokens(self, tile: Any, masked: bool) -> Array:
        """Of a tile's rows, 0 for those that are not `live`."""
        return flash.load_rows(self.list_ref, (self.places(tile),), self.live(tile, masked))

    def rows(self, tile: Any, token: Array, masked: bool) -> _PieceRows:
        here, there = jnp.full_like(token, self.sequence), jnp.full_like(token, self.head)
        return _PieceRows((here, token, there, self.in_group), token, self.live(tile, masked))

    def visible(self, rows: _PieceRows) -> Array:
        """`[keys, rows]`"""
        low, high = (
            flash.load_rows(ref, (rows.where[0], rows.token), rows.live) for ref in (self.low_ref, self.high_ref)
        )
        key_index = self.key_index[:, None]
        return (low[None, :] <= key_index) & (key_index < high[None, :]) & self.exists[:, None]

    def seen(self, keys: tuple[Array, ...], visible: Array) -> tuple[Array, ...]:
        """0 for a key that none of the rows (`visible` `[rows, keys]`) reads: it may hold anything, and 0 * NaN is NaN."""
        seen = jnp.max(visible.astype(jnp.int32), axis=0) > 0
        return tuple(jnp.where(seen[:, None], part, jnp.zeros_like(part)) for part in keys)

    def slot(self, rows: _PieceRows, blocks_ref: Any) -> tuple[Array, ...]:
        """Where a row's partial result belongs, in arrays `[B, T, K, A, G, ...]`: blocks ascend."""
        slots = blocks_ref.shape[3]
        shape = (rows.token.shape[0], flash.next_power_of_2(slots))
        here, token, there, head = rows.where
        lane = jnp.broadcast_to(lax.iota(jnp.int32, shape[1])[None, :], shape)
        where = (*(jnp.broadcast_to(i[:, None], shape) for i in (here, token, there)), lane)
        mask = lane < slots if rows.live is None else (lane < slots) & rows.live[:, None]
        chosen = pltriton.load(blocks_ref.at[where], mask=mask, other=flash.NO_BLOCK)
        slot = flash.count((chosen >= 0) & (chosen < self.block), axis=1)
        if rows.live is not None:
            # No two rows write to one place, not even those that are masked.
            slot = jnp.where(rows.live, slot, slots + lax.iota(jnp.int32, shape[0]))
        return here, token, there, slot, head

    def over_tiles(self, step: Callable[..., Any], state: Any, *, holes: bool, ahead: bool) -> Any:
        """`step(rows, state, masked)`.

        Args:
            ahead: whether to learn a tile early which rows come next, so that their loads need not wait for that.
        """
        count, full = flash.ceil_div(self.end - self.begin, self.per_tile), (self.end - self.begin) // self.per_tile
        # Lists ascend, so only the first l' queries of a list can lie inside its block and see a part of it.
        inside = flash.ceil_div(jnp.maximum(self.list_begin + self.size - self.begin, 0), self.per_tile)
        # The last block may be shorter, for all queries.
        inside = jnp.where((self.block + 1) * self.size <= self.num_keys, inside, count)
        whole = self.held * -(-self.size // self.held) == self.size
        bounds = (0, inside if whole and not holes else count, full, count)

        def read(tile: Any, state: Any, masked: bool) -> Any:
            return step(self.rows(tile, self.tokens(tile, masked), masked), state, masked)

        def read_ahead(tile: Any, carry: tuple[Array, Any], masked: bool) -> tuple[Array, Any]:
            token, state = carry
            upcoming = self.tokens(tile + 1, masked=True)
            return upcoming, step(self.rows(tile, token, masked), state, masked)

        if not ahead:
            return flash.over_tiles(*bounds, read, state)
        return flash.over_tiles(*bounds, read_ahead, (self.tokens(jnp.int32(0), masked=True), state))[1]


def _place(which: Any, num_blocks: int, kv_heads: int) -> tuple[Any, Any, Any]:
    """Block, key/value head and sequence of a list."""
    which, block = flash.divide(which, num_blocks)
    sequence, head = flash.divide(which, kv_heads)
    return block, head, sequence


def _lists(blocks: Array, key: Array, config: Config) -> Any:
    lists = invert(blocks, num_blocks=-(-key.shape[1] // config.select_block))
    return lists, cut(lists)


def _by_rows(kernel: Callable[..., None], name: str, inputs: Any, outs: Any, *, launch: Launch) -> Any:
    """A kernel over tiles of rows of `[B, T, K, ...]` arrays; outputs are `[B, T, K, G, ...]`."""
    batch, length, kv_heads, group = outs[0].shape[:4]
    return launch(
        kernel,
        name,
        grid=(pl.cdiv(length * group, launch.tile.rows), kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs(outs),
        out_shape=outs,
    )(*inputs)


def _over_heads(some_heads: Callable[..., Any], bytes_per_head: int, *arrays: Any) -> Any:
    """`some_heads(first head, *arrays of some heads)` for as many heads (axis 2) at a time as `MAX_PARTIALS` holds."""
    kv_heads = arrays[0].shape[2]
    most = max(1, MAX_PARTIALS // bytes_per_head)
    at_once = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= most)
    num_chunks = kv_heads // at_once
    if num_chunks == 1:
        return some_heads(jnp.zeros((1,), jnp.int32), *arrays)

    def one_chunk(chunk: Array) -> Any:
        head = chunk * at_once
        parts = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, head, at_once, axis=2), arrays)
        return some_heads(head[None], *parts)

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], kv_heads, *x.shape[4:])

    return jax.tree.map(joined, lax.map(one_chunk, jnp.arange(num_chunks, dtype=jnp.int32)))
