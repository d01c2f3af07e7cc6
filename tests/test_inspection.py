"""What `inspect` measures, against loops over single queries; its page, its files, how it goes on, and what it refuses."""

import base64
import dataclasses
import json
import operator
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import ops, select_blocks
from tests.tiny import MODEL, random_params, replace_model
from train import inspection, plots
from train.__main__ import main
from train.errors import Interrupted
from train.inspection import (
    Choices,
    Mass,
    covered_mass,
    inspect_text,
    layer_numbers,
    look,
    look_closely,
    share_read,
    summarize,
)
from train.model import Network
from train.page import write_inspection
from train.runs import load_own_corpus, open_run

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.usefixtures("quick_compilation")

# Four query heads on two key/value heads, and a text that ends within a block.
CONFIG = dataclasses.replace(MODEL, num_heads=4, num_kv_heads=2)
SIZE, SLOTS = CONFIG.nsa.select_block, CONFIG.nsa.num_selected
LENGTH = 39


def mass_by_block(query: np.ndarray, key: np.ndarray, at: int, head: int, *, group: int, size: int) -> list[float]:
    """The softmax of one query over the tokens up to it, summed over each block; float64."""
    scores = [float(query[at, head] @ key[token, head // group]) * query.shape[-1] ** -0.5 for token in range(at + 1)]
    weights = np.exp(np.asarray(scores) - max(scores))
    p = weights / weights.sum()
    return [float(p[start : start + size].sum()) for start in range(0, at + 1, size)]


@pytest.mark.parametrize("chunk_scores", [1, 130, 1 << 24], ids=["a query at a time", "chunks of 2", "at once"])
def test_covered_mass_is_that_of_each_querys_softmax(monkeypatch, chunk_scores):
    monkeypatch.setattr(inspection, "CHUNK_SCORES", chunk_scores)
    rng = np.random.default_rng(0)
    length, heads, kv_heads, size = 19, 6, 2, 4
    query, key = (rng.normal(scale=2, size=(length, n, 8)).astype(np.float32) for n in (heads, kv_heads))
    blocks = np.full((length, kv_heads, 3), -1, np.int32)
    for at in range(length):
        for head in range(kv_heads):
            own = at // size
            chosen = sorted(rng.choice(own + 1, min(3, own + 1) if at % 5 else 1, replace=False))
            blocks[at, head, : len(chosen)] = chosen
    found = covered_mass(jnp.asarray(query), jnp.asarray(key), jnp.asarray(blocks), select_block=size)
    assert found.selected.shape == found.best.shape == (heads, length)
    query, key = query.astype(np.float64), key.astype(np.float64)
    for at in range(length):
        for kv_head in range(kv_heads):
            mine = range(kv_head * 3, kv_head * 3 + 3)
            mass = {head: mass_by_block(query, key, at, head, group=3, size=size) for head in mine}
            together = np.sum([*mass.values()], axis=0)
            best = np.argsort(-together)[:3]
            for head in mine:
                expected = sum(mass[head][block] for block in blocks[at, kv_head] if block >= 0)
                assert float(found.selected[head, at]) == pytest.approx(expected, abs=2e-6)
                assert float(found.best[head, at]) == pytest.approx(sum(mass[head][b] for b in best), abs=2e-6)


def test_all_mass_is_covered_by_a_choice_that_sees_it_and_none_by_a_blind_one():
    """Each query looks for one token alone, in block 2 of 8; where all tokens are alike, blocks cover what they read."""
    key = np.zeros((32, 1, 4), np.float32)
    key[9, 0] = 1000
    for block, covered in ((2, 1), (0, 0)):
        found = covered_mass(
            jnp.ones((32, 2, 4)), jnp.asarray(key), jnp.full((32, 1, 1), block, jnp.int32), select_block=4
        )
        np.testing.assert_allclose(found.selected[:, 9:], covered, atol=1e-6)
        np.testing.assert_allclose(found.best[:, 9:], 1, atol=1e-6)
    blocks = np.full((32, 1, 2), -1, np.int32)
    blocks[:, 0, 0] = np.arange(32) // 4
    found = covered_mass(jnp.ones((32, 2, 4)), jnp.ones((32, 1, 4)), jnp.asarray(blocks), select_block=4)
    np.testing.assert_allclose(found.selected, np.broadcast_to(share_read(blocks, 4), (2, 32)), rtol=1e-5)


def numbers(choices: Choices, mass: Mass, config) -> dict:
    """What `inspect` reports of all layers."""
    num_layers, length = choices.blocks.shape[:2]
    each = [jax.tree.map(operator.itemgetter(layer), (choices, mass)) for layer in range(num_layers)]
    return summarize([layer_numbers(*layer, config) for layer in each], length, config)


@pytest.fixture(scope="module")
def seen():
    """Of a model with random parameters: what `look_closely` gives, and each layer's projections and blocks."""
    network = Network(CONFIG, 50)
    params = random_params(network)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 50, LENGTH), jnp.int32)

    @jax.jit
    def layers(params):
        model = network.model(params)
        x, found = model.embed(tokens[None]), []
        for layer in model.unstacked_layers():
            normed = layer.attention_norm(x)
            found.append((layer.attention.project(normed), layer.attention.select_blocks(normed)))
            x = layer(x, None)
        return found

    return look_closely(network, params, tokens), jax.tree.map(lambda x: np.asarray(x[0]), layers(params))


def test_every_number_against_a_loop(seen):
    (choices, mass), layers = seen
    found = numbers(choices, mass, CONFIG.nsa)
    first = SIZE * SLOTS
    assert found["tokens"] == LENGTH and found["first_that_chooses"] == first == 12
    assert found["queries_that_choose"] == LENGTH - first
    shares, counts = np.zeros((2, LENGTH, 2)), np.zeros((2, LENGTH, 2))
    for layer, (projections, blocks) in enumerate(layers):
        numbers_here = found["layers"][layer]
        assert numbers_here["layer"] == layer and numbers_here["num_kv_heads"] == 2
        for branch, name in enumerate(("compressed", "selected", "window")):
            expected = [np.mean([projections.gates[at, head, branch] for at in range(LENGTH)]) for head in range(4)]
            np.testing.assert_allclose(numbers_here["gates"][name], expected, rtol=1e-5)
        chosen = [[{*blocks[at, head].tolist()} - {-1} for head in range(2)] for at in range(LENGTH)]
        for count in (2, 4, 8, 16):
            starts = range(0, LENGTH - count + 1, count)
            expected = [
                np.mean(
                    [len(set().union(*(chosen[at][head] for at in range(start, start + count)))) for start in starts]
                )
                for head in range(2)
            ]
            np.testing.assert_allclose(numbers_here["mean_union"][str(count)], expected, rtol=1e-6)
        covered, best = np.zeros((2, 4, LENGTH))
        query, key = (x.astype(np.float64) for x in (projections.query, projections.selected.key))
        for at in range(LENGTH):
            for kv_head in range(2):
                tokens = sum(min(SIZE, at + 1 - block * SIZE) for block in chosen[at][kv_head])
                shares[layer, at, kv_head] = tokens / (at + 1)
                counts[layer, at, kv_head] = len(chosen[at][kv_head])
                mine = (2 * kv_head, 2 * kv_head + 1)
                each = {head: mass_by_block(query, key, at, head, group=2, size=SIZE) for head in mine}
                order = np.argsort(-np.sum([*each.values()], axis=0))[:SLOTS]
                for head in mine:
                    covered[head, at] = sum(each[head][block] for block in chosen[at][kv_head])
                    best[head, at] = sum(each[head][block] for block in order)
        np.testing.assert_allclose(numbers_here["covered"], covered[:, first:].mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(numbers_here["best"], best[:, first:].mean(axis=1), atol=1e-5)
        # Not all mass is covered, and no choice covers more than the best one.
        assert max(numbers_here["covered"]) < 0.999
        assert np.mean(numbers_here["covered"]) < np.mean(numbers_here["best"])
        for name, values in (("covered", covered), ("best", best)):
            expected = [values[:, part["start"] : part["end"]].mean() for part in found["positions"]]
            np.testing.assert_allclose(numbers_here[f"{name}_by_position"], expected, atol=1e-5)
    everything = zip([found, *found["layers"]], [shares, *shares], [counts, *counts], strict=True)
    for numbers_here, share, count in everything:
        share = share.reshape(-1, LENGTH, 2)
        assert numbers_here["mean_blocks"] == pytest.approx(count.mean())
        assert numbers_here["share_read"] == pytest.approx(share[:, first:].mean())
        expected = [share[:, part["start"] : part["end"]].mean() for part in found["positions"]]
        np.testing.assert_allclose(numbers_here["share_read_by_position"], expected)
    # The parts are the text, in order, and of about equal size.
    assert len(found["positions"]) == 32
    at = [position for part in found["positions"] for position in range(part["start"], part["end"])]
    assert at == list(range(LENGTH))
    assert {part["end"] - part["start"] for part in found["positions"]} == {1, 2}


def test_what_a_short_text_does_not_have_is_none(seen):
    (choices, mass), _ = seen
    short = Choices(choices.blocks[:, :3], choices.gates), Mass(mass.selected[..., :3], mass.best[..., :3])
    found = numbers(*short, CONFIG.nsa)
    assert found["queries_that_choose"] == 0 and found["share_read"] is None and len(found["positions"]) == 3
    for layer in found["layers"]:
        assert layer["covered"] is None and layer["best"] is None and layer["share_read"] is None
        assert [count for count, union in layer["mean_union"].items() if union is None] == ["4", "8", "16"]
        np.testing.assert_allclose(layer["covered_by_position"], 1.0, atol=1e-6)
    json.dumps(found, allow_nan=False)


def test_the_mean_over_layers_that_read_different_shares():
    """With no block forced, a layer may read the first blocks and another the last ones, which are not full."""
    config = dataclasses.replace(CONFIG.nsa, num_initial=0, num_local=0, num_selected=1)
    length = 10
    own = np.arange(length) // SIZE
    blocks = jnp.asarray(np.stack([0 * own, own]).reshape(2, length, 1, 1), jnp.int32)
    ones = jnp.ones((2, 2, length))
    found = numbers(Choices(blocks, jnp.full((2, 2, 3), 0.5)), Mass(ones, ones), config)
    first = [4 / 5, 4 / 6, 4 / 7, 4 / 8, 4 / 9, 4 / 10]
    last = [1 / 5, 2 / 6, 3 / 7, 4 / 8, 1 / 9, 2 / 10]
    assert [layer["share_read"] for layer in found["layers"]] == pytest.approx([np.mean(first), np.mean(last)])
    assert found["share_read"] == pytest.approx(np.mean(first + last))
    assert found["share_read_by_position"] == pytest.approx([1, 1, 1, 1, *np.mean([first, last], axis=0)])


def test_inspect_sees_the_choices_and_gates_of_the_model_itself(tiny_run, monkeypatch):
    """Against what `select_blocks` and the gates' sigmoid give while the whole model runs."""
    run = tiny_run.run
    tokens = jnp.asarray(run.tokenizer.encode("the quick brown fox jumps over"), jnp.int32)
    choices = look(run.network, run.params, tokens)
    seen = []
    attend = ops.nsa_attention

    def spy(query, *, compressed, gates, config, **rest):
        blocks = select_blocks(query, compressed.key, config=config, num_keys=query.shape[1])
        seen.append((blocks, gates))
        return attend(query, compressed=compressed, gates=gates, config=config, **rest)

    monkeypatch.setattr(ops, "nsa_attention", spy)

    @jax.jit
    def run_layers(params):
        model = run.network.model(params)
        x = model.embed(tokens[None])
        for layer in model.unstacked_layers():
            x = layer(x, None)
        return seen

    seen = run_layers(run.params)
    assert len(seen) == choices.blocks.shape[0] == 2
    for (blocks, gates), chosen, mean in zip(seen, choices.blocks, choices.gates, strict=True):
        np.testing.assert_array_equal(chosen, blocks[0])
        np.testing.assert_allclose(mean, gates[0].mean(axis=0), rtol=1e-5)


class Page(HTMLParser):
    """Checks that tags close in order, and keeps what the page shows and what it would load."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.loads, self.cells, self.words, self.tags = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


def test_inspect_writes_a_page_that_needs_nothing_else(tiny_run, tmp_path, capsys, monkeypatch):
    output, drawn = tmp_path / "new" / "folder", {}
    monkeypatch.setattr("train.runs.open_run", lambda *_, **__: tiny_run.run._replace(folder=tmp_path / "a<b>&c"))
    for name in ("selected_blocks", "gates", "unions", "coverage"):

        def draw(*args, name=name, draw=getattr(plots, name), **options):
            drawn[name] = (args[0], options)
            return draw(*args, **options)

        monkeypatch.setattr(plots, name, draw)
    assert main(["inspect", "--run", str(tiny_run.folder), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    names = ["inspect.html", "inspect.json", "selected_blocks.png", "gates.png", "unions.png", "coverage.png"]
    names += ["blocks_layer_00.png", "blocks_layer_01.png"]
    progress, written = printed.splitlines()
    assert re.fullmatch(r"inspect 2/2  layer 1  ETA .*", progress)
    assert written == "written: " + ", ".join(str(output / name) for name in names)
    assert {path.name for path in output.iterdir()} == {*names, "inspect.parts.jsonl"}

    text = load_own_corpus(tiny_run.run).validation[0].text
    tokens = jnp.asarray(tiny_run.run.tokenizer.encode(text)[:32], jnp.int32)
    found = json.loads((output / "inspect.json").read_text())
    choices, mass = look_closely(tiny_run.run.network, tiny_run.run.params, tokens)
    nsa = tiny_run.config.model.nsa
    expected = numbers(choices, mass, nsa)
    assert {name: found[name] for name in expected} == json.loads(json.dumps(expected))
    assert (found["step"], found["context"], found["nsa"]["select_block"]) == (40, 32, 4)

    np.testing.assert_array_equal(drawn["selected_blocks"][0], choices.blocks)
    np.testing.assert_array_equal(drawn["gates"][0], choices.gates)
    unions, options = drawn["unions"]
    assert unions == {n: [layer["mean_union"][str(n)] for layer in found["layers"]] for n in (2, 4, 8, 16)}
    assert options == dict(mean_blocks=found["mean_blocks"])
    covered, options = drawn["coverage"]
    np.testing.assert_allclose(covered, mass.selected[..., 12:].mean(axis=-1), rtol=1e-5)
    assert options["positions"] == [(position, position + 1) for position in range(32)]
    for name, values in (
        ("covered_by_position", mass.selected.mean(axis=1)),
        ("best_by_position", mass.best.mean(axis=(0, 1))),
        ("share_read", [min(1, (8 + at % 4 + 1) / (at + 1)) for at in range(32)]),
    ):
        np.testing.assert_allclose(options[name], values, rtol=1e-5)
    for layer in range(2):
        plots.head_choices(
            choices.blocks[layer],
            tmp_path / "layer.png",
            select_block=4,
            num_initial=nsa.num_initial,
            num_local=nsa.num_local,
            title=f"layer {layer}",
        )
        assert (tmp_path / "layer.png").read_bytes() == (output / f"blocks_layer_0{layer}.png").read_bytes()

    html = (output / "inspect.html").read_text()
    page = Page(html)
    names = ["selected_blocks", "blocks_layer_00", "blocks_layer_01", "gates", "unions", "coverage"]
    assert [
        base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in page.images
    ] == [(output / f"{name}.png").read_bytes() for name in names]
    assert page.loads == page.images and not re.search(r"https?://|@import|url\(", html.replace("data:image", ""))
    assert "link" not in page.tags and page.tags.count("script") == 1
    words = " ".join(page.words)
    assert "a<b>&c" in words and "<b>" not in html.replace("</b>", "")
    assert "20 of the 32 queries, from position 12 on" in words
    # Each number of the table, which is what a reader without pictures has.
    for layer in found["layers"]:
        row = [str(layer["layer"])]
        row += [f"{np.mean(layer['gates'][name]):.2f}" for name in ("compressed", "selected", "window")]
        row += [f"{np.mean(layer['mean_union'][count]):.1f}" for count in ("2", "4", "8", "16")]
        row += [f"{x:.1%}" for x in (np.mean(layer["covered"]), min(layer["covered"]), max(layer["covered"]))]
        row += [f"{np.mean(layer['best']):.1%}"]
        assert any(page.cells[at : at + len(row)] == row for at in range(len(page.cells)))


def test_the_page_has_a_row_for_each_head(seen, tmp_path, monkeypatch):
    (choices, mass), _ = seen
    found = numbers(choices, mass, CONFIG.nsa)
    about = dict(run=".", step=1, text="text", context=LENGTH, nsa=dataclasses.asdict(CONFIG.nsa))
    (tmp_path / "name").mkdir()
    monkeypatch.chdir(tmp_path / "name")
    page = Page(write_inspection(tmp_path / "page.html", about | found, [], []).read_text())
    assert "What the attention of name reads" in page.words
    rows = []
    for layer in found["layers"]:
        for head, mine in enumerate(([0, 1], [2, 3])):
            row = [str(layer["layer"]), str(head)]
            row += [f"{layer['mean_union'][count][head]:.1f}" for count in ("2", "4", "8", "16")]
            covered, best = ([layer[name][each] for each in mine] for name in ("covered", "best"))
            rows.append([*row, *(f"{x:.1%}" for x in (np.mean(covered), min(covered), max(covered), np.mean(best)))])
    assert len({*map(tuple, rows)}) == 4
    assert page.cells[-40:] == [cell for row in rows for cell in row]


def looks_at_one_layer(read):
    """In place of `look_at_layers`: the tokens are kept in a list, and the one layer reads the first block alone."""

    def look_at_layers(network, params, tokens):
        read.append(tokens.tolist())
        length = len(tokens)
        blocks = jnp.zeros((length, 1, 3), jnp.int32).at[..., 1:].set(-1)
        mass = Mass(jnp.ones((2, length)), jnp.ones((2, length)))
        yield Choices(blocks, jnp.full((2, 3), 0.5)), lambda: mass

    return look_at_layers


def test_inspect_reads_what_it_is_told_to(tiny_run, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(inspection, "look_at_layers", looks_at_one_layer(read))
    monkeypatch.setattr("train.runs.open_run", lambda *_, **__: tiny_run.run)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog")
    flags = ["inspect", "--run", str(tiny_run.folder), "--text", str(text), "--output", str(tmp_path / "out")]
    for more, length in (([], 32), (["--length", "1"], 1), (["--length", "40", "--beyond-context"], 40)):
        assert main([*flags, *more]) == 0
        assert bytes(read.pop()) == text.read_bytes()[:length]
        page = Page((tmp_path / "out" / "inspect.html").read_text())
        words = " ".join(page.words)
        assert f"The first {length} tokens" in words and str(text) in words
        assert ("more than the context that it was trained with" in words) == (length == 40)
        # Of one token there is no overlap, and nobody chooses.
        assert len(page.images) == (4 if length == 1 else 5)
        assert ("No query has to choose" in words) == ("–" in page.cells) == (length == 1)


def test_inspect_says_which_text_it_reads(tiny_run, tmp_path, monkeypatch):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    told = []
    monkeypatch.setattr("train.runs.open_run", lambda *_, **__: tiny_run.run)
    monkeypatch.setattr(inspection, "inspect_text", lambda *args, source, **_: told.append((args[1], source)) or [])
    for flags in ([], ["--text", str(tmp_path / "b.txt")], ["--text", str(tmp_path)]):
        assert main(["inspect", "--run", str(tiny_run.folder), *flags]) == 0
    held_out = load_own_corpus(tiny_run.run).validation[0]
    assert told == [
        (held_out.text, f"{tiny_run.text} (validation: {held_out.name})"),
        ("text b", str(tmp_path / "b.txt")),
        ("text a", f"{tmp_path} (a.txt)"),
    ]


def test_inspect_goes_on_after_an_interruption(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.runs.open_run", lambda *_, **__: tiny_run.run)
    traced, covered_mass = [], inspection.covered_mass
    monkeypatch.setattr(
        inspection, "covered_mass", lambda *args, **rest: traced.append(1) or covered_mass(*args, **rest)
    )
    command = ["inspect", "--run", str(tiny_run.folder), "--output"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    assert len(traced) == 1  # of two layers

    measured, layer_numbers = [], inspection.layer_numbers

    def interrupted(*args):
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return layer_numbers(*args)

    monkeypatch.setattr(inspection, "layer_numbers", interrupted)
    command.append(str(tmp_path / "parts"))
    capsys.readouterr()
    assert main(command) == 130
    assert "inspect stopped at part 1 of 2; what is done is in " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["inspect.parts.jsonl"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "inspect.parts.jsonl has parts, 1 of these settings: going on\ninspect 2/2  layer 1  ETA " in out
    assert len(measured) == 3
    # To the last digit, and what is drawn too.
    whole, parts = (
        {path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in ("whole", "parts")
    )
    assert len(whole) == 9 and parts == whole


def test_inspect_measures_anew_what_is_not_the_same(tiny_run, tmp_path, capsys, monkeypatch):
    measured = []

    def look_at_layers(network, params, tokens):
        """A layer, and then Ctrl-C: nothing is drawn."""
        ((choices, measure),) = looks_at_one_layer([])(network, params, tokens)
        yield choices, lambda: measured.append(1) or measure()
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "look_at_layers", look_at_layers)

    def inspect(run=tiny_run.run, text="the quick brown fox", source="text", **options):
        measured.clear()
        with pytest.raises(Interrupted, match="inspect stopped at part 1 of 2"):
            inspect_text(run, text, tmp_path, source=source, **options)
        return len(measured), capsys.readouterr().out

    assert inspect() == (1, "")
    count, out = inspect()
    assert count == 0 and "has parts, 1 of these settings: going on" in out
    # A length that is that of the text changes nothing; nor does a copy of the folder, or what the text is called.
    assert inspect(length=19)[0] == inspect(run=tiny_run.run._replace(folder=tmp_path))[0] == 0
    assert inspect(source="another")[0] == 0
    other = jax.tree.map(lambda x: x + 1, tiny_run.run.params)
    for changed in (
        dict(length=16),
        dict(text="the quick brown dog"),
        dict(run=open_run(tiny_run.folder, step=30)),
        dict(run=tiny_run.run._replace(params=other)),
    ):
        assert inspect(**changed)[0] == 1
        # Neither is lost to the other.
        assert inspect(**changed)[0] == inspect()[0] == 0
    monkeypatch.setattr("train.evaluation.code_sha256", lambda: "other")
    count, out = inspect()
    assert count == 1 and "has parts, 0 of these settings, 5 of others or of other code: going on" in out


def test_inspect_refuses_what_it_cannot_read(tiny_run, tmp_path):
    def inspect(text="the quick brown fox jumps over a lazy dog", **options):
        inspect_text(tiny_run.run, text, tmp_path / "out", source="text", **options)

    for length in (0, -3):
        with pytest.raises(ValueError, match=f"length={length} must be at least 1 token"):
            inspect(length=length)
    with pytest.raises(
        ValueError, match=r"length=33 is more than the context=32 that .* was trained with: give at most"
    ):
        inspect(length=33)
    with pytest.raises(ValueError, match="length=99 is more than the 41 tokens of the text"):
        inspect(length=99, beyond_context=True)
    with pytest.raises(ValueError, match="length=12 is more than the 5 tokens of the text"):
        inspect(text="quick", length=12)
    with pytest.raises(ValueError, match="the text is empty"):
        inspect(text="")
    run = tiny_run.run._replace(config=replace_model(tiny_run.config, attention="full"))
    with pytest.raises(ValueError, match="was trained with attention='full': only 'nsa' selects blocks"):
        inspect_text(run, "text", tmp_path / "out", source="text")
    assert not (tmp_path / "out").exists()
