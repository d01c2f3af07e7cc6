"""Attention to the tokens of the selected blocks, one softmax over all of them (eq. 12 of arXiv 2502.11089), by query.

A program holds one query's group and passes over its blocks; grid (query, key/value head, sequence). The forward program
also forms the gated sum with the other branches' outputs, and dq adds what they gave. Keys are read from the L2 cache anew
by every query, which a large group makes good; for small ones, and for dk and dv, see `selected_by_block.py`.
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
from pallas_kernels.flash import Config, Launch, Ranges
from pallas_kernels.range_attention import Grouped, QuerySide, RowValues

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
        in_specs=range_attention.specs(inputs),
        out_specs=range_attention.specs((out, out, lse)),
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
    state = flash.over_tiles(
        0, reads.inner, reads.outer, reads.count, step, flash.softmax_start(where[0].shape[0], v_parts)
    )
    outs, lse = flash.softmax_end(state, scale)
    flash.store_parts(slc_ref, where, v_parts, outs, live)
    flash.store_rows(lse_ref, where, lse, live)
    total = flash.gated_sum(gates_ref, where, v_parts, (cmp_ref, win_ref), outs, live)
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
        in_specs=range_attention.specs(inputs),
        out_specs=range_attention.specs(dq),
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


# --------------------------------------------------------------------------------------------------------------- helpers


def held_keys(config: Config) -> int:
    """Keys of a block that a program holds: a power of two; a long block is read in parts."""
    return max(16, min(MAX_KEYS, flash.next_power_of_2(config.select_block)))


class _Reads:
    """The keys that one query reads, in tiles: a block, or a part of a long one."""

    def __init__(self, blocks_ref: Any, low_ref: Any, high_ref: Any, config: Config):
        query = pl.program_id(0)
        self.blocks_ref, self.query, self.size = blocks_ref, query, config.select_block
        self.low, self.high, self.held = low_ref[query], high_ref[query], held_keys(config)
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
