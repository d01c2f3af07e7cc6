"""Needles and recall of planted and of real models, and evaluations that are interrupted."""

import dataclasses
import json
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig
from nsa_jax.module import NativeSparseAttention
from tests.tiny import MODEL, make_config, random_params, replace_model, save_untrained
from train import evaluate_mqar, evaluate_niah, evaluation, plots
from train.__main__ import main
from train.checkpoint import CheckpointError
from train.data import Document
from train.draws import Draws
from train.errors import Interrupted
from train.evaluate_mqar import choose_cells, measure_cell
from train.evaluate_niah import SelectionAnswers, agreement, chance_of_hits, mean_hit_rates, score
from train.evaluation import Answers, Parts
from train.model import Network
from train.mqar import make_recall
from train.niah import RECIPES, NeedleMaker, make_haystack
from train.runs import load_own_corpus, open_run
from train.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")
pytest_plugins = ["tests.tiny_fixtures"]

VOCAB = 257
STORY = "".join(f" Sentence {i} says nothing new; but it says so {i % 7} times." for i in range(60))


class Planted:
    """A network whose model predicts what a function of the tokens `[B, T]` says, `[B, T]`."""

    def __init__(self, predict):
        self.predict = predict

    def model(self, params):
        return self

    def hidden(self, tokens):
        shape = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
        return jax.nn.one_hot(jax.pure_callback(self.predict, shape, tokens), VOCAB)

    def logits(self, hidden):
        return hidden


def recalls(tokens):
    """After a key, the token that followed it at first."""
    tokens = np.asarray(tokens)
    first = np.argmax(tokens[:, None, :] == tokens[:, :, None], axis=2)
    return np.take_along_axis(tokens, np.minimum(first + 1, tokens.shape[1] - 1), axis=1).astype(np.int32)


