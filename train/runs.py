"""A run's folder: what lies in it, and how a trained model is opened from it with no flags.

RUN/config.json         the configuration, to be read
RUN/checkpoints/        see train/checkpoint.py; each holds configuration, tokenizer, data hash and versions too
RUN/metrics.jsonl       a row for each logged step and each validation
RUN/tensorboard/        the same, where tensorboardX is installed
RUN/summary.json, sample.txt, loss.png, selected_blocks.png, gates.png     written at the end
RUN/inspect/            what `inspect` writes
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import nsa_jax
from train.checkpoint import CheckpointError, Checkpoints
from train.config import TrainConfig, differences, from_dict, to_dict
from train.data import Corpus, load_corpus
from train.model import Network, Params
from train.step import abstract_state
from train.tokenizer import Tokenizer, tokenizer_from_json

FORMAT = 1


class Run(NamedTuple):
    """A trained run, opened."""

    folder: Path
    step: int
    config: TrainConfig
    tokenizer: Tokenizer
    network: Network
    params: Params
    data_sha256: str  # of the text that it was trained on, splits and all


def checkpoints_in(folder: Path) -> Path:
    return folder / "checkpoints"


def make_metadata(config: TrainConfig, tokenizer: Tokenizer, data_sha256: str) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    return dict(
        format=FORMAT,
        config=to_dict(config),
        tokenizer=tokenizer.to_json(),
        data_sha256=data_sha256,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return dict(nsa_jax=nsa_jax.__version__, python=platform.python_version(), **packages)


def open_run(folder: Path, *, step: int | None = None) -> Run:
    """The model of a run folder, at its last checkpoint or at that of a step.

    Raises:
        CheckpointError: the folder is none of a run, or its checkpoint is missing, damaged or of another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no run folder {folder}: `python -m train run PRESET --run {folder}` makes one")
    with Checkpoints(checkpoints_in(folder), read_only=True) as checkpoints:
        metadata = read_metadata(checkpoints, step)
        try:
            config = from_dict(TrainConfig, metadata["config"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"the configuration in {folder} can't be read: {error}") from error
        tokenizer = tokenizer_from_json(metadata["tokenizer"])
        network = Network(config.model, tokenizer.vocab_size)
        state, found = checkpoints.restore(abstract_state(network, config), step)
    return Run(folder, found, config, tokenizer, network, state.params, metadata["data_sha256"])


def read_metadata(checkpoints: Checkpoints, step: int | None = None) -> dict[str, Any]:
    """What `make_metadata` made; raises `CheckpointError` if another version did."""
    metadata = checkpoints.metadata(step)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{checkpoints.directory} was written in format {metadata.get('format')} of nsa-jax {metadata.get('versions')}, "
            f"this is format {FORMAT}: open it with that version"
        )
    return metadata


def load_own_corpus(run: Run) -> Corpus:
    """The text that a run was trained on.

    Raises:
        ValueError: it has changed: what is held out now may have been trained on.
    """
    corpus = load_corpus(run.config.data.text)
    check_same_data(run.data_sha256, corpus.sha256, run.folder)
    return corpus


def claim_folder(folder: Path, config: TrainConfig) -> None:
    """Make the folder, or find that it belongs to this very configuration.

    Raises:
        ValueError: it holds another run, or something that is no run.
    """
    written = folder / "config.json"
    partial = folder / "config.tmp"
    if not written.exists():
        # A start that was killed at once leaves the partial file behind.
        if folder.exists() and (not folder.is_dir() or any(path != partial for path in folder.iterdir())):
            raise ValueError(f"{folder} is no run folder: give another with --run")
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(to_dict(config), indent=1) + "\n")
        partial.replace(written)
        return
    try:
        saved = json.loads(written.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{written} can't be read ({error}): move {folder} away, or give another with --run"
        ) from error
    if lines := differences(saved, json.loads(json.dumps(to_dict(config)))):
        raise ValueError(
            f"{folder} holds a run of another configuration:\n  "
            + "\n  ".join(lines)
            + f"\ngive another folder with --run, or move {folder} away; to go on with that run, leave these flags out"
        )


def check_same_data(then: str, now: str, folder: Path) -> None:
    """Raise `ValueError` when a run would go on, or be judged, with another text than it began with; both are SHA-256."""
    if then != now:
        raise ValueError(
            f"the text has changed since {folder} was begun (SHA-256 {now[:12]}..., then {then[:12]}...): "
            "bring the old text back, or begin anew with another --run"
        )
