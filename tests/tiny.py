"""Small runs for the tests of `train`: text, configurations, folders."""

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import NSAConfig
from train.checkpoint import Checkpoints
from train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from train.data import load_corpus
from train.model import Network, Params
from train.runs import Run, checkpoints_in, claim_folder, make_metadata
from train.step import init_state
from train.tokenizer import make_tokenizer

MODEL = ModelConfig(
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    value_head_dim=4,
    mlp_dim=24,
    dtype="float32",
    remat="attention",
    nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=6),
)


def write_text(path: Path, *, num_words: int = 1200, seed: int = 0) -> Path:
    """A few kilobytes in which there is something to learn."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "and",
        "sleeps",
        "while",
        "it",
        "rains",
    ]
    path.write_text(" ".join(random.Random(seed).choices(words, k=num_words)))
    return path


def make_config(text: Path, *, model: ModelConfig = MODEL, **fields: Any) -> TrainConfig:
    defaults = dict(
        name="tiny",
        context=32,
        batch_size=4,
        steps=40,
        log_every=5,
        eval_every=20,
        eval_batches=2,
        checkpoint_every=10,
        keep_checkpoints=9,
        prompt="the quick ",
        model=model,
        data=DataConfig(text=str(text)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
    )
    return TrainConfig(**(defaults | fields))


class Trained(NamedTuple):
    folder: Path
    config: TrainConfig
    text: Path
    output: str  # what the training printed
    run: Run
    programs: dict[str, Any]  # its compiled ones, by the names that they have in train.loop


@contextlib.contextmanager
def compiling_quickly() -> Iterator[None]:
    """Most of these tests' time is XLA's optimisation of programs that run for milliseconds."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def random_params(network: Network, seed: int = 1) -> Params:
    """Of every parameter: none is left at a zero or a one that would hide it."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        scale = 1.0 if path[-1].key in ("scale", "embedding") else 0.3
        return jnp.asarray(rng.normal(scale=scale, size=x.shape) + (path[-1].key == "scale"), x.dtype)

    return jax.tree_util.tree_map_with_path(draw, network.abstract_params())


def save_untrained(folder: Path, config: TrainConfig, *, step: int = 0) -> None:
    """A run folder with fresh parameters."""
    corpus = load_corpus(config.data.text)
    tokenizer = make_tokenizer(config.data.tokenizer, lambda: (document.text for document in corpus.train))
    claim_folder(folder, config)
    state = init_state(Network(config.model, tokenizer.vocab_size), config)
    with Checkpoints(checkpoints_in(folder)) as checkpoints:
        checkpoints.save(step, state, make_metadata(config, tokenizer, corpus.sha256), validation_loss=None)


def replace_model(config: TrainConfig, **fields: Any) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))
