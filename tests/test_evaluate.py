"""The loss on held-out text against NumPy, its buckets, and what `eval loss` writes."""

import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import MODEL, Trained, random_params, replace_model, save_untrained
from train import evaluate, plots
from train.__main__ import main
from train.data import Batch, evaluation_batches, load_corpus, tokenize
from train.evaluate import LossMeter, evaluate_loss, evaluate_losses
from train.model import LanguageModel, Network
from train.runs import Run, open_run
from train.tokenizer import make_tokenizer

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def compiled_meter(tiny_run, monkeypatch):
    """For the model of the tiny run, what its training has compiled."""
    known = tiny_run.programs["LossMeter"]
    monkeypatch.setattr(
        evaluate,
        "LossMeter",
        lambda network: known if network.config == tiny_run.config.model else LossMeter(network),
    )


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.usefixtures("compiled_meter")
def test_the_loss_is_that_of_the_models_logits_on_each_token_once(tiny_run):
    run, context = tiny_run.run, tiny_run.config.context
    tokens = np.append(np.frombuffer(load_corpus(str(tiny_run.text)).validation[0].text.encode(), np.uint8), 256)
    windows = -(-(len(tokens) - 1) // context)
    assert (len(tokens) - 1) % context  # the last window is short
    padded = np.pad(tokens.astype(np.int32), (0, windows * context + 1 - len(tokens)))
    inputs, targets = padded[:-1].reshape(windows, context), padded[1:].reshape(windows, context)
    logits = jax.jit(lambda params, tokens: run.network.model(params)(tokens))(run.params, jnp.asarray(inputs))
    nats = -np.take_along_axis(log_probabilities(logits), targets[..., None], axis=-1)[..., 0]
    real = np.arange(windows * context).reshape(windows, context) < len(tokens) - 1

    result = evaluate_loss(run)
    assert result.tokens == len(tokens) - 1 == real.sum()
    assert result.loss == pytest.approx(nats[real].mean(), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(
        nats[real].mean() / math.log(2) * len(tokens) / (len(tokens) - 1), rel=1e-5
    )
    per_byte = result.bits_per_byte / result.loss
    assert all(bucket.bits_per_byte == pytest.approx(bucket.loss * per_byte) for bucket in result.by_position)
    edges = [0, 1, 2, 4, 8, 16, 32]
    assert [(bucket.start, bucket.end) for bucket in result.by_position] == list(itertools.pairwise(edges))
    for bucket in result.by_position:
        columns = slice(bucket.start, bucket.end)
        assert bucket.loss == pytest.approx(nats[:, columns][real[:, columns]].mean(), rel=1e-5)
    # It is what the run measured at its end.
    summary = json.loads((tiny_run.folder / "summary.json").read_text())
    assert json.loads(json.dumps(dataclasses.asdict(result))) == summary["validation"]


@pytest.mark.usefixtures("compiled_meter")
def test_a_blind_model_loses_the_logarithm_of_the_vocabulary(tiny_run):
    result = evaluate_loss(tiny_run.run._replace(params=jax.tree.map(jnp.zeros_like, tiny_run.run.params)))
    assert result.loss == pytest.approx(math.log(257), rel=1e-6)
    assert all(bucket.loss == pytest.approx(math.log(257), rel=1e-6) for bucket in result.by_position)


@pytest.mark.usefixtures("compiled_meter")
def test_eval_loss_goes_on_after_an_interruption(tiny_run, tmp_path, capsys, monkeypatch):
    measured, sums = [], LossMeter.sums

    def interrupted(self, *args):
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return sums(self, *args)

    monkeypatch.setattr(LossMeter, "sums", interrupted)
    command = ["eval", "loss", "--run", str(tiny_run.folder), "--output", str(tmp_path)]
    assert main(command) == 130
    stopped = re.search(r"loss_validation stopped at part 1 of (\d+)", capsys.readouterr().err)
    assert not (tmp_path / "loss_validation.json").exists()
    assert main(command) == 0
    assert len(measured) == 2 + int(stopped[1]) - 1
    (result,) = json.loads((tmp_path / "loss_validation.json").read_text()).values()
    assert result == json.loads(json.dumps(dataclasses.asdict(evaluate_loss(tiny_run.run))))


def test_buckets_are_weighted_by_the_targets_that_count(monkeypatch):
    """Losses 0 .. 5 by position, over two batches of one row; a context that is no power of two."""
    monkeypatch.setattr(
        LanguageModel, "losses", lambda self, tokens, *_: jnp.broadcast_to(jnp.arange(6.0)[None], tokens.shape) + tokens
    )
    network = Network(dataclasses.replace(MODEL, attention="window", num_layers=1), 50)
    weights = [[1, 0, 1, 0, 1, 0], [1, 0, 1, 1, 1, 0]]
    batches = [
        Batch(jnp.full((1, 6), 10 * i, jnp.int32), jnp.zeros((1, 6), jnp.int32), jnp.asarray([row], jnp.float32), None)
        for i, row in enumerate(weights)
    ]
    result = LossMeter(network)(random_params(network), batches, bytes_per_token=2.0)
    assert result.tokens == 7
    assert result.loss == pytest.approx((0 + 2 + 4 + 10 + 12 + 13 + 14) / 7)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 2)
    # At position 1 nothing counts, and 4 .. 5 is what is left of 4 .. 7.
    assert [dataclasses.astuple(bucket) for bucket in result.by_position] == [
        (0, 1, pytest.approx(5), pytest.approx(5 / math.log(2) / 2)),
        (2, 4, pytest.approx((2 + 12 + 13) / 3), pytest.approx((2 + 12 + 13) / 3 / math.log(2) / 2)),
        (4, 6, pytest.approx(9), pytest.approx(9 / math.log(2) / 2)),
    ]


def test_bits_per_byte_compare_tokenizers(tiny_run, tmp_path):
    """All bits that a BPE's tokens cost, over all bytes: of a text with two bytes a character, and of documents."""
    pytest.importorskip("tokenizers", reason='byte-pair encodings need pip install "nsa-jax[train]"')
    (tmp_path / "a.txt").write_text("naïve à côté " * 40)
    (tmp_path / "b.txt").write_text("élève déjà vu " * 40)
    config = dataclasses.replace(
        replace_model(tiny_run.config, attention="window", num_layers=1),
        data=dataclasses.replace(tiny_run.config.data, text=str(tmp_path), tokenizer="bpe:270"),
    )
    corpus = load_corpus(str(tmp_path))
    tokenizer = make_tokenizer("bpe:270", lambda: [document.text for document in corpus.train])
    network = Network(config.model, tokenizer.vocab_size)
    run = Run(tmp_path, 0, config, tokenizer, network, random_params(network), load_corpus(config.data.text).sha256)
    stream = tokenize(corpus.train, tokenizer)
    assert len(corpus.train) == 2 and len(stream.tokens) < 0.8 * stream.num_bytes

    result = evaluate_loss(run, split="train")
    batches = evaluation_batches(stream, context=32, batch_size=4, packing="running")
    measure = jax.jit(
        lambda params, batch: (network.model(params).losses(batch.inputs, batch.targets) * batch.weights).sum()
    )
    nats = sum(float(measure(run.params, jax.tree.map(jnp.asarray, batch))) for batch in batches)
    num_bytes = sum(len(document.text.encode()) for document in corpus.train)
    assert result.tokens == len(stream.tokens) - 1
    # The first token of all is not scored; it counts as the others do in the mean.
    assert result.bits_per_byte == pytest.approx(
        nats / math.log(2) / num_bytes * len(stream.tokens) / result.tokens, rel=1e-5
    )


@pytest.mark.usefixtures("compiled_meter")
def test_what_is_kept_is_of_these_parameters_and_this_text(tiny_run, tmp_path):
    run, other = tiny_run.run, tmp_path / "other.txt"

    def measure(run=run):
        (result,) = evaluate_losses([run], tmp_path / "results", text=str(other))
        return result

    other.write_text("a quick dog jumps. " * 9)
    first = measure()
    zeros = measure(run._replace(params=jax.tree.map(jnp.zeros_like, run.params)))
    assert zeros.loss == pytest.approx(math.log(257), rel=1e-6) != first.loss
    assert measure(run._replace(folder=tmp_path)) == measure() == first  # wherever the folder is
    other.write_text("a quick cow jumps. " * 9)
    assert measure() != first


@pytest.fixture(scope="module")
def full_run(tiny_run, tmp_path_factory):
    """Of the same text with full attention, untrained."""
    folder = tmp_path_factory.mktemp("full") / "run"
    save_untrained(folder, replace_model(tiny_run.config, attention="full", num_layers=1), step=7)
    return folder


@pytest.mark.usefixtures("compiled_meter")
def test_eval_loss_writes_numbers_and_one_figure_of_all_runs(tiny_run, full_run, tmp_path, capsys, monkeypatch):
    drawn = []
    loss_by_position = plots.loss_by_position
    monkeypatch.setattr(
        plots,
        "loss_by_position",
        lambda *args, **rest: (drawn.append((args[0], rest)), loss_by_position(*args, **rest))[1],
    )
    output = tmp_path / "new" / "folder"
    runs = [str(tiny_run.folder), str(full_run)]
    assert main(["eval", "loss", "--run", *runs, "--output", str(output)]) == 0
    results = json.loads((output / "loss_validation.json").read_text())
    assert list(results) == runs
    expected = json.loads(json.dumps(dataclasses.asdict(evaluate_loss(open_run(tiny_run.folder)))))
    assert results[runs[0]] == expected
    assert results[runs[1]]["loss"] > results[runs[0]]["loss"] + 1  # it is untrained
    assert (output / "loss_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert [(list(positions), rest) for positions, rest in drawn] == [(runs, dict(field="loss"))]
    text = capsys.readouterr().out
    for folder, step in zip(runs, (40, 7)):
        assert f"{folder}, step {step}, {tiny_run.text} (validation): loss {results[folder]['loss']:.4f} nats" in text
    assert f"  positions     16 to 31      loss {expected['by_position'][-1]['loss']:.4f}\n" in text
    assert "different tokenizers" not in text
    assert str(output / "loss_validation.json") in text and str(output / "loss_by_position.png") in text


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte(tiny_run, tmp_path, capsys, monkeypatch):
    """Of one name and one size, made of different texts."""
    run, drawn = tiny_run.run, []

    class Shifted(type(run.tokenizer)):
        def to_json(self):
            return "another"

    opened = dict(a=run, b=run._replace(tokenizer=Shifted(), folder=tmp_path / "b"))
    monkeypatch.setattr("train.runs.open_run", lambda folder, **_: opened[folder.name])
    losses = [evaluate.summarize([[[4.0, 8.0], [1.0, 4.0]]], context=2, bytes_per_token=size) for size in (1.0, 2.0)]
    monkeypatch.setattr(evaluate, "evaluate_losses", lambda *_, **__: losses)
    monkeypatch.setattr(plots, "loss_by_position", lambda *args, **rest: drawn.append(rest))
    for runs, differ in ((["a", "b"], True), (["a", "a"], False)):
        assert main(["eval", "loss", "--run", *runs, "--output", str(tmp_path)]) == 0
        assert ("different tokenizers: compare bits per byte" in capsys.readouterr().out) == differ
        assert drawn.pop() == dict(field="bits_per_byte" if differ else "loss")


def test_a_perfect_model_loses_nothing(tiny_run, tmp_path, monkeypatch):
    """Of a text in which each letter tells the next one."""
    (tmp_path / "text.txt").write_text("abcdefghijklmnop" * 20)

    def sure_of_the_next(self, tokens, segment_ids=None):
        following = jnp.where(tokens == ord("p"), ord("a"), tokens + 1)
        return 100.0 * jax.nn.one_hot(following, self.padded_vocab_size)

    monkeypatch.setattr(LanguageModel, "hidden", sure_of_the_next)
    monkeypatch.setattr(LanguageModel, "logits", lambda self, hidden: hidden)
    network = Network(dataclasses.replace(MODEL, attention="window", num_layers=1), 257)
    run = tiny_run.run._replace(network=network, params=random_params(network))
    result = evaluate_loss(run, text=str(tmp_path / "text.txt"))
    # But for the end of the document, which no letter tells: 100 nats, once.
    assert result.loss == pytest.approx(100 / result.tokens, rel=1e-5) and result.tokens == 320
    assert [bucket.loss for bucket in result.by_position][:-1] == pytest.approx([0] * 5, abs=1e-6)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) * 321 / 320)


