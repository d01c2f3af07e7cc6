"""Native Sparse Attention in kernels: the three branches, their gated sum, and its gradient, as one `custom_vjp`.

Forward: window; compressed; the choice of blocks, from the compressed branch's log-sum-exp; selected, whose program also
forms the gated sum. Kept for the backward pass: the branches' outputs (rounded to the values' dtype) and log-sum-exps, and
the blocks.

Backward: `delta = dout . o` of each branch, which is its gate's gradient, and after which the outputs are no longer wanted.
One kernel forms dq of all that is read in ranges: the window, the compressed tokens, and, unless the selected branch goes by
block, the blocks that every query is forced to choose. A second adds dq of the other selected blocks. Then dk and dv of each
branch.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from pallas_kernels import (
    block_selection,
    compressed_attention,
    flash,
    range_attention,
    selected_attention,
    selected_by_block,
    window_attention,
)
from pallas_kernels.flash import Config, Launch, Ranges, Tile
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
from pallas_kernels.range_attention import Branch, Grouped, QuerySide, RowValues
from pallas_kernels.tiles import Tiles, tiles_for


class Static(NamedTuple):
    """What is known when a call is traced."""

    config: Config
    scale: float
    tiles: Tiles
    holes: bool
    interpret: bool

    @property
    def by_block(self) -> bool:
        return selected_by_block.goes_by_block(self.tiles, self.config)

    def launch(self, kernel: str) -> Launch:
        tile: Tile = getattr(self.tiles, kernel)
        return Launch(tile, self.interpret)


class Operands(NamedTuple):
    """What is differentiated; queries by key/value head."""

    query: Grouped
    key_cmp: Float[Array, "B C K H"]
    value_cmp: Float[Array, "B C K V"]
    key_slc: Float[Array, "B S K H"]
    value_slc: Float[Array, "B S K V"]
    key_win: Float[Array, "B W K H"]
    value_win: Float[Array, "B W K V"]
    gates: Float[Array, "B T K G 3"]


class Places(NamedTuple):
    """What each query may read in each branch, and the blocks that it may choose and will."""

    compressed: Ranges
    tokens: Ranges
    window: Ranges
    candidates: BlockRanges
    forced: tuple[Ranges, ...] | None  # tokens of every query's forced blocks, where these are read apart


class Saved(NamedTuple):
    """What the forward pass keeps beside its operands."""

    blocks: Int32[Array, "B T K A"]
    out_cmp: Float[Array, "B T K G V"]
    out_slc: Float[Array, "B T K G V"]
    out_win: Float[Array, "B T K G V"]
    lse_cmp: RowValues
    lse_slc: RowValues
    lse_win: RowValues


def attend(
    query: Float[Array, "B T N H"],
    compressed: tuple[Array, Array],
    selected: tuple[Array, Array],
    window: tuple[Array, Array],
    gates: Float[Array, "B T N 3"],
    blocks: Int32[Array, "B T K A"] | None,
    *,
    config: Config,
    scale: float,
    query_start: Any,
    window_start: Any,
    segment_ids: Int32[Array, "B S"] | None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """The gated sum of the three branches (eq. 5); the blocks are chosen here if not given. Shapes as in `nsa_attention`.

    Blocks that are given are as `select_blocks` gives them: ascending, each once, none of the future, then -1.
    """
    batch, length, num_heads, _ = query.shape
    num_keys, kv_heads, value_size = selected[1].shape[1:]
    static = Static(config, scale, tiles or tiles_for(query, kv_heads, value_size), segment_ids is not None, interpret)
    where = positions(query_start, segment_ids, batch=batch, num_queries=length, num_keys=num_keys)
    if blocks is not None and blocks.shape[-1] == 0:
        # Arrays have no axis of length 0 for a kernel to read.
        blocks = jnp.full((*blocks.shape[:-1], 1), flash.NO_BLOCK, jnp.int32)
    places = places_of(where, window_start, window_keys=window[0].shape[1], config=config, own_choice=blocks is None)
    operands = Operands(_grouped(query, kv_heads), *compressed, *selected, *window, _grouped(gates, kv_heads))
    out = _attend(static, operands, places, blocks)
    return out.reshape(batch, length, num_heads, out.shape[-1])


def places_of(where: Positions, window_start: Any, *, window_keys: int, config: Config, own_choice: bool) -> Places:
    """With `own_choice`, the blocks are those that `_select` gives."""
    # The caller's blocks need not hold the forced ones.
    apart = own_choice and config.num_initial + config.num_local > 0
    return Places(
        compressed_ranges(where, config=config),
        token_ranges(where),
        window_ranges(where, window_start, length=window_keys, config=config),
        candidate_blocks(where, config=config),
        forced_ranges(where, config=config) if apart else None,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, operands: Operands, places: Places, blocks: Array | None) -> Array:
    return _branches(static, operands, places, blocks, keep=False)[0]


@jax.custom_jvp
def _differentiated_once(arrays: Any) -> Any:
    """The same; to ask for a derivative of what a derivative is made of ends here, with the reason, and not in a kernel."""
    return arrays


@_differentiated_once.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError("the kernels have no second derivatives; implementation='xla' has them")


def _forward(static: Static, operands: Operands, places: Places, blocks: Array | None) -> tuple[Array, Any]:
    operands = _differentiated_once(operands)
    out, saved = _branches(static, operands, places, blocks, keep=True)
    names = ("nsa_blocks", *(f"nsa_{what}_{branch}" for what in ("out", "lse") for branch in ("cmp", "slc", "win")))
    saved = Saved(*map(checkpoint_name, saved, names))
    return checkpoint_name(out, "nsa_out"), (operands, places, saved)


def _branches(
    static: Static, operands: Operands, places: Places, blocks: Array | None, *, keep: bool
) -> tuple[Array, Any]:
    """Their gated sum, and with `keep` a `Saved`."""
    query, config, scale = operands.query, static.config, static.scale
    out_win, lse_win = window_attention.window_forward(
        query, operands.key_win, operands.value_win, places.window, scale=scale, launch=static.launch("window_forward")
    )
    out_cmp, lse_cmp = compressed_attention.compressed_forward(
        query,
        operands.key_cmp,
        operands.value_cmp,
        places.compressed,
        scale=scale,
        holes=static.holes,
        launch=static.launch("compressed_forward"),
    )
    if blocks is None:
        blocks = _select(
            static,
            query,
            operands.key_cmp,
            lse_cmp,
            places.compressed,
            places.candidates,
            num_keys=operands.key_slc.shape[1],
        )
    branches = selected_attention.Sum(operands.gates, out_cmp, out_win)
    forced = None
    if places.forced is not None:
        forced = selected_attention.Forced(places.forced, static.launch("selected_forced"))
    reads = (query, operands.key_slc, operands.value_slc, _apart(blocks, places, config), places.tokens, branches)
    if static.by_block:
        out, kept = selected_by_block.selected_forward_by_block(
            *reads,
            config=config,
            scale=scale,
            holes=static.holes,
            forced=forced,
            launch=static.launch("selected_by_block"),
            sum_launch=static.launch("selected_add"),
            keep=keep,
        )
    else:
        out, kept = selected_attention.selected_forward(
            *reads,
            config=config,
            scale=scale,
            holes=static.holes,
            forced=forced,
            launch=static.launch("selected_forward"),
            keep=keep,
        )
    if kept is None:
        return out, None
    return out, Saved(blocks, out_cmp, kept.out, out_win, lse_cmp, kept.lse, lse_win)


def _apart(blocks: Array, places: Places, config: Config) -> Array:
    """The blocks that are read one by one: all, or those beside the forced."""
    if places.forced is None:
        return blocks
    return selected_attention.free_blocks(blocks, places.candidates, config=config)


def _select(
    static: Static,
    query: Grouped,
    key: Float[Array, "B C K H"],
    lse: RowValues,
    visible: Ranges,
    candidates: BlockRanges,
    *,
    num_keys: int,
) -> Int32[Array, "B T K A"]:
    return block_selection.select(
        query,
        key,
        lse,
        visible,
        candidates,
        config=static.config,
        num_blocks=-(-num_keys // static.config.select_block),
        scale=static.scale,
        scores_launch=static.launch("scores"),
        choice_launch=static.launch("choice"),
    )


def _backward(static: Static, residuals: Any, dout: Array) -> tuple[Operands, None, None]:
    (operands, places, saved), dout = residuals, _differentiated_once(dout)
    scale, config = static.scale, static.config
    deltas = range_attention.deltas(dout, (saved.out_cmp, saved.out_slc, saved.out_win))
    key_cmp, value_cmp, key_slc, value_slc, key_win, value_win = operands[1:7]
    branches = branches_of(static, operands, places, saved, deltas)
    dq = range_attention.query_gradient(
        operands.query, dout, branches, scale=scale, holes=static.holes, launch=static.launch("range_dq")
    )
    compressed, selected, window = (
        QuerySide(operands.query, dout, branch.gate, branch.lse, branch.delta) for branch in branches
    )
    dkv_cmp = compressed_attention.compressed_key_value_gradients(
        compressed,
        key_cmp,
        value_cmp,
        places.compressed,
        scale=scale,
        launch=static.launch("compressed_dkv"),
    )
    if not static.by_block:
        dq = selected_attention.selected_query_gradient(
            selected,
            key_slc,
            value_slc,
            _apart(saved.blocks, places, config),
            places.tokens,
            dq,
            dtype=operands.query.dtype,
            config=config,
            scale=scale,
            launch=static.launch("selected_dq"),
        )
    found = selected_by_block.selected_gradients_by_block(
        selected,
        key_slc,
        value_slc,
        saved.blocks,
        places.tokens,
        dq if static.by_block else None,
        config=config,
        scale=scale,
        holes=static.holes,
        launch=static.launch("selected_dkv"),
        sum_launch=static.launch("selected_add"),
    )
    dq = dq if found.dq is None else found.dq
    dkv_win = window_attention.window_key_value_gradients(
        window, key_win, value_win, places.window, scale=scale, launch=static.launch("window_dkv")
    )
    dgates = jnp.stack(deltas, axis=-1).astype(operands.gates.dtype)
    return Operands(dq, *dkv_cmp, found.dk, found.dv, *dkv_win, dgates), None, None


def branches_of(
    static: Static, operands: Operands, places: Places, saved: Saved, deltas: Sequence[RowValues]
) -> tuple[Branch, Branch, Branch]:
    """What the backward pass of each branch reads; its ranges are those of which dq of all branches is formed at once."""
    gates = operands.gates.astype(jnp.float32)
    key_cmp, value_cmp, key_slc, value_slc, key_win, value_win = operands[1:7]
    forced = () if static.by_block else places.forced or ()
    return (
        Branch(key_cmp, value_cmp, (places.compressed,), gates[..., 0], saved.lse_cmp, deltas[0]),
        Branch(key_slc, value_slc, forced, gates[..., 1], saved.lse_slc, deltas[1]),
        Branch(key_win, value_win, (places.window,), gates[..., 2], saved.lse_win, deltas[2]),
    )


_attend.defvjp(_forward, _backward)


def select_blocks(
    query: Float[Array, "B T N H"],
    compressed_key: Float[Array, "B C K H"],
    *,
    config: Config,
    num_keys: int,
    scale: float,
    query_start: Any,
    segment_ids: Int32[Array, "B S"] | None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Int32[Array, "B T K A"]:
    """Blocks that each query reads; see `nsa_jax.select_blocks`."""
    batch, length, _, size = query.shape
    kv_heads = compressed_key.shape[2]
    static = Static(config, scale, tiles or tiles_for(query, kv_heads, size), segment_ids is not None, interpret)
    where = positions(query_start, segment_ids, batch=batch, num_queries=length, num_keys=num_keys)
    visible = compressed_ranges(where, config=config)
    candidates = candidate_blocks(where, config=config)
    query, key = jax.lax.stop_gradient((_grouped(query, kv_heads), compressed_key))
    _, lse = compressed_attention.compressed_forward(
        query, key, key, visible, scale=scale, holes=static.holes, launch=static.launch("compressed_forward")
    )
    return _select(static, query, key, lse, visible, candidates, num_keys=num_keys)


def _grouped(x: Float[Array, "B T N D"], kv_heads: int) -> Float[Array, "B T K G D"]:
    batch, length, num_heads, size = x.shape
    return x.reshape(batch, length, kv_heads, num_heads // kv_heads, size)
