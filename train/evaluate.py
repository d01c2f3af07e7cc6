"""The loss of a model on held-out text: overall, and by position in the context."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float

from train.data import Batch, TokenStream, evaluation_batches, load_documents, tokenize
from train.evaluation import Parts, describe_run
from train.model import Network, Params
from train.report import bits_per_byte
from train.runs import Run, load_own_corpus

Split = Literal["validation", "test", "train"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Of the targets at positions `start` to `end - 1` of the context: nats per token, and bits per byte of the whole text."""

    start: int
    end: int
    loss: float
    bits_per_byte: float


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

    def sums(self, params: Params, batch: Batch) -> npt.NDArray[np.float64]:
        """`[2, buckets]`: of a batch, the losses in each bucket of positions and the targets that they are of."""
        # Summed in float64 on the host: millions of float32 terms would lose digits.
        by_position = np.asarray(self._by_position(params, batch), np.float64)
        starts = [0, *(2**i for i in range((by_position.shape[1] - 1).bit_length()))]
        return np.add.reduceat(by_position, starts, axis=1)

    def __call__(self, params: Params, batches: Iterable[Batch], *, bytes_per_token: float) -> Loss:
        context, sums = 0, []
        for batch in batches:
            context = batch.inputs.shape[1]
            sums.append(self.sums(params, batch))
        return summarize(sums, context=context, bytes_per_token=bytes_per_token)


def summarize(sums: Sequence[npt.ArrayLike], *, context: int, bytes_per_token: float) -> Loss:
    """The measurement that the sums of all batches make, each `[2, buckets]` as of `LossMeter.sums`."""
    losses, weights = np.asarray(sums, np.float64).sum(axis=0)
    mean = float(losses.sum() / weights.sum())
    buckets, start = [], 0
    for bucket_loss, weight in zip(losses.tolist(), weights.tolist(), strict=True):
        end = min(max(1, 2 * start), context)
        if weight:
            nats = bucket_loss / weight
            buckets.append(Bucket(start, end, nats, bits_per_byte(nats, bytes_per_token)))
        start = end
    return Loss(mean, bits_per_byte(mean, bytes_per_token), int(weights.sum()), tuple(buckets))


def evaluate_loss(run: Run, *, split: Split = "validation", text: str | None = None) -> Loss:
    """The loss of a run on a split of its own text, or on the whole of another text."""
    stream = _read_text(run, split, text)
    return LossMeter(run.network)(run.params, _batches(run, stream), bytes_per_token=stream.bytes_per_token)


def evaluate_losses(
    runs: Sequence[Run], folder: Path, *, split: Split = "validation", text: str | None = None
) -> list[Loss]:
    """`evaluate_loss` of several runs, with what is done kept in a folder; see `train.evaluation`."""
    streams = [_read_text(run, split, text) for run in runs]
    total = sum(_num_batches(run, stream) for run, stream in zip(runs, streams, strict=True))
    results = []
    with Parts(folder, f"loss_{split if text is None else 'text'}", {}, total=total) as parts:
        for run, stream in zip(runs, streams, strict=True):
            meter, sums = LossMeter(run.network), []
            known = dict(describe_run(run), tokens_sha256=hashlib.sha256(stream.tokens.tobytes()).hexdigest())
            for index, batch in enumerate(_batches(run, stream)):
                name, of = f"{run.folder} batch {index}", dict(run=known, batch=index)
                sums.append(parts(name, meter.sums, run.params, batch, of=of))
            results.append(summarize(sums, context=run.config.context, bytes_per_token=stream.bytes_per_token))
    return results


def _read_text(run: Run, split: Split, text: str | None) -> TokenStream:
    documents = getattr(load_own_corpus(run), split) if text is None else load_documents(text)
    return tokenize(documents, run.tokenizer)


def _batches(run: Run, stream: TokenStream) -> Iterable[Batch]:
    config = run.config
    return evaluation_batches(stream, context=config.context, batch_size=_batch_size(run), packing=config.data.packing)


def _batch_size(run: Run) -> int:
    return run.config.batch_size // run.config.optimizer.accumulate


def _num_batches(run: Run, stream: TokenStream) -> int:
    windows = -(-(len(stream.tokens) - 1) // run.config.context)
    return -(-windows // _batch_size(run))
