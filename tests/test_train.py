"""The optimizer's step, what is not finite, what a run writes while it goes on and when it ends, and full disks."""

import dataclasses
import errno
import functools
import json
import math
import os
import re
import shutil
import struct
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import MODEL, make_config
from train import checkpoint, loop
from train.checkpoint import CheckpointError, Checkpoints
from train.config import OptimizerConfig, TrainConfig
from train.data import Batch, Batches
from train.errors import Diverged
from train.model import Network
from train.report import Reporter, peak_flops, read_metrics
from train.runs import checkpoints_in, open_run
from train.step import init_state, learning_rate_schedule, make_optimizer, make_train_step

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = 50
TIMING = {"tokens_per_second", "mfu"}


def config_of(*, model=MODEL, **optimizer) -> TrainConfig:
    """With attention "window", which compiles fastest, where the attention does not matter."""
    return make_config(
        Path("nothing is read"), model=dataclasses.replace(model, num_layers=1), optimizer=OptimizerConfig(**optimizer)
    )


WINDOW = dataclasses.replace(MODEL, attention="window", num_layers=1)


def random_batch(seed: int = 0, *, batch_size: int = 4, length: int = 12) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (batch_size, length + 1)).astype(np.int32)
    weights = rng.integers(0, 2, (batch_size, length)).astype(np.float32)
    segment_ids = np.sort(rng.integers(0, 3, weights.shape)).astype(np.int32)
    return jax.tree.map(jnp.asarray, Batch(tokens[:, :-1], tokens[:, 1:], weights, segment_ids))


def bits(tree):
    return jax.tree.map(lambda x: (x.dtype, np.asarray(x).tobytes()), tree)


# ------------------------------------------------------------------------------------------------------- the optimizer


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    config = make_config(
        Path("x"), steps=110, optimizer=OptimizerConfig(learning_rate=0.2, warmup_steps=10, final_fraction=0.1)
    )
    rates = [float(learning_rate_schedule(config)(step)) for step in (0, 1, 5, 10, 35, 60, 110, 200)]
    quarter = 0.02 + 0.18 * (1 + math.cos(math.pi / 4)) / 2
    np.testing.assert_allclose(rates, [0, 0.02, 0.1, 0.2, quarter, 0.11, 0.02, 0.02], rtol=1e-6)
    config = make_config(Path("x"), optimizer=OptimizerConfig(learning_rate=0.2, warmup_steps=0))
    assert float(learning_rate_schedule(config)(0)) == pytest.approx(0.2)


@pytest.mark.parametrize("compression", ["mlp", "gated_pool"])
def test_matrices_decay_and_nothing_else(compression):
    """Of a gradient of zeros, an update is the decay alone."""
    model = dataclasses.replace(MODEL, compression=compression, tie_embeddings=False)
    config = config_of(model=model, learning_rate=0.5, weight_decay=0.25, warmup_steps=0)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), Network(config.model, VOCAB).abstract_params())
    optimizer = make_optimizer(config)

    @jax.jit
    def decay(params):
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)[0]

    decayed, kept = set(), set()
    for path, update in jax.tree_util.tree_leaves_with_path(decay(params)):
        name = ".".join(key.key for key in path)
        values = set(np.unique(update).tolist())
        assert values in ({-0.125}, {0.0}), name
        (decayed if values == {-0.125} else kept).add(name)
    layer = {"attention.query", "attention.key", "attention.value", "attention.gate", "attention.out"}
    layer |= {"mlp.gate", "mlp.up", "mlp.out"}
    for phi in ("attention.compress_key", "attention.compress_value"):
        layer |= {f"{phi}.blocks", f"{phi}.out"} if compression == "mlp" else {f"{phi}.gate"}
    assert decayed == {f"layers.{name}.kernel" for name in layer} | {"embed.embedding", "head.kernel"}
    assert {name.split(".")[-1] for name in kept} == {"scale", "bias", "position"}


