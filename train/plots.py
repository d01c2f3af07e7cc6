"""Figures of training runs and of what Native Sparse Attention reads.

Each function takes plain NumPy arrays or lists and an output path whose suffix picks the format (.png, .svg, .pdf),
writes the file, making its folder, and returns the path. Block choices, gates and losses come from the caller: nothing
here computes attention. The three branches have the same colours in every figure, `BRANCH_COLOURS`.

matplotlib is imported by the first call, and pyplot never: no backend, figure or style of the caller is touched.

    python -m train.plots docs/figures     # remakes the README's picture
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from math import isfinite, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's "high contrast" scheme: told apart with every colour vision and, by lightness, in greyscale too.
BRANCH_COLOURS = {"compressed": "#DDAA33", "selected": "#BB5566", "window": "#004488"}
# Runs are no branches, so they share no colour with them. Paul Tol's "vibrant" scheme.
RUN_COLOURS = ("#009988", "#EE7733", "#33BBEE", "#EE3377", "#777777", "#0077BB", "#CC3311")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

PAPER = "#FFFFFF"  # opaque: the same picture on light and on dark pages
INK = "#333333"
FUTURE = "#E4E4E4"
UNREAD = "#F1EFEA"
DENSE = "#9A9A9A"

LINE: dict[str, Any] = {"linewidth": 1.6, "markersize": 4.5}
_LOSS_UNITS = {"loss": "loss (nats per token)", "bits_per_byte": "loss (bits per byte)"}
# "none" keeps every cell a sharp rectangle, and in SVG and PDF leaves the scaling to the viewer.
CELLS: dict[str, Any] = {"interpolation": "none", "aspect": "auto"}

DPI = 200
# A map has at most so many rows and columns, and its panel more pixels than that: every cell is seen.
MAX_CELLS = 320
MAX_PICTURE_TOKENS = 640


@runtime_checkable
class BlockSizes(Protocol):
    """What `reading_pattern` asks of a config, in tokens; `nsa_jax.NSAConfig` has it."""

    @property
    def compress_block(self) -> int: ...
    @property
    def compress_stride(self) -> int: ...
    @property
    def select_block(self) -> int: ...
    @property
    def window(self) -> int: ...


def loss_curve(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> Path:
    """Draw loss over training steps: training as a thin line, validation with markers.

    Where a step occurs twice in a run, as after a restart from a checkpoint, the later row counts. A loss that is None,
    infinite or NaN leaves a gap.

    Args:
        runs: label -> rows of that run's `metrics.jsonl`: mappings with `step`, `loss` and, in the rows that have one,
            `validation_loss`, both in nats per token. A row may lack either.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        ValueError: there is no run, a run has no loss at all, or a row has no step.
    """
    if not runs:
        raise ValueError("runs={} must hold at least one run: label -> rows with 'step' and 'loss'")
    figure = _new_figure(7.2, 4.2)
    axes = _new_axes(figure, x="training step", y="loss (nats per token)")
    for (label, rows), (colour, marker) in zip(runs.items(), _run_styles(), strict=False):
        training, validation = _series(label, rows, "loss"), _series(label, rows, "validation_loss")
        if not training and not validation:
            raise ValueError(
                f"runs[{label!r}] must have a row with 'loss' or 'validation_loss'; none of {len(rows)} has"
            )
        if training:
            name, alpha = (f"{label}, training", 0.5) if validation else (label, 1.0)
            axes.plot(*zip(*training, strict=True), color=colour, linewidth=0.8, alpha=alpha, label=name)
        if validation:
            name = f"{label}, validation"
            axes.plot(*zip(*validation, strict=True), color=colour, marker=marker, **LINE, label=name)
    _add_legend(axes, columns=len(runs) if len(runs) <= 3 else 2)
    return _save(figure, path)


def loss_by_position(
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path,
    *,
    field: Literal["loss", "bits_per_byte"] = "loss",
) -> Path:
    """Draw the loss of tokens over their position in the sequence, on a log axis.

    Args:
        results: label -> buckets `{"start": int, "end": int, "loss": float}`: the mean loss, in nats per token, at the
            0-based positions `start .. end - 1`. A bucket is drawn at the geometric mean of its first and last
            position, counted from 1: start=4, end=8 at `sqrt(5 * 8)`.
        path: the file to write.
        field: of a bucket that is drawn: "bits_per_byte" is comparable between tokenizers.

    Returns:
        `path`.

    Raises:
        ValueError: there is no label, a label has no bucket, or a bucket is not `0 <= start < end` with that field.
    """
    if not results:
        raise ValueError("results={} must hold at least one label -> buckets")
    figure = _new_figure(7.2, 4.2)
    axes = _new_axes(figure, x="position in the sequence (tokens, log scale)", y=_LOSS_UNITS[field])
    axes.set_xscale("log", base=2)
    for (label, buckets), (colour, marker) in zip(results.items(), _run_styles(), strict=False):
        if not buckets:
            raise ValueError(f"results[{label!r}]=[] must hold at least one bucket")
        for bucket in buckets:
            if missing := sorted({"start", "end", field} - bucket.keys()):
                raise ValueError(f"results[{label!r}]: {bucket=} must also have {missing}")
            if not 0 <= bucket["start"] < bucket["end"]:
                raise ValueError(f"results[{label!r}]: {bucket=} must have 0 <= start < end")
        ordered = sorted(buckets, key=lambda bucket: bucket["start"])
        middles = [sqrt((bucket["start"] + 1) * bucket["end"]) for bucket in ordered]
        losses = [float(bucket[field]) for bucket in ordered]
        axes.plot(middles, losses, color=colour, marker=marker, **LINE, label=label)
    axes.xaxis.set_major_formatter(_format_tokens)
    axes.xaxis.set_tick_params(which="minor", length=0)
    _add_legend(axes)
    return _save(figure, path)


def selected_blocks(
    blocks: ArrayLike,
    path: str | Path,
    *,
    select_block: int,
    num_keys: int,
    query_start: int = 0,
    layer_names: Sequence[str] | None = None,
) -> Path:
    """Draw which key blocks each query chose: a panel for each layer, queries downwards, keys to the right.

    The colour is the number of key/value heads that chose the block. The line is the diagonal, and what is grey is the
    future: a choice there is drawn like any other, so a fault of causality is seen.

    A panel has at most 320 rows and columns. Of a larger input, neighbouring queries (or blocks) share a cell, which
    shows the *largest* count among them: T=8192 puts 26 queries in a row, and a block that one head chose for one of
    the 26 is drawn as chosen by one head. So no choice is lost, and a rare one looks larger than it is. The axis label
    says how many share a row.

    Args:
        blocks: int `[L, T, K, A]`: layers, queries, key/value heads, chosen blocks; -1 is an unused slot, and a block
            that a head names twice counts once.
        path: the file to write.
        select_block: tokens in a block.
        num_keys: S, the keys; blocks are `0 .. ceil(S / select_block) - 1`.
        query_start: position of the first query.
        layer_names: titles of the L panels; by default "layer 0", "layer 1", ...

    Returns:
        `path`.

    Raises:
        ValueError: a wrong shape, dtype or number of names, a block that does not exist, queries beyond the keys.
    """
    if select_block < 1 or num_keys < 1:
        raise ValueError(f"{select_block=} and {num_keys=} must be positive")
    num_blocks = -(-num_keys // select_block)
    choices = _check_blocks(blocks, "LTKA", num_blocks)
    num_layers, num_queries, num_heads, _ = choices.shape
    query_end = query_start + num_queries
    if not 0 <= query_start <= query_end <= num_keys:
        raise ValueError(
            f"{query_start=} and the {num_queries} queries of {choices.shape=} must lie within {num_keys=}"
        )
    names = [f"layer {layer}" for layer in range(num_layers)] if layer_names is None else layer_names
    if len(names) != num_layers:
        raise ValueError(f"layer_names={list(names)} must have one name for each of the {num_layers} layers")

    columns = min(num_layers, 4)
    rows = -(-num_layers // columns)
    side = 3.8 if num_layers == 1 else 2.5
    figure = _new_figure(1.2 + side * columns, 0.6 + side * rows)
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    panels = [figure.add_subplot(rows, columns, layer + 1) for layer in range(num_layers)]
    row_queries, column_blocks = -(-num_queries // MAX_CELLS), -(-num_blocks // MAX_CELLS)
    shades = _shades(BRANCH_COLOURS["selected"], num_heads)
    # -1 is the future, 0 a block that no head chose, 1 .. K the heads that chose it.
    colours = ListedColormap(np.stack([_rgb(FUTURE), _rgb(PAPER), *shades]))
    future = np.arange(num_blocks) * select_block > np.arange(query_start, query_end)[:, None]
    for layer, (axes, name) in enumerate(zip(panels, names, strict=True)):
        counts = _head_counts(choices[layer], num_blocks)
        counts[future & (counts == 0)] = -1
        _draw_map(
            axes,
            counts,
            colours,
            levels=(-1, num_heads),
            cell=(row_queries, column_blocks),
            select_block=select_block,
            num_keys=num_keys,
            query_start=query_start,
        )
        axes.set_title(name, fontsize=9, color=INK, pad=4)
        axes.tick_params(labelleft=layer % columns == 0, labelbottom=layer + columns >= num_layers)

    _label_map(figure, (row_queries, column_blocks), select_block)
    levels = BoundaryNorm([heads + 0.5 for heads in range(num_heads + 1)], num_heads)
    bar = figure.colorbar(ScalarMappable(levels, ListedColormap(shades)), ax=panels, pad=0.02, aspect=30 * rows)
    bar.set_ticks(list(range(num_heads, 0, -max(1, num_heads // 8))))
    bar.minorticks_off()
    bar.set_label(f"K/V heads that chose the block (of {num_heads})", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, length=0)
    bar.ax.spines[:].set_visible(False)
    return _save(figure, path)


def head_choices(
    blocks: ArrayLike,
    path: str | Path,
    *,
    select_block: int,
    num_initial: int,
    num_local: int,
    title: str,
) -> Path:
    """Draw which key blocks each query of one layer chose: a panel for each key/value head, queries downwards.

    Pale are the blocks that every query reads whatever it says, dark those that its scores chose. As in `selected_blocks`,
    the future is grey, and where queries share a cell, what the scores chose for one of them is shown.

    Args:
        blocks: int `[T, K, A]`: queries, key/value heads, chosen blocks; -1 is an unused slot.
        path: the file to write.
        select_block: tokens in a block.
        num_initial, num_local: blocks at the beginning, and up to the query's own, that are always read.
        title: above the panels.

    Returns:
        `path`.

    Raises:
        ValueError: a wrong shape or dtype, or a block that does not exist.
    """
    if select_block < 1:
        raise ValueError(f"{select_block=} must be positive")
    num_queries = len(np.asarray(blocks))
    num_blocks = -(-num_queries // select_block)
    choices = _check_blocks(blocks, "TKA", num_blocks)
    num_heads = choices.shape[1]
    columns = min(num_heads, 2 if num_heads <= 4 else 4)
    rows, side = -(-num_heads // columns), 3.4
    width = max(0.7 + side * columns, 6.0)
    figure = _new_figure(width, 0.95 + side * rows)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    pale, _, dark = _shades(BRANCH_COLOURS["selected"], 3)
    colours = ListedColormap(np.stack([_rgb(FUTURE), _rgb(PAPER), pale, dark]))
    cell = (-(-num_queries // (2 * MAX_CELLS)), -(-num_blocks // (2 * MAX_CELLS)))
    query, block = np.arange(num_queries)[:, None], np.arange(num_blocks)
    future = block * select_block > query
    forced = (block < num_initial) | (block > query // select_block - num_local)
    for head in range(num_heads):
        axes = figure.add_subplot(rows, columns, head + 1)
        chosen = _head_counts(choices[:, head : head + 1], num_blocks)
        levels = np.where(chosen > 0, np.where(forced, 1, 2), np.where(future, -1, 0))
        _draw_map(
            axes,
            levels,
            colours,
            levels=(-1, 2),
            cell=cell,
            select_block=select_block,
            num_keys=num_queries,
            query_start=0,
        )
        axes.set_title(f"K/V head {head}", fontsize=9, color=INK, pad=4)
        axes.tick_params(labelleft=head % columns == 0, labelbottom=head + columns >= num_heads)
    _label_map(figure, cell, select_block)
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    always = f"always read (first {num_initial}, last {num_local})"
    meaning = (("chosen by score", dark), (always, pale), ("the future", _rgb(FUTURE)))
    figure.legend(
        handles=[Patch(facecolor=tuple(colour), label=label) for label, colour in meaning],
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handlelength=1.2,
    )
    return _save(figure, path)


def unions(unions: Mapping[int, ArrayLike], path: str | Path, *, mean_blocks: float) -> Path:
    """Draw how many different blocks adjacent queries read together, over the depth of the model.

    A line is the mean of the layer's key/value heads, and each head is a dot beside it. The dashed line is what one
    query reads: so would any number of them that choose alike.

    Args:
        unions: number of adjacent queries -> float `[L, K]`, their mean union.
        path: the file to write.
        mean_blocks: blocks that one query reads, in the mean.

    Returns:
        `path`.

    Raises:
        ValueError: there is none, or a wrong shape.
    """
    if not unions:
        raise ValueError("unions={} must hold at least one number of queries -> [L, K]")
    figure = _new_figure(7.2, 3.8)
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes = _new_axes(figure, x="layer", y="different blocks read together (log scale)")
    axes.set_yscale("log", base=2)
    highest, num_layers = mean_blocks, 1
    for row, ((count, each), (colour, marker)) in enumerate(zip(unions.items(), _run_styles(), strict=False)):
        values = np.asarray(each, np.float64)
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"unions[{count}].shape={values.shape} must be [L, K], and not empty")
        num_layers, num_heads = values.shape
        depth, highest = np.arange(num_layers), max(highest, values.max())
        if num_heads > 1:
            beside = np.repeat(depth + _side_by_side(num_layers) * (row - (len(unions) - 1) / 2), num_heads)
            axes.scatter(beside, values.ravel(), s=9, color=colour, alpha=0.5, linewidths=0)
        axes.plot(depth, values.mean(axis=1), color=colour, marker=marker, **LINE, label=f"{count} queries")
    axes.axhline(mean_blocks, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"one ({mean_blocks:.1f})")
    axes.set(xlim=(-0.4, num_layers - 0.6), ylim=(mean_blocks / 1.15, highest * 1.15))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    # Few powers of two may lie in the range: also those between them.
    axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1.0, 1.25, 1.5, 1.75)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    _add_legend(axes, columns=len(unions) + 1)
    return _save(figure, path)


def coverage(
    covered: ArrayLike | None,
    path: str | Path,
    *,
    positions: Sequence[tuple[int, int]],
    covered_by_position: ArrayLike,
    best_by_position: ArrayLike,
    share_read: ArrayLike,
) -> Path:
    """Draw how much of full attention's mass the selected blocks hold: by layer and head, and over the position.

    Args:
        covered: float `[L, N]` in [0, 1]: the mean over the queries that had to choose; None: there is none, and no map.
        path: the file to write.
        positions: starts and ends of P parts of the text: a part is drawn at its middle.
        covered_by_position: float `[L, P]`: each layer's share.
        best_by_position: float `[P]`: the share of the best blocks, as many, in the mean over the layers.
        share_read: float `[P]`: the share of the tokens that the blocks hold.

    Returns:
        `path`.

    Raises:
        ValueError: a wrong shape, or a share outside [0, 1].
    """
    layers, best, read = (np.asarray(x, np.float64) for x in (covered_by_position, best_by_position, share_read))
    if layers.ndim != 2 or 0 in layers.shape or not layers.shape[1:] == best.shape == read.shape == (len(positions),):
        raise ValueError(
            f"{layers.shape=}, {best.shape=} and {read.shape=} must be [L, P], [P] and [P] for P={len(positions)} positions"
        )
    num_layers = len(layers)
    heads = None if covered is None else np.asarray(covered, np.float64)
    if heads is not None and (heads.ndim != 2 or heads.shape[0] != num_layers or not heads.shape[1]):
        raise ValueError(f"covered.shape={heads.shape} must be [L, N] for L={num_layers} layers")
    for name, values in (("covered", heads), ("layers", layers), ("best", best), ("read", read)):
        # Sums of float32 reach a little above one.
        if values is not None and not np.all((values >= 0) & (values <= 1 + 1e-4)):
            raise ValueError(f"{name} must lie in [0, 1], but reaches from {values.min()} to {values.max()}")

    figure = _new_figure(9.6, 4.4)
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator, MultipleLocator

    # Dark to light for every colour vision, and in greyscale.
    colours = colormaps["cividis"]
    panels = figure.subplots(1, 2, width_ratios=(1, 1.25))
    axes = panels[0]
    if heads is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no query of so short a text\nhas to choose", ha="center", fontsize=9, color=INK)
    else:
        image = axes.imshow(heads, cmap=colours, vmin=0, vmax=1, **CELLS)
        _style_axes(axes)
        axes.grid(visible=False)
        axes.set_title("mean over the queries that choose", fontsize=9, color=INK, pad=4)
        axes.set_xlabel("query head", fontsize=10, color=INK)
        axes.set_ylabel("layer", fontsize=10, color=INK)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        if heads.shape[0] <= 12 and heads.shape[1] <= 8:
            for (layer, head), value in np.ndenumerate(heads):
                ink = PAPER if value < 0.6 else INK
                axes.text(head, layer, f"{value:.0%}", ha="center", va="center", fontsize=8, color=ink)
        bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
        bar.ax.yaxis.set_major_formatter(_format_share)
        bar.ax.tick_params(labelsize=8, labelcolor=INK, length=0)
        bar.ax.spines[:].set_visible(False)

    axes = panels[1]
    middles = [(start + end) / 2 for start, end in positions]
    for layer, values in enumerate(layers):
        # Not the lightest, which paper would swallow.
        colour = colours(0.88 * layer / max(1, num_layers - 1))
        label = f"layer {layer}" if layer in (0, num_layers - 1) else None
        axes.plot(middles, values, color=colour, linewidth=0.9, label=label)
    # What is to be compared is in ink: the means of the layers, and the tokens' share.
    for values, name, style in (
        (layers.mean(axis=0), "mean of the layers", "-"),
        (best, "the best blocks", (0, (3, 1.5))),
        (read, "share of the tokens", (0, (1, 1.2))),
    ):
        axes.plot(middles, values, color=INK, linewidth=1.8, linestyle=style, label=name)
    axes.set(xlim=(0, positions[-1][1]), ylim=(-0.02, 1.04))
    axes.xaxis.set_major_locator(MultipleLocator(2 ** max(0, (positions[-1][1] // 4).bit_length() - 1)))
    axes.xaxis.set_major_formatter(_format_tokens)
    axes.yaxis.set_major_formatter(_format_share)
    axes.set_xlabel("position of the query (tokens)", fontsize=10, color=INK)
    _style_axes(axes)
    # Above the axes, as lines may run anywhere in them.
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1),
        ncols=3,
        frameon=False,
        fontsize=8.5,
        columnspacing=1.2,
        labelcolor=INK,
    )
    title = "Full attention's mass that lies in the selected blocks"
    figure.suptitle(title, fontsize=11, color=INK, x=0.01, ha="left")
    return _save(figure, path)


def gates(gates: ArrayLike, path: str | Path) -> Path:
    """Draw the mean gate of the three branches over the depth of the model.

    Args:
        gates: float `[L, 3]`, or `[L, N, 3]` with a value for each query head, in [0, 1]; the last axis is compressed,
            selected, window, as in `nsa_attention`. With heads, a line is their mean and each head is a dot beside it.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        ValueError: a wrong shape, or a value outside [0, 1].
    """
    values = np.asarray(gates, dtype=np.float64)
    if values.ndim not in (2, 3) or values.shape[-1] != 3 or 0 in values.shape:
        raise ValueError(
            f"gates.shape={values.shape} must be [L, 3] or [L, N, 3]: compressed, selected, window come last"
        )
    if not np.all((values >= 0) & (values <= 1)):
        raise ValueError(
            f"gates must lie in [0, 1], but reach from {values.min()} to {values.max()}: apply the sigmoid"
        )

    heads = values if values.ndim == 3 else values[:, None]
    num_layers, num_heads, _ = heads.shape
    figure = _new_figure(7.2, 3.8)
    from matplotlib.ticker import MaxNLocator

    axes = _new_axes(figure, x="layer", y="mean gate (0 closed, 1 open)")
    depth = np.arange(num_layers)
    for branch, ((name, colour), marker) in enumerate(zip(BRANCH_COLOURS.items(), MARKERS, strict=False)):
        if num_heads > 1:
            # Side by side, so that the heads of one branch do not cover those of another.
            beside = np.repeat(depth + _side_by_side(num_layers) * (branch - 1), num_heads)
            axes.scatter(beside, heads[:, :, branch], s=9, color=colour, alpha=0.35, linewidths=0)
        axes.plot(depth, heads[:, :, branch].mean(axis=1), color=colour, marker=marker, **LINE, label=name)
    axes.set(xlim=(-0.4, num_layers - 0.6), ylim=(-0.02, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    _add_legend(axes)
    return _save(figure, path)


def needle_map(results: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> Path:
    """Draw how often needles are found: a panel for each task, lengths to the right, depths downwards.

    Args:
        results: task -> cells `{"length": int, "depth": float, "exact": float}`, in any order: tokens, percent, and the share
            of examples that are right. A length and depth that is not there is left blank.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        ValueError: there is no task, or a task has no cell.
    """
    panels = {}
    for task, cells in results.items():
        if not cells:
            raise ValueError(f"results[{task!r}]=[] must hold at least one cell")
        lengths, depths = (sorted({cell[name] for cell in cells}) for name in ("length", "depth"))
        values = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            values[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["exact"]
        panels[task] = (values, [f"{depth:g}" for depth in depths], [_format_tokens(length) for length in lengths])
    return _draw_shares(
        panels, path, x="length (tokens)", y="depth (% of the sentences)", label="found (% of the examples)", side=2.6
    )


def hit_rates(results: Mapping[str, ArrayLike], path: str | Path) -> Path:
    """Draw how often the blocks that a query selects hold the token that it has to repeat, for each layer and head.

    Args:
        results: title -> float `[L, K]`, shares for each layer and key/value head.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        ValueError: there is no title, or a wrong shape.
    """
    panels = {}
    for title, rates in results.items():
        values = np.asarray(rates, np.float64)
        if values.ndim != 2 or 0 in values.shape:
            raise ValueError(f"results[{title!r}].shape={values.shape} must be [L, K], none of them empty")
        panels[title] = (values, [str(i) for i in range(len(values))], [str(i) for i in range(values.shape[1])])
    return _draw_shares(panels, path, x="key/value head", y="layer", label="needle's block selected (%)", side=2.2)


def recall(results: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> Path:
    """Draw the accuracy of associative recall over the number of pairs: a panel for each length, a line for each run.

    The dashed line is a model that takes any of the values: one in so many as there are pairs.

    Args:
        results: label -> cells `{"length": int, "pairs": int, "accuracy": float}`, in any order.
        path: the file to write.

    Returns:
        `path`.

    Raises:
        ValueError: there is no label, or a label has no cell.
    """
    if not results:
        raise ValueError("results={} must hold at least one label -> cells")
    for label, cells in results.items():
        if not cells:
            raise ValueError(f"results[{label!r}]=[] must hold at least one cell")
    lengths = sorted({cell["length"] for cells in results.values() for cell in cells})
    rows, columns = _grid(len(lengths))
    figure = _new_figure(max(4.8, 1.4 + 2.4 * columns), 1 + 2.4 * rows)
    from matplotlib.ticker import NullLocator

    lines = {}
    for index, length in enumerate(lengths):
        axes = figure.add_subplot(rows, columns, index + 1)
        _style_axes(axes)
        axes.set_xscale("log", base=2)
        here = {label: [cell for cell in cells if cell["length"] == length] for label, cells in results.items()}
        known = sorted({cell["pairs"] for cells in here.values() for cell in cells})
        for (label, cells), (colour, marker) in zip(here.items(), _run_styles(), strict=False):
            points = sorted((cell["pairs"], cell["accuracy"]) for cell in cells)
            if points:
                (lines[label],) = axes.plot(*zip(*points, strict=True), color=colour, marker=marker, **LINE)
        chance = [1 / pairs for pairs in known]
        (by_chance,) = axes.plot(known, chance, color=INK, linewidth=1, linestyle=(0, (4, 3)), marker="_", zorder=1)
        axes.set(xlim=(known[0] / 1.3, known[-1] * 1.3), ylim=(-0.02, 1.03))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(_format_share)
        axes.tick_params(labelleft=index % columns == 0)
        ticks = known[:: -(-len(known) // 8)]
        axes.set_xticks(ticks, [_format_tokens(pairs) for pairs in ticks])
        axes.set_title(f"{_format_tokens(length)} tokens", fontsize=9, color=INK, pad=4)
    figure.supxlabel("key-value pairs (log scale)", fontsize=10, color=INK)
    figure.supylabel("queries answered right", fontsize=10, color=INK)
    _add_figure_legend(figure, lines | {"one of the values at random": by_chance}, columns=4)
    return _save(figure, path)


def _draw_shares(
    panels: Mapping[str, tuple[NDArray[np.float64], Sequence[str], Sequence[str]]],
    path: str | Path,
    *,
    x: str,
    y: str,
    label: str,
    side: float,
) -> Path:
    """Panels of shares in [0, 1], each with the names of its rows and columns; small ones have the percentages written in."""
    if not panels:
        raise ValueError("results={} must hold at least one panel")
    from matplotlib.colors import LinearSegmentedColormap

    rows, columns = _grid(len(panels))
    figure = _new_figure(1.4 + side * columns, 0.7 + side * rows)
    colours = LinearSegmentedColormap.from_list("shares", [_rgb(UNREAD), 0.55 * _rgb(RUN_COLOURS[0])])
    shown = None
    for index, (title, (values, row_names, column_names)) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        _style_axes(axes)
        axes.grid(visible=False)
        shown = axes.imshow(100 * values, cmap=colours, vmin=0, vmax=100, **CELLS)
        # So many names find room: long ones, side by side, fewer.
        room = 30 // (1 + max(map(len, column_names)))
        for axis, names, most in ((axes.xaxis, column_names, room), (axes.yaxis, row_names, 12)):
            every = -(-len(names) // most)
            axis.set_ticks(range(0, len(names), every), names[::every])
        if max(values.shape) <= 12:
            for (row, column), value in np.ndenumerate(values):
                if isfinite(value):
                    ink = INK if value < 0.6 else PAPER
                    axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=ink)
        axes.set_title(title, fontsize=9, color=INK, pad=4)
    figure.supxlabel(x, fontsize=10, color=INK)
    figure.supylabel(y, fontsize=10, color=INK)
    assert shown is not None
    bar = figure.colorbar(shown, ax=figure.axes, pad=0.02, aspect=30 * rows)
    bar.set_label(label, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, length=0)
    bar.outline.set_visible(False)
    return _save(figure, path)


def reading_pattern(path: str | Path, *, config: BlockSizes, num_tokens: int, blocks: ArrayLike) -> Path:
    """Draw what each query of a sequence reads: full causal attention on the left, the three branches on the right.

    A compressed token is a pale stripe, half a stride wide, in the middle of the tokens that it stands for; it starts
    at the first query that sees it. The window covers the chosen blocks that it meets, and they cover the stripes. The
    strips below show the last query's row branch by branch, so without overlap, with the number of keys it reads; a
    token that two branches read is two keys, as each branch has its own.

    Args:
        path: the file to write.
        config: has `compress_block`, `compress_stride`, `select_block` and `window`, in tokens.
        num_tokens: T, at most 640, so that a token is a pixel or more.
        blocks: int `[T, A]`, the blocks that each query chose; -1 is an unused slot, and future tokens are not read.

    Returns:
        `path`.

    Raises:
        ValueError: a wrong shape or dtype, T out of range, or a block that does not exist.
    """
    if not 1 <= num_tokens <= MAX_PICTURE_TOKENS:
        raise ValueError(
            f"{num_tokens=} must be in 1 .. {MAX_PICTURE_TOKENS}; selected_blocks() draws longer sequences"
        )
    choices = _check_blocks(blocks, "TA", -(-num_tokens // config.select_block))
    if len(choices) != num_tokens:
        raise ValueError(f"blocks.shape={choices.shape} must have one row for each of {num_tokens=}")

    query, key = np.arange(num_tokens)[:, None], np.arange(num_tokens)
    causal = key <= query
    window = causal & (key > query - config.window)
    selected = causal & (choices[:, :, None] == key // config.select_block).any(axis=1)
    compressed = np.zeros_like(causal)
    starts = range(0, num_tokens - config.compress_block + 1, config.compress_stride)
    stripe = max(1, config.compress_stride // 2)
    for start in starts:
        left = start + (config.compress_block - stripe) // 2
        compressed[start + config.compress_block - 1 :, left : left + stripe] = True

    unread, paper = _rgb(UNREAD), _rgb(PAPER)
    yellow, red, blue = (_rgb(colour) for colour in BRANCH_COLOURS.values())
    pale = 0.6 * yellow + 0.4 * paper
    dense = np.where(causal[..., None], _rgb(DENSE), paper)
    sparse = np.where(causal[..., None], unread, paper)
    sparse[compressed] = pale
    sparse[selected] = red
    sparse[window] = blue

    # Placed by hand, in inches from the lower left: the contents never change the size of anything.
    width, height, side = 9.6, 5.7, 3.84
    left_x, right_x, panel_y = 0.42, width - side - 0.12, 1.22
    figure = _new_figure(width, height, layout="none")

    def show(pixels: NDArray[np.float64], x: float, y: float, tall: float, wide: float = side) -> None:
        axes = figure.add_axes((x / width, y / height, wide / width, tall / height))
        axes.imshow(pixels, **CELLS)
        axes.set_axis_off()

    def write(text: str, x: float, y: float, size: float = 9.5, **style: Any) -> None:
        figure.text(x / width, y / height, text, **{"fontsize": size, "color": INK, "va": "center", **style})

    for x, title, pixels in ((left_x, "Full attention", dense), (right_x, "Native Sparse Attention", sparse)):
        write(title, x, height - 0.22, 13, weight="bold")
        write("keys \N{RIGHTWARDS ARROW}", x, panel_y + side + 0.13, 9)
        write("\N{LEFTWARDS ARROW} queries", x - 0.13, panel_y + side, 9, rotation=90, ha="center", va="top")
        show(pixels, x, panel_y, side)

    # Legends in the future's corner, which is blank.
    write("every earlier token", left_x + side, panel_y + side - 0.2, ha="right")
    legend = (
        ("compressed", f"summaries of {config.compress_block} tokens, one every {config.compress_stride}", pale),
        ("selected", f"blocks of {config.select_block} tokens", red),
        ("window", f"the last {config.window} tokens", blue),
    )
    for row, (name, meaning, colour) in enumerate(legend):
        y = panel_y + side - 0.2 - 0.36 * row
        write(name, right_x + side - 0.2, y, 10, weight="bold", ha="right")
        write(meaning, right_x + side - 0.2, y - 0.16, 8.5, ha="right")
        show(colour[None, None], right_x + side - 0.13, y - 0.22, 0.29, 0.13)

    strips = (
        ("compressed", len(starts), np.where(compressed[-1:, :, None], pale, unread)),
        ("selected", int(selected[-1].sum()), np.where(selected[-1:, :, None], red, unread)),
        ("window", int(window[-1].sum()), np.where(window[-1:, :, None], blue, unread)),
    )
    first_y, tall, gap = panel_y - 0.6, 0.14, 0.22
    for row, (name, count, pixels) in enumerate(strips):
        show(pixels, right_x, first_y - gap * row, tall)
        write(f"{name} {count}", right_x - 0.1, first_y - gap * row + tall / 2, ha="right")
    show(dense[-1:], left_x, first_y, tall)
    read = sum(count for _, count, _ in strips)
    share = f"The last query reads {read} keys ({read / num_tokens:.0%})"
    for x, text in ((left_x, f"The last query reads {num_tokens} keys"), (right_x, share)):
        write(text, x, panel_y - 0.24, 11, weight="bold")
    return _save(figure, path)


def _new_figure(width: float, height: float, *, layout: Literal["constrained", "none"] = "constrained") -> "Figure":
    """A figure of that many inches, unknown to pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "nsa-jax[train]"') from error
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=PAPER)
    figure.set_layout_engine(layout)
    FigureCanvasAgg(figure)
    return figure


