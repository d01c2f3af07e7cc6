"""train/plots.py: every figure is read back from its PNG, and colours are looked for at the places of the data."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from train import plots

matplotlib = pytest.importorskip("matplotlib", reason="figures are part of nsa-jax[train]")


class Sizes(NamedTuple):
    compress_block: int = 8
    compress_stride: int = 4
    select_block: int = 8
    window: int = 2


class Drawn:
    """A PNG that was written, with the figure that it shows."""

    def __init__(self, figure: Any, path: Path):
        from matplotlib.image import imread

        self.figure = figure
        self.pixels = imread(path)[:, :, :3]

    def colour(self, axes: Any, x: float, y: float) -> Any:
        """The pixel at data coordinates."""
        column, row = axes.transData.transform((x, y))
        return self.pixels[len(self.pixels) - 1 - int(row), int(column)]

    def share(self, colour: Any) -> float:
        """The share of the pixels that have the colour."""
        return float(np.mean(same(self.pixels, colour)))

    def words(self) -> list[str]:
        return [text.get_text() for text in self.figure.texts]


def same(pixels: Any, colour: Any) -> Any:
    wanted = plots._rgb(colour) if isinstance(colour, str) else np.asarray(colour)
    return np.all(np.abs(pixels - wanted) < 1.5 / 255, axis=-1)


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Calls a function of plots with a path to write, and reads the picture back."""
    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path))[1])

    def call(function, *args, **kwargs):
        path = tmp_path / "new folder" / "figure.png"
        positional = (path,) if function is plots.reading_pattern else (*args, path)
        assert function(*positional, **kwargs) == path
        return Drawn(figures[-1], path)

    return call


def test_loss_curve(draw):
    nsa = [
        {"step": 0, "loss": 4.0},
        {"step": 10, "loss": 3.0, "validation_loss": 3.5, "tokens_per_second": 1e5},
        {"step": 20, "loss": 9.0},
        # A restart from the checkpoint of step 10: this step 20 counts, and the line does not run backwards.
        {"step": 20, "loss": 2.0, "validation_loss": 2.5},
        {"step": 30, "loss": float("nan"), "validation_loss": None},
        {"step": 40, "loss": 1.0},
    ]
    drawn = draw(plots.loss_curve, {"NSA": nsa, "full": [{"step": 0, "loss": 4.5}, {"step": 40, "loss": float("inf")}]})
    axes = drawn.figure.axes[0]
    training, validation, full = axes.lines
    np.testing.assert_array_equal(training.get_xdata(), [0, 10, 20, 30, 40])
    np.testing.assert_array_equal(training.get_ydata(), [4, 3, 2, np.nan, 1])
    np.testing.assert_array_equal(validation.get_ydata(), [3.5, 2.5])
    np.testing.assert_array_equal(full.get_ydata(), [4.5, np.nan])
    assert axes.get_ylabel() == "loss (nats per token)"
    assert training.get_linewidth() < validation.get_linewidth()
    for step, loss in ((10, 3.5), (20, 2.5)):  # the markers
        assert same(drawn.colour(axes, step, loss), plots.RUN_COLOURS[0])
    assert [text.get_text() for text in drawn.figure.legends[0].get_texts()] == [
        "NSA, training",
        "NSA, validation",
        "full",
    ]


def test_loss_by_position(draw):
    """Buckets in any order; 4 .. 7, counted from 1 as 5 .. 8, is drawn at sqrt(40)."""
    buckets = [{"start": 4, "end": 8, "loss": 2.0}, {"start": 0, "end": 1, "loss": 5.0}]
    drawn = draw(plots.loss_by_position, {"NSA": buckets, "full": [{"start": 1, "end": 4, "loss": 3.0}]})
    axes = drawn.figure.axes[0]
    assert axes.get_xscale() == "log"
    assert same(drawn.colour(axes, 1, 5.0), plots.RUN_COLOURS[0])
    assert same(drawn.colour(axes, 40**0.5, 2.0), plots.RUN_COLOURS[0])
    assert same(drawn.colour(axes, 8**0.5, 3.0), plots.RUN_COLOURS[1])
    assert same(drawn.colour(axes, 8**0.5, 2.3), plots.PAPER)
    assert axes.get_ylabel() == "loss (nats per token)"


