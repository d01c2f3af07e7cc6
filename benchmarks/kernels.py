"""Each kernel of `pallas_kernels` alone, with inputs as it has them in a training step.

`prepare` runs the forward kernels once; a kernel is a function of what that gave, for any tile. What goes by block includes
the inversion of the lists (`invert`, also timed by itself) and the sums of partial results.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array

from benchmarks.problems import Operands
from nsa_jax import KeyValue, NSAConfig
from nsa_jax.shapes import Blocks
from pallas_kernels import (
    attention,
    block_selection,
    compressed_attention,
    inverse_lists,
    positions,
    range_attention,
    selected_attention,
    selected_by_block,
    window_attention,
)
from pallas_kernels.flash import Launch, Tile
from pallas_kernels.range_attention import Branch, QuerySide
from pallas_kernels.tiles import Tiles


class Prepared(NamedTuple):
    """What the kernels read, as `pallas_kernels.attention` has it."""

    query: Array  # by key/value head, as gates and dout
    keys_cmp: KeyValue
    keys_slc: KeyValue
    keys_win: KeyValue
    gates: Array
    places: attention.Places
    saved: attention.Saved
    free_blocks: Array  # beside the forced
    dout: Array
    branches: tuple[Branch, Branch, Branch]  # compressed, selected, window
    dq: Array  # float32: of all that is read in ranges

    def rows(self, branch: int) -> QuerySide:
        _, _, _, gate, lse, delta = self.branches[branch]
        return QuerySide(self.query, self.dout, gate, lse, delta)

    @property
    def outs(self) -> tuple[Array, Array, Array]:
        return self.saved.out_cmp, self.saved.out_slc, self.saved.out_win


def prepare(operands: Operands, cotangent: Array, *, config: NSAConfig, tiles: Tiles) -> Prepared:
    """Run the forward kernels, and those of the backward pass that others read from."""
    static, tensors, places, saved = _forward(operands, config=config, tiles=tiles)
    dout = cotangent.reshape(saved.out_cmp.shape)
    deltas = range_attention.deltas(dout, (saved.out_cmp, saved.out_slc, saved.out_win))
    branches = attention.branches_of(static, tensors, places, saved, deltas)
    more: dict[str, Any] = dict(scale=static.scale, holes=False, launch=static.launch("range_dq"))
    return Prepared(
        tensors.query,
        operands.compressed,
        operands.selected,
        operands.window,
        tensors.gates,
        places,
        saved,
        free_blocks=selected_attention.free_blocks(saved.blocks, places.candidates, config=config),
        dout=dout,
        branches=branches,
        dq=range_attention.query_gradient(tensors.query, dout, branches, **more),
    )


def chosen(operands: Operands, *, config: NSAConfig, tiles: Tiles) -> Blocks:
    """The blocks that `nsa_attention` chooses with these tiles, to the bit: of tied scores, too."""
    return _forward(operands, config=config, tiles=tiles)[-1].blocks


def _forward(operands: Operands, *, config: NSAConfig, tiles: Tiles) -> tuple[Any, ...]:
    batch, length, _, size = operands.query.shape
    num_keys, kv_heads = operands.selected.key.shape[1:3]

    def grouped(x: Array) -> Array:
        return x.reshape(batch, length, kv_heads, -1, x.shape[-1])

    where = positions.positions(0, None, batch=batch, num_queries=length, num_keys=num_keys)
    places = attention.places_of(where, 0, window_keys=num_keys, config=config, own_choice=True)
    pairs = (*operands.compressed, *operands.selected, *operands.window)
    tensors = attention.Operands(grouped(operands.query), *pairs, grouped(operands.gates))
    static = attention.Static(config, size**-0.5, tiles, holes=False, interpret=False)
    return static, tensors, places, attention._branches(static, tensors, places, None, keep=True)[1]


Kernel = Callable[[Prepared], Any]


def kernels(*, config: NSAConfig, scale: float, tiles: Tiles) -> dict[str, Callable[[Tile], Kernel]]:
    """By the names of `Tiles`: for a tile, the kernel as a function of what it reads. Other kernels' tiles are from `tiles`.

    `scores` and `choice` both stand for the whole selection, `selected_add` for the kernels whose parts it sums;
    `selected_forward` includes `selected_forced` where it needs it.
    """
    fixed, by_block = _launches(tiles), selected_by_block.goes_by_block(tiles, config)

    def window_forward(tile: Tile) -> Kernel:
        return lambda x: window_attention.window_forward(
            x.query, *x.keys_win, x.places.window, scale=scale, launch=_launch(tile)
        )

    def range_dq(tile: Tile) -> Kernel:
        more: dict[str, Any] = dict(scale=scale, holes=False, launch=_launch(tile))
        return lambda x: range_attention.query_gradient(x.query, x.dout, x.branches, **more)

    def window_dkv(tile: Tile) -> Kernel:
        return lambda x: window_attention.window_key_value_gradients(
            x.rows(2), *x.keys_win, x.places.window, scale=scale, launch=_launch(tile)
        )

    def compressed_forward(tile: Tile) -> Kernel:
        return lambda x: compressed_attention.compressed_forward(
            x.query, *x.keys_cmp, x.places.compressed, scale=scale, holes=False, launch=_launch(tile)
        )

    def compressed_dkv(tile: Tile) -> Kernel:
        return lambda x: compressed_attention.compressed_key_value_gradients(
            x.rows(0), *x.keys_cmp, x.places.compressed, scale=scale, launch=_launch(tile)
        )

    def selection(scores: Launch, choice: Launch) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, scores_launch=scores, choice_launch=choice)
        return lambda x: block_selection.select(
            x.query,
            x.keys_cmp.key,
            x.saved.lse_cmp,
            x.places.compressed,
            x.places.candidates,
            num_blocks=config.num_blocks(x.keys_slc.key.shape[1]),
            **more,
        )

    def selected_forward(launch: Launch, forced_launch: Launch) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, holes=False, launch=launch, keep=True)
        return lambda x: selected_attention.selected_forward(
            *_selected_reads(x), forced=_forced(x, forced_launch), **more
        )

    def selected_forced(tile: Tile) -> Kernel:
        def run(x: Prepared) -> tuple[Array, Array]:
            forced = _forced(x, _launch(tile))
            return selected_attention.forced_forward(x.query, *x.keys_slc, forced, scale=scale, holes=False)

        return run

    def selected_dq(tile: Tile) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, launch=_launch(tile))
        return lambda x: selected_attention.selected_query_gradient(
            x.rows(1), *x.keys_slc, x.free_blocks, x.places.tokens, x.dq, dtype=x.query.dtype, **more
        )

    def forward_by_block(launch: Launch, sum_launch: Launch) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, holes=False, launch=launch, sum_launch=sum_launch)
        forced_launch = fixed("selected_forced")
        return lambda x: selected_by_block.selected_forward_by_block(
            *_selected_reads(x), forced=_forced(x, forced_launch), keep=True, **more
        )

    def gradients_by_block(launch: Launch, sum_launch: Launch) -> Kernel:
        more: dict[str, Any] = dict(config=config, scale=scale, holes=False, launch=launch, sum_launch=sum_launch)

        def run(x: Prepared) -> tuple[Any, ...]:
            added = x.dq if by_block else None
            reads = (x.rows(1), *x.keys_slc, x.saved.blocks, x.places.tokens, added)
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
        inverse_lists.invert(x.saved.blocks, num_blocks=config.num_blocks(x.keys_slc.key.shape[1]))
    )
    made["deltas"] = lambda x: range_attention.deltas(x.dout, x.outs)
    return made


def _selected_reads(x: Prepared) -> tuple[Any, ...]:
    branches = selected_attention.Sum(x.gates, x.saved.out_cmp, x.saved.out_win)
    return x.query, *x.keys_slc, x.free_blocks, x.places.tokens, branches


def _forced(x: Prepared, launch: Launch) -> selected_attention.Forced:
    assert x.places.forced is not None
    return selected_attention.Forced(x.places.forced, launch)


def _launches(tiles: Tiles) -> Callable[[str], Launch]:
    return lambda name: _launch(getattr(tiles, name))


def _launch(tile: Tile) -> Launch:
    return Launch(tile, interpret=False)
