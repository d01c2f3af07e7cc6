"""The loss of a model on held-out text: overall, and by position in the context."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from train.data import Batch, evaluation_batches, load_documents, tokenize
from train.model import Network, Params
from train.report import bits_per_byte
from train.runs import Run, load_own_corpus

Split = Literal["validation", "test", "train"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Mean loss, in nats per token, of the targets at positions `start` to `end - 1` of the context."""

    start: int
    end: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Loss:
    """A measurement: nats per token, bits per UTF-8 byte of the text, and the tokens that were scored.

    The buckets of `by_position` are log-spaced: positions 0, 1, 2-3, 4-7, ...
    """

    loss: float
    bits_per_byte: float
    tokens: int
    by_position: tuple[Bucket, ...]

    def __str__(self) -> str:
        return f"loss {self.loss:.4f} nats per token, {self.bits_per_byte:.4f} bits per byte, {self.tokens} tokens"


class LossMeter:
    """Measures the loss of parameters on batches; compiled once for a shape of batches."""

    def __init__(self, network: Network):
        def by_position(params: Params, batch: Batch) -> Float[Array, "2 T"]:
            losses = network.model(params).losses(batch.inputs, batch.targets, batch.segment_ids)
            return jnp.stack([(losses * batch.weights).sum(axis=0), batch.weights.sum(axis=0)])

        self._by_position = jax.jit(by_position)

    def __call__(self, params: Params, batches: Iterable[Batch], *, bytes_per_token: float) -> Loss:
        # Summed in float64 on the host: millions of float32 terms would lose digits.
        total = sum(np.asarray(self._by_position(params, batch), np.float64) for batch in batches)
        losses, weights = np.asarray(total)
        mean = float(losses.sum() / weights.sum())
        buckets, start = [], 0
        while start < len(losses):
            end = min(max(1, 2 * start), len(losses))
            if weights[start:end].sum():
                buckets.append(Bucket(start, end, float(losses[start:end].sum() / weights[start:end].sum())))
            start = end
        return Loss(mean, bits_per_byte(mean, bytes_per_token), int(weights.sum()), tuple(buckets))


def evaluate_loss(run: Run, *, split: Split = "validation", text: str | None = None) -> Loss:
    """The loss of a run on a split of its own text, or on the whole of another text."""
    config = run.config
    if text is None:
        documents = getattr(load_own_corpus(run), split)
    else:
        documents = load_documents(text)
    stream = tokenize(documents, run.tokenizer)
    batches = evaluation_batches(
        stream,
        context=config.context,
        batch_size=config.batch_size // config.optimizer.accumulate,
        packing=config.data.packing,
    )
    return LossMeter(run.network)(run.params, batches, bytes_per_token=stream.bytes_per_token)
