"""Time and ratio over length, NSA beside full attention. matplotlib is imported by the first call, and pyplot never."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.problems import Shape
from train.plots import DENSE, DPI, FUTURE, INK, PAPER, RUN_COLOURS

PASSES = {"forward": "forward", "both": "forward + backward"}
COLOURS = dict(zip(PASSES, RUN_COLOURS))
MARKERS = {"forward": "o", "both": "s"}
DASHES = {"random": "solid", "alike": (0, (4, 1.5))}


def draw_attention(results: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
    """A row of two panels for each number of key/value heads: milliseconds, and how many times faster than cuDNN.

    Args:
        results: rows of the record of `benchmarks.attention`; what failed or was skipped leaves a gap.
        path: .png, .svg or .pdf.
        title: above all panels.
    """
    groups = sorted({row["kv_heads"] for row in results})
    figure = _figure(rows=len(groups))
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for (times, ratios), kv_heads in zip(panels, groups, strict=True):
        rows = sorted((row for row in results if row["kv_heads"] == kv_heads), key=lambda row: row["length"])
        _draw_times(times, rows)
        _draw_ratios(ratios, rows)
        times.set_title(f"{kv_heads} key/value heads", loc="left", fontsize=9, color=INK)
        for axes in (times, ratios):
            _style(axes, [row["length"] for row in rows])
    return _finish(figure, panels[0][0], path, title)


def draw_decode(results: Sequence[dict[str, Any]], path: Path, *, title: str) -> Path:
    """Two panels: microseconds of a step of decoding (of attention, and of a model where that was timed), and how many times
    faster than cuDNN attention is; a colour for each batch.

    Args:
        results: rows of the record of `benchmarks.decode`; what failed or was skipped leaves a gap.
        path, title: as in `draw_attention`.
    """
    figure = _figure(rows=1)
    times, ratios = figure.subplots(1, 2)
    batches = sorted({row["batch"] for row in results})
    for batch, color in zip(batches, RUN_COLOURS):
        rows = sorted((row for row in results if row["batch"] == batch), key=lambda row: row["length"])
        name = f"{batch} sequence{'s' if batch > 1 else ''}"
        for which, label, dashes in (("full", "cuDNN", DASHES["alike"]), ("nsa", "NSA", DASHES["random"])):
            microseconds = [(row["length"], _scaled(row[which].get("ms"), 1e3)) for row in rows]
            _plot(times, microseconds, "forward", color=color, linestyle=dashes, label=f"{label}, {name}")
        model = [(row["length"], _scaled(row.get("model", {}).get("ms"), 1e3)) for row in rows]
        if any(microseconds is not None for _, microseconds in model):
            _plot(times, model, "both", color=color, linestyle="dotted", label=f"whole model with NSA, {name}")
        _plot(ratios, [(row["length"], row.get("ratio")) for row in rows], "forward", color=color)
    times.set_yscale("log")
    times.set_ylabel("time of a step (µs, log scale)", fontsize=10, color=INK)
    ratios.axhline(1.0, color=INK, linewidth=0.7)
    ratios.set_ylim(bottom=0)
    ratios.set_ylabel("times faster than cuDNN", fontsize=10, color=INK)
    for axes in (times, ratios):
        _style(axes, sorted({row["length"] for row in results}))
        axes.set_xlabel("tokens in the cache (log scale)", fontsize=10, color=INK)
    return _finish(figure, times, path, title)


def describe(shape: Shape, device_kind: str) -> str:
    """The figure's title."""
    size = f"{shape.head_dim}" if shape.head_dim == shape.value_head_dim else f"{shape.head_dim}/{shape.value_head_dim}"
    return f"{device_kind}, {shape.dtype}, batch {shape.batch}, {shape.heads} query heads of {size}, causal"


def _figure(*, rows: int) -> Any:
    """Room for rows of two panels."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "nsa-jax[train]"') from error
    figure = Figure(figsize=(9.6, 0.9 + 3.4 * rows), dpi=DPI, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Any, axes: Any, path: Path, title: str) -> Path:
    """Title, legend (that of `axes`) and file."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=3.2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    figure.savefig(path, dpi="figure", facecolor=PAPER, metadata=metadata)
    return path


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _draw_times(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for which, name in PASSES.items():
        points = [(row["length"], row["full"].get(which, {}).get("ms")) for row in rows]
        _plot(axes, points, which, color=DENSE, label=f"full attention (cuDNN), {name}")
    for kind in _kinds(rows):
        for which, name in PASSES.items():
            points = [(row["length"], row["nsa"][kind].get(which, {}).get("ms")) for row in rows]
            style = {"color": COLOURS[which], "linestyle": DASHES[kind]}
            _plot(axes, points, which, **style, label=f"NSA, {name}, {kind}")
    axes.set_yscale("log")
    axes.set_ylabel("time (ms, log scale)", fontsize=10, color=INK)


def _draw_ratios(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for kind in _kinds(rows):
        for which in PASSES:
            points = [(row["length"], row["ratios"][kind].get(which)) for row in rows]
            _plot(axes, points, which, color=COLOURS[which], linestyle=DASHES[kind])
    axes.axhline(1.0, color=INK, linewidth=0.7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("times faster than cuDNN", fontsize=10, color=INK)


def _kinds(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [kind for kind in DASHES if any(kind in row["nsa"] for row in rows)]


def _plot(axes: Any, points: Sequence[tuple[int, float | None]], which: str, **style: Any) -> None:
    measured = [point for point in points if point[1] is not None]
    if measured:
        axes.plot(*zip(*measured), marker=MARKERS[which], linewidth=1.6, markersize=4.5, **style)


def _style(axes: Any, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
    axes.set_xlabel("sequence length (tokens, log scale)", fontsize=10, color=INK)
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, linewidth=0.6)
    axes.tick_params(labelsize=8.5, labelcolor=INK, color=INK, width=0.6, length=3)
    axes.tick_params(which="minor", length=0)
    axes.grid(visible=True, color=FUTURE, linewidth=0.6)
    axes.set_axisbelow(True)
