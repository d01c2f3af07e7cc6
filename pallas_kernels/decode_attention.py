"""One step of decoding: a query for each sequence against its cache, all of NSA (eq. 5-12 of arXiv 2502.11089).

Its time is that of the bytes it reads. Each key and value that the step needs is read once, by a program that holds the G
heads of a group; how many programs share a context follows from how many sequences there are. Three kernels:

Compressed: grid (split of the context, key/value head, sequence). A program passes over tiles of compressed tokens and
writes the attention to them alone, its log-sum-exp, and for each block and head the two sums of `block_selection.py`,
relative to the tile's `top`, which is the highest score that the program had met by then:

    own[j] = sum over j's tokens of 2^(s_i - top) * (units that i and j share),  after[j] = the same with j + 1

so no array of scores exists. Splits follow the length of each sequence; those that have nothing to read write nothing.

Choice: grid (1 + part of the window, key/value head, sequence). Program 0 chooses the blocks, by sums times 2^(top - lse):
the latency of a few small loads and counts, hidden behind the others, which read the window's ring in place: token p is
in row p % w, and the order of keys is all one to a softmax.

Selected: grid (1, key/value head, sequence). A program reads the chosen blocks, joins the splits of the compressed branch
and the parts of the window, and forms the gated sum, rounded once.
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
from pallas_kernels.block_selection import Choice, outside_units, store_choice
from pallas_kernels.flash import Config, Launch, Tile
from pallas_kernels.positions import (
    candidate_blocks,
    compressed_ranges,
    positions,
    ring_ranges,
    token_ranges,
)
from pallas_kernels.range_attention import Grouped
from pallas_kernels.selected_attention import held_keys
from pallas_kernels.tiles import Tiles, tiles_for

MAX_SPLITS = 64  # whose log-sum-exps a program holds
WINDOW_PART = 512  # keys; to read so many takes about as long as a choice
HELD_SCORES = 8192  # numbers of heads and blocks that a program adds up at once
JOINED = 8  # partial results that are under way at once


class Places(NamedTuple):
    """Columns of an int32 `[B, 4]`: how far each branch may read."""

    compressed: Any
    own_block: Any
    tokens: Any
    ring: Any


def decode_step(
    query: Float[Array, "B 1 N H"],
    compressed: tuple[Array, Array],
    selected: tuple[Array, Array],
    window: tuple[Array, Array],
    gates: Float[Array, "B 1 N 3"],
    lengths: Int32[Array, "B"],
    *,
    config: Config,
    scale: float,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B 1 N V"]:
    """The gated sum of the three branches for the last of `lengths` tokens; shapes as in `nsa_jax.ops.decode_step`."""
    batch, _, num_heads, _ = query.shape
    num_keys, kv_heads, value_size = selected[1].shape[1:]
    tiles = tiles or tiles_for(query, kv_heads, value_size)
    where = positions(lengths - 1, None, batch=batch, num_queries=1, num_keys=num_keys)
    ranges = compressed_ranges(where, config=config), token_ranges(where), ring_ranges(where, config=config)
    own_block = candidate_blocks(where, config=config).own
    places = jnp.concatenate(Places(ranges[0].high, own_block, ranges[1].high, ranges[2].high), axis=1)

    group = num_heads // kv_heads
    grouped = query.reshape(batch, 1, kv_heads, group, query.shape[-1])
    programs = max(1, tiles.decode_programs // (batch * kv_heads))
    more: dict[str, Any] = dict(config=config, scale=scale)
    context = None
    if compressed[0].shape[1] > 0:
        launch = Launch(tiles.decode_compressed, interpret)
        context = _compressed(places, grouped, *compressed, programs=programs, launch=launch, **more)
    launch = Launch(tiles.decode_choice, interpret)
    blocks, near = _choice(places, grouped, *window, context, num_keys=num_keys, launch=launch, **more)
    launch = Launch(tiles.decode_selected, interpret)
    gates = gates.reshape(batch, 1, kv_heads, group, 3)
    out = _selected(places, grouped, *selected, gates, blocks, context, near, launch=launch, **more)
    return out.reshape(batch, 1, num_heads, value_size)


class Partial(NamedTuple):
    """Attention to parts of the keys, each by itself."""

    out: Float[Array, "B parts K G V"]
    lse: Float[Array, "B parts K G"]  # base 2


# ------------------------------------------------------------------------------------------------------------ compressed


class Plan(NamedTuple):
    """How the blocks of a context are cut, in sizes that are known when a call is traced.

    A tile holds `blocks` blocks of `units` compressed tokens, at `places` places each: of a long block a part of its tokens
    at a time, of others all, and places that are none where `units` is no power of two.
    """

    units: int
    shared: int
    keys: int
    blocks: int
    steps: int  # parts of a block
    splits: int

    @property
    def whole(self) -> bool:
        """Whether every place of a tile is a token's."""
        return self.steps * self.keys == self.blocks * self.units

    def reach(self, num_visible: Any) -> tuple[Any, Any, Any]:
        """Of so many tokens: the tiles that hold any, tiles of a split, splits that have any."""
        num_tiles = flash.ceil_div(num_visible, self.blocks * self.units)
        share = jnp.maximum(flash.ceil_div(num_tiles, self.splits), 1)
        return num_tiles, share, (num_tiles + share - 1) // share