def test_gradients_are_clipped_to_the_global_norm():
    config = config_of(clip_norm=2.0, beta1=0.75, warmup_steps=0)
    gradient = {"a": {"kernel": jnp.full((2, 2), 3.0)}, "b": {"scale": jnp.full((4,), 4.0)}}  # norm 10
    for scale, expected in ((1.0, 0.2), (0.1, 0.1)):
        optimizer = make_optimizer(config)
        scaled = jax.tree.map(lambda x, scale=scale: x * scale, gradient)
        _, state = optimizer.update(scaled, optimizer.init(gradient), gradient)
        mu = optax.tree.get(state, "mu")
        jax.tree.map(lambda m, g, e=expected: np.testing.assert_allclose(m, 0.25 * e * g, rtol=1e-6), mu, gradient)


window_network = functools.cache(functools.partial(Network, WINDOW, VOCAB))


@functools.cache
def window_step(*, accumulate: int):
    config = config_of(model=WINDOW, accumulate=accumulate, warmup_steps=3)
    return config, window_network(), make_train_step(window_network(), config)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_has_the_gradient_of_the_mean_over_the_targets_that_count(accumulate):
    """Also in parts that have unequal weights."""
    batch = random_batch()
    assert len(set(batch.weights.reshape(2, -1).sum(axis=1).tolist())) == 2
    config, network, step = window_step(accumulate=accumulate)
    state = init_state(network, config)
    loss, gradient = mean_loss_and_gradient(network, state.params, batch)
    stepped, metrics = step(state, batch)
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-6)
    norm = optax.tree.norm(gradient)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    # Adam's first update is little but a sign; its moments show what it was given.
    factor = 0.1 * min(1.0, float(config.optimizer.clip_norm / norm))
    for mu, x in zip(jax.tree.leaves(optax.tree.get(stepped.opt_state, "mu")), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(mu, factor * x, rtol=0, atol=1e-5 * np.abs(x).max())


@functools.partial(jax.jit, static_argnames="network")
def mean_loss_and_gradient(network, params, batch):
    def loss(params):
        losses = network.model(params).losses(batch.inputs, batch.targets, batch.segment_ids)
        return (losses * batch.weights).sum() / batch.weights.sum()

    return jax.value_and_grad(loss)(params)


# -------------------------------------------------------------------------------------------------- what is not finite


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    config, network, step = window_step(accumulate=1)
    first, second = random_batch(1), random_batch(2)
    bad = first._replace(weights=jnp.full_like(first.weights, jnp.nan))

    state, _ = step(init_state(network, config), first)
    before = bits((state.params, state.opt_state))
    state, metrics = step(state, bad)
    assert bits((state.params, state.opt_state)) == before
    assert (int(state.step), int(state.skipped), int(state.bad_in_a_row)) == (2, 1, 1)
    assert math.isnan(metrics.loss) and (int(metrics.skipped), int(metrics.bad_in_a_row)) == (1, 1)
    state, metrics = step(state, bad)
    assert (int(state.skipped), int(state.bad_in_a_row)) == (2, 2)
    state, metrics = step(state, second)
    assert (int(state.step), int(state.skipped), int(state.bad_in_a_row)) == (4, 2, 0)

    expected, _ = step(init_state(network, config), first)
    expected, expected_metrics = step(expected, second)
    assert bits((state.params, state.opt_state)) == bits((expected.params, expected.opt_state))
    assert float(metrics.learning_rate) == float(expected_metrics.learning_rate) == pytest.approx(1e-3 / 3)


@pytest.mark.usefixtures("compiled")
def test_a_run_that_diverges_stops_with_the_step_and_keeps_its_checkpoints(tiny_run, tmp_path, monkeypatch):
    assert tiny_run.config.optimizer.max_bad_steps == 5
    at = Batches.at

    def poisoned(self: Batches, step: int) -> Batch:
        batch = at(self, step)
        # One bad step alone, then one after the other.
        return batch._replace(weights=batch.weights * (np.nan if step in (3, *range(12, 18)) else 1))

    monkeypatch.setattr(Batches, "at", poisoned)
    with pytest.raises(
        Diverged, match=r"^step 17: loss nan, gradient norm nan\. With max_bad_steps=5 such steps in a row"
    ):
        loop.train(tiny_run.config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row["skipped"]) for row in rows] == [(5, 1), (10, 1), (15, 4)]
    # The last checkpoint is a good one.
    saved = open_run(tmp_path / "run")
    assert saved.step == 10
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved.params))


