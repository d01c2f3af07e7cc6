"""A run that is killed goes on as if it had not been: the same command, the same bits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.tiny import MODEL, compiling_quickly, make_config, write_text
from train import loop
from train.checkpoint import Checkpoints
from train.config import PRESETS, DataConfig
from train.errors import Interrupted
from train.mixture import Mixture
from train.runs import checkpoints_in, claim_folder, open_run
from train.step import abstract_state

ROOT = Path(__file__).parents[1]
STEPS, CHECKPOINT_EVERY, KILLED_AT = 40, 10, 25

# All that could be lost on the way: a tokenizer that was trained, borders of documents, parts of a batch, two epochs.
FLAGS = {
    "--context": 32,
    "--steps": STEPS,
    "--batch-size": 4,
    "--log-every": 4,
    "--eval-every": 15,
    "--eval-batches": 2,
    "--checkpoint-every": CHECKPOINT_EVERY,
    "--prompt": "the ",
    "--num-layers": 1,
    "--model-dim": 16,
    "--num-heads": 2,
    "--num-kv-heads": 1,
    "--head-dim": 8,
    "--value-head-dim": 8,
    "--mlp-dim": 16,
    "--compression": "mean",
    "--compress-block": 4,
    "--compress-stride": 2,
    "--select-block": 4,
    "--num-selected": 3,
    "--window": 8,
    "--tokenizer": "bpe:280",
    "--packing": "documents",
    "--accumulate": 2,
    "--warmup-steps": 4,
}

# Sends itself a signal when the batch of a step is made, in the thread that makes batches ahead: so at most a few steps
# before that one, and surely in the middle of the run.
KILLED = """
import os, runpy, sys
from train.data import Batches

at, killed_at, signum = Batches.at, int(sys.argv.pop(1)), int(sys.argv.pop(1))

def kill(self, step):
    if step == killed_at:
        os.kill(os.getpid(), signum)
    return at(self, step)

Batches.at = kill
runpy.run_module("train", run_name="__main__")
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        write_text(folder / f"{i:02}.txt", num_words=60 + 7 * i, seed=i)
    return folder


@pytest.fixture(scope="module")
def start(texts, tmp_path_factory):
    """Starts the same command in the same surroundings, each time in a process of its own."""
    # What a process compiles, the next one reads: these tests' time is compilation.
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # some processors make XLA talk about the programs that it reads again
    }

    def call(folder, *, kill: signal.Signals | None = None):
        program = ["-m", "train"] if kill is None else ["-c", KILLED, str(KILLED_AT), str(int(kill))]
        flags = [str(word) for flag in (FLAGS | {"--text": texts, "--run": folder}).items() for word in flag]
        command = [sys.executable, "-W", "error", *program, "run", "tiny", *flags]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    return call


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finished = start(folder)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert rows(folder)[-1]["step"] == STEPS
    return folder


def rows(folder: Path) -> list[dict]:
    """Of metrics.jsonl, without what is a measurement of time."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: x for key, x in json.loads(line).items() if key not in ("tokens_per_second", "mfu")} for line in lines
    ]


def state_bits(folder: Path) -> list[tuple[str, bytes]]:
    """The last checkpoint, every bit: parameters, moments, counters."""
    run = open_run(folder)
    with Checkpoints(checkpoints_in(folder), read_only=True) as checkpoints:
        state, step = checkpoints.restore(abstract_state(run.network, run.config))
    assert step == STEPS
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]


def assert_equal_runs(folder: Path, expected: Path) -> None:
    assert state_bits(folder) == state_bits(expected)
    assert rows(folder) == rows(expected)
    for name in ("config.json", "summary.json", "sample.txt"):
        assert (folder / name).read_text() == (expected / name).read_text(), name


def steps_on_disk(folder: Path) -> tuple[int, ...]:
    return Checkpoints(checkpoints_in(folder), read_only=True).steps()


def test_the_test_trains(uninterrupted):
    losses = [row["loss"] for row in rows(uninterrupted) if "loss" in row]
    assert len(losses) == STEPS // 4 and losses[-1] < losses[0] - 1


def test_sigterm(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    stopped = start(folder, kill=signal.SIGTERM)
    assert stopped.returncode == 128 + signal.SIGTERM == 143
    (step,) = set(steps_on_disk(folder)) - {CHECKPOINT_EVERY, 2 * CHECKPOINT_EVERY}  # saved when it was stopped
    assert KILLED_AT - 5 < step <= KILLED_AT + 1
    assert stopped.stderr == f"stopped by SIGTERM at step {step}, which is saved: the same command goes on from there\n"
    assert not (folder / "summary.json").exists()

    resumed = start(folder)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert f"going on from step {step} of {STEPS}\n" in resumed.stdout
    assert_equal_runs(folder, uninterrupted)


def test_sigkill(start, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    killed = start(folder, kill=signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    step = steps_on_disk(folder)[-1]
    assert step in (CHECKPOINT_EVERY, 2 * CHECKPOINT_EVERY)
    # Rows after the checkpoint are lost with the steps, and come again.
    assert rows(folder)[-1]["step"] >= 2 * CHECKPOINT_EVERY

    resumed = start(folder)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert f"going on from step {step} of {STEPS}\n" in resumed.stdout
    assert_equal_runs(folder, uninterrupted)


# A curriculum that goes on after the interruption.
MIXTURES = {
    "mqar": dict(context=64, packing="documents", task_lengths=(16, 32, 64), pairs=(2, 4, 8), curriculum_steps=90),
    "niah": dict(context=320, needles=("passkey", "single_2"), task_lengths=(300, 320), curriculum_steps=60),
}


@pytest.mark.parametrize("task", MIXTURES)
def test_a_mixture_goes_on_where_it_stopped(task, texts, tmp_path, monkeypatch):
    """In this process, as what is at stake is the batches: with the window alone, which compiles fastest."""
    data = dict(MIXTURES[task])
    config = make_config(
        texts,
        context=data.pop("context"),
        steps=STEPS,
        batch_size=2,
        checkpoint_every=CHECKPOINT_EVERY,
        model=dataclasses.replace(MODEL, attention="window", num_layers=1),
        data=DataConfig(text=str(texts), task=task, **data),
    )
    for name in ("make_train_step", "LossMeter", "Network"):  # compiled once for the three starts
        made, make = {}, getattr(loop, name)
        monkeypatch.setattr(
            loop, name, lambda *args, name=name, make=make, made=made: made.setdefault(name, make(*args))
        )
    monkeypatch.setattr(loop, "_finish", lambda *_: ())
    at = Mixture.at

    def kill(self, step):
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return at(self, step)

    with compiling_quickly():
        loop.train(config, tmp_path / "uninterrupted")
        monkeypatch.setattr(Mixture, "at", kill)
        with pytest.raises(Interrupted):
            loop.train(config, tmp_path / "run")
        monkeypatch.setattr(Mixture, "at", at)
        assert KILLED_AT - 5 < steps_on_disk(tmp_path / "run")[-1] <= KILLED_AT + 1
        loop.train(config, tmp_path / "run")
    assert state_bits(tmp_path / "run") == state_bits(tmp_path / "uninterrupted")
    assert rows(tmp_path / "run") == rows(tmp_path / "uninterrupted")


def test_a_start_that_was_killed_at_once_begins_anew(tmp_path: Path):
    """Between the making of the folder and the writing of config.json."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.tmp").write_text("{")
    claim_folder(folder, PRESETS["tiny"][1])
    assert [path.name for path in folder.iterdir()] == ["config.json"]
