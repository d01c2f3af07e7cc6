"""Needles in a haystack: sentences that give a key its value, hidden in a long text that ends by asking for them.

The tasks are RULER's (Hsieh et al. 2024, arXiv 2404.06654) and the older passkey. Differs from RULER: the haystack "essay" is
a text of the caller's, words are those of `train.words`, the prompts are worded anew, an example is filled to its length to
the token (its last sentence is cut), and several answers are expected in the order of the text or of the question.

A prompt is put together from pieces that are encoded one by one, so that the tokens of a needle are known, and the same
wherever it stands.
"""

import functools
import re
import uuid
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from train.config import NeedleTask
from train.data import Document
from train.draws import Draws
from train.tokenizer import Tokenizer
from train.words import ADJECTIVES, NOUNS


class Recipe(NamedTuple):
    """What a task hides, and in what."""

    haystack: Literal["noise", "text", "needles"]
    keys: Literal["none", "words", "uuids"] = "words"
    values: Literal["digits", "numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1  # of each key
    num_queries: int = 1  # keys that are asked for


RECIPES: dict[NeedleTask, Recipe] = {
    "passkey": Recipe("noise", keys="none", values="digits"),
    "single_1": Recipe("noise"),
    "single_2": Recipe("text"),
    "single_3": Recipe("text", values="uuids"),
    "multikey_1": Recipe("text", num_keys=4),
    "multikey_2": Recipe("needles"),
    "multikey_3": Recipe("needles", keys="uuids", values="uuids"),
    "multivalue": Recipe("text", num_values=4),
    "multiquery": Recipe("text", num_keys=4, num_queries=4),
}

NOISE = (
    " The grass is green.",
    " The sky is blue.",
    " The sun is yellow.",
    " Here we go.",
    " There and back again.",
)
# Needles of a task vary in length. When the longest of so many fits, that none of as many fits will not be seen.
TRIES = 32
LONGEST_SENTENCE = 400  # characters; what is longer, as in a source file, is cut


class Haystack(NamedTuple):
    """Tokens, and where its sentences start; the end of the last comes last."""

    tokens: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]


class Ingredients(NamedTuple):
    """Of an example, all but its haystack."""

    keys: list[str]
    needles: list[tuple[npt.NDArray[np.int32], int]]  # tokens, and the place of the value among them
    intro: npt.NDArray[np.int32]
    question: npt.NDArray[np.int32]
    values: list[npt.NDArray[np.int32]]  # of the answer, with a comma between two
    comma: npt.NDArray[np.int32]
    size: int  # tokens of them all


class Needles(NamedTuple):
    """An example: a prompt of `answer_start` tokens and the answer, A tokens.

    `value` and `source` are of the answer's tokens. A token that holds nothing of a value, as a comma does and a space that is
    a token of its own, has -1 in both.
    """

    tokens: npt.NDArray[np.int32]  # [length]
    answer_start: int
    value: npt.NDArray[np.int32]  # [A]: which value it is of: 0, 1, ...
    source: npt.NDArray[np.int32]  # [A]: where in the prompt the token stands that it repeats


def split_sentences(text: str) -> list[str]:
    """The text in pieces that each end a sentence, the space between two going to the second; none longer than 400 characters.

    >>> split_sentences('He came. "Well?" said she.')
    ['He came.', ' "Well?"', ' said she.']
    """
    pieces = []
    for sentence in re.split(r"""(?<=[.!?])(?=\s)|(?<=[.!?]["')\]_”’])(?=\s)""", text):
        while len(sentence) > LONGEST_SENTENCE:
            cut = sentence.rfind(" ", 1, LONGEST_SENTENCE)
            cut = LONGEST_SENTENCE if cut < 1 else cut
            pieces.append(sentence[:cut])
            sentence = sentence[cut:]
        if sentence:
            pieces.append(sentence)
    return pieces


def make_haystack(documents: Sequence[Document], tokenizer: Tokenizer) -> Haystack:
    """The documents one after the other, sentence by sentence."""
    pieces = [tokenizer.encode(piece) for document in documents for piece in split_sentences(document.text)]
    return _join(pieces)


def _join(pieces: Sequence[npt.NDArray[np.int32]]) -> Haystack:
    starts = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)
    return Haystack(np.concatenate([np.zeros(0, np.int32), *pieces]), starts)