@pytest.mark.usefixtures("compiled_meter")
def test_eval_loss_of_another_split_text_and_step(tiny_run, full_run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("a quick dog jumps. " * 9)
    for flags, name in (
        (["--split", "test"], "loss_test.json"),
        (["--text", str(other)], "loss_text.json"),
        (["--step", "20"], "loss_validation.json"),
    ):
        assert main(["eval", "loss", "--run", str(tiny_run.folder), "--output", str(tmp_path), *flags]) == 0
        (result,) = json.loads((tmp_path / name).read_text()).values()
        if name == "loss_test.json":
            assert result == json.loads(json.dumps(dataclasses.asdict(evaluate_loss(tiny_run.run, split="test"))))
        if name == "loss_text.json":
            assert result["tokens"] >= len("a quick dog jumps. " * 9)
        if name == "loss_validation.json":
            (row,) = (
                row
                for line in (tiny_run.folder / "metrics.jsonl").read_text().splitlines()
                if "validation_loss" in (row := json.loads(line)) and row["step"] == 20
            )
            # The measurement on the way read eval_batches of 2 batches, of a validation text of little more.
            assert result["loss"] == pytest.approx(row["validation_loss"], abs=0.1)
            assert "step 20" in capsys.readouterr().out


def test_eval_refuses_a_text_that_has_changed(tiny_run: Trained, tmp_path: Path):
    """What is held out of the new text may have been trained on in the old one."""
    opened = open_run(tiny_run.folder)._replace(data_sha256="0" * 64)
    with pytest.raises(ValueError, match="the text has changed"):
        evaluate_loss(opened)