# ---------------------------------------------------------------------------------------------------------- a whole run


def rows_without_timing(folder: Path) -> list[dict]:
    return [{key: x for key, x in row.items() if key not in TIMING} for row in read_metrics(folder / "metrics.jsonl")]


def test_a_run_leaves_what_it_promises(tiny_run):
    folder, config = tiny_run.folder, tiny_run.config
    files = {path.name for path in folder.iterdir()}
    assert files == {
        *("config.json", "metrics.jsonl", "summary.json", "sample.txt", "checkpoints", "tensorboard"),
        *("loss.png", "selected_blocks.png", "gates.png"),
    }
    for path in folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(dataclasses.asdict(config)))
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir()) == [10, 20, 30, 40]

    rows = read_metrics(folder / "metrics.jsonl")
    training, validation = ([row for row in rows if key in row] for key in ("loss", "validation_loss"))
    assert [row["step"] for row in training] == list(range(5, 41, 5))
    for row in training:
        assert row.keys() == {
            *("step", "loss", "bits_per_byte", "learning_rate", "grad_norm", "skipped", "tokens_per_second")
        }  # and no "mfu": a CPU's peak is not known
    assert [row["step"] for row in validation] == [20, 40]
    assert training[-1]["loss"] < training[0]["loss"] - 1.5
    assert validation[-1]["validation_loss"] < validation[0]["validation_loss"]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation"]["loss"] == validation[-1]["validation_loss"]
    assert (summary["attention"], summary["steps"], summary["seed"]) == ("nsa", 40, 0)
    assert {"jax", "jaxlib", "flax", "optax", "numpy", "python", "nsa_jax"} == summary["versions"].keys()
    assert (folder / "sample.txt").read_text().startswith(config.prompt)


def test_a_run_says_what_it_does_in_plain_lines(tiny_run):
    lines = tiny_run.output.splitlines()
    assert not re.search(r"[\x1b\r]", tiny_run.output)
    position = {
        name: next(i for i, line in enumerate(lines) if line.startswith(name))
        for name in (
            f"run {tiny_run.folder}: {tiny_run.text}: train",
            "model: 0.0",
            "compiling...",
            "compiled in",
            "step 5/40",
        )
    }
    assert list(position.values()) == sorted(position.values())
    number = r"[\d.e+-]+"
    assert re.fullmatch(
        rf"step 40/40  loss {number}  bpb {number}  lr {number}  gnorm {number}  {number}[kM]? tok/s  ETA 0s",
        next(line for line in lines if line.startswith("step 40/40  loss")),
    )
    assert any(re.fullmatch(rf"step 40/40  validation loss {number}  bpb {number}", line) for line in lines)
    assert any(
        re.match(rf"validation: loss {number} nats per token, {number} bits per byte, \d+ tokens", line)
        for line in lines
    )
    assert any(line.startswith("sample: the quick |") for line in lines)
    written = next(line for line in lines if line.startswith("written: ")).removeprefix("written: ").split(", ")
    assert {Path(path).name for path in written} >= {"loss.png", "selected_blocks.png", "summary.json", "checkpoints"}
    assert all(Path(path).exists() for path in written)


def test_a_checkpoint_knows_its_config_tokenizer_data_and_versions(tiny_run):
    with Checkpoints(checkpoints_in(tiny_run.folder), read_only=True) as checkpoints:
        metadata = checkpoints.metadata()
    assert metadata.keys() == {"format", "config", "tokenizer", "data_sha256", "versions"}
    opened = open_run(tiny_run.folder)
    assert (opened.config, opened.step) == (tiny_run.config, 40)
    assert opened.tokenizer.encode("né").tolist() == [110, 195, 169]
    assert bits(opened.params) == bits(tiny_run.run.params)


def full_disk_after(last: int, *, but_not: int | None = None, seconds: float = 0.0):
    """A stand-in for what reads a checkpoint's files once they are written: later steps than `last` find no room."""
    sha256 = checkpoint._file_sha256

    def read(path: Path) -> str:
        writing = [int(part.removesuffix(".incomplete")) for part in path.parts if part.endswith(".incomplete")]
        if any(step > last and step != but_not for step in writing):
            time.sleep(seconds)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return sha256(path)

    return read


