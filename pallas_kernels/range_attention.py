"""Attention in which each query reads one contiguous range of keys: the window and the compressed branch are both that.

    query t reads keys low[t] .. high[t] - 1, and neither bound ever decreases along t

so a tile of rows reads the keys between its first row's `low` and its last row's `high`, and needs no mask between its last
row's `low` and its first row's `high`. Positions, packing and visibility are all in the two arrays.

Forward and dq: a program holds a tile of rows and passes over tiles of keys; grid (tile of rows, key/value head, sequence),
the longest rows first. dq is formed of several branches at once, since they have the same rows. dk and dv: a program holds
a tile of keys and passes over the rows of a slice of the sequence that read it; grid (slice and tile of keys, key/value head,
sequence), so that programs side by side read the same rows, from the L2 cache; slices are summed in a fixed order. Products in
dk and dv are formed transposed, `[keys, rows]`, which is how the tensor cores want them next.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels import flash
from pallas_kernels.flash import Launch, Ranges, Tile

Grouped = Float[Array, "B T K G H"]  # queries, outputs and their gradients, by key/value head
RowValues = Float[Array, "B T K G"]  # one number for each token and head


class QuerySide(NamedTuple):
    """What a backward kernel reads for each row."""

    query: Grouped
    dout: Float[Array, "B T K G V"]  # gradient of the gated sum
    gate: RowValues
    lse: RowValues
    delta: RowValues  # dout . o, which is the gate's gradient


def deltas(dout: Float[Array, "B T K G V"], outs: tuple[Float[Array, "B T K G V"], ...]) -> list[RowValues]:
    """`dout . o` of each branch, which is its gate's gradient."""
    wide = dout.astype(jnp.float32)
    return [jnp.sum(wide * out.astype(jnp.float32), axis=-1) for out in outs]


# --------------------------------------------------------------------------------------------------------------- forward


