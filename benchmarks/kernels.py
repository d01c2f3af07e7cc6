"""Each kernel of `pallas_kernels` alone, with inputs as it has them in a training step.

`prepare` runs the forward kernels once; a kernel is a function of what that gave, for any tile. What goes by block includes
the inversion of the lists (`invert`, also timed by itself) and the sums of partial results.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.problems import Operands
from nsa_jax import KeyValue, NSAConfig
from pallas_kernels import (
    block_selection,
    compressed_attention,
    inverse_lists,
    positions,
    range_attention,
    selected_attention,
    selected_by_block,
    window_attention,
)
from pallas_kernels.flash import Launch, Ranges, Tile
from pallas_kernels.positions import BlockRanges
from pallas_kernels.range_attention import Branch, QuerySide
from pallas_kernels.tiles import Tiles


class Prepared(NamedTuple):
    """What the kernels read; queries by key/value head."""

    query: Array
    keys_cmp: KeyValue
    keys_slc: KeyValue
    keys_win: KeyValue
    gates: Array
    visible_cmp: Ranges
    visible_slc: Ranges
    visible_win: Ranges
    candidates: BlockRanges
    forced: tuple[Ranges, ...]
    blocks: Array
    free_blocks: Array  # beside the forced
    outs: tuple[Array, Array, Array]  # of compressed, selected, window
    lse_cmp: Array
    dout: Array
    rows_cmp: QuerySide
    rows_slc: QuerySide
    rows_win: QuerySide
    branches: tuple[Branch, Branch, Branch]
    dq: Array  # float32: of all that is read in ranges


def prepare(operands: Operands, cotangent: Array, *, config: NSAConfig, tiles: Tiles) -> Prepared:
    """Run the forward kernels, and those of the backward pass that others read from."""
    batch, length, _, size = operands.query.shape
    num_keys, kv_heads = operands.selected.key.shape[1:3]

    def grouped(x: Array) -> Array:
        return x.reshape(batch, length, kv_heads, -1, x.shape[-1])

    where = positions.positions(0, None, batch=batch, num_queries=length, num_keys=num_keys)
    query, gates, dout = grouped(operands.query), grouped(operands.gates), grouped(cotangent)
    visible_cmp = positions.compressed_ranges(where, config=config)
    visible_slc = positions.token_ranges(where)
    visible_win = positions.window_ranges(where, 0, length=num_keys, config=config)
    candidates = positions.candidate_blocks(where, config=config)
    forced = positions.forced_ranges(where, config=config)
    launch, scale = _launches(tiles), size**-0.5
    out_win, lse_win = window_attention.window_forward(
        query, *operands.window, visible_win, scale=scale, launch=launch("window_forward")
    )
    out_cmp, lse_cmp = compressed_attention.compressed_forward(
        query, *operands.compressed, visible_cmp, scale=scale, holes=False, launch=launch("compressed_forward")
    )
    blocks = block_selection.select(
        query,
        operands.compressed.key,
        lse_cmp,
        visible_cmp,
        candidates,
        config=config,
        num_blocks=config.num_blocks(num_keys),
        scale=scale,
        scores_launch=launch("scores"),
        choice_launch=launch("choice"),
    )
    free = selected_attention.free_blocks(blocks, candidates, config=config)
    more: dict[str, Any] = dict(forced=selected_attention.Forced(forced, launch("selected_forced")), keep=True)
    reads = (query, *operands.selected, free, visible_slc, selected_attention.Sum(gates, out_cmp, out_win))
    by_block = selected_by_block.goes_by_block(tiles, config)
    if by_block:
        _, kept = selected_by_block.selected_forward_by_block(
            *reads,
            config=config,
            scale=scale,
            holes=False,
            launch=launch("selected_by_block"),
            sum_launch=launch("selected_add"),
            **more,
        )
    else:
        _, kept = selected_attention.selected_forward(
            *reads,
            config=config,
            scale=scale,
            holes=False,
            launch=launch("selected_forward"),
            **more,
        )
    assert kept is not None
    gates_of = [gates[..., i].astype(jnp.float32) for i in range(3)]
    outs = (out_cmp, kept.out, out_win)
    deltas = range_attention.deltas(dout, outs)
    branches = (
        Branch(*operands.compressed, (visible_cmp,), gates_of[0], lse_cmp, deltas[0]),
        Branch(*operands.selected, () if by_block else forced, gates_of[1], kept.lse, deltas[1]),
        Branch(*operands.window, (visible_win,), gates_of[2], lse_win, deltas[2]),
    )
    dq = range_attention.query_gradient(query, dout, branches, scale=scale, holes=False, launch=launch("range_dq"))
    rows = [QuerySide(query, dout, x.gate, x.lse, x.delta) for x in branches]
    return Prepared(
        query,
        operands.compressed,
        operands.selected,
        operands.window,
        gates,
        visible_cmp,
        visible_slc,
        visible_win,
        candidates,
        forced,
        blocks,
        free,
        outs,
        lse_cmp,
        dout,
        rows_cmp=rows[0],
        rows_slc=rows[1],
        rows_win=rows[2],
        branches=branches,
        dq=dq,
    )


Kernel = Callable[[Prepared], Any]


def kernels(*, config: NSAConfig, scale: float, tiles: Tiles) -> dict[str, Callable[[Tile], Kernel]]:
    """By the names of `Tiles`: for a tile, the kernel as a function of what it reads. Other kernels' tiles are from `tiles`.

    `scores` and `choice` both stand for the whole selection, `selected_add` for the kernels whose parts it sums;
    `selected_forward` includes `selected_forced` where it needs it.
    """
    fixed, by_block = _launches(tiles), selected_by_block.goes_by_block(tiles, config)

    def window_forward(tile: Tile) -> Kernel:
        return lambda x: window_attention.window_forward(
            x.query, *x.keys_win, x.visible_win, scale=scale, launch=_launch(tile)
        )

    def range_dq(tile: Tile) -> Kernel:
        more: dict[str, Any] = dict(scale=scale, holes=False, launch=_launch(tile))
        return lambda x: range_attention.query_gradient(x.query, x.dout, x.branches, **more)

    def window_dkv(tile: Tile) -> Kernel:
        return lambda x: window_attention.window_key_value_gradients(
            x.rows_win, *x.keys_win, x.visible_win, scale=scale, launch=_launch(tile)
        )

    def compressed_forward(tile: Tile) -> Kernel:
        return lambda x: compressed_attention.compressed_forward(
            x.query, *x.keys_cmp, x.visible_cmp, scale=scale, holes=False, launch=_launch(tile)
        )

    def compressed_dkv(tile: Tile) -> Kernel:
        return lambda x: compressed_attention.compressed_key_value_gradients(
            x.rows_cmp, *x.keys_cmp, x.visible_cmp, scale=scale, launch=_launch(tile)
        )

    def selection(scores: Launch, choice: Launch) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, scores_launch=scores, choice_launch=choice)
        return lambda x: block_selection.select(
            x.query,
            x.keys_cmp.key,
            x.lse_cmp,
            x.visible_cmp,
            x.candidates,
            num_blocks=config.num_blocks(x.keys_slc.key.shape[1]),
            **more,
        )

    def selected_forward(launch: Launch, forced_launch: Launch) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, holes=False, launch=launch, keep=True)
        return lambda x: selected_attention.selected_forward(
            *_selected_reads(x), forced=selected_attention.Forced(x.forced, forced_launch), **more
        )

    def selected_forced(tile: Tile) -> Kernel:
        def run(x: Prepared) -> tuple[Array, Array]:
            forced = selected_attention.Forced(x.forced, _launch(tile))
            return selected_attention.forced_forward(x.query, *x.keys_slc, forced, scale=scale, holes=False)

        return run

    def selected_dq(tile: Tile) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, launch=_launch(tile))
        return lambda x: selected_attention.selected_query_gradient(
            x.rows_slc, *x.keys_slc, x.free_blocks, x.visible_slc, x.dq, dtype=x.query.dtype, **more
        )

    def forward_by_block(launch: Launch, sum_launch: Launch) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, holes=False, launch=launch, sum_launch=sum_launch)
        forced_launch = fixed("selected_forced")
        return lambda x: selected_by_block.selected_forward_by_block(
            *_selected_reads(x), forced=selected_attention.Forced(x.forced, forced_launch), keep=True, **more
        )

    def gradients_by_block(launch: Launch, sum_launch: Launch) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, holes=False, launch=launch, sum_launch=sum_launch)

        def run(x: Prepared) -> tuple[Any, ...]:
            added = x.dq if by_block else None
            reads = (x.rows_slc, *x.keys_slc, x.blocks, x.visible_slc, added)
            found = selected_by_block.selected_gradients_by_block(*reads, **more)
            return tuple(array for array in found if array is not None)

        return run

    def selected_add(tile: Tile) -> Kernel:
        gradients = gradients_by_block(fixed("selected_dkv"), _launch(tile))
        if not by_block:
            return gradients
        forward = forward_by_block(fixed("selected_by_block"), _launch(tile))
        return lambda x: (forward(x), gradients(x))

    return {
        "window_forward": window_forward,
        "window_dkv": window_dkv,
        "compressed_forward": compressed_forward,
        "range_dq": range_dq,
        "compressed_dkv": compressed_dkv,
        "scores": lambda tile: selection(_launch(tile), fixed("choice")),
        "choice": lambda tile: selection(fixed("scores"), _launch(tile)),
        "selected_forced": selected_forced,
        "selected_forward": lambda tile: selected_forward(_launch(tile), fixed("selected_forced")),
        "selected_dq": selected_dq,
        "selected_dkv": lambda tile: gradients_by_block(_launch(tile), fixed("selected_add")),
        "selected_by_block": lambda tile: forward_by_block(_launch(tile), fixed("selected_add")),
        "selected_add": selected_add,
    }


def names_in_use(tiles: Tiles, config: NSAConfig) -> tuple[str, ...]:
    """The kernels that run with these tiles: the selected branch goes by query or by block."""
    unused: tuple[str, ...] = ("selected_forward", "selected_dq")
    if not selected_by_block.goes_by_block(tiles, config):
        unused = ("selected_by_block",)
    return tuple(name for name in kernels(config=config, scale=1.0, tiles=tiles) if name not in unused)


def parts(*, config: NSAConfig, scale: float, tiles: Tiles) -> dict[str, Kernel]:
    """What a forward and backward pass is made of, with these tiles; each is timed once."""
    every = kernels(config=config, scale=scale, tiles=tiles)
    timed_with_others = ("choice", "selected_forced", "selected_add")
    made = {
        "selection" if name == "scores" else name: every[name](getattr(tiles, name))
        for name in names_in_use(tiles, config)
        if name not in timed_with_others
    }
    made["invert"] = lambda x: inverse_lists.cut(
        inverse_lists.invert(x.blocks, num_blocks=config.num_blocks(x.keys_slc.key.shape[1]))
    )
    made["deltas"] = lambda x: range_attention.deltas(x.dout, x.outs)
    return made


def _selected_reads(x: Prepared) -> tuple[Any, ...]:
    branches = selected_attention.Sum(x.gates, x.outs[0], x.outs[2])
    return x.query, *x.keys_slc, x.free_blocks, x.visible_slc, branches


def _launches(tiles: Tiles) -> Callable[[str], Launch]:
    return lambda name: _launch(getattr(tiles, name))


def _launch(tile: Tile) -> Launch:
    return Launch(tile, interpret=False)