def finds_needles(tokens):
    """Reads the prompt alone, and writes the answer from where it ends."""
    predicted = np.zeros(tokens.shape, np.int32)
    for row, ids in enumerate(np.asarray(tokens)):
        text = ByteTokenizer().decode(ids)
        prompt = text[: re.search(r"\nWhat .* (is|is:|are:)(?= )", text).end()]
        question = prompt[prompt.rindex("\nWhat") :]
        if "pass key" in question:
            values = re.findall(r"The pass key is (\d+)\.", prompt)
        else:
            keys = re.search(r" for (.*) in the text", question).group(1).replace(" and ", " ").split(", ")
            values = [value for key in keys for value in re.findall(rf"for {key} is: (\S+)\.", prompt)]
        answer = ByteTokenizer().encode(" " + ", ".join(values))
        predicted[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = answer
    return predicted


def says_five(tokens):
    return np.full(tokens.shape, ord("5"), np.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Planted models
# ---------------------------------------------------------------------------------------------------------------------


def recall_accuracy(predict, *, batch_size=100, **others):
    sizes = dict(length=48, pairs=6, vocab_size=VOCAB, examples=250, seed=0) | others
    return measure_cell(Answers(Planted(predict)), {}, **sizes, batch_size=batch_size)


def test_a_model_that_recalls_has_every_query_right():
    cell = recall_accuracy(recalls)
    assert cell["accuracy"] == 1 and cell["queries"] == 1500


def test_examples_of_recall_are_all_different_whatever_the_batch():
    def examples(**sizes):
        rows = []

        def see(tokens):
            rows.extend(row.tobytes() for row in np.asarray(tokens))
            return np.zeros(tokens.shape, np.int32)

        recall_accuracy(see, **sizes)
        return rows

    rows = examples()
    assert len(set(rows)) == len(rows) == 300
    assert examples(batch_size=50) == rows[:250] and examples(batch_size=7)[:250] == rows[:250]
    assert examples(examples=1, batch_size=1, seed=1) != rows[:1]


def test_no_example_of_recall_has_the_draws_of_a_row_that_is_trained_on():
    """Row 48 of a mixture draws from (seed, 48, 1)."""
    first = []
    recall_accuracy(lambda tokens: first.append(tokens[0]) or tokens, pairs=1, examples=1, batch_size=1)
    trained_on = make_recall(Draws(0, 48, 1), num_examples=1, length=48, pairs=1, vocab_size=VOCAB)
    assert (first[0] != trained_on.tokens[0]).any()


def test_a_blind_model_recalls_by_chance():
    cell = recall_accuracy(lambda tokens: np.full(tokens.shape, 200, np.int32))
    assert cell["chance"] == 1 / 129
    assert cell["accuracy"] == pytest.approx(cell["chance"], abs=0.006)


def test_a_model_that_takes_any_value_has_one_in_so_many():
    cell = recall_accuracy(lambda tokens: np.repeat(tokens[:, 3:4], tokens.shape[1], axis=1))
    assert cell["accuracy"] == cell["accuracy_of_any_of_the_values"] == 1 / 6


def planted_scores(predict, task, num=8):
    maker = NeedleMaker(ByteTokenizer(), make_haystack([Document("story", STORY)], ByteTokenizer()))
    examples = [maker.make(Draws(seed), task, length=900, depth=10 * (seed % 11)) for seed in range(num)]
    return score(Answers(Planted(predict)), {}, examples, NSAConfig())


@pytest.mark.parametrize("task", RECIPES)
def test_a_model_that_finds_needles_has_them_all(task):
    for one in planted_scores(finds_needles, task, num=3):
        assert one.exact and one.values == one.tokens == 1 and one.hit_rate is None


def test_a_blind_model_finds_nothing_but_a_digit_by_chance():
    scores = planted_scores(says_five, "multivalue", num=30)
    assert not any(one.exact or one.values for one in scores)
    # The first digit of seven is no zero, and the space before them is of no value.
    assert np.mean([one.tokens for one in scores]) == pytest.approx((1 / 9 + 6 / 10) / 7, abs=0.025)


def test_values_count_one_by_one():
    def half(tokens):
        predicted = finds_needles(tokens)
        for row, ids in enumerate(np.asarray(tokens)):
            last = ByteTokenizer().decode(ids).rindex(",")
            predicted[row, last:] = ord("x")
        return predicted

    for one in planted_scores(half, "multiquery", num=2):
        assert not one.exact and one.values == one.tokens == 3 / 4


def test_an_answer_is_exact_if_its_commas_are_too():
    def without_commas(tokens):
        predicted = finds_needles(tokens)
        return np.where(predicted == ord(","), ord(";"), predicted)

    for one in planted_scores(without_commas, "multiquery", num=2):
        assert not one.exact and one.values == one.tokens == 1


def test_agreement_ends_at_the_first_wrong_token():
    expected, wrong = np.array([1, 2, 3, 4]), np.array([1, 2, 9, 4])
    assert agreement(expected, expected, np.array([1, 2, 3, 4])) == (True, 4)
    assert agreement(expected, expected, np.array([1, 2, 3, 5])) == (False, 4)
    assert agreement(expected, wrong, np.array([1, 2, 9, 7])) == (True, 3)
    assert agreement(expected, wrong, np.array([1, 2, 3, 4])) == (False, 3)


def test_decoding_is_greedy_to_the_last_token(runs):
    """Given what it decoded, the most likely token at each place is the one that it decoded; prompts differ in length."""
    run = open_run(runs / "nsa")
    run = run._replace(params=random_params(run.network))
    lengths, prompts = (
        np.asarray([90, 71], np.int32),
        np.random.default_rng(0).integers(0, VOCAB, (2, 90)).astype(np.int32),
    )
    generated = evaluate_niah.decode(run, prompts, lengths, 12)
    assert generated.shape == (2, 12) and len(set(generated.ravel().tolist())) > 4
    positions = lengths[:, None] - 1 + np.arange(12, dtype=np.int32)
    texts = np.pad(prompts, ((0, 0), (0, 12)))
    np.put_along_axis(texts, positions + 1, generated, axis=1)
    np.testing.assert_array_equal(Answers(run.network)(run.params, texts, positions), generated)


# ---------------------------------------------------------------------------------------------------------------------
# What is selected
# ---------------------------------------------------------------------------------------------------------------------


def test_hits_are_the_blocks_that_the_layers_select():
    network = Network(MODEL, VOCAB)
    params = random_params(network)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (2, 60)).astype(np.int32)
    positions = rng.integers(40, 60, (2, 5)).astype(np.int32)
    sources = rng.integers(0, 40, (2, 5)).astype(np.int32)
    predicted, hits = SelectionAnswers(network)(params, tokens, positions, sources)
    np.testing.assert_array_equal(predicted, Answers(network)(params, tokens, positions))
    assert hits.shape == (2, 5, 2, 1) and 0 < hits.mean() < 1

    @jax.jit
    def select(params, tokens):
        model = network.model(params)
        x, blocks = model.embed(tokens), []
        for layer in model.unstacked_layers():
            blocks.append(layer.attention.select_blocks(layer.attention_norm(x)))
            x = layer(x, None)
        return jnp.stack(blocks)

    blocks = np.asarray(select(params, jnp.asarray(tokens)))
    for row, answer, layer, head in np.ndindex(hits.shape):
        chosen = blocks[layer, row, positions[row, answer], head]
        assert hits[row, answer, layer, head] == (sources[row, answer] // MODEL.nsa.select_block in chosen)


def test_a_hit_rate_is_the_mean_over_the_tokens_of_values():
    """A model that hits wherever the wanted token is before the middle: all of what was asked for, none, or two of four."""
    maker = NeedleMaker(ByteTokenizer(), make_haystack([Document("story", STORY)], ByteTokenizer()))
    examples = [maker.make(Draws(0), "single_2", length=900, depth=depth) for depth in (5, 95)]
    several = next(
        example
        for example in (maker.make(Draws(seed), "multivalue", length=900, depth=50) for seed in range(99))
        if sum(example.source[example.value == value].max() < 450 for value in range(4)) == 2
    )
    assert (several.value < 0).sum() == 4 + 3  # spaces and commas

    class Half(SelectionAnswers):
        def __init__(self):
            pass

        def __call__(self, params, tokens, positions, sources):
            return np.zeros(positions.shape, np.int32), (sources < 450)[:, :, None, None] & np.ones((1, 1, 3, 2), bool)

    config = NSAConfig(select_block=112, num_selected=4, num_initial=0, num_local=1)
    early, late, mixed = (score(Half(), {}, [example], config)[0] for example in (*examples, several))
    assert (early.hit_rate == np.ones((3, 2))).all() and (late.hit_rate == np.zeros((3, 2))).all()
    assert (mixed.hit_rate == np.full((3, 2), 0.5)).all()
    # The answer's queries are in block 7 or 8, and draw 3 of the blocks before their own.
    assert 3 / 8 <= early.chance <= 3 / 7


@pytest.mark.parametrize("sees", [True, False], ids=["perfect", "blind"])
def test_hit_rates_of_planted_selections(monkeypatch, sees):
    """Blocks that hold every source of the example, and blocks drawn at random beside the forced ones: all, and chance."""
    config = NSAConfig(4, 4, 16, 6, 1, 2, 6)
    network = Network(dataclasses.replace(MODEL, num_layers=1, nsa=config), VOCAB)
    maker = NeedleMaker(ByteTokenizer(), make_haystack([Document("story", STORY)], ByteTokenizer()))
    examples = [maker.make(Draws(seed), "passkey", length=400, depth=10 * (seed % 11)) for seed in range(64)]
    wanted = np.full((64, 1, 1, 6), -1, np.int32)
    for row, example in enumerate(examples):
        held = np.unique(example.source[example.value >= 0] // 16)
        wanted[row, 0, 0, : len(held)] = held
    draws = np.random.default_rng(0)
    drawn = np.full((64, 400, 1, 6), -1, np.int32)
    for row, at in np.ndindex(64, 400):
        own = at // 16
        forced = [j for j in range(own + 1) if j < 1 or j > own - 2]
        free = draws.permutation([j for j in range(own + 1) if j not in forced])[:3].tolist()
        drawn[row, at, 0, : len(forced + free)] = forced + free
    blocks = jnp.asarray(np.broadcast_to(wanted, drawn.shape) if sees else drawn)
    monkeypatch.setattr(NativeSparseAttention, "select_blocks", lambda self, x: blocks)
    monkeypatch.setattr(NativeSparseAttention, "__call__", lambda self, x, **_: jnp.zeros_like(x))
    scores = score(SelectionAnswers(network), random_params(network), examples, config)
    hit_rate, chance = np.mean([one.hit_rate for one in scores]), np.mean([one.chance for one in scores])
    assert 0.1 < chance < 0.3
    assert hit_rate == 1 if sees else hit_rate == pytest.approx(chance, abs=0.05)


@pytest.mark.parametrize("num_initial, num_local, num_selected", [(1, 2, 4), (0, 0, 2), (0, 2, 2), (2, 1, 9)])
def test_chance_is_that_of_blocks_that_are_drawn(num_initial, num_local, num_selected):
    """Every query and source of 12 blocks; each query draws 4000 times."""
    config = NSAConfig(4, 2, 4, num_selected, num_initial, num_local, 4)
    draw = np.random.default_rng(0)
    for own in range(12):
        forced = {j for j in range(own + 1) if j < num_initial or j > own - num_local}
        free = [j for j in range(own + 1) if j not in forced]
        room = min(len(free), num_selected - num_initial - num_local)
        drawn = np.stack([draw.permutation(free)[:room] for _ in range(4000)]) if room > 0 else np.zeros((1, 0))
        blocks = np.arange(own + 1, dtype=np.int32)
        found = chance_of_hits(np.full_like(blocks, 4 * own + 1), 4 * blocks, config)
        for j in range(own + 1):
            share = 1.0 if j in forced else (drawn == j).any(axis=1).mean()
            assert found[j] == pytest.approx(share, abs=0.04)


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained, with NSA and with the window alone."""
    base = tmp_path_factory.mktemp("runs")
    (base / "text.txt").write_text(STORY * 10)
    config = replace_model(make_config(base / "text.txt", context=384), num_layers=1)
    save_untrained(base / "nsa", config, step=3)
    save_untrained(base / "window", replace_model(config, attention="window"), step=3)
    return base


NIAH = ["--depths", "3", "--examples", "2", "--batch-size", "2"]


def test_eval_niah_goes_on_after_an_interruption(runs, tmp_path, capsys, monkeypatch):
    command = ["eval", "niah", "--run", str(runs / "nsa"), *NIAH, "--generate", "2"]
    command += ["--tasks", "single_2", "--text", str(runs / "text.txt"), "--lengths", "320"]
    # Compiled once for all of these starts.
    run = open_run(runs / "nsa")
    compiled = SelectionAnswers(run.network)
    monkeypatch.setattr("train.runs.open_run", lambda *_, **__: run)
    monkeypatch.setattr(SelectionAnswers, "__init__", lambda self, _: setattr(self, "_answer", compiled._answer))
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    whole = json.loads((tmp_path / "whole" / "niah.json").read_text())
    out = capsys.readouterr().out
    assert "single_2, haystack: " in out
    assert re.search(r"2 decoded, 100% as teacher forcing says \(of [2-9] tokens\), 0% exact", out)
    assert re.search(r"length    320  exact   0\.0%  .* selected .* \(best head .*, at random 1\.3%\)", out)
    (task,) = whole["tasks"].values()
    assert [(cell["length"], cell["depth"]) for cell in task["cells"]] == [(320, 0), (320, 50), (320, 100)]
    assert [decoded["agree"] for decoded in task["decoded"]] == [1]
    assert np.shape(task["cells"][0]["hit_rate"]) == (1, 1)
    assert task["cells"][0]["hit_rate_of_random_blocks"] == pytest.approx(1 / 77, rel=0.05)
    for name in ("niah.png", "niah_selection.png"):
        assert (tmp_path / "whole" / name).read_bytes().startswith(b"\x89PNG")
    assert list(mean_hit_rates(whole)) == ["single_2, 320 tokens\nblocks at random: 1%"]

    # From here on only the numbers are looked at.
    for name in ("needle_map", "hit_rates"):
        monkeypatch.setattr(plots, name, lambda _, path: path)
    counted, score = [], evaluate_niah.score

    def interrupted(*args, **kwargs):
        counted.append(1)
        if len(counted) == 3:
            raise KeyboardInterrupt
        return score(*args, **kwargs)

    monkeypatch.setattr(evaluate_niah, "score", interrupted)
    command += ["--output", str(tmp_path / "parts")]
    assert main(command) == 130
    assert "niah stopped at part 2 of 4" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "niah.json").exists()
    with (tmp_path / "parts" / "niah.parts.jsonl").open("a") as file:
        file.write('{"part": "single_2 length 3')  # a line that a killed process left
    assert main(command) == 0
    assert "has parts, 2 of these settings: going on" in capsys.readouterr().out
    assert len(counted) == 3 + 2
    assert json.loads((tmp_path / "parts" / "niah.json").read_text()) == whole

    assert main([*command, "--seed", "1"]) == 0
    assert "has parts, 0 of these settings, 4 of others or of other code: going on" in capsys.readouterr().out
    assert len(counted) == 5 + 4
    # Nothing was lost to that; a length and a depth more are measured alone, and what is asked for twice once.
    assert main(command) == 0 and len(counted) == 9
    more = ["--lengths", "320", "384", "320", "--tasks", "single_2", "single_2"]
    assert main([*command[:-4], *more, *command[-2:]]) == 0
    assert len(counted) == 9 + 4
    capsys.readouterr()
    # The haystack counts by what is in it.
    text = runs / "text.txt"
    written = text.read_text()
    text.write_text(written.replace("nothing", "anything"))
    assert main(command) == 0 and len(counted) == 13 + 4
    # Depths and the number of those decoded, which a decoded part alone depends on.
    assert main([*command, "--depths", "2"]) == 0 and len(counted) == 17 + 1
    assert main([*command, "--generate", "1"]) == 0 and len(counted) == 18 + 1
    assert main([*command, "--generate", "0", "--examples", "1"]) == 0 and len(counted) == 19 + 3
    # No text is in the haystack of a passkey.
    passkey = ["passkey" if word == "single_2" else word for word in command]
    assert main(passkey) == 0 and len(counted) == 22 + 4
    text.write_text(written)
    assert main(passkey) == 0 and len(counted) == 26


def decoding(predict):
    """Greedy decoding of a planted model, as its one prediction is for the whole answer."""

    def decode(run, prompts, lengths, num_tokens):
        found = np.full((len(prompts), num_tokens), ord(" "), np.int32)
        for row, length in enumerate(lengths):
            prompt = np.pad(prompts[row, :length], (0, num_tokens), constant_values=ord(" "))
            found[row] = predict(prompt[None])[0, length - 1 : -1]
        return found

    return decode


@pytest.mark.parametrize("predict, right", [(finds_needles, 1), (says_five, 0)], ids=["perfect", "blind"])
def test_eval_niah_of_planted_models_without_nsa(runs, tmp_path, capsys, monkeypatch, predict, right):
    traced, decoded = [], []

    class Traced(Planted):
        def hidden(self, tokens):
            traced.append(tokens.shape)
            return super().hidden(tokens)

    def decode(run, prompts, lengths, num_tokens):
        decoded.append((*prompts.shape, num_tokens))
        return decoding(predict)(run, prompts, lengths, num_tokens)

    monkeypatch.setattr(evaluate_niah, "Answers", lambda network: Answers(Traced(predict)))
    monkeypatch.setattr(evaluate_niah, "decode", decode)
    command = ["eval", "niah", "--run", str(runs / "window"), *NIAH, "--generate", "3", "--output", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "has attention='window', which selects nothing: no hit rates" in out
    assert re.search(r"left out: multiquery at 48, 96, 192, 384 tokens, as its needles and question need 5..\n", out)
    result = json.loads((tmp_path / "niah.json").read_text())
    assert set(result["tasks"]) == {"passkey", "single_1", "single_2", "single_3", "multikey_2"}
    assert {cell["length"] for cell in result["tasks"]["passkey"]["cells"]} == {192, 384}
    for task in result["tasks"].values():
        for cell in task["cells"]:
            assert cell["exact"] == cell["values"] == right and "hit_rate" not in cell
        for one in task["decoded"]:
            assert (one["exact"], one["agree"], one["examples"]) == (right, 1, 3)
    assert not (tmp_path / "niah_selection.png").exists()
    # One program for each length, whatever the task and the prompts: three examples are a batch and half of one.
    assert sorted(traced) == [(2, 192), (2, 384)]
    assert set(decoded) == {(2, 192, 64), (2, 384, 64)} and len(decoded) == 2 * sum(
        len(task["decoded"]) for task in result["tasks"].values()
    )


@pytest.mark.parametrize("split", ["validation", "train"])
def test_needles_are_hidden_in_the_split(runs, tmp_path, monkeypatch, split):
    hidden_in = []
    monkeypatch.setattr(evaluate_niah, "Answers", lambda network: Answers(Planted(says_five)))
    monkeypatch.setattr(evaluate_niah, "make_haystack", lambda *args: hidden_in.extend(args[0]) or make_haystack(*args))
    run = open_run(runs / "window")
    sizes = dict(tasks=("single_2",), lengths=(300,), depths=1, examples=1, generate=0)
    result = evaluate_niah.evaluate_niah(run, tmp_path, split=split, **sizes)
    assert [document.text for document in hidden_in] == [
        document.text for document in getattr(load_own_corpus(run), split)
    ]
    assert f"({split}): " in result["tasks"]["single_2"]["haystack"]


def test_decoding_that_differs_from_teacher_forcing_is_seen(runs, monkeypatch):
    """Of six examples over three depths, no two the same, one in the wrong."""
    monkeypatch.setattr(evaluate_niah, "Answers", lambda network: Answers(Planted(finds_needles)))

    seen = set()

    def decode(run, prompts, lengths, num_tokens):
        answers = decoding(finds_needles)(run, prompts, lengths, num_tokens)
        for row, (prompt, length) in enumerate(zip(prompts, lengths)):
            if (asked := prompt[:length].tobytes()) not in seen:
                seen.add(asked)
                answers[row, 2] += len(seen) == 3
        return answers

    monkeypatch.setattr(evaluate_niah, "decode", decode)
    result = evaluate_niah.evaluate_niah(
        open_run(runs / "window"), runs / "lies", tasks=("passkey",), lengths=(200,), depths=3, examples=1, generate=6
    )
    (decoded,) = result["tasks"]["passkey"]["decoded"]
    assert len(seen) == 6 and decoded["agree"] == decoded["exact"] == 5 / 6
    assert decoded["tokens_compared"] == 6 * 6


def test_eval_mqar_measures_several_runs(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate_mqar, "Answers", lambda network: Answers(Planted(recalls)))
    folders = [str(runs / "nsa"), str(runs / "window")]
    flags = ["--lengths", "32", "64", "--pairs", "2", "16", "--examples", "5", "--batch-size", "4"]
    command = ["eval", "mqar", "--run", *folders, *flags, "--output", str(tmp_path)]
    assert main(command) == 0
    results = json.loads((tmp_path / "mqar.json").read_text())
    assert list(results) == folders
    for result in results.values():
        assert [(cell["length"], cell["pairs"], cell["accuracy"]) for cell in result["cells"]] == [
            (32, 2, 1),
            (64, 2, 1),
            (64, 16, 1),
        ]
    assert (tmp_path / "mqar.png").read_bytes().startswith(b"\x89PNG")
    assert "length    64  pairs  16  accuracy 100.0%  (one of the values at random 6.2%)" in capsys.readouterr().out
    opened = {folder: open_run(folder) for folder in map(Path, folders)}
    measured, some_cell = [], results[folders[0]]["cells"][0]
    monkeypatch.setattr("train.runs.open_run", lambda folder, **_: opened[folder])
    monkeypatch.setattr(evaluate_mqar, "measure_cell", lambda *args, **rest: measured.append(args[2:]) or some_cell)
    monkeypatch.setattr(plots, "recall", lambda _, path: path)
    # What a cell depends on, and no more: with more pairs of a length the others are kept.
    for flags, anew in (
        ([], 0),
        (["--pairs", "2", "16", "8", "2"], 2),
        (["--seed", "1"], 3),
        (["--examples", "6"], 3),
        (["--batch-size", "5"], 3),
        ([], 0),
    ):
        measured.clear()
        assert main([*command, *flags]) == 0
        assert len(measured) == 2 * anew  # of each run


def test_recall_of_a_real_model(runs):
    run = open_run(runs / "window")
    sizes = {64: (4, 8, 16), 128: (4, 8, 16, 32), 256: (4, 8, 16, 32, 64)}
    assert choose_cells(run, (), (), beyond_context=False) == [(length, n) for length in sizes for n in sizes[length]]
    results = evaluate_mqar.evaluate_mqar([run], runs / "mqar", lengths=(64,), examples=64)
    for cell in results[str(runs / "window")]["cells"]:
        assert cell["accuracy"] < 0.05  # it is untrained


@pytest.mark.parametrize(
    "command, message",
    [
        (["niah", "--lengths", "512"], "length=512 is longer than the context of 384 tokens"),
        (["niah", "--lengths", "0"], "lengths=\\(0,\\) must be at least 1"),
        (["niah", "--lengths", "200", "--tasks", "single_2"], "length=200 is too short for 'single_2'"),
        (
            ["niah", "--lengths", "100"],
            "no task fits:\n  left out: passkey at 100 tokens, as its needles and question need 160",
        ),
        (["niah", "--examples", "0"], "examples=0 must be at least 1"),
        (["niah", "--seed", "-1"], "seed=-1 must be at least 0"),
        (["niah", "--text", ""], 'text="" names nothing'),
        (["loss", "--text", ""], 'text="" names nothing'),
        (["mqar", "--seed", "-1"], "seed=-1 must be at least 0"),
        (["niah", "--depths", "102"], "depths=102 must be at most 101"),
        (["mqar", "--lengths", "512"], "length=512 is longer than the context of 384 tokens"),
        (
            ["mqar", "--lengths", "258", "--pairs", "4"],
            "vocab_size=257 of the tokenizer must be larger than length=258",
        ),
        (["mqar", "--lengths", "63"], "length=63 must be even"),
        (["mqar", "--lengths", "12"], "length=12 has room for 3 pairs at most"),
        (["mqar", "--pairs", "90"], "pairs=90 must be at least 1, and need a length of 360"),
        (["mqar", "--examples", "0"], "examples=0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_said(runs, tmp_path, capsys, command, message):
    assert main(["eval", *command, "--run", str(runs / "nsa"), "--output", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_lengths_beyond_the_context_are_measured_when_wanted(runs):
    assert choose_cells(open_run(runs / "window"), (128, 256), (4,), beyond_context=True)
    run = open_run(runs / "window")
    run = run._replace(config=make_config(runs / "text.txt", context=100))
    with pytest.raises(ValueError, match="--beyond-context to measure it"):
        choose_cells(run, (128,), (4,), beyond_context=False)
    assert choose_cells(run, (128,), (4,), beyond_context=True) == [(128, 4)]


def test_a_wrong_run_folder_is_said(tmp_path, capsys):
    for task in ("niah", "mqar", "loss"):
        assert main(["eval", task, "--run", str(tmp_path / "none")]) == 1
        assert "there is no run folder" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        open_run(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def test_parts_are_computed_once_and_read_back_exactly(tmp_path, capsys):
    settings, computed = dict(seed=0, lengths=(1, 2)), []

    def compute(number):
        computed.append(number)
        return dict(third=number / 3, array=np.full((2,), 0.1))

    with Parts(tmp_path / "new", "some", settings, total=3) as parts:
        first = [parts(f"part {number}", compute, number) for number in range(2)]
        assert parts("part 0", compute, 0) == first[0]
    assert first[1] == dict(third=1 / 3, array=[0.1, 0.1])
    with Parts(tmp_path / "new", "some", settings, total=3) as parts:
        assert [parts(f"part {number}", compute, number) for number in range(3)][:2] == first
    assert computed == [0, 1, 2]
    out = capsys.readouterr().out
    assert "some.parts.jsonl has parts, 2 of these settings: going on" in out and "some 3/3  part 2" in out


def test_parts_of_other_code_are_computed_anew(tmp_path, capsys, monkeypatch):
    with Parts(tmp_path, "some", {}, total=1) as parts:
        assert parts("one", lambda: 1) == 1
    capsys.readouterr()
    monkeypatch.setattr(evaluation, "code_sha256", lambda: "other")
    with Parts(tmp_path, "some", {}, total=1) as parts:
        assert parts("one", lambda: 2) == 2
    assert "has parts, 0 of these settings, 1 of others or of other code: going on" in capsys.readouterr().out
    monkeypatch.undo()
    with Parts(tmp_path, "some", {}, total=1) as parts:
        assert parts("one", lambda: 3) == 1


def test_a_part_counts_by_what_it_is_of(tmp_path):
    def start(settings):
        with Parts(tmp_path, "some", settings, total=1) as parts:
            return parts("a name", lambda: settings["n"], of=dict(of=settings["of"]))

    assert start(dict(n=1, of=1)) == 1 and start(dict(n=2, of=1)) == 2 and start(dict(n=1, of=1)) == 1
    with Parts(tmp_path, "some", dict(n=1, of=1), total=1) as parts:
        assert parts("another name", lambda: 3, of=dict(of=1)) == 1
        assert parts("a name", lambda: 4, of=dict(of=2)) == 4


def test_a_half_written_line_is_cut_off(tmp_path, capsys):
    path = tmp_path / "some.parts.jsonl"
    for result in (1, 2, 3):
        with Parts(tmp_path, "some", {}, total=1) as parts:
            assert parts("one", lambda result=result: result) == 1
        with path.open("ab") as file:
            file.write(b'{"part": "tw\xe2')
    assert "cannot be read" not in capsys.readouterr().out
    assert path.read_bytes().count(b"\n") == 1


def test_a_large_file_loses_the_parts_of_other_code(tmp_path, capsys, monkeypatch):
    def start(code, seed, result):
        monkeypatch.setattr(evaluation, "code_sha256", lambda: code)
        with Parts(tmp_path, "some", dict(seed=seed), total=1) as parts:
            return parts("one", lambda: result), capsys.readouterr().out

    assert start("old", 0, 1)[0] == 1 and start("new", 0, 2)[0] == 2 and start("new", 1, 3)[0] == 3
    monkeypatch.setattr(evaluation, "LARGEST_FILE", 10)
    result, out = start("new", 0, 4)
    assert result == 2 and "larger than 10 bytes: 1 parts of other code are dropped" in out
    # What is left is large, and all of this code.
    result, out = start("new", 1, 5)
    assert result == 3 and "dropped" not in out
    assert start("old", 0, 6)[0] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["some.parts.jsonl"]


@pytest.mark.parametrize("damage", [b"[1, 2]\n", b'{"settings": 3}\n', b"\xff\xfe\x00\n", b"{\n"], ids=repr)
def test_a_damaged_line_is_said_and_the_others_count(tmp_path, capsys, damage):
    path = tmp_path / "some.parts.jsonl"
    path.write_bytes(damage)
    with Parts(tmp_path, "some", {}, total=2) as parts:
        assert parts("one", lambda: 1) == 1
    assert f"{path}: 1 of its lines cannot be read, and what they held is computed anew" in capsys.readouterr().out
    with Parts(tmp_path, "some", {}, total=2) as parts:
        assert parts("one", lambda: 2) == 1


def test_sigterm_is_told_what_is_kept(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert before is not evaluation._stop  # which another start has left
    with pytest.raises(
        Interrupted, match="some stopped at part 1 of 2; what is done is in .*some.parts.jsonl"
    ) as caught:
        with Parts(tmp_path, "some", {}, total=2) as parts:
            parts("one", lambda: 1)
            parts("two", lambda: signal.raise_signal(signal.SIGTERM))
    assert caught.value.exit_code == 143 and signal.getsignal(signal.SIGTERM) is before


def test_any_source_file_counts_as_code(tmp_path, monkeypatch):
    (tmp_path / "new.py").write_text("")
    (tmp_path / "unread.txt").write_text("")

    def digest_of_this_folder():
        evaluation.code_sha256.cache_clear()
        return evaluation.code_sha256()

    before = digest_of_this_folder()
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda _: spec)
    digests = [before, digest_of_this_folder()]
    (tmp_path / "unread.txt").write_text("changed")
    assert digest_of_this_folder() == digests[1]
    for path, text in (("new.py", "changed"), ("tiles.json", "{}")):
        (tmp_path / path).write_text(text)
        digests.append(digest_of_this_folder())
    assert len(set(digests)) == 4
    monkeypatch.undo()
    assert digest_of_this_folder() == before


def test_an_error_leaves_what_was_done(tmp_path):
    with pytest.raises(ZeroDivisionError), Parts(tmp_path, "some", {}, total=2) as parts:
        parts("one", lambda: 1)
        parts("two", lambda: 1 // 0)
    with Parts(tmp_path, "some", {}, total=2) as parts:
        assert parts("one", lambda: 2) == 1
