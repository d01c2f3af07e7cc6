"""Batches that mix text with examples of a task, so that a small model learns what the evaluation asks of it."""

from collections.abc import Sequence

import numpy as np

from train.config import DataConfig, TrainConfig
from train.data import Array, Batch, Batches, Document
from train.draws import Draws
from train.mqar import check_recall, make_recall
from train.niah import NeedleMaker, make_haystack
from train.tokenizer import Tokenizer

# Keeps the draws of examples apart from those of `Batches`, which are seeded with two numbers.
_EXAMPLES = 1


class Mixture:
    """Text and task in turn, row by row; `at(step)` is a pure function of the configuration and the step, as `Batches.at` is.

    Rows are numbered through the whole run; row w is one of the task when `floor((w + 1) * task_share)` is larger than
    `floor(w * task_share)`. The others read the windows of the text in their order, without a gap.

    A task's row holds as many examples of one length as fit. The length is drawn from `task_lengths`, at first from the
    shortest alone: the others join one by one, at equal distances over `curriculum_steps`. Loss counts at the answers alone;
    those of a row weigh `task_weight * context` together, and a text row's targets weigh `context`, so the loss is shared as
    rows are. Otherwise a row with one answer of 7 tokens would vanish beside the 8192 of a text.

    With packing "documents" an example is a document; with "running" a row holds no more than one.

    Args:
        text: of the run.
        documents: what it was made of: haystacks of niah.
        tokenizer: of the run.
        config: whose data has a task.

    Raises:
        ValueError: an example does not fit in a length, the vocabulary does not fit the task, or examples of a row see each
            other.
    """

    def __init__(self, text: Batches, documents: Sequence[Document], tokenizer: Tokenizer, config: TrainConfig):
        self._text, self._data, self._context = text, config.data, config.context
        self._batch_size, self._seed, self._vocab_size = config.batch_size, config.seed, tokenizer.vocab_size
        self._lengths = task_lengths(config)
        # Else what two examples give different values has two right answers. (Runs that were trained so can still be opened.)
        if self._data.packing == "running" and self._lengths[0] * 2 <= config.context:
            raise ValueError(
                f"task={self._data.task!r} with task_lengths={self._data.task_lengths} puts several examples in "
                f"context={config.context}, and they must not see each other: packing must be 'documents'"
            )
        if self._data.task == "mqar":
            for length in self._lengths:
                check_recall(length=length, pairs=min(self._data.pairs), vocab_size=self._vocab_size)
            check_recall(length=self._lengths[-1], pairs=max(self._data.pairs), vocab_size=self._vocab_size)
        else:
            self._needles = NeedleMaker(tokenizer, make_haystack(documents, tokenizer))
            for task in self._data.needles:  # raises what does not fit
                for length in self._lengths:
                    self._needles.check(task, length=length)

    def at(self, step: int) -> Batch:
        """The batch of a step (0, 1, ...), whatever was asked for before."""
        if step < 0:
            raise ValueError(f"{step=} must not be negative")
        rows = step * self._batch_size + np.arange(self._batch_size)
        before = np.floor(rows * self._data.task_share).astype(np.int64)
        is_task = np.floor((rows + 1) * self._data.task_share).astype(np.int64) > before
        shape = (self._batch_size, self._context)
        packed = self._data.packing == "documents"
        batch = Batch(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.int32) if packed else None,
        )
        if not is_task.all():
            text = self._text.read((rows - before)[~is_task])
            for whole, part in zip(batch, text, strict=True):
                if whole is not None:
                    whole[~is_task] = part
        for row in np.flatnonzero(is_task).tolist():
            self._write_row([None if x is None else x[row] for x in batch], step, int(rows[row]))
        return batch

    def _write_row(self, row: Sequence[Array], step: int, number: int) -> None:
        inputs, targets, weights, segment_ids = row
        draws = Draws(self._seed, number, _EXAMPLES)
        known = self._lengths[: allowed_lengths(self._data, len(self._lengths), step)]
        length = known[draws.one_below(len(known))]
        count = self._context // length
        fitting = [pairs for pairs in self._data.pairs if 4 * pairs <= length]
        pairs = fitting[draws.one_below(len(fitting))] if self._data.task == "mqar" else 0
        for index in range(count):
            here = slice(index * length, (index + 1) * length)
            if self._data.task == "mqar":
                recall = make_recall(draws, num_examples=1, length=length, pairs=pairs, vocab_size=self._vocab_size)
                inputs[here] = recall.tokens[0]
                targets[here][recall.positions[0]] = recall.answers[0]
                weights[here][recall.positions[0]] = 1
            else:
                task = self._data.needles[draws.one_below(len(self._data.needles))]
                needles = self._needles.make(draws, task, length=length, depth=draws.one_below(101))
                inputs[here] = needles.tokens
                targets[here][:-1] = needles.tokens[1:]
                weights[here][needles.answer_start - 1 : -1] = 1
        if segment_ids is not None:
            segment_ids[:] = np.arange(self._context) // length
        weights *= self._data.task_weight * self._context / weights.sum()


def task_lengths(config: TrainConfig) -> tuple[int, ...]:
    """Ascending, each once."""
    return tuple(sorted(set(config.data.task_lengths))) or (config.context,)


def allowed_lengths(data: DataConfig, num_lengths: int, step: int) -> int:
    """How many of the lengths, from the shortest on, a step draws from.

    With 4 lengths and curriculum_steps=100: 1 in steps 0 .. 24, 2 in 25 .. 49, 3 in 50 .. 74, then all 4.
    """
    if data.curriculum_steps == 0:
        return num_lengths
    return min(num_lengths, 1 + step * num_lengths // data.curriculum_steps)