class NeedleMaker:
    """Makes examples for a tokenizer.

    Args:
        tokenizer: of the model.
        text: the haystack of the tasks that have a text.

    Raises:
        ValueError: the tokenizer cannot write what needles are made of.
    """

    def __init__(self, tokenizer: Tokenizer, text: Haystack):
        self._text, self._tokenizer = text, tokenizer
        self._encode = functools.lru_cache(maxsize=4096)(tokenizer.encode)
        self.least_length = functools.cache(self._measure_least_length)
        sample = "One of the special magic numbers for a-b is: 0123456789abcdef."
        if (decoded := tokenizer.decode(tokenizer.encode(sample))).strip() != sample:
            raise ValueError(
                f"the tokenizer reads back {decoded!r} for {sample!r}: needles can't be written with it; use a tokenizer that "
                "keeps every character, as bytes and bpe:N do"
            )

    def make(self, draws: Draws, task: NeedleTask, *, length: int, depth: float) -> Needles:
        """An example of `length` tokens. Some needles are longer than others: those that do not fit are drawn anew.

        Args:
            draws: random numbers.
            task: its name.
            length: tokens of prompt and answer.
            depth: 0 .. 100, the share of the haystack's sentences, in percent, that come before the needle. Where several are
                asked for it is the depth of one of them; all others are anywhere.

        Raises:
            ValueError: the needles do not fit in `length`, or the text is shorter than that.
        """
        recipe = RECIPES[task]
        for _ in range(TRIES):
            keys, pieces, intro, question, values, comma, size = self._draw_ingredients(draws, recipe)
            if size < length:
                break
        else:
            raise self._too_short(task, length)
        num_values, answer_length = len(values), sum(map(len, values)) + (len(values) - 1) * len(comma)
        haystack = self._fill(draws, recipe, length - size, keys)

        # Each needle goes before a sentence; those that share a place keep their order.
        depths = [depth, *(draws.below(101, len(pieces) - 1).tolist())]
        num_sentences = len(haystack.starts) - 1
        places = [int(haystack.starts[int(num_sentences * share / 100)]) for share in depths]
        order = sorted(range(len(pieces)), key=lambda i: places[i])
        parts, position, last = [intro], len(intro), 0
        sources: dict[int, npt.NDArray[np.int32]] = {}
        for i in order:
            piece, value_start = pieces[i]
            parts += [haystack.tokens[last : places[i]], piece]
            position += places[i] - last
            if i < num_values:
                sources[i] = np.arange(position + value_start, position + value_start + len(values[i]), dtype=np.int32)
                sources[i][: self._num_spaces(values[i])] = -1
            position += len(piece)
            last = places[i]
        parts += [haystack.tokens[last:], question]

        # The values of a key come in the order of the text, those of several keys in the order of the question.
        expected = list(sources) if recipe.num_values > 1 else range(num_values)
        value, source = [], []
        for rank, i in enumerate(expected):
            if rank:
                parts.append(comma)
                value.append(np.full(len(comma), -1, np.int32))
                source.append(value[-1])
            parts.append(values[i])
            value.append(np.where(sources[i] < 0, -1, rank).astype(np.int32))
            source.append(sources[i])
        return Needles(
            np.concatenate(parts).astype(np.int32),
            length - answer_length,
            np.concatenate(value),
            np.concatenate(source),
        )

    def _num_spaces(self, value: npt.NDArray[np.int32]) -> int:
        """Tokens at the beginning of a value that hold nothing but the space before it."""
        return next(i for i in range(len(value)) if self._tokenizer.decode(value[: i + 1]).strip())

    def check(self, task: NeedleTask, *, length: int) -> None:
        """Raise `ValueError` where an example of whatever draws might not fit in a length, or the text is shorter than that."""
        if length < self.least_length(task):
            raise self._too_short(task, length)
        if RECIPES[task].haystack == "text":
            self._fill(Draws(0), RECIPES[task], length, [])

    def _measure_least_length(self, task: NeedleTask) -> int:
        """Room for the longest of many needles, and a token of haystack."""
        draws = Draws(0)
        return 1 + max(self._draw_ingredients(draws, RECIPES[task]).size for _ in range(TRIES))

    def _too_short(self, task: NeedleTask, length: int) -> ValueError:
        least = self.least_length(task)
        return ValueError(
            f"{length=} is too short for {task!r}, whose needles and question take up to {least - 1} tokens of this tokenizer: "
            f"give at least {least}, and several times that for a haystack worth the name"
        )

    def _draw_ingredients(self, draws: Draws, recipe: Recipe) -> Ingredients:
        keys = self._draw_keys(draws, recipe, recipe.num_keys)
        needles = [(key, self._draw_value(draws, recipe)) for key in keys for _ in range(recipe.num_values)]
        pieces = [self._needle(recipe, key, value) for key, value in needles]
        intro, question = self._frame(recipe, keys[: recipe.num_queries])
        values = [self._encode(f" {value}") for _, value in needles[: recipe.num_queries * recipe.num_values]]
        comma = self._encode(",")
        texts = (intro, question, *values, *(piece for piece, _ in pieces))
        size = sum(map(len, texts)) + (len(values) - 1) * len(comma)
        return Ingredients(keys, pieces, intro, question, values, comma, size)

    def _frame(self, recipe: Recipe, asked: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """What comes before the haystack, and the question behind it."""
        if recipe.keys == "none":
            return (
                self._encode("A pass key is hidden in the text below. Remember it: you will be asked for it.\n"),
                self._encode("\nWhat is the pass key? The pass key is"),
            )
        kind, key = ("uuid" if recipe.values == "uuids" else "number"), _enumerate(asked)
        if recipe.num_values * recipe.num_queries == 1:
            return (
                self._encode(
                    f"A special magic {kind} is hidden in the text below. Remember it: you will be asked for it.\n"
                ),
                self._encode(
                    f"\nWhat is the special magic {kind} for {key} in the text above? The special magic {kind} for {key} is:"
                ),
            )
        return (
            self._encode(
                f"Special magic {kind}s are hidden in the text below. Remember them: you will be asked for them.\n"
            ),
            self._encode(
                f"\nWhat are the special magic {kind}s for {key} in the text above? The special magic {kind}s for {key} are:"
            ),
        )

    def _needle(self, recipe: Recipe, key: str, value: str) -> tuple[npt.NDArray[np.int32], int]:
        """The tokens of a needle, and the place of its value among them."""
        if recipe.keys == "none":
            before, after = " The pass key is", ". Remember it."
        else:
            kind = "uuids" if recipe.values == "uuids" else "numbers"
            before, after = f" One of the special magic {kind} for {key} is:", "."
        head = self._encode(before)
        return np.concatenate([head, self._encode(f" {value}"), self._encode(after)]), len(head)

    def _fill(self, draws: Draws, recipe: Recipe, size: int, keys: Sequence[str]) -> Haystack:
        """A haystack of `size` tokens."""
        if recipe.haystack == "text":
            tokens, starts = self._text
            last = int(np.searchsorted(starts, len(tokens) - size, side="right")) - 1
            if last < 0:
                raise ValueError(
                    f"the haystack has {len(tokens)} tokens of this tokenizer, {size} are needed: give a longer text or "
                    "shorter lengths"
                )
            first = draws.one_below(last + 1)
            begin = int(starts[first])
            inner = starts[first : int(np.searchsorted(starts, begin + size))] - begin
            return Haystack(tokens[begin : begin + size], np.append(inner, size))
        if recipe.haystack == "noise":
            pieces = [self._encode(sentence) for sentence in NOISE]
            pieces *= -(-size // sum(map(len, pieces)))
        else:
            pieces, have = [], 0
            while have < size:
                (key,) = self._draw_keys(draws, recipe, 1)
                if key not in keys:
                    pieces.append(self._needle(recipe, key, self._draw_value(draws, recipe))[0])
                    have += len(pieces[-1])
        tokens, starts = _join(pieces)
        return Haystack(tokens[:size], np.append(starts[starts < size], size))

    def _draw_keys(self, draws: Draws, recipe: Recipe, count: int) -> list[str]:
        """So many different ones."""
        keys: dict[str, None] = {}
        while len(keys) < count:
            if recipe.keys == "uuids":
                keys[_draw_uuid(draws)] = None
            else:
                keys[f"{ADJECTIVES[draws.one_below(len(ADJECTIVES))]}-{NOUNS[draws.one_below(len(NOUNS))]}"] = None
        return list(keys)

    def _draw_value(self, draws: Draws, recipe: Recipe) -> str:
        if recipe.values == "uuids":
            return _draw_uuid(draws)
        smallest = 10**6 if recipe.values == "numbers" else 10**4
        return str(smallest + draws.one_below(9 * smallest))


def _draw_uuid(draws: Draws) -> str:
    return str(uuid.UUID(bytes=draws.raw(2).astype("<u8").tobytes(), version=4))


def _enumerate(words: Sequence[str]) -> str:
    """ "a"; "a, and b"; "a, b, and c"."""
    return ", and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