def test_loss_by_position_in_bits_per_byte(draw):
    buckets = [
        {"start": 0, "end": 1, "loss": 5.0, "bits_per_byte": 1.5},
        {"start": 1, "end": 4, "loss": 4.0, "bits_per_byte": 1.0},
    ]
    axes = (drawn := draw(plots.loss_by_position, {"NSA": buckets}, field="bits_per_byte")).figure.axes[0]
    assert axes.get_ylabel() == "loss (bits per byte)" and same(drawn.colour(axes, 1, 1.5), plots.RUN_COLOURS[0])


def test_selected_blocks(draw):
    """Three blocks of 8, the last one cut to 4 keys; every cell against a matrix written by hand."""
    blocks = np.full((2, 20, 2, 3), -1)
    blocks[0, :, 0, 0] = 0  # head 0 of layer 0: always block 0
    blocks[0, 8:, 1] = [1, 1, -1]  # head 1: from query 8 on block 1, named twice
    blocks[0, 16:, 0, 1:] = [1, 2]  # and head 0: both others from query 16 on
    blocks[1, 3, 1, 2] = 2  # layer 1: one fault, a block in the future
    drawn = draw(plots.selected_blocks, blocks, select_block=8, num_keys=20, layer_names=["first", "second"])
    one, two = plots._shades(plots.BRANCH_COLOURS["selected"], 2)
    first, second = drawn.figure.axes[:2]
    assert [first.get_title(), second.get_title()] == ["first", "second"]
    rows = {
        range(0, 8): (one, plots.FUTURE, plots.FUTURE),
        range(8, 16): (one, one, plots.FUTURE),
        range(16, 20): (one, two, one),
    }
    for queries, row in rows.items():
        for query in queries:
            for block, colour in enumerate(row):
                key = 8 * block + (3 if block < 2 else 1)
                if abs(query - key) > 1:  # elsewhere is the line of the diagonal
                    assert same(drawn.colour(first, key + 0.5, query + 0.5), colour), (query, block)
    assert same(drawn.colour(second, 18, 3.5), one)
    assert same(drawn.colour(second, 18, 4.5), plots.FUTURE)
    assert same(drawn.colour(second, 4, 12.5), plots.PAPER)


def test_selected_blocks_of_a_later_chunk(draw):
    """Queries 12 .. 15 of 16 keys: the last block starts at 12, so there is no future."""
    blocks = np.reshape([1, 1, 2, 2], (1, 4, 1, 1))
    drawn = draw(plots.selected_blocks, blocks, select_block=4, num_keys=16, query_start=12)
    axes = drawn.figure.axes[0]
    assert axes.get_ylim() == (16, 12)
    for query, chosen, other in ((12, 1, 2), (13, 1, 2), (14, 2, 1), (15, 2, 1)):
        assert same(drawn.colour(axes, 4 * chosen + 2, query + 0.5), plots.BRANCH_COLOURS["selected"])
        assert same(drawn.colour(axes, 4 * other + 2, query + 0.5), plots.PAPER)
    assert drawn.share(plots.FUTURE) < 1e-3  # a pixel of a letter may have any grey


def test_selected_blocks_of_long_sequences_lose_nothing(draw):
    """One choice of one query among 2 ** 20 pairs of query and block, in every panel of twelve, is drawn."""
    blocks = np.full((12, 2048, 2, 1), -1)
    places = [(1100 + 67 * layer, 3 + 19 * layer) for layer in range(12)]
    for layer, (query, block) in enumerate(places):
        blocks[layer, query, 0, 0] = block
    drawn = draw(plots.selected_blocks, blocks, select_block=4, num_keys=2048)
    assert "7 to a row" in drawn.figure.get_supylabel()
    assert "2 to a column" in drawn.figure.get_supxlabel()
    one, _ = plots._shades(plots.BRANCH_COLOURS["selected"], 2)
    for axes, (query, block) in zip(drawn.figure.axes, places, strict=False):
        assert min(axes.bbox.size) > plots.MAX_CELLS
        row, column = query // 7, block // 2
        assert same(drawn.colour(axes, (column + 0.5) * 8, (row + 0.5) * 7), one)
        assert same(drawn.colour(axes, (column + 1.5) * 8, (row + 0.5) * 7), plots.PAPER)
        assert same(drawn.colour(axes, (column + 0.5) * 8, (row + 1.5) * 7), plots.PAPER)