@pytest.mark.usefixtures("compiled")
def test_the_same_seed_gives_the_same_bits_and_a_full_disk_stops_nothing(tiny_run, tmp_path, monkeypatch, capsys):
    """The whole run again, but its checkpoint of step 30 cannot be written, which is known when step 40 is done."""
    monkeypatch.setattr(checkpoint, "_file_sha256", full_disk_after(20, but_not=40, seconds=1))
    monkeypatch.setattr(loop, "_finish", lambda *_: iter(()))
    folder = tmp_path / "run"
    again = loop.train(tiny_run.config, folder)
    assert bits(again.params) == bits(tiny_run.run.params)
    assert rows_without_timing(folder) == rows_without_timing(tiny_run.folder)
    output = capsys.readouterr().out
    assert f"warning: checkpoint 30 could not be saved in {folder}/checkpoints: OSError: [Errno 28]" in output
    assert re.search(
        r"MiB free: make room.* The next save tries again; the checkpoints on disk are as they were: 10, 20\.", output
    )
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["10", "20", "40"]


@pytest.mark.usefixtures("compiled")
def test_a_disk_that_stays_full_loses_no_checkpoint(tiny_run, tmp_path, monkeypatch):
    """The last save fails too: the run ends with what to do, and later goes on from the last checkpoint."""
    folder = tmp_path / "run"
    monkeypatch.setattr(loop, "_finish", lambda *_: iter(()))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_file_sha256", full_disk_after(10))
        with pytest.raises(
            CheckpointError, match=r"checkpoint 40 could not be saved .*No space(?s:.*) as they were: 10\."
        ):
            loop.train(tiny_run.config, folder)
    assert open_run(folder).step == 10
    again = loop.train(tiny_run.config, folder)
    assert bits(again.params) == bits(tiny_run.run.params)
    assert rows_without_timing(folder) == rows_without_timing(tiny_run.folder)


@pytest.mark.usefixtures("compiled")
def test_a_trained_run_is_not_trained_again(tiny_run, tmp_path, monkeypatch, capsys):
    """The same command once more measures and draws again, and takes no step."""
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    for name in ("summary.json", "loss.png"):
        (folder / name).unlink()
    monkeypatch.setattr(loop, "draw_choices", lambda *_: [])
    monkeypatch.setattr(loop, "generate", lambda *_, **__: "")
    run = loop.train(tiny_run.config, folder)
    assert bits(run.params) == bits(tiny_run.run.params)
    assert rows_without_timing(folder) == rows_without_timing(tiny_run.folder)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(
        (tiny_run.folder / "summary.json").read_text()
    )
    output = capsys.readouterr().out
    assert "is trained to its last step already" in output
    assert "compiling" not in output


# ------------------------------------------------------------------------------------------------------------ reporting


def reporter(folder: Path, **fields) -> Reporter:
    defaults = dict(first_step=0, steps=100, tokens_per_step=1000, flops_per_token=5e6, peak=None, bytes_per_token=2.0)
    return Reporter(folder, **(defaults | fields))


