"""Multi-query associative recall of trained runs: the share of queries answered right, by length and number of pairs."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.draws import Draws
from train.evaluation import Answers, Parts, check_lengths, check_numbers, describe_run
from train.model import Params
from train.mqar import Recall, check_recall, make_recall
from train.runs import Run

PAIRS = (4, 8, 16, 32, 64)  # of zoology's paper
# The last number of the draws: zeros at the end do not count, and `train.mixture` ends with 1.
_EXAMPLES = 2
LENGTHS = (64, 128, 256, 512)


def choose_cells(
    run: Run, lengths: tuple[int, ...], pairs: tuple[int, ...], *, beyond_context: bool
) -> list[tuple[int, int]]:
    """The (length, pairs) that zoology's definition allows; those of the paper where none are given.

    Raises:
        ValueError: a length or a number of pairs has no place in any.
    """
    vocab_size, context = run.network.vocab_size, run.config.context
    if not lengths:
        lengths = tuple(length for length in LENGTHS if length <= context and length < vocab_size)
        # Of even length, as each of the task is.
        lengths = lengths or (min(context, vocab_size - 1) // 2 * 2,)
    lengths, pairs = tuple(dict.fromkeys(lengths)), tuple(dict.fromkeys(pairs))
    check_lengths(run, lengths, beyond_context=beyond_context)
    cells = [(length, count) for length in lengths for count in pairs or PAIRS if 1 <= 4 * count <= length]
    for count in pairs:
        if not any(count == known for _, known in cells):
            raise ValueError(
                f"pairs={count} must be at least 1, and need a length of {4 * count}: {lengths=} have none"
            )
    for length in lengths:
        check_recall(length=length, pairs=1, vocab_size=vocab_size)
        if not any(length == known for known, _ in cells):
            raise ValueError(f"{length=} has room for {length // 4} pairs at most: give fewer with --pairs")
    return cells


def measure_cell(
    answers: Answers,
    params: Params,
    length: int,
    pairs: int,
    *,
    vocab_size: int,
    examples: int,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Of `examples` examples: queries, and the share of them answered right. Shapes depend on length and batch_size alone."""

    def make(index: int) -> Recall:
        draws = Draws(seed, length, pairs, index, _EXAMPLES)
        return make_recall(draws, num_examples=1, length=length, pairs=pairs, vocab_size=vocab_size)

    correct = 0
    for first in range(0, examples, batch_size):
        recall = Recall(*map(np.concatenate, zip(*map(make, range(first, first + batch_size)), strict=True)))
        # No example of the length has more pairs than a quarter of it.
        positions = np.pad(recall.positions, ((0, 0), (0, length // 4 - pairs)))
        predicted = answers(params, recall.tokens, positions)[:, :pairs]
        correct += int((predicted == recall.answers)[: examples - first].sum())
    return dict(
        length=length,
        pairs=pairs,
        queries=examples * pairs,
        accuracy=correct / (examples * pairs),
        accuracy_of_any_of_the_values=1 / pairs,
        chance=1 / (vocab_size - vocab_size // 2),
    )


def evaluate_mqar(
    runs: Sequence[Run],
    folder: Path,
    *,
    lengths: tuple[int, ...] = (),
    pairs: tuple[int, ...] = (),
    examples: int = 256,
    batch_size: int = 32,
    seed: int = 0,
    beyond_context: bool = False,
) -> dict[str, Any]:
    """Measure runs on the same cells, with what is done kept in a folder.

    Args:
        runs: whose tokenizers may differ: the ids of an example are of each one's own vocabulary.
        folder: for the parts.
        lengths, pairs: the cells; zoology's if not given.
        examples: of a cell.
        batch_size: examples at a time.
        seed: of the examples.
        beyond_context: allow lengths that a run was not trained for.

    Returns:
        Run folder -> step and a list of cells, see `measure_cell`.

    Raises:
        ValueError: see `choose_cells`.
    """
    check_numbers(examples=(examples, 1), batch_size=(batch_size, 1), seed=(seed, 0))
    chosen = [choose_cells(run, lengths, pairs, beyond_context=beyond_context) for run in runs]
    settings = dict(examples=examples, batch_size=batch_size, seed=seed)
    results: dict[str, Any] = {}
    with Parts(folder, "mqar", settings, total=sum(map(len, chosen))) as parts:
        for run, cells in zip(runs, chosen, strict=True):
            measure = functools.partial(
                measure_cell,
                Answers(run.network),
                run.params,
                vocab_size=run.network.vocab_size,
                examples=examples,
                batch_size=batch_size,
                seed=seed,
            )
            known, found = describe_run(run), []
            for length, count in cells:
                name, of = f"{run.folder} length {length} pairs {count}", dict(run=known, length=length, pairs=count)
                found.append(parts(name, measure, length, count, of=of))
            results[str(run.folder)] = dict(
                step=run.step, context=run.config.context, vocab_size=run.network.vocab_size, cells=found
            )
    return results
