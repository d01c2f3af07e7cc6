"""One step of decoding: a query for each sequence against its cache, all of NSA (eq. 5-12 of arXiv 2502.11089).

Its time is that of the bytes it reads. Each key and value that the step needs is read once, by a program that holds the G
heads of a group; how many programs share a context follows from how many sequences there are. Three kernels:

Compressed: grid (split of the context, key/value head, sequence). A program passes over tiles of compressed tokens and
writes the attention to them alone, its log-sum-exp, and for each block and head, relative to the tile's `top`, which is the
highest score that the program had met by then:

    sum over tokens of 2^(s_i - top) * (units that token i and the block share)

so no array of scores exists. What a tile's last block gives to the first of the next is written apart. Splits follow the
length of each sequence; those that have nothing to read write nothing.

Choice: grid (kind of work, key/value head, sequence). One program chooses the blocks, by sums times 2^(top - lse): the
latency of a few small loads and counts. Beside it, one joins the splits.

Selected: grid (part of the window or of the slots, key/value head, sequence). A program reads some of the chosen blocks, or
of the window's ring in place, where token p is in row p % w, since the order of keys is all one to a softmax. The one that
ends last joins the parts, in their order, and forms the gated sum, rounded once: which one it is does not show.
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
from pallas_kernels.block_selection import Choice, outside_units, store_choice
from pallas_kernels.flash import Config, Launch, Tile
from pallas_kernels.positions import Positions, candidate_blocks, compressed_ranges, ring_ranges
from pallas_kernels.range_attention import Grouped
from pallas_kernels.selected_attention import held_keys
from pallas_kernels.tiles import Tiles, tiles_for

MAX_SPLITS = 32  # that one program joins
HELD_SCORES = 16384  # numbers of heads and blocks that a program adds up at once
JOINED = 8  # partial results that are under way at once


class Reach(NamedTuple):
    """How far each branch of a sequence may read."""

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
    group = num_heads // kv_heads
    query = query.reshape(batch, 1, kv_heads, group, query.shape[-1])
    gates = gates.reshape(batch, 1, kv_heads, group, 3)
    lengths = lengths[:, None]
    more: dict[str, Any] = dict(config=config, num_keys=num_keys, scale=scale)

    def programs(of_all: int) -> int:
        return max(1, of_all // (batch * kv_heads))

    num_compressed = compressed[0].shape[1]
    cut = plan(config, num_compressed, keys=tiles.decode_compressed.keys, programs=programs(tiles.decode_programs))
    context = None
    if num_compressed > 0:
        launch = Launch(tiles.decode_compressed, interpret)
        context = _compressed(lengths, query, *compressed, cut=cut, launch=launch, **more)
    launch = Launch(tiles.decode_choice, interpret)
    chosen = _choice(lengths, query, context, cut=cut, config=config, num_keys=num_keys, launch=launch)
    parts, launch = programs(tiles.decode_selected_programs), Launch(tiles.decode_selected, interpret)
    out = _selected(lengths, query, selected, window, gates, chosen, programs=parts, launch=launch, **more)
    return out.reshape(batch, 1, num_heads, value_size)


class Partial(NamedTuple):
    """Attention to parts of the keys, each by itself."""

    out: Any  # float32 [B, parts, K, G, V]; in a kernel, as below, a ref of one sequence and key/value head
    lse: Any  # float32 [B, parts, K, G], base 2


def _partial(query: Grouped, parts: int, value_size: int) -> Partial:
    shape = (query.shape[0], parts, *query.shape[2:4])
    return Partial(_float32(*shape, value_size), _float32(*shape))


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


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
    """What is known of the compressed branch, in float32; what lies beyond a sequence's length was not written."""

    partial: Partial
    top: Any  # [B, G, K, tiles]
    sums: Any  # [B, G, K, blocks]
    after: Any  # [B, G, K, tiles], from the tile's last block to the next; None if they share no token


