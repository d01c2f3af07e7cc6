"""Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): key-value pairs, then the keys, each to be answered.

To the definition of zoology (github.com/HazyResearch/zoology, `multiquery_ar`), with one pass over the pairs and random tokens
where nothing is asked. Tokens are ids of a vocabulary of V: what they stand for in a text plays no part.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from train.draws import Draws

POWER = 0.01  # zoology's `power_a`: a key is asked for soon after the pairs more often than late


class Recall(NamedTuple):
    """B examples of T tokens with P pairs each."""

    tokens: npt.NDArray[np.int32]  # [B, T]
    positions: npt.NDArray[np.int32]  # [B, P]: where each key stands again, ascending
    answers: npt.NDArray[
        np.int32
    ]  # [B, P]: its value, which the model is to predict there; the token that follows is random


def check_recall(*, length: int, pairs: int, vocab_size: int) -> None:
    """Raise `ValueError` for what zoology's definition does not make examples of."""
    if pairs < 1:
        raise ValueError(f"{pairs=} must be at least 1")
    if length % 2:
        raise ValueError(f"{length=} must be even: keys stand at even positions")
    if length < 4 * pairs:
        raise ValueError(f"{length=} must be at least 4 * {pairs=} = {4 * pairs}: give fewer pairs or a larger length")
    if vocab_size <= length:
        raise ValueError(
            f"{vocab_size=} of the tokenizer must be larger than {length=}, by zoology's definition: give shorter lengths, or "
            "train with a larger tokenizer (as in --tokenizer bpe:4096)"
        )


def make_recall(draws: Draws, *, num_examples: int, length: int, pairs: int, vocab_size: int) -> Recall:
    """Examples of MQAR.

    With T = 12, P = 2, keys `a b` and values `X Y`; `.` is a random token, and the answers are asked for below:

        a X b Y a . . . . . b .
                X           Y

    Keys are distinct ids from 1 .. V // 2 - 1 and values from V // 2 .. V - 1. Each key stands once more, 2 g tokens behind
    the pairs, the g being drawn without replacement in proportion to `(g + 1) ** (0.01 - 1)`. All else is random.

    Raises:
        ValueError: see `check_recall`.
    """
    check_recall(length=length, pairs=pairs, vocab_size=vocab_size)
    half = vocab_size // 2
    keys = 1 + draws.distinct(half - 1, num_examples, pairs)
    values = half + draws.distinct(vocab_size - half, num_examples, pairs)
    slots = (length - 2 * pairs) // 2
    gaps = draws.distinct_weighted(np.arange(1, slots + 1, dtype=np.float64) ** (POWER - 1), num_examples, pairs)
    tokens = draws.below(vocab_size, num_examples, length)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    positions = 2 * pairs + 2 * gaps
    np.put_along_axis(tokens, positions, keys, axis=1)
    order = np.argsort(positions, axis=1)
    return Recall(
        tokens.astype(np.int32),
        np.take_along_axis(positions, order, axis=1).astype(np.int32),
        np.take_along_axis(values, order, axis=1).astype(np.int32),
    )