def report(reporter: Reporter, step: int, loss: float = 1.5, **fields) -> None:
    reporter.train(step, **(dict(loss=loss, grad_norm=0.5, learning_rate=1e-3, skipped=0) | fields))


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as the reporter reads them."""
    now = [100.0]
    monkeypatch.setattr("train.report.time.perf_counter", lambda: now[0])
    return now


def test_the_peak_is_known_or_not_given():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    for other in ("cpu", "NVIDIA H200 NVL", "NVIDIA H100 PCIe", "NVIDIA RTX A6000", ""):
        assert peak_flops(other) is None


def test_speed_utilisation_and_time_to_go(tmp_path, clock, capsys):
    for peak, expected in ((1e12, 0.005), (None, None)):
        clock[0] = 100.0
        with reporter(tmp_path, peak=peak) as reporting:
            clock[0] += 60  # compilation
            reporting.restart_clock(1)
            report(reporting, 1)
            clock[0] += 9
            report(reporting, 10, skipped=2)
        first, row = read_metrics(tmp_path / "metrics.jsonl")[-2:]
        assert not TIMING & first.keys()  # no step was timed yet
        assert row["tokens_per_second"] == pytest.approx(1000)
        assert row.get("mfu") == (None if expected is None else pytest.approx(expected))
        assert row["bits_per_byte"] == pytest.approx(1.5 / math.log(2) / 2)
        line = capsys.readouterr().out.splitlines()[-1]
        mfu = "" if peak is None else "  MFU 0.5%"
        assert (
            line == f"step 10/100  loss 1.5000  bpb 1.082  lr 1.00e-03  gnorm 0.50  1k tok/s{mfu}  ETA 1m30s  skipped 2"
        )


def test_json_has_no_nan(tmp_path):
    with reporter(tmp_path) as reporting:
        report(reporting, 1, math.nan, grad_norm=math.inf)
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (row["loss"], row["grad_norm"], row["learning_rate"]) == (None, None, 1e-3)


def test_rows_after_the_checkpoint_are_dropped_when_a_run_goes_on(tmp_path):
    with reporter(tmp_path) as reporting:
        for step in (10, 20, 30):
            report(reporting, step, loss=step)
        reporting.validation(20, loss=2.0, bits_per_byte=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed in the middle of a line
    with reporter(tmp_path, first_step=20) as reporting:
        report(reporting, 30, loss=3.5)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("loss", row.get("validation_loss"))) for row in rows] == [
        (10, 10), (20, 20), (20, 2.0), (30, 3.5),
    ]  # fmt: skip


def read_events(folder: Path) -> list:
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return events


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboardX", reason="TensorBoard's files are part of nsa-jax[train]")
    with reporter(tmp_path) as reporting:
        report(reporting, 10, loss=math.nan)
        reporting.validation(10, loss=2.0, bits_per_byte=1.0)
    with reporter(tmp_path, first_step=10):
        pass
    events = read_events(tmp_path / "tensorboard")
    assert [event.file_version for event in events if event.file_version] == ["brain.Event:2"] * 2
    scalars = {(event.step, value.tag): value.simple_value for event in events for value in event.summary.value}
    assert scalars.keys() == {
        (10, name)
        for name in (
            *("learning_rate", "grad_norm", "skipped", "tokens_per_second"),
            *("validation_loss", "validation_bits_per_byte"),
        )
    }
    assert scalars[10, "validation_loss"] == 2.0
    # Where the second start takes over.
    assert [event.step for event in events if event.HasField("session_log")] == [1, 11]


def test_a_full_disk_ends_the_metrics_and_not_the_run(tmp_path, capsys):
    from tensorboardX.record_writer import RecordWriter

    with reporter(tmp_path) as reporting:
        report(reporting, 10)
        reporting._file.close()
        reporting._file = Path("/dev/full").open("w")  # noqa: SIM115
        reporting._tensorboard._records.close()
        reporting._tensorboard._records = RecordWriter("/dev/full")
        # More than any buffer, queue or pipe holds.
        for step in range(11, 2000):
            report(reporting, step)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 2
    for name in ("metrics.jsonl", "tensorboard"):
        assert any(f"{tmp_path / name} can't be written ([Errno 28] No space left" in line for line in warnings)
    assert lines[-1].startswith("step 1999/100")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10]


def test_a_terminal_gets_one_line_that_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with reporter(tmp_path) as reporting:
        report(reporting, 10)
        reporting.validation(20, loss=2.0, bits_per_byte=1.0)
        report(reporting, 30)
    output = capsys.readouterr().out
    assert output.count("\x1b[2K") >= 2  # erases the line
    assert "step 20/100  validation loss 2.0000  bpb 1.000\n" in output
    assert "step 30/100  loss 1.5000" in output


def test_text_is_printed_as_it_is(tmp_path, capsys):
    with reporter(tmp_path) as reporting:
        reporting.say("sample: [bold]one :smile: " + "word " * 99)
    assert capsys.readouterr().out == "sample: [bold]one :smile: " + "word " * 99 + "\n"