class Context(NamedTuple):
    """What is known of the compressed branch; what lies beyond a sequence's length was not written."""

    plan: Plan
    partial: Partial
    top: Float[Array, "B G K tiles"]
    sums: tuple[Array, ...]  # own and, if blocks share tokens, after: `[B, G, K, blocks]`


def plan(config: Config, num_compressed: int, *, keys: int, programs: int) -> Plan:
    units, shared = (size // config.compress_stride for size in (config.select_block, config.compress_block))
    places = flash.next_power_of_2(units)
    blocks, steps = max(1, keys // places), max(1, places // keys)
    num_tiles = -(-num_compressed // (blocks * units))
    return Plan(units, shared, keys, blocks, steps, max(1, min(programs, num_tiles, MAX_SPLITS)))


def _compressed(
    places: Int32[Array, "B 4"],
    query: Grouped,
    key: Float[Array, "B C K H"],
    value: Float[Array, "B C K V"],
    *,
    config: Config,
    scale: float,
    programs: int,
    launch: Launch,
) -> Context:
    batch, num_compressed, kv_heads, value_size = value.shape
    group = query.shape[3]
    cut = plan(config, num_compressed, keys=launch.tile.keys, programs=programs)
    num_tiles = -(-num_compressed // (cut.blocks * cut.units))
    partial = _partial(query, cut.splits, value_size)
    top = jax.ShapeDtypeStruct((batch, group, kv_heads, num_tiles), jnp.float32)
    sums = jax.ShapeDtypeStruct((batch, group, kv_heads, num_tiles * cut.blocks), jnp.float32)
    outs = (*partial, top, *[sums] * (1 if cut.shared == 1 else 2))
    inputs = (places, query, key, value)
    out, lse, top, *found = launch(
        functools.partial(_compressed_kernel, cut=cut, scale=scale),
        "nsa_decode_compressed",
        grid=(cut.splits, kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs(outs),
        out_shape=outs,
    )(*inputs)
    return Context(cut, Partial(out, lse), top, tuple(found))


def _compressed_kernel(
    places_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    top_ref: Any,
    *sums_refs: Any,
    cut: Plan,
    scale: float,
) -> None:
    heads = _Heads(q_ref)
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    query = heads.load(q_ref, q_parts)
    num_visible = _places(places_ref).compressed
    num_tiles, share, _ = cut.reach(num_visible)
    split = pl.program_id(0)
    first = jnp.minimum(split * share, num_tiles)
    last = jnp.minimum(first + share, num_tiles)

    def step(j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
        def read(part: Any, carry: Any) -> Any:
            """The tokens at some places of each block, those of a place side by side."""
            state, total, after = carry
            place, block = flash.divide(lax.iota(jnp.int32, cut.keys), cut.blocks)
            place = place + part * cut.keys
            index = (j * cut.blocks + block) * cut.units + place
            exists = (place < cut.units) & (index < num_visible) if masked else None
            key = flash.load_parts(k_ref, (index,), q_parts, exists)
            value = flash.load_parts(v_ref, (index,), v_parts, exists)
            visible = None if exists is None else jnp.broadcast_to(exists[None, :], (heads.count, cut.keys))
            products = flash.dot_parts(query, key)
            read, p = flash.weighted_step(state, products, scale, value, visible)
            if cut.steps > 1:
                shrink = flash.exp2((state.highest - read.highest) * (scale * flash.LOG2E))[:, None]
                total, after = total * shrink, after * shrink
            outside = outside_units(place, cut.units, cut.shared)[None, :]
            return read, total + _by_block(p, cut), after + _by_block(p * outside, cut)

        zero = jnp.zeros((heads.count, cut.blocks), jnp.float32)
        carry = state, zero, zero
        if cut.steps == 1:
            state, total, after = read(0, carry)
        else:
            state, total, after = lax.fori_loop(jnp.int32(0), jnp.int32(cut.steps), read, carry)
        shape = (heads.count, cut.blocks)
        block = j * cut.blocks + lax.iota(jnp.int32, cut.blocks)
        where = jnp.broadcast_to(heads.head[:, None], shape), jnp.broadcast_to(block[None, :], shape)
        for ref, found in zip(sums_refs, (total * cut.shared - after, after)):
            pltriton.store(ref.at[where], found, mask=jnp.broadcast_to(heads.live[:, None], shape))
        top = state.highest * (scale * flash.LOG2E)
        flash.store_rows(top_ref, (heads.head, jnp.full_like(heads.head, j)), top, heads.live)
        return state

    whole = num_visible // (cut.blocks * cut.units) if cut.whole else first
    state = _over_tiles(first, whole, last, step, flash.softmax_start(heads.count, v_parts))
    heads.store_partial(out_ref, lse_ref, split, v_parts, state, scale, written=last > first)


def _by_block(p: Array, cut: Plan) -> Array:
    """`[rows, places * blocks]` summed to `[rows, blocks]`."""
    return jnp.sum(p.reshape(p.shape[0], -1, cut.blocks), axis=1)


# ---------------------------------------------------------------------------------------------------- choice and window


def _choice(
    places: Int32[Array, "B 4"],
    query: Grouped,
    key: Float[Array, "B w K H"],
    value: Float[Array, "B w K V"],
    context: Context | None,
    *,
    config: Config,
    scale: float,
    num_keys: int,
    launch: Launch,
) -> tuple[Int32[Array, "B 1 K A"], Partial]:
    batch, window, kv_heads, value_size = value.shape
    num_tiles = -(-window // launch.tile.keys)
    share = -(-num_tiles // -(-window // WINDOW_PART))
    num_parts = -(-num_tiles // share)
    partial = _partial(query, num_parts, value_size)
    blocks = jax.ShapeDtypeStruct((batch, 1, kv_heads, config.num_selected), jnp.int32)
    inputs: tuple[Any, ...] = (places, query, key, value)
    if context is not None:
        inputs += (context.partial.lse, context.top, *context.sums)
    # A row of scores lies in registers: a long one in those of more warps.
    width = flash.next_power_of_2(-(-num_keys // config.select_block))
    at_once = min(flash.next_power_of_2(query.shape[3]), max(1, HELD_SCORES // width))
    warps = max(launch.tile.warps, min(16, at_once * width // 2048))
    launch = Launch(launch.tile._replace(warps=warps), launch.interpret)
    kernel = functools.partial(_choice_kernel, cut=None if context is None else context.plan, width=width)
    found, out, lse = launch(
        functools.partial(kernel, at_once=at_once, share=share, tile=launch.tile, scale=scale, config=config),
        "nsa_decode_choice",
        grid=(1 + num_parts, kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs((blocks, *partial)),
        out_shape=(blocks, *partial),
    )(*inputs)
    return found, Partial(out, lse)


def _choice_kernel(
    places_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    cut: Plan | None,
    width: int,
    at_once: int,
    share: int,
    tile: Tile,
    scale: float,
    config: Config,
) -> None:
    *context_refs, blocks_ref, out_ref, lse_ref = refs
    places, group, program = _places(places_ref), q_ref.shape[1], pl.program_id(0)

    @pl.when(program == 0)
    def choose() -> None:
        shape = (1, width)
        block = jnp.broadcast_to(lax.iota(jnp.int32, width)[None, :], shape)
        candidate = block <= places.own_block
        score = jnp.zeros(shape, jnp.float32)
        if cut is not None:
            score = _importance(context_refs, places.compressed, block, candidate, group, cut, at_once)
        row, zero = lax.iota(jnp.int32, 1), jnp.zeros((1, 1), jnp.int32)
        own = jnp.broadcast_to(places.own_block, (1, 1))
        choice = Choice(jnp.zeros_like(block), block, candidate, row, zero, own, row >= 0)
        store_choice(blocks_ref, score, choice, config=config)

    @pl.when(program > 0)
    def read_window() -> None:
        heads, part = _Heads(q_ref), program - 1
        q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
        query = heads.load(q_ref, q_parts)

        def step(j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
            row = j * tile.keys + lax.iota(jnp.int32, tile.keys)
            return _read(heads, query, (k_ref, v_ref), row, row < places.ring if masked else None, state, scale)

        num_tiles = flash.ceil_div(places.ring, tile.keys)
        first = jnp.minimum(part * share, num_tiles)
        last = jnp.minimum(first + share, num_tiles)
        start = flash.softmax_start(heads.count, v_parts)
        state = _over_tiles(first, places.ring // tile.keys, last, step, start)
        heads.store_partial(out_ref, lse_ref, part, v_parts, state, scale)


def _importance(
    refs: Any, num_visible: Any, block: Array, candidate: Array, group: int, cut: Plan, at_once: int
) -> Array:
    """The scores (eq. 9, 10) of blocks `[1, width]`."""
    lse_ref, top_ref, *sums_refs = refs
    num_tiles, _, num_splits = cut.reach(num_visible)
    shape = (at_once, block.shape[1])

    def add(i: Any, score: Array) -> Array:
        head = i * at_once + lax.iota(jnp.int32, at_once)
        live = head < group
        lse = _joint_lse(lse_ref, head, num_splits, live)
        for shift, ref in enumerate(sums_refs):
            # What a block gives to the next counts there.
            giver = jnp.maximum(block - shift, 0)
            given = candidate & (block >= shift) & (giver < num_tiles * cut.blocks)
            mask = jnp.broadcast_to(given, shape) & jnp.broadcast_to(live[:, None], shape)
            giver, heads = jnp.broadcast_to(giver, shape), jnp.broadcast_to(head[:, None], shape)
            sums = pltriton.load(ref.at[heads, giver], mask=mask, other=0.0)
            tile, _ = flash.divide(giver, cut.blocks)
            top = pltriton.load(top_ref.at[heads, tile], mask=mask, other=flash.MASKED)
            score += jnp.sum(sums * flash.exp2(top - lse[:, None]), axis=0)[None, :]
        return score

    score, turns = jnp.zeros(block.shape, jnp.float32), -(-flash.next_power_of_2(group) // at_once)
    if turns > 4:
        return lax.fori_loop(jnp.int32(0), jnp.int32(turns), add, score)
    for i in range(turns):
        score = add(i, score)
    return score


# -------------------------------------------------------------------------------------------------------------- selected


def _selected(
    places: Int32[Array, "B 4"],
    query: Grouped,
    key: Float[Array, "B L K H"],
    value: Float[Array, "B L K V"],
    gates: Float[Array, "B 1 K G 3"],
    blocks: Int32[Array, "B 1 K A"],
    context: Context | None,
    near: Partial,
    *,
    config: Config,
    scale: float,
    launch: Launch,
) -> Float[Array, "B 1 K G V"]:
    batch, _, kv_heads, group, _ = query.shape
    out = jax.ShapeDtypeStruct((batch, 1, kv_heads, group, value.shape[-1]), value.dtype)
    inputs: tuple[Any, ...] = (places, query, key, value, gates, blocks, *near)
    if context is not None:
        inputs += context.partial
    kernel = functools.partial(_selected_kernel, cut=None if context is None else context.plan)
    return launch(
        functools.partial(kernel, held=held_keys(config, launch.tile), scale=scale, config=config),
        "nsa_decode_selected",
        grid=(1, kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs(out),
        out_shape=out,
    )(*inputs)


def _selected_kernel(
    places_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    gates_ref: Any,
    blocks_ref: Any,
    *refs: Any,
    cut: Plan | None,
    held: int,
    scale: float,
    config: Config,
) -> None:
    *partial_refs, o_ref = refs
    places, heads = _places(places_ref), _Heads(q_ref)
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    query = heads.load(q_ref, q_parts)
    size = config.select_block
    parts = -(-size // held)

    def step(j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
        slot, part = flash.divide(j, parts)
        in_block = part * held + lax.iota(jnp.int32, held)
        token = blocks_ref[0, slot] * size + in_block
        exists = (in_block < size) & (token < places.tokens) if masked else None
        return _read(heads, query, (k_ref, v_ref), token, exists, state, scale)

    # A query chooses as many of its candidates as it may. Of the last block, which is most often its own, parts that begin
    # at tokens to come are left out, and others masked.
    count = jnp.minimum(places.own_block + 1, config.num_selected)
    before = jnp.maximum(count - 1, 0)
    reached = jnp.minimum(places.tokens - blocks_ref[0, before] * size, size)
    last = before * parts + jnp.where(count > 0, flash.ceil_div(reached, held), 0)
    whole = before * parts if parts * held == size else 0
    state = _over_tiles(0, whole, last, step, flash.softmax_start(heads.count, v_parts))
    out_slc, _ = flash.softmax_end(state, scale)

    out_win = _joined(partial_refs[:2], partial_refs[0].shape[0], heads, v_parts)
    out_cmp = tuple(jnp.zeros_like(part) for part in out_slc)
    if cut is not None:
        out_cmp = _joined(partial_refs[2:], cut.reach(places.compressed)[2], heads, v_parts)
    gates = flash.load_gates(gates_ref, heads.at(0), heads.live)
    out = flash.sum_branches(gates, out_cmp, out_slc, out_win)
    flash.store_parts(o_ref, heads.at(0), v_parts, out, heads.live)


# --------------------------------------------------------------------------------------------------------------- helpers


class _Heads:
    """The rows of a program: the heads of a group."""

    def __init__(self, q_ref: Any):
        self.group = q_ref.shape[1]
        # Triton's dot wants 16 rows at least.
        self.count = max(16, flash.next_power_of_2(self.group))
        self.head = lax.iota(jnp.int32, self.count)
        self.live = self.head < self.group

    def at(self, place: Any) -> tuple[Array, Array]:
        """Indices of arrays `[place, G, ...]`."""
        return jnp.full_like(self.head, place), self.head

    def load(self, ref: Any, parts: tuple[flash.Part, ...]) -> tuple[Array, ...]:
        return flash.load_parts(ref, self.at(0), parts, self.live)

    def store_partial(
        self,
        out_ref: Any,
        lse_ref: Any,
        place: Any,
        parts: tuple[flash.Part, ...],
        state: flash.Softmax,
        scale: float,
        written: Any = True,
    ) -> None:
        outs, lse = flash.softmax_end(state, scale)
        where, live = self.at(place), self.live & written
        flash.store_parts(out_ref, where, parts, outs, live)
        # What has read nothing has no share in the whole.
        flash.store_rows(lse_ref, where, jnp.where(state.total > 0.0, lse, flash.MASKED), live)


def _partial(query: Grouped, parts: int, value_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of a `Partial`."""
    shape = (query.shape[0], parts, *query.shape[2:4])
    return tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*shape, value_size), shape))


def _places(ref: Any) -> Places:
    return Places(*(ref[i] for i in range(len(Places._fields))))


def _read(
    heads: _Heads,
    query: tuple[Array, ...],
    refs: tuple[Any, Any],
    index: Array,
    exists: Array | None,
    state: flash.Softmax,
    scale: float,
) -> flash.Softmax:
    """Keys and values `index`, which all heads see where they exist."""
    key, value = (flash.load_parts(ref, (index,), flash.head_parts(ref.shape[-1]), exists) for ref in refs)
    visible = None if exists is None else jnp.broadcast_to(exists[None, :], (heads.count, index.shape[0]))
    return flash.softmax_step(state, flash.dot_parts(query, key), scale, value, visible)


def _over_tiles(first: Any, whole: Any, last: Any, step: Callable[..., Any], state: Any) -> Any:
    """`step(tile, state, masked)` for tiles `first .. last - 1`, those before `whole` without masks."""
    # Triton's lowering types a Python number by its value.
    first, whole, last = (jnp.asarray(bound, jnp.int32) for bound in (first, whole, last))
    whole = jnp.minimum(jnp.maximum(whole, first), last)
    state = lax.fori_loop(first, whole, lambda j, state: step(j, state, False), state)
    return lax.fori_loop(whole, last, lambda j, state: step(j, state, True), state)


def _joint_lse(lse_ref: Any, head: Array, count: Any, live: Array) -> Array:
    """Of `count` partial results `[parts, G]`, for some heads."""
    shape = (flash.next_power_of_2(lse_ref.shape[0]), head.shape[0])
    part = jnp.broadcast_to(lax.iota(jnp.int32, shape[0])[:, None], shape)
    mask = (part < count) & jnp.broadcast_to(live[None, :], shape)
    lse = pltriton.load(lse_ref.at[part, jnp.broadcast_to(head[None, :], shape)], mask=mask, other=flash.MASKED)
    highest = jnp.max(lse, axis=0)
    return highest + jnp.log2(jnp.sum(flash.exp2(lse - highest[None, :]), axis=0))


def _joined(refs: Any, count: Any, heads: _Heads, parts: tuple[flash.Part, ...]) -> tuple[Array, ...]:
    """The attention to all keys of `count` partial results, or 0."""
    out_ref, lse_ref = refs
    at_once = min(JOINED, out_ref.shape[0])
    lse = _joint_lse(lse_ref, heads.head, count, heads.live)

    def add(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        for place in range(at_once):
            place = i * at_once + place
            where, live = heads.at(place), heads.live & (place < count)
            weight = jnp.where(live, flash.exp2(flash.load_rows(lse_ref, where, live) - lse), 0.0)
            outs = flash.load_parts(out_ref, where, parts, live)
            sums = tuple(total + weight[:, None] * out for total, out in zip(sums, outs, strict=True))
        return sums

    sums = tuple(jnp.zeros((heads.count, part.width), jnp.float32) for part in parts)
    turns = flash.ceil_div(jnp.asarray(count, jnp.int32), at_once)
    return lax.fori_loop(jnp.int32(0), turns, add, sums)