def forward(
    query: Grouped,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *ranges: Ranges,
    scale: float,
    holes: bool,
    launch: Launch,
    name: str,
) -> tuple[Float[Array, "B T K G V"], RowValues]:
    """Outputs and log-sum-exps (base 2, of scaled scores); both 0 for a query that reads nothing.

    Args:
        ranges: one or more, of which no two share a key.
        holes: whether there may be keys between a tile's first and last that none of its rows reads. They may hold NaN.
    """
    if key.shape[1] == 0:
        nothing = jnp.zeros((*query.shape[:-1], value.shape[-1]), value.dtype)
        return nothing, jnp.zeros(query.shape[:-1], jnp.float32)
    batch, length, kv_heads, group, _ = query.shape
    out = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), value.dtype)
    lse = jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32)
    kernel = functools.partial(_forward_kernel, tile=launch.tile, scale=scale, holes=holes)
    inputs = (*(bound for pair in ranges for bound in pair), query, key, value)
    return launch(
        kernel,
        name,
        grid=(pl.cdiv(length * group, launch.tile.rows), kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs((out, lse)),
        out_shape=(out, lse),
    )(*inputs)


def _forward_kernel(*refs: Any, tile: Tile, scale: float, holes: bool) -> None:
    *range_refs, q_ref, k_ref, v_ref, o_ref, lse_ref = refs
    rows = _tile_of_rows(q_ref, tile)
    where = (rows.token, rows.head)
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    query = flash.load_parts(q_ref, where, q_parts, rows.live)

    def step(bounds: _Bounds, j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
        key_index = bounds.start(j) + lax.iota(jnp.int32, tile.keys)
        visible, readable = bounds.masks(key_index, holes) if masked else (None, None)
        key = flash.load_parts(k_ref, (key_index,), q_parts, readable)
        value = flash.load_parts(v_ref, (key_index,), v_parts, readable)
        return flash.softmax_step(state, flash.dot_parts(query, key), scale, value, visible)

    state = flash.softmax_start(tile.rows, v_parts)
    for low_ref, high_ref in zip(range_refs[::2], range_refs[1::2], strict=True):
        bounds = _bounds(low_ref, high_ref, rows, q_ref, tile)
        read = functools.partial(step, bounds)
        state = flash.over_tiles(0, bounds.inner, bounds.outer, bounds.num_tiles, read, state)
    outs, lse = flash.softmax_end(state, scale)
    flash.store_parts(o_ref, where, v_parts, outs, rows.live)
    flash.store_rows(lse_ref, where, lse, rows.live)


# -------------------------------------------------------------------------------------------------------------- backward


class Branch(NamedTuple):
    """What one branch gives to the gradient of the queries."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    ranges: tuple[Ranges, ...]  # of which no two share a key
    gate: RowValues
    lse: RowValues
    delta: RowValues  # dout . o, which is the gate's gradient


def query_gradient(
    query: Grouped,
    dout: Float[Array, "B T K G V"],
    branches: tuple[Branch, ...],
    *,
    scale: float,
    holes: bool,
    launch: Launch,
) -> Float32[Array, "B T K G H"]:
    """dq, summed over the branches; `holes` as in `forward`."""
    batch, length, kv_heads, group, _ = query.shape
    branches = tuple(branch for branch in branches if branch.key.shape[1])
    inputs: list[Array] = [query, dout]
    for branch in branches:
        inputs += [*branch[3:], branch.key, branch.value, *(bound for pair in branch.ranges for bound in pair)]
    dq = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    num_ranges = tuple(len(branch.ranges) for branch in branches)
    return launch(
        functools.partial(_dq_kernel, num_ranges=num_ranges, tile=launch.tile, scale=scale, holes=holes),
        "nsa_range_dq",
        grid=(pl.cdiv(length * group, launch.tile.rows), kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs(dq),
        out_shape=dq,
    )(*inputs)


def _dq_kernel(*refs: Any, num_ranges: tuple[int, ...], tile: Tile, scale: float, holes: bool) -> None:
    q_ref, dout_ref, *input_refs, dq_ref = refs
    refs_left = iter(input_refs)
    rows = _tile_of_rows(q_ref, tile)
    where = (rows.token, rows.head)
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(dout_ref.shape[-1])
    query = flash.load_parts(q_ref, where, q_parts, rows.live)
    dout = flash.load_parts(dout_ref, where, v_parts, rows.live)

    def step(
        row: flash.GradientRows,
        k_ref: Any,
        v_ref: Any,
        bounds: _Bounds,
        j: Any,
        sums: tuple[Array, ...],
        masked: bool,
    ) -> tuple[Array, ...]:
        key_index = bounds.start(j) + lax.iota(jnp.int32, tile.keys)
        visible, readable = bounds.masks(key_index, holes) if masked else (None, None)
        key = flash.load_parts(k_ref, (key_index,), q_parts, readable)
        value = flash.load_parts(v_ref, (key_index,), v_parts, readable)
        return flash.dq_step(sums, row, key, value, scale, visible)

    sums = tuple(jnp.zeros((tile.rows, part.width), jnp.float32) for part in q_parts)
    for count in num_ranges:
        gate, lse, delta = (flash.load_rows(next(refs_left), where, rows.live) for _ in range(3))
        row = flash.gradient_rows(query, dout, gate, lse, delta, scale)
        reads = functools.partial(step, row, next(refs_left), next(refs_left))
        for _ in range(count):
            bounds = _bounds(next(refs_left), next(refs_left), rows, q_ref, tile)
            read = functools.partial(reads, bounds)
            sums = flash.over_tiles(0, bounds.inner, bounds.outer, bounds.num_tiles, read, sums)
    flash.store_parts(dq_ref, where, q_parts, sums, rows.live)


def key_value_gradients(
    rows: QuerySide,
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    ranges: Ranges,
    *,
    scale: float,
    slices: int,
    launch: Launch,
    name: str,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """dk and dv; 0 for a key that no query reads."""
    batch, length, kv_heads, _ = key.shape
    if length == 0:
        return jnp.zeros_like(key), jnp.zeros_like(value)
    num_tiles = pl.cdiv(length, launch.tile.keys)
    readers = _readers(ranges, length, num_tiles, launch.tile.keys)
    dtype = key.dtype if slices == 1 else jnp.float32
    outs = tuple(jax.ShapeDtypeStruct((slices, *array.shape), dtype) for array in (key, value))
    kernel = functools.partial(_dkv_kernel, tile=launch.tile, scale=scale, slices=slices)
    inputs = (readers, *ranges, *rows, key, value)

    def out_spec(array: jax.ShapeDtypeStruct) -> pl.BlockSpec:
        shape = (None, None, length, None, array.shape[-1])
        return pl.BlockSpec(shape, lambda tile, head, sequence: (tile // num_tiles, sequence, 0, head, 0))

    dk, dv = launch(
        kernel,
        name,
        grid=(num_tiles * slices, kv_heads, batch),
        in_specs=[flash.whole(readers, head_axis=None), *flash.specs(inputs[1:])],
        out_specs=tuple(out_spec(out) for out in outs),
        out_shape=outs,
    )(*inputs)
    if slices == 1:
        return dk[0], dv[0]
    return dk.sum(axis=0).astype(key.dtype), dv.sum(axis=0).astype(value.dtype)


def _readers(ranges: Ranges, length: int, num_tiles: int, keys: int) -> Int32[Array, "B tiles 4"]:
    """For each tile of keys: the first query that reads any of it, the first that reads all, the ends of both."""
    begin = jnp.arange(num_tiles, dtype=jnp.int32) * keys
    end = jnp.minimum(begin + keys, length)

    def one_sequence(low: Array, high: Array) -> Array:
        places = (
            flash.search(high, begin, side="right"),
            flash.search(high, end, side="left"),
            flash.search(low, begin, side="right"),
            flash.search(low, end, side="left"),
        )
        return jnp.stack(places, axis=-1)

    return jax.vmap(one_sequence)(*ranges)


def _dkv_kernel(
    readers_ref: Any, low_ref: Any, high_ref: Any, *refs: Any, tile: Tile, scale: float, slices: int
) -> None:
    q_ref, dout_ref, gate_ref, lse_ref, delta_ref, k_ref, v_ref, dk_ref, dv_ref = refs
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    length, group = k_ref.shape[0], q_ref.shape[1]
    # The last rows are read by the most keys: their slice first.
    before, key_tile = flash.divide(pl.program_id(0), readers_ref.shape[0])
    part = slices - 1 - before
    key_index = key_tile * tile.keys + lax.iota(jnp.int32, tile.keys)
    exists = key_index < length
    # First row that reads any key of the tile, that reads all; the ends of both.
    begin, inner, outer, end = (readers_ref[key_tile, i] * group for i in range(4))
    read = end > begin
    key = flash.load_parts(k_ref, (key_index,), q_parts, exists & read)
    value = flash.load_parts(v_ref, (key_index,), v_parts, exists & read)

    def step(i: Any, sums: Any, masked: bool) -> Any:
        rows = flash.rows_from(begin + i * tile.rows, tile.rows, group, q_ref.shape[0])
        where, live = (rows.token, rows.head), rows.live if masked else None
        query = flash.load_parts(q_ref, where, q_parts, live)
        dout = flash.load_parts(dout_ref, where, v_parts, live)
        gate, lse, delta = (flash.load_rows(ref, where, live) for ref in (gate_ref, lse_ref, delta_ref))
        # [keys, rows]
        weights = flash.exp2(flash.dot_parts(key, query) * (scale * flash.LOG2E) - lse[None, :]) * gate[None, :]
        if masked:
            low, high = (flash.load_rows(ref, (rows.token,), live) for ref in (low_ref, high_ref))
            visible = (low[None, :] <= key_index[:, None]) & (key_index[:, None] < high[None, :]) & rows.live[None, :]
            weights = jnp.where(visible, weights, 0.0)
        dscores = weights * (flash.dot_parts(value, dout) * scale - (delta * scale)[None, :])
        if masked:
            # A key that no row reads may hold anything, and 0 * NaN is NaN.
            dscores = jnp.where(visible, dscores, 0.0)
        dk, dv = sums
        dk = tuple(total + flash.dot(dscores.astype(x.dtype), x) for total, x in zip(dk, query, strict=True))
        dv = tuple(total + flash.dot(weights.astype(x.dtype), x) for total, x in zip(dv, dout, strict=True))
        return dk, dv

    count = flash.ceil_div(jnp.maximum(end - begin, 0), tile.rows)
    # The rows of a slice are the same for all tiles of keys.
    span = -(-q_ref.shape[0] * group // slices)
    first, last = (
        jnp.minimum(flash.ceil_div(jnp.maximum(edge * span - begin, 0), tile.rows), count) for edge in (part, part + 1)
    )
    sums = tuple(
        tuple(jnp.zeros((tile.keys, part.width), jnp.float32) for part in parts) for parts in (q_parts, v_parts)
    )
    inner, outer = flash.ceil_div(inner - begin, tile.rows), (outer - begin) // tile.rows
    dk, dv = flash.over_tiles(first, inner, outer, jnp.maximum(first, last), step, sums)
    flash.store_parts(dk_ref, (key_index,), q_parts, dk, exists)
    flash.store_parts(dv_ref, (key_index,), v_parts, dv, exists)


# --------------------------------------------------------------------------------------------------------------- helpers


class _Bounds(NamedTuple):
    """The keys of a tile of rows: tiles of keys start at `first`; `inner .. outer - 1` of `num_tiles` need no mask."""

    low: Array  # [rows]
    high: Array  # [rows]
    first: Array
    last: Array
    inner: Array
    outer: Array
    num_tiles: Array
    keys: int

    def start(self, tile: Any) -> Array:
        return self.first + tile * self.keys

    def masks(self, key_index: Array, holes: bool) -> tuple[Array, Array]:
        """Which row reads which key, `[rows, keys]`, and which keys may be loaded.

        A key that no row reads may hold anything, and 0 * NaN is NaN.
        """
        visible = (self.low[:, None] <= key_index[None, :]) & (key_index[None, :] < self.high[:, None])
        readable = key_index < self.last
        if holes:
            readable &= jnp.max(visible.astype(jnp.int32), axis=0) > 0
        return visible, readable


def _first_row(tile: Tile) -> Any:
    # The longest rows first: the last programs to start are the shortest.
    return (pl.num_programs(0) - 1 - pl.program_id(0)) * tile.rows


def _tile_of_rows(q_ref: Any, tile: Tile) -> flash.Rows:
    return flash.rows_from(_first_row(tile), tile.rows, q_ref.shape[1], q_ref.shape[0])


def _bounds(low_ref: Any, high_ref: Any, rows: flash.Rows, q_ref: Any, tile: Tile) -> _Bounds:
    num_tokens, group = q_ref.shape[:2]
    start = _first_row(tile)
    low = flash.load_rows(low_ref, (rows.token,), rows.live)
    high = flash.load_rows(high_ref, (rows.token,), rows.live)
    first_token, last_token = start // group, jnp.minimum((start + tile.rows - 1) // group, num_tokens - 1)
    first, last = low_ref[first_token], high_ref[last_token]
    inner, outer = low_ref[last_token], high_ref[first_token]
    return _Bounds(
        low,
        high,
        first,
        last,
        inner=flash.ceil_div(inner - first, tile.keys),
        outer=(outer - first) // tile.keys,
        num_tiles=flash.ceil_div(jnp.maximum(last - first, 0), tile.keys),
        keys=tile.keys,
    )