def test_head_choices(draw):
    """Six blocks of 4, of which the first and the query's own are always read: every cell of two heads."""
    blocks = np.full((22, 2, 3), -1)
    for query, head in np.ndindex(22, 2):
        own = query // 4
        chosen = sorted({0, own, own // 2 if head else 0})
        blocks[query, head, : len(chosen)] = chosen
    drawn = draw(plots.head_choices, blocks, select_block=4, num_initial=1, num_local=1, title="layer 3")
    pale, _, dark = plots._shades(plots.BRANCH_COLOURS["selected"], 3)
    panels = drawn.figure.axes
    assert [axes.get_title() for axes in panels] == ["K/V head 0", "K/V head 1"]
    for head, axes in enumerate(panels):
        for query in range(22):
            own = query // 4
            for block in range(6):
                key = 4 * block + (2 if block < 5 else 1)
                expected = plots.FUTURE if block > own else plots.PAPER
                if block in (0, own):
                    expected = pale
                elif head == 1 and own > 1 and block == own // 2:
                    expected = dark
                if abs(query - key) > 1:  # elsewhere is the line of the diagonal
                    assert same(drawn.colour(axes, key + 0.5, query + 0.5), expected), (head, query, block)
    legend = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert legend == ["chosen by score", "always read (first 1, last 1)", "the future"]
    assert drawn.figure.get_suptitle() == "layer 3"


def test_head_choices_of_long_sequences_lose_nothing(draw):
    """One query of 4096 chose a block by its score: it is seen through those that share its cell and did not."""
    blocks = np.full((4096, 1, 2), -1)
    blocks[:, 0, 0] = 0
    blocks[3000, 0, 1] = 5
    drawn = draw(plots.head_choices, blocks, select_block=64, num_initial=1, num_local=1, title="layer 0")
    axes = drawn.figure.axes[0]
    assert "7 to a row" in drawn.figure.get_supylabel() and min(axes.bbox.size) > 4096 / 7
    pale, _, dark = plots._shades(plots.BRANCH_COLOURS["selected"], 3)
    row = 3000 // 7 * 7 + 3.5
    assert same(drawn.colour(axes, 5.5 * 64, row), dark)
    assert same(drawn.colour(axes, 5.5 * 64, row + 7), plots.PAPER)
    assert same(drawn.colour(axes, 32, row), pale)


def test_unions(draw):
    unions = {2: [[5.0, 7.0], [6.0, 6.0]], 16: [[20.0, 20.0], [9.0, 11.0]]}
    drawn = draw(plots.unions, unions, mean_blocks=4.5)
    axes = drawn.figure.axes[0]
    assert axes.get_yscale() == "log"
    for count, (colour, means) in zip((2, 16), zip(plots.RUN_COLOURS, ([6, 6], [20, 10]))):
        for layer, value in enumerate(means):
            assert same(drawn.colour(axes, layer, value), colour), (count, layer)
    dots = np.concatenate([dots.get_offsets() for dots in axes.collections])
    assert sorted(dots[:, 1]) == sorted([5, 7, 6, 6, 20, 20, 9, 11])
    assert [text.get_text() for text in drawn.figure.legends[0].get_texts()] == ["2 queries", "16 queries", "one (4.5)"]
    assert axes.lines[-1].get_ydata()[0] == 4.5
    bottom, top = axes.get_ylim()
    assert bottom < 4.5 and top > 20
    assert len([tick for tick in axes.get_yticks() if bottom <= tick <= top]) >= 4


COVERAGE = dict(
    positions=[(0, 8), (8, 16), (16, 24)],
    covered_by_position=[[1.0, 0.8, 0.6], [1.0, 0.6, 0.4]],
    best_by_position=[1.0, 0.9, 0.85],
    share_read=[1.0, 0.4, 0.2],
)


def test_coverage(draw):
    from matplotlib import colormaps

    covered = [[0.0, 0.25, 1.0], [0.5, 0.75, 0.1]]
    drawn = draw(plots.coverage, covered, **COVERAGE)
    heat, lines = (axes for axes in drawn.figure.axes if axes.get_xlabel())
    for (layer, head), value in np.ndenumerate(covered):
        # Beside the number in the middle.
        assert same(drawn.colour(heat, head - 0.4, layer - 0.4), colormaps["cividis"](value)[:3])
    assert [text.get_text() for text in heat.texts] == ["0%", "25%", "100%", "50%", "75%", "10%"]
    drawn_lines = [line.get_ydata().tolist() for line in lines.lines]
    assert drawn_lines[:2] == COVERAGE["covered_by_position"]
    np.testing.assert_allclose(drawn_lines[2], [1.0, 0.7, 0.5])
    assert drawn_lines[3:] == [COVERAGE["best_by_position"], COVERAGE["share_read"]]
    assert all(line.get_xdata().tolist() == [4, 12, 20] for line in lines.lines)
    assert [text.get_text() for text in lines.get_legend().get_texts()] == [
        "layer 0",
        "layer 1",
        "mean of the layers",
        "the best blocks",
        "share of the tokens",
    ]


def test_coverage_where_no_query_chooses(draw):
    drawn = draw(plots.coverage, None, **COVERAGE)
    assert "no query of so short a text\nhas to choose" in [text.get_text() for text in drawn.figure.axes[0].texts]


def share_colour(share):
    return (1 - share) * plots._rgb(plots.UNREAD) + share * 0.55 * plots._rgb(plots.RUN_COLOURS[0])


def names_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_needle_map(draw):
    """Cells in any order, and one that was not measured."""
    shares = {(512, 0): 0.0, (512, 100): 0.25, (512, 50): 1.0, (2048, 100): 0.5, (2048, 0): 0.9}
    cells = [dict(length=length, depth=depth, exact=share) for (length, depth), share in shares.items()]
    drawn = draw(plots.needle_map, {"passkey": cells, "single_1": [dict(length=64, depth=50, exact=0.5)]})
    first, second = drawn.figure.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["passkey", "single_1"]
    assert (names_of(first.xaxis), names_of(first.yaxis)) == (["512", "2k"], ["0", "50", "100"])
    for column, length in enumerate((512, 2048)):
        for row, depth in enumerate((0, 50, 100)):
            share = shares.get((length, depth))
            expected = plots.PAPER if share is None else share_colour(share)
            # Beside the number in the middle.
            assert same(drawn.colour(first, column - 0.4, row - 0.4), expected), (length, depth)
    assert [text.get_text() for text in first.texts] == ["0", "90", "100", "25", "50"]
    assert same(drawn.colour(second, -0.4, -0.4), share_colour(0.5)) and names_of(second.xaxis) == ["64"]


def test_needle_maps_of_many_cells_have_fewer_names_and_no_numbers(draw):
    cells = [dict(length=1024 * i, depth=5 * j, exact=i * j % 2) for i in range(1, 33) for j in range(21)]
    drawn = draw(plots.needle_map, {str(task): cells for task in range(9)})
    panels = drawn.figure.axes[:9]
    assert [len({round(getattr(axes.get_position(), side), 3) for axes in panels}) for side in ("x0", "y0")] == [3, 3]
    for axes in panels:
        assert not axes.texts
        assert same(drawn.colour(axes, 30, 15), share_colour(1)) and same(drawn.colour(axes, 31, 15), share_colour(0))
        boxes = [label.get_window_extent() for label in axes.xaxis.get_ticklabels()]
        assert len(boxes) > 4 and all(left.x1 + 5 < right.x0 for left, right in itertools.pairwise(boxes))


def test_hit_rates(draw):
    rates = np.array([[0.0, 0.5, 1.0], [0.25, 0.75, 0.1]])
    drawn = draw(plots.hit_rates, {"passkey": rates, "single_1": rates[:1, :1]})
    axes = drawn.figure.axes[0]
    for (layer, head), rate in np.ndenumerate(rates):
        assert same(drawn.colour(axes, head - 0.4, layer - 0.4), share_colour(rate))
    assert [text.get_text() for text in axes.texts] == ["0", "50", "100", "25", "75", "10"]
    # Dark on light and light on dark.
    assert [text.get_color() == plots.PAPER for text in axes.texts] == [False, False, True, False, True, False]
    assert (names_of(axes.xaxis), names_of(axes.yaxis)) == (["0", "1", "2"], ["0", "1"])
    assert (drawn.figure.get_supxlabel(), drawn.figure.get_supylabel()) == ("key/value head", "layer")


def test_recall(draw):
    def cells(*points):
        return [dict(length=length, pairs=pairs, accuracy=accuracy) for length, pairs, accuracy in points]

    ours = cells((128, 8, 0.5), (64, 4, 1.0), (128, 4, 0.75), (64, 16, 0.9))
    drawn = draw(plots.recall, {"ours": ours, "full": cells((64, 4, 0.7), (64, 16, 0.3))})
    short, long = drawn.figure.axes
    assert [axes.get_title() for axes in (short, long)] == ["64 tokens", "128 tokens"]
    for axes, run, pairs, accuracy in (
        (short, 0, 4, 1.0),
        (short, 0, 16, 0.9),
        (short, 1, 4, 0.7),
        (short, 1, 16, 0.3),
        (long, 0, 4, 0.75),
        (long, 0, 8, 0.5),
    ):
        assert same(drawn.colour(axes, pairs, accuracy), plots.RUN_COLOURS[run])
    # Half way on a log axis: where nothing was measured is the line.
    assert same(drawn.colour(short, 8, 0.95), plots.RUN_COLOURS[0])
    assert len(long.lines) == 2 and long.lines[-1].get_ydata().tolist() == [1 / 4, 1 / 8]
    assert names_of(short.xaxis) == ["4", "16"] and "100%" in names_of(short.yaxis)
    legend = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert legend == ["ours", "full", "one of the values at random"]


@pytest.mark.parametrize("lengths", [[64], [32 * i for i in range(1, 10)]])
def test_long_names_of_runs_keep_their_end_and_stay_inside(draw, lengths):
    runs = [f"{'folder/' * 30}{name}" for name in ("mqar", "mqar-full")]
    cells = [dict(length=length, pairs=4, accuracy=0.5) for length in lengths]
    drawn = draw(plots.recall, dict.fromkeys(runs, cells))
    (legend,) = drawn.figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= drawn.figure.bbox.x1 and box.y1 <= drawn.figure.bbox.y1
    names = [text.get_text() for text in legend.get_texts()]
    assert names[0].endswith("folder/mqar") and names[1].endswith("folder/mqar-full") and len(drawn.figure.axes) < 10


@pytest.mark.parametrize("num_heads", [None, 1, 5])
def test_gates(draw, num_heads):
    means = np.array([[0.2, 0.5, 0.9], [0.0, 0.6, 1.0]])
    values = means if num_heads is None else np.repeat(means[:, None], num_heads, axis=1)
    if num_heads == 5:
        values[:, :, 1] += np.linspace(-0.2, 0.2, 5)  # the mean stays
    drawn = draw(plots.gates, values)
    axes = drawn.figure.axes[0]
    for layer in range(2):
        for branch, colour in enumerate(plots.BRANCH_COLOURS.values()):
            assert same(drawn.colour(axes, layer, means[layer, branch]), colour)
    legend = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert legend == ["compressed", "selected", "window"]


def test_reading_pattern(draw):
    """Compressed token i stands for 4i .. 4i + 7, is seen from query 4i + 7 on, and drawn at keys 4i + 3, 4i + 4."""
    blocks = np.full((59, 3), -1)
    blocks[40:] = [2, 7, -1]  # keys 16 .. 23, and 56 .. 63: the future of queries up to 55
    drawn = draw(plots.reading_pattern, config=Sizes(), num_tokens=59, blocks=blocks)
    full, sparse = (axes for axes in drawn.figure.axes if axes.bbox.height > 100)
    selected, window = plots.BRANCH_COLOURS["selected"], plots.BRANCH_COLOURS["window"]
    compressed = 0.6 * plots._rgb(plots.BRANCH_COLOURS["compressed"]) + 0.4
    expected = {
        (26, 23): plots.UNREAD,
        (27, 22): plots.UNREAD,
        (27, 23): compressed,
        (27, 24): compressed,
        (27, 25): plots.UNREAD,
        (27, 26): window,
        (27, 27): window,
        (27, 28): plots.PAPER,
        (39, 16): compressed,
        (40, 15): compressed,
        (40, 16): selected,
        (40, 23): selected,
        (40, 24): compressed,
        (54, 56): plots.PAPER,
        (56, 56): window,
        (58, 56): selected,
        (58, 57): window,
    }
    for (query, key), colour in expected.items():
        assert same(drawn.colour(sparse, key, query), colour), (query, key)
        assert same(drawn.colour(full, key, query), plots.DENSE if key <= query else plots.PAPER)
    # The last query: tokens 0 .. 12, as the next ends at 59; block 2, and 3 keys of block 7; itself and its neighbour.
    assert {"compressed 13", "selected 11", "window 2"} < set(drawn.words())
    assert {"The last query reads 59 keys", "The last query reads 26 keys (44%)"} < set(drawn.words())


def test_reading_pattern_of_one_token(draw):
    """No compressed token exists yet."""
    drawn = draw(plots.reading_pattern, config=Sizes(), num_tokens=1, blocks=[[0, -1]])
    assert {"compressed 0", "selected 1", "window 1"} < set(drawn.words())


def test_the_branch_colours_are_the_same_everywhere(draw):
    drawn = draw(plots.selected_blocks, np.zeros((1, 8, 1, 1), int), select_block=4, num_keys=8)
    assert drawn.share(plots.BRANCH_COLOURS["selected"]) > 0.1
    drawn = draw(plots.gates, [[0.2, 0.5, 0.9], [0.3, 0.5, 0.8]])
    assert all(drawn.share(colour) > 1e-3 for colour in plots.BRANCH_COLOURS.values())


def blocks_of(*shape, value=0, dtype=int):
    return np.full(shape, value, dtype)


WRONG = {
    "no run": (lambda path: plots.loss_curve({}, path), "at least one run"),
    "run without a loss": (lambda path: plots.loss_curve({"a": [{"step": 1}]}, path), r"runs\['a'\] must have a row"),
    "row without a step": (lambda path: plots.loss_curve({"a": [{"loss": 1.0}]}, path), "must have 'step'"),
    "no label": (lambda path: plots.loss_by_position({}, path), "at least one label"),
    "no bucket": (lambda path: plots.loss_by_position({"a": []}, path), "at least one bucket"),
    "bucket without a loss": (
        lambda path: plots.loss_by_position({"a": [{"start": 0, "end": 1}]}, path),
        r"must also have \['loss'\]",
    ),
    "empty bucket": (
        lambda path: plots.loss_by_position({"a": [{"start": 4, "end": 4, "loss": 1.0}]}, path),
        "0 <= start < end",
    ),
    "blocks of one layer": (
        lambda path: plots.selected_blocks(blocks_of(8, 2, 3), path, select_block=4, num_keys=8),
        r"blocks.shape=\(8, 2, 3\) must be \[L, T, K, A\]",
    ),
    "blocks of no query": (
        lambda path: plots.selected_blocks(blocks_of(1, 0, 2, 3), path, select_block=4, num_keys=8),
        "none of them empty",
    ),
    "blocks that are floats": (
        lambda path: plots.selected_blocks(blocks_of(1, 8, 2, 3, dtype=float), path, select_block=4, num_keys=8),
        "blocks.dtype=float64 must be an integer type",
    ),
    "block beyond the keys": (
        lambda path: plots.selected_blocks(blocks_of(1, 8, 2, 3, value=2), path, select_block=4, num_keys=8),
        r"blocks from 2 to 2 must be in -1 .. 1: there are num_blocks=2",
    ),
    "block below -1": (
        lambda path: plots.selected_blocks(blocks_of(1, 8, 2, 3, value=-2), path, select_block=4, num_keys=8),
        "must be in -1 .. 1",
    ),
    "queries beyond the keys": (
        lambda path: plots.selected_blocks(blocks_of(1, 8, 2, 3), path, select_block=4, num_keys=8, query_start=1),
        "query_start=1 and the 8 queries .* must lie within num_keys=8",
    ),
    "block size": (
        lambda path: plots.selected_blocks(blocks_of(1, 8, 2, 3), path, select_block=0, num_keys=8),
        "select_block=0 and num_keys=8 must be positive",
    ),
    "names": (
        lambda path: plots.selected_blocks(blocks_of(2, 8, 2, 3), path, select_block=4, num_keys=8, layer_names=["a"]),
        r"layer_names=\['a'\] must have one name for each of the 2 layers",
    ),
    "head choices with layers": (
        lambda path: plots.head_choices(
            blocks_of(1, 8, 2, 3), path, select_block=4, num_initial=1, num_local=1, title=""
        ),
        r"blocks.shape=\(1, 8, 2, 3\) must be \[T, K, A\]",
    ),
    "head choices in blocks of none": (
        lambda path: plots.head_choices(blocks_of(8, 2, 3), path, select_block=0, num_initial=1, num_local=1, title=""),
        "select_block=0 must be positive",
    ),
    "no unions": (lambda path: plots.unions({}, path, mean_blocks=4.0), "at least one number of queries"),
    "unions without heads": (lambda path: plots.unions({2: [3.0]}, path, mean_blocks=4.0), r"unions\[2\].shape=\(1,\)"),
    "coverage of other positions": (
        lambda path: plots.coverage([[0.5], [0.5]], path, **COVERAGE | dict(share_read=[1.0])),
        "for P=3 positions",
    ),
    "coverage of other layers": (lambda path: plots.coverage([[0.5]], path, **COVERAGE), "for L=2 layers"),
    "coverage above one": (
        lambda path: plots.coverage([[0.5], [1.5]], path, **COVERAGE),
        r"covered must lie in \[0, 1\], but reaches from 0.5 to 1.5",
    ),
    "no task": (lambda path: plots.needle_map({}, path), "at least one panel"),
    "task without a cell": (
        lambda path: plots.needle_map({"passkey": []}, path),
        r"results\['passkey'\]=\[\] must hold",
    ),
    "hit rates without heads": (
        lambda path: plots.hit_rates({"a": [0.5]}, path),
        r"\['a'\].shape=\(1,\) must be \[L, K\]",
    ),
    "no recall": (lambda path: plots.recall({}, path), "at least one label"),
    "recall without a cell": (lambda path: plots.recall({"a": []}, path), r"results\['a'\]=\[\] must hold"),
    "gates of two branches": (
        lambda path: plots.gates(np.ones((4, 2)), path),
        r"gates.shape=\(4, 2\) must be \[L, 3\]",
    ),
    "gates of no layer": (lambda path: plots.gates(np.ones((0, 3)), path), r"gates.shape=\(0, 3\)"),
    "gates before the sigmoid": (lambda path: plots.gates([[0.0, 1.5, 0.2]], path), "apply the sigmoid"),
    "gates that are NaN": (lambda path: plots.gates([[0.0, float("nan"), 0.2]], path), "apply the sigmoid"),
    "blocks with heads": (
        lambda path: plots.reading_pattern(path, config=Sizes(), num_tokens=8, blocks=blocks_of(8, 2, 3)),
        r"must be \[T, A\]",
    ),
    "too few rows": (
        lambda path: plots.reading_pattern(path, config=Sizes(), num_tokens=8, blocks=blocks_of(7, 2)),
        "one row for each of num_tokens=8",
    ),
    "too many tokens": (
        lambda path: plots.reading_pattern(path, config=Sizes(), num_tokens=641, blocks=blocks_of(641, 2)),
        "num_tokens=641 must be in 1 .. 640",
    ),
    "format": (lambda path: plots.gates([[0.1, 0.2, 0.3]], path.with_suffix(".txt")), "must end in one of .png"),
}


@pytest.mark.parametrize("call, message", WRONG.values(), ids=WRONG)
def test_wrong_input_raises(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_same_input_same_bytes(tmp_path, monkeypatch, suffix):
    written = set()
    for seconds in ("0", "1000000"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", seconds)  # matplotlib's clock
        written.add(plots.gates([[0.2, 0.5, 0.9]], tmp_path / f"at {seconds}{suffix}").read_bytes())
    assert len(written) == 1


def test_the_readme_picture_can_be_remade(tmp_path, capsys):
    plots.main(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["reading_pattern.png"]


def test_missing_matplotlib_names_the_remedy(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "nsa-jax\[train\]"'):
        plots.gates([[0.1, 0.2, 0.3]], tmp_path / "figure.png")


def test_imports_are_lazy_and_the_caller_s_matplotlib_is_untouched(tmp_path):
    program = """
import sys
from train import plots
assert "matplotlib" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams.copy())
plots.gates([[0.1, 0.2, 0.3]], sys.argv[1])
assert dict(matplotlib.rcParams.copy()) == before
assert not {"matplotlib.pyplot", "jax"} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "figure.svg")],
        check=True,
        cwd=Path(plots.__file__).parent.parent,
    )