def plan(config: Config, num_compressed: int, *, keys: int, programs: int) -> Plan:
    units, shared = (size // config.compress_stride for size in (config.select_block, config.compress_block))
    places = flash.next_power_of_2(units)
    blocks, steps = max(1, keys // places), max(1, places // keys)
    num_tiles = -(-num_compressed // (blocks * units))
    return Plan(units, shared, keys, blocks, steps, max(1, min(programs, num_tiles, MAX_SPLITS)))


def _compressed(
    lengths: Int32[Array, "B 1"],
    query: Grouped,
    key: Float[Array, "B C K H"],
    value: Float[Array, "B C K V"],
    *,
    cut: Plan,
    config: Config,
    num_keys: int,
    scale: float,
    launch: Launch,
) -> Context:
    batch, num_compressed, kv_heads, value_size = value.shape
    group = query.shape[3]
    num_tiles = -(-num_compressed // (cut.blocks * cut.units))
    of_tile, of_block = (_float32(batch, group, kv_heads, count) for count in (num_tiles, num_tiles * cut.blocks))
    outs = Context(_partial(query, cut.splits, value_size), of_tile, of_block, of_tile if cut.shared > 1 else None)
    inputs = (lengths, query, key, value)
    return launch(
        functools.partial(_compressed_kernel, cut=cut, scale=scale, num_keys=num_keys, config=config),
        "nsa_decode_compressed",
        grid=(cut.splits, kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs((outs,)),
        out_shape=(outs,),
    )(*inputs)[0]


def _compressed_kernel(
    length_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    context: Context,
    *,
    cut: Plan,
    scale: float,
    num_keys: int,
    config: Config,
) -> None:
    heads = _Heads(q_ref.shape[1])
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(v_ref.shape[-1])
    query = flash.load_parts(q_ref, heads.at(0), q_parts, heads.live)
    num_visible = _reach(length_ref, num_keys, config).compressed
    num_tiles, share, _ = cut.reach(num_visible)
    split = pl.program_id(0)
    first = jnp.minimum(split * share, num_tiles)
    last = jnp.minimum(first + share, num_tiles)

    def step(j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
        def read_places(part: Any, carry: Any) -> Any:
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
            before = state.highest
            state, p = flash.weighted_step(state, products, scale, value, visible)
            if cut.steps > 1:
                shrink = flash.exp2((before - state.highest) * (scale * flash.LOG2E))[:, None]
                total, after = total * shrink, after * shrink
            outside = outside_units(place, cut.units, cut.shared)[None, :]
            return state, total + _by_block(p, cut), after + _by_block(p * outside, cut)

        zero = jnp.zeros((heads.count, cut.blocks), jnp.float32)
        carry = state, zero, zero
        if cut.steps == 1:
            state, total, after = read_places(0, carry)
        else:
            state, total, after = lax.fori_loop(jnp.int32(0), jnp.int32(cut.steps), read_places, carry)
        found = total * cut.shared - after
        in_tile, where = lax.iota(jnp.int32, cut.blocks), (heads.head, jnp.full_like(heads.head, j))
        if context.after is not None:
            found += _moved_on(after)
            at_end = jnp.where(in_tile[None, :] == cut.blocks - 1, after, 0.0)
            flash.store_rows(context.after, where, jnp.sum(at_end, axis=1), heads.live)
        flash.store_rows(context.top, where, state.highest * (scale * flash.LOG2E), heads.live)
        shape, block = found.shape, j * cut.blocks + in_tile
        where = jnp.broadcast_to(heads.head[:, None], shape), jnp.broadcast_to(block[None, :], shape)
        pltriton.store(context.sums.at[where], found, mask=jnp.broadcast_to(heads.live[:, None], shape))
        return state

    whole = num_visible // (cut.blocks * cut.units) if cut.whole else first
    state = flash.over_whole_tiles(first, whole, last, step, flash.softmax_start(heads.count, v_parts))
    heads.store_partial(context.partial, split, v_parts, state, scale, written=last > first)


def _by_block(p: Array, cut: Plan) -> Array:
    """`[rows, places * blocks]` summed to `[rows, blocks]`."""
    return jnp.sum(p.reshape(p.shape[0], -1, cut.blocks), axis=1)


def _moved_on(x: Array) -> Array:
    """`x[:, j - 1]`, and 0 where j = 0."""
    index = lax.iota(jnp.int32, x.shape[1])
    moves = (index[:, None] + 1 == index[None, :]).astype(jnp.float32)
    if x.shape[1] >= 16:
        return flash.dot(x, moves)
    return jnp.sum(x[:, :, None] * moves[None, :, :], axis=1)


# ---------------------------------------------------------------------------------------------------------------- choice


class Chosen(NamedTuple):
    """What the last kernel wants of the one before it."""

    blocks: Any  # int32 [B, 1, K, A]
    arrived: Any  # int32 [B, 1, K]: 0
    compressed: Any  # float32 [B, 1, K, G, V], the branch's output; None if there are no compressed tokens


def _choice(
    lengths: Int32[Array, "B 1"],
    query: Grouped,
    context: Context | None,
    *,
    cut: Plan,
    config: Config,
    num_keys: int,
    launch: Launch,
) -> Chosen:
    batch, _, kv_heads, group, _ = query.shape
    inputs: tuple[Any, ...] = (lengths,) if context is None else (lengths, context)
    outs = Chosen(
        jax.ShapeDtypeStruct((batch, 1, kv_heads, config.num_selected), jnp.int32),
        jax.ShapeDtypeStruct((batch, 1, kv_heads), jnp.int32),
        None if context is None else _float32(batch, 1, *context.partial.out.shape[2:]),
    )
    # A row of scores lies in registers: a long one in those of more warps.
    width = flash.next_power_of_2(-(-num_keys // config.select_block))
    at_once = min(flash.next_power_of_2(group), max(1, HELD_SCORES // width))
    warps = max(launch.tile.warps, min(16, at_once * width // 2048))
    launch = Launch(launch.tile._replace(warps=warps), launch.interpret)
    kernel = functools.partial(_choice_kernel, cut=cut, width=width, at_once=at_once)
    return launch(
        functools.partial(kernel, num_keys=num_keys, config=config),
        "nsa_decode_choice",
        grid=(len(inputs), kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs((outs,)),
        out_shape=(outs,),
    )(*inputs)[0]


def _choice_kernel(
    length_ref: Any, *refs: Any, cut: Plan, width: int, at_once: int, num_keys: int, config: Config
) -> None:
    context, chosen = (None, *refs)[-2:]
    reach, program = _reach(length_ref, num_keys, config), pl.program_id(0)

    @pl.when(program == 0)
    def choose() -> None:
        shape = (1, width)
        block = jnp.broadcast_to(lax.iota(jnp.int32, width)[None, :], shape)
        candidate = block <= reach.own_block
        score = jnp.zeros(shape, jnp.float32)
        if context is not None:
            score = _importance(context, reach.compressed, block, candidate, cut, at_once)
        row, zero = lax.iota(jnp.int32, 1), jnp.zeros((1, 1), jnp.int32)
        own = jnp.broadcast_to(reach.own_block, (1, 1))
        choice = Choice(jnp.zeros_like(block), block, candidate, row, zero, own, row >= 0)
        store_choice(chosen.blocks, score, choice, config=config)
        chosen.arrived[0] = jnp.int32(0)

    if context is not None:

        @pl.when(program == 1)
        def join() -> None:
            heads, v_parts = _Heads(chosen.compressed.shape[1]), flash.head_parts(chosen.compressed.shape[2])
            out = _joined(context.partial, 0, cut.reach(reach.compressed)[2], cut.splits, heads, v_parts)
            flash.store_parts(chosen.compressed, heads.at(0), v_parts, out, heads.live)


def _importance(context: Context, num_visible: Any, block: Array, candidate: Array, cut: Plan, at_once: int) -> Array:
    """The scores (eq. 9, 10) of blocks `[1, width]`."""
    group = context.partial.lse.shape[1]
    num_tiles, _, num_splits = cut.reach(num_visible)
    tile, in_tile = flash.divide(block, cut.blocks)
    shape = (at_once, block.shape[1])
    terms = [(context.sums, block, tile, candidate & (tile < num_tiles))]
    if context.after is not None:
        before = jnp.maximum(tile - 1, 0)
        terms.append((context.after, before, before, candidate & (in_tile == 0) & (tile > 0) & (tile <= num_tiles)))

    def add(i: Any, score: Array) -> Array:
        head = i * at_once + lax.iota(jnp.int32, at_once)
        live = head < group
        lse = _joint_lse(context.partial.lse, 0, num_splits, cut.splits, head, live)
        for ref, index, tile, given in terms:
            mask = jnp.broadcast_to(given, shape) & jnp.broadcast_to(live[:, None], shape)
            heads = jnp.broadcast_to(head[:, None], shape)
            index, tile = jnp.broadcast_to(index, shape), jnp.broadcast_to(tile, shape)
            sums = pltriton.load(ref.at[heads, index], mask=mask, other=0.0)
            top = pltriton.load(context.top.at[heads, tile], mask=mask, other=flash.MASKED)
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
    lengths: Int32[Array, "B 1"],
    query: Grouped,
    selected: tuple[Array, Array],
    window: tuple[Array, Array],
    gates: Float[Array, "B 1 K G 3"],
    chosen: Chosen,
    *,
    config: Config,
    num_keys: int,
    scale: float,
    programs: int,
    launch: Launch,
) -> Float[Array, "B 1 K G V"]:
    batch, _, kv_heads, group, _ = query.shape
    value_size = selected[1].shape[-1]
    slots = -(-config.num_selected // min(programs, config.num_selected))
    slot_parts = -(-config.num_selected // slots)
    # Of the window a program reads about as much.
    window_tiles = -(-window[0].shape[1] // launch.tile.keys)
    share = max(-(-slots * config.select_block // launch.tile.keys), -(-window_tiles // MAX_SPLITS))
    window_parts = -(-window_tiles // share)
    inputs = (lengths, query, tuple(selected), tuple(window), gates, chosen)
    out = jax.ShapeDtypeStruct((batch, 1, kv_heads, group, value_size), selected[1].dtype)
    arrived = jax.ShapeDtypeStruct(chosen.arrived.shape, jnp.int32)
    outs = (out, arrived, _partial(query, window_parts + slot_parts, value_size))
    place = next(i for i, x in enumerate(jax.tree.leaves(inputs)) if x is chosen.arrived)
    kernel = functools.partial(_selected_kernel, slots=slots, share=share, window_parts=window_parts, tile=launch.tile)
    return launch(
        functools.partial(kernel, scale=scale, num_keys=num_keys, config=config),
        "nsa_decode_selected",
        grid=(window_parts + slot_parts, kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs(outs),
        out_shape=outs,
        input_output_aliases={place: 1},
    )(*inputs)[0]


def _selected_kernel(
    length_ref: Any,
    q_ref: Any,
    selected: tuple[Any, Any],
    window: tuple[Any, Any],
    gates_ref: Any,
    chosen: Chosen,
    o_ref: Any,
    arrived_ref: Any,
    partial: Partial,
    *,
    slots: int,
    share: int,
    window_parts: int,
    tile: Tile,
    scale: float,
    num_keys: int,
    config: Config,
) -> None:
    reach, heads, part = _reach(length_ref, num_keys, config), _Heads(q_ref.shape[1]), pl.program_id(0)
    q_parts, v_parts = flash.head_parts(q_ref.shape[-1]), flash.head_parts(o_ref.shape[-1])
    query = flash.load_parts(q_ref, heads.at(0), q_parts, heads.live)
    start = flash.softmax_start(heads.count, v_parts)

    @pl.when(part < window_parts)
    def read_window() -> None:
        def step(j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
            row = j * tile.keys + lax.iota(jnp.int32, tile.keys)
            return _read(heads, query, window, row, row < reach.ring if masked else None, state, scale)

        num_tiles = flash.ceil_div(reach.ring, tile.keys)
        first = jnp.minimum(part * share, num_tiles)
        last = jnp.minimum(first + share, num_tiles)
        state = flash.over_whole_tiles(first, reach.ring // tile.keys, last, step, start)
        heads.store_partial(partial, part, v_parts, state, scale)

    @pl.when(part >= window_parts)
    def read_blocks() -> None:
        size, held = config.select_block, held_keys(config, tile)
        tiles = -(-size // held)

        def step(j: Any, state: flash.Softmax, masked: bool) -> flash.Softmax:
            slot, in_block = flash.divide(j, tiles)
            in_block = in_block * held + lax.iota(jnp.int32, held)
            token = chosen.blocks[0, slot] * size + in_block
            exists = (in_block < size) & (token < reach.tokens) if masked else None
            return _read(heads, query, selected, token, exists, state, scale)

        # A query chooses as many of its candidates as it may. Of the last block, which is most often its own, tiles that
        # begin at tokens to come are left out, and others masked.
        count = jnp.minimum(reach.own_block + 1, config.num_selected)
        before = jnp.maximum(count - 1, 0)
        reached = jnp.minimum(reach.tokens - chosen.blocks[0, before] * size, size)
        last = before * tiles + jnp.where(count > 0, flash.ceil_div(reached, held), 0)
        whole = before * tiles if tiles * held == size else 0
        first = jnp.minimum((part - window_parts) * slots * tiles, last)
        state = flash.over_whole_tiles(first, whole, jnp.minimum(first + slots * tiles, last), step, start)
        heads.store_partial(partial, part, v_parts, state, scale)

    @pl.when(flash.arrive(arrived_ref) == pl.num_programs(0) - 1)
    def finish() -> None:
        slot_parts = partial.lse.shape[0] - window_parts
        out_win = _joined(partial, 0, window_parts, window_parts, heads, v_parts)
        out_slc = _joined(partial, window_parts, slot_parts, slot_parts, heads, v_parts)
        out_cmp = tuple(jnp.zeros_like(out) for out in out_slc)
        if chosen.compressed is not None:
            out_cmp = flash.load_parts(chosen.compressed, heads.at(0), v_parts, heads.live)
        gates = flash.load_gates(gates_ref, heads.at(0), heads.live)
        out = flash.sum_branches(gates, out_cmp, out_slc, out_win)
        flash.store_parts(o_ref, heads.at(0), v_parts, out, heads.live)


# --------------------------------------------------------------------------------------------------------------- helpers


class _Heads:
    """The rows of a program: the heads of a group."""

    def __init__(self, group: int):
        # Triton's dot wants 16 rows at least.
        self.count = max(16, flash.next_power_of_2(group))
        self.head = lax.iota(jnp.int32, self.count)
        self.live = self.head < group

    def at(self, place: Any) -> tuple[Array, Array]:
        """Indices of arrays `[place, G, ...]`."""
        return jnp.full_like(self.head, place), self.head

    def store_partial(
        self,
        partial: Partial,
        place: Any,
        parts: tuple[flash.Part, ...],
        state: flash.Softmax,
        scale: float,
        written: Any = True,
    ) -> None:
        outs, lse = flash.softmax_end(state, scale)
        where, live = self.at(place), self.live & written
        flash.store_parts(partial.out, where, parts, outs, live)
        # What has read nothing has no share in the whole.
        flash.store_rows(partial.lse, where, jnp.where(state.total > 0.0, lse, flash.MASKED), live)


def _reach(length_ref: Any, num_keys: int, config: Config) -> Reach:
    """Of the last token of a sequence."""
    position = length_ref[0] - 1
    last = jnp.minimum(position, num_keys - 1)
    where = Positions(position, last, jnp.zeros_like(last))
    visible, ring = compressed_ranges(where, config=config), ring_ranges(where, config=config)
    return Reach(visible.high, candidate_blocks(where, config=config).own, last + 1, ring.high)


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


def _joint_lse(lse_ref: Any, first: int, count: Any, most: int, head: Array, live: Array) -> Array:
    """Of `count` partial results from `first` on, at most `most`, for some heads; `lse_ref` is `[parts, G]`."""
    shape = (flash.next_power_of_2(most), head.shape[0])
    part = jnp.broadcast_to(lax.iota(jnp.int32, shape[0])[:, None], shape)
    mask = (part < count) & jnp.broadcast_to(live[None, :], shape)
    where = first + part, jnp.broadcast_to(head[None, :], shape)
    lse = pltriton.load(lse_ref.at[where], mask=mask, other=flash.MASKED)
    highest = jnp.max(lse, axis=0)
    return highest + jnp.log2(jnp.sum(flash.exp2(lse - highest[None, :]), axis=0))


def _joined(
    partial: Partial, first: int, count: Any, most: int, heads: _Heads, parts: tuple[flash.Part, ...]
) -> tuple[Array, ...]:
    """The attention to all keys of `count` partial results from `first` on, at most `most`, or 0."""
    at_once = min(JOINED, most)
    lse = _joint_lse(partial.lse, first, count, most, heads.head, heads.live)

    def add(i: Any, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        for place in range(at_once):
            place = i * at_once + place
            where, live = heads.at(first + place), heads.live & (place < count)
            weight = jnp.where(live, flash.exp2(flash.load_rows(partial.lse, where, live) - lse), 0.0)
            outs = flash.load_parts(partial.out, where, parts, live)
            sums = tuple(total + weight[:, None] * out for total, out in zip(sums, outs, strict=True))
        return sums

    sums = tuple(jnp.zeros((heads.count, part.width), jnp.float32) for part in parts)
    if at_once == most:
        return add(0, sums)
    turns = flash.ceil_div(jnp.asarray(count, jnp.int32), at_once)
    return lax.fori_loop(jnp.int32(0), turns, add, sums)