def _new_axes(figure: "Figure", *, x: str, y: str) -> "Axes":
    axes = figure.add_subplot()
    axes.set_xlabel(x, fontsize=10, color=INK)
    axes.set_ylabel(y, fontsize=10, color=INK)
    _style_axes(axes)
    return axes


def _style_axes(axes: "Axes") -> None:
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, linewidth=0.6)
    axes.tick_params(labelsize=8.5, labelcolor=INK, color=INK, width=0.6, length=3)
    axes.grid(visible=True, color=FUTURE, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_map(
    axes: "Axes",
    values: NDArray[np.int64],
    colours: Any,
    *,
    levels: tuple[int, int],
    cell: tuple[int, int],
    select_block: int,
    num_keys: int,
    query_start: int,
) -> None:
    """`values` `[T, M]`, whole numbers from `levels[0]` to `levels[1]`, over queries and blocks; `cell` of them share one."""
    from matplotlib.ticker import MultipleLocator

    query_end = query_start + len(values)
    cells = _pool_largest(values, *cell)
    # The last cells may reach beyond the last query and key: the limits cut them off.
    bottom = query_start + len(cells) * cell[0]
    right = cells.shape[1] * cell[1] * select_block
    axes.imshow(
        cells,
        cmap=colours,
        vmin=levels[0] - 0.5,
        vmax=levels[1] + 0.5,
        extent=(0, right, bottom, query_start),
        **CELLS,
    )
    axes.plot([query_start, query_end], [query_start, query_end], color=INK, linewidth=0.7)
    axes.set(xlim=(0, num_keys), ylim=(query_end, query_start))
    _style_axes(axes)
    axes.grid(visible=False)
    for axis, length in ((axes.xaxis, num_keys), (axes.yaxis, len(values))):
        axis.set_major_locator(MultipleLocator(2 ** max(0, (length // 3).bit_length() - 1)))
        axis.set_major_formatter(_format_tokens)


def _label_map(figure: "Figure", cell: tuple[int, int], select_block: int) -> None:
    rows_note = f"; {cell[0]} to a row" if cell[0] > 1 else ""
    columns_note = f", {cell[1]} to a column" if cell[1] > 1 else ""
    figure.supylabel(f"query position (tokens{rows_note})", fontsize=10, color=INK)
    figure.supxlabel(f"key position (tokens; blocks of {select_block}{columns_note})", fontsize=10, color=INK)


def _add_legend(axes: "Axes", *, columns: int = 3) -> None:
    """Above the axes, where it covers no line."""
    handles, labels = axes.get_legend_handles_labels()
    _add_figure_legend(axes.figure, dict(zip(labels, handles, strict=True)), columns=columns)


def _add_figure_legend(figure: Any, handles: Mapping[str, Any], *, columns: int) -> None:
    """Above all axes; in fewer columns if the labels are long. Of what is too long it has the end."""
    characters = int(13.9 * figure.get_figwidth())
    longest = characters - 6
    labels = [label if len(label) <= longest else f"\N{HORIZONTAL ELLIPSIS}{label[1 - longest :]}" for label in handles]
    columns = max(1, min(columns, characters // (6 + max(map(len, labels)))))
    figure.legend(
        handles.values(), labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=INK
    )


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns of so many panels: at most 4 columns, and few places empty. 5: 2 x 3; 9: 3 x 3."""
    rows = -(-count // 4)
    return rows, -(-count // rows)


def _save(figure: "Figure", path: str | Path) -> Path:
    from matplotlib import rc_context

    path = Path(path)
    suffix = path.suffix.lower()
    # Without dates and random ids: the same input writes the same bytes.
    metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    if suffix not in metadata:
        raise ValueError(f"path={str(path)!r} must end in one of {', '.join(metadata)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "nsa-jax"}):
        figure.savefig(path, dpi="figure", facecolor=PAPER, transparent=False, metadata=metadata[suffix])
    return path


def _format_tokens(tokens: float, _: float | None = None) -> str:
    """512 -> "512", 1536 -> "1.5k", 8192 -> "8k"."""
    return f"{tokens / 1024:g}k" if tokens >= 1024 and tokens % 512 == 0 else f"{tokens:g}"


def _format_share(share: float, _: float | None = None) -> str:
    return f"{share:.0%}"


def _side_by_side(num_layers: int) -> float:
    """How far dots that belong to one layer stand apart, in layers: to be told apart, and from those of the next layer."""
    return min(0.008 * num_layers, 0.15)


def _run_styles() -> Iterator[tuple[str, str]]:
    """Colour and marker of the first run, the second, ...; without end."""
    return cycle(zip(RUN_COLOURS, MARKERS, strict=True))


def _series(label: str, rows: Sequence[Mapping[str, Any]], field: str) -> list[tuple[int, float]]:
    """Steps and values of the rows that have `field`, in order of steps; of a step given twice, the later value."""
    values: dict[int, float] = {}
    for row in rows:
        if "step" not in row:
            raise ValueError(f"runs[{label!r}]: {row=} must have 'step'")
        if row.get(field) is not None:
            values[row["step"]] = float(row[field]) if isfinite(row[field]) else float("nan")
    return sorted(values.items())


def _check_blocks(blocks: ArrayLike, axes: str, num_blocks: int) -> NDArray[np.integer]:
    checked = np.asarray(blocks)
    if checked.ndim != len(axes) or 0 in checked.shape[:-1]:
        raise ValueError(f"blocks.shape={checked.shape} must be [{', '.join(axes)}], none of them empty")
    if not np.issubdtype(checked.dtype, np.integer):
        raise ValueError(f"blocks.dtype={checked.dtype} must be an integer type: the indices of blocks")
    if checked.size and not -1 <= checked.min() <= checked.max() < num_blocks:
        raise ValueError(
            f"blocks from {checked.min()} to {checked.max()} must be in -1 .. {num_blocks - 1}: there are {num_blocks=}"
        )
    return checked


def _head_counts(choices: NDArray[np.integer], num_blocks: int) -> NDArray[np.int64]:
    """`[T, K, A]` chosen blocks -> `[T, M]` numbers of heads that chose each block."""
    num_queries, num_heads, _ = choices.shape
    counts = np.zeros((num_queries, num_blocks), np.int64)
    for head in range(num_heads):
        # One column more, so that -1, an unused slot, marks a block that is then dropped.
        chosen = np.zeros((num_queries, num_blocks + 1), np.bool_)
        chosen[np.arange(num_queries)[:, None], choices[:, head]] = True
        counts += chosen[:, :-1]
    return counts


def _pool_largest(values: NDArray[np.int64], rows: int, columns: int) -> NDArray[np.int64]:
    """The largest value of each cell of `rows` x `columns`; the last cells may hold fewer."""
    values = np.maximum.reduceat(values, range(0, values.shape[0], rows), axis=0)
    return np.maximum.reduceat(values, range(0, values.shape[1], columns), axis=1)


def _rgb(colour: str) -> NDArray[np.float64]:
    """Red, green and blue in [0, 1] of "#RRGGBB"."""
    return np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255


def _shades(colour: str, count: int) -> NDArray[np.float64]:
    """`[count, 3]` shades of a colour, from pale to dark; the colour itself if there is one."""
    anchors = np.stack([0.3 * _rgb(colour) + 0.7, _rgb(colour), 0.5 * _rgb(colour)])
    where = np.linspace(0, 2, count) if count > 1 else [1.0]
    return np.stack([np.interp(where, range(3), channel) for channel in anchors.T], axis=1)


def main(folder: str = "docs/figures") -> None:
    """Remake the README's picture, with block choices that are made up: first, previous, own and three that wander."""
    from nsa_jax.config import NSAConfig

    config = NSAConfig(compress_block=16, compress_stride=8, select_block=16, num_selected=6, window=32)
    num_tokens = 512
    random = np.random.default_rng(0)
    blocks = np.full((num_tokens, config.num_selected), -1)
    wandering: list[int] = []
    for position in range(num_tokens):
        own = position // config.select_block
        forced = {0, max(own - 1, 0), own}
        free = [block for block in range(own) if block not in forced]
        # A choice lasts for some queries, then one of the three moves.
        wandering = [block for block in wandering if block in free and random.random() > 0.02]
        while len(wandering) < min(3, len(free)):
            wandering.append(int(random.choice([block for block in free if block not in wandering])))
        chosen = sorted(forced | set(wandering))
        blocks[position, : len(chosen)] = chosen
    print(reading_pattern(Path(folder) / "reading_pattern.png", config=config, num_tokens=num_tokens, blocks=blocks))


if __name__ == "__main__":
    main(*sys.argv[1:])
