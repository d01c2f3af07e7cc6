"""Needles in a haystack of a trained run: exact match by depth and length, and whether attention selects what it has to read.

Teacher-forced: the model is given prompt and answer at once, and has an example right when the most likely token is the
answer's at every position of it. Greedy decoding would then write it; a subset is decoded through the cache to see so.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Int32

from nsa_jax.config import NSAConfig
from nsa_jax.module import NativeSparseAttention
from train.config import NeedleTask
from train.data import load_documents
from train.draws import Draws
from train.evaluate import Split
from train.evaluation import Answers, Parts, check_lengths, check_numbers, describe_run
from train.generate import Sampling, generate_tokens
from train.model import Network, Params
from train.niah import RECIPES, NeedleMaker, Needles, make_haystack
from train.runs import Run, load_own_corpus

TASKS: tuple[NeedleTask, ...] = get_args(NeedleTask)
# Answers are padded to a multiple of this, so that all tasks of a length share one program.
ANSWER_MULTIPLE = 64


class Seen(NamedTuple):
    """What a model answers, and whether its L layers and K key/value heads select the block of the token to be repeated."""

    predicted: Int32[Array, "B A"]
    hits: Bool[Array, "B A L K"]


class SelectionAnswers:
    """`Answers` of a model with NSA, and what it selects at these positions; compiled once for each shape."""

    def __init__(self, network: Network):
        select_block = network.config.nsa.select_block

        def answer(
            params: Params,
            tokens: Int32[Array, "B T"],
            positions: Int32[Array, "B A"],
            sources: Int32[Array, "B A"],
        ) -> Seen:
            model = network.model(params)
            graph, stacked = nnx.split(model.layers)
            wanted = (sources // select_block)[:, :, None, None]

            def one_layer(x: Array, state: Any) -> tuple[Array, Array]:
                layer = nnx.merge(graph, state)
                assert isinstance(layer.attention, NativeSparseAttention)
                blocks = layer.attention.select_blocks(layer.attention_norm(x))
                here = jnp.take_along_axis(blocks, positions[:, :, None, None], axis=1)
                return layer(x, None), (here == wanted).any(axis=-1)

            x, hits = lax.scan(one_layer, model.embed(tokens), stacked)
            hidden = jnp.take_along_axis(model.norm(x), positions[:, :, None], axis=1)
            predicted = jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)
            return Seen(predicted, jnp.moveaxis(hits, 0, 2))

        self._answer = jax.jit(answer)

    def __call__(
        self, params: Params, tokens: np.ndarray, positions: np.ndarray, sources: np.ndarray
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        seen = self._answer(params, *map(jnp.asarray, (tokens, positions, sources)))
        return np.asarray(seen.predicted), np.asarray(seen.hits)


class Score(NamedTuple):
    """Of one example."""

    exact: bool  # every token of the answer
    values: float  # share of the values whose every token is right, each behind a right answer so far
    tokens: float  # share of the tokens of values
    predicted: npt.NDArray[np.int32]  # [A]
    hit_rate: npt.NDArray[np.float64] | None  # [L, K]: share of the tokens of values whose block is selected
    chance: float | None  # the same where the blocks that are not forced are drawn at random


def score(
    answers: Answers | SelectionAnswers,
    params: Params,
    examples: Sequence[Needles],
    config: NSAConfig,
) -> list[Score]:
    """Scores of examples of one length; see `Score`."""
    longest = max(len(example.value) for example in examples)
    padded = -(-longest // ANSWER_MULTIPLE) * ANSWER_MULTIPLE
    tokens = np.stack([example.tokens for example in examples])
    positions = np.zeros((len(examples), padded), np.int32)
    sources = np.zeros((len(examples), padded), np.int32)
    for row, example in enumerate(examples):
        # The token at position p is answered at p - 1.
        positions[row, : len(example.value)] = example.answer_start - 1 + np.arange(len(example.value))
        sources[row, : len(example.value)] = np.maximum(example.source, 0)
    hits = None
    if isinstance(answers, SelectionAnswers):
        predicted, hits = answers(params, tokens, positions, sources)
    else:
        predicted = answers(params, tokens, positions)
    scores = []
    for row, example in enumerate(examples):
        size, of_value = len(example.value), example.value >= 0
        own = predicted[row, :size]
        right = own == example.tokens[example.answer_start :]
        values = [right[example.value == value].all() for value in range(example.value.max() + 1)]
        hit_rate = chance = None
        if hits is not None:
            hit_rate = hits[row, :size][of_value].mean(axis=0)
            asked = positions[row, :size][of_value], sources[row, :size][of_value]
            chance = float(chance_of_hits(*asked, config).mean())
        values_right, tokens_right = float(np.mean(values)), float(right[of_value].mean())
        scores.append(Score(bool(right.all()), values_right, tokens_right, own, hit_rate, chance))
    return scores


def chance_of_hits(
    positions: Int32[np.ndarray, "A"], sources: Int32[np.ndarray, "A"], config: NSAConfig
) -> npt.NDArray[np.float64]:
    """How likely a query at a position reads the block of an earlier token, if all but the forced blocks are drawn."""
    own, wanted = positions // config.select_block, sources // config.select_block
    forced = (wanted < config.num_initial) | (wanted > own - config.num_local)
    num_forced = config.num_initial + config.num_local
    free = np.maximum(own + 1 - num_forced, 1)
    return np.where(forced, 1.0, np.minimum(1.0, (config.num_selected - num_forced) / free))


class Agreement(NamedTuple):
    """Whether decoding says what teacher forcing says it will, and of how many tokens that can be said."""

    agrees: bool
    compared: int


def agreement(expected: np.ndarray, predicted: np.ndarray, generated: np.ndarray) -> Agreement:
    """The same tokens up to the first that is wrong, and that one: behind it the two read different texts."""
    wrong = np.flatnonzero(predicted != expected)
    end = int(wrong[0]) + 1 if len(wrong) else len(expected)
    return Agreement(bool((predicted[:end] == generated[:end]).all()), end)


def decode(
    run: Run, prompts: Int32[np.ndarray, "B T"], lengths: Int32[np.ndarray, "B"], num_tokens: int
) -> npt.NDArray[np.int32]:
    """`[B, num_tokens]`: the most likely continuation of each row's first `lengths[b]` tokens, through the cache."""
    drawn = generate_tokens(
        run.network,
        run.params,
        jnp.asarray(prompts),
        jax.random.key(0),
        max_tokens=num_tokens,
        sampling=Sampling(temperature=0.0),
        lengths=jnp.asarray(lengths),
    )
    return np.asarray(drawn)


def evaluate_niah(
    run: Run,
    folder: Path,
    *,
    tasks: tuple[NeedleTask, ...] = (),
    lengths: tuple[int, ...] = (),
    depths: int = 11,
    examples: int = 8,
    generate: int = 4,
    batch_size: int = 4,
    split: Split = "validation",
    text: str | None = None,
    seed: int = 0,
    beyond_context: bool = False,
) -> dict[str, Any]:
    """Measure a run on needles, with what is done kept in a folder.

    Args:
        run: trained.
        folder: for the parts.
        tasks: all that fit if not given.
        lengths: in tokens of the run's tokenizer; an eighth, a quarter, half of the context and all of it if not given.
        depths: number of depths, evenly from 0 to 100 percent.
        examples: of a task, length and depth.
        generate: examples of a task and length that are decoded too; 0: none.
        batch_size: examples at a time.
        split, text: the haystack's text: of the run's own, or another one.
        seed: of the examples.
        beyond_context: allow lengths that the run was not trained for.

    Returns:
        JSON values: of each task its cells (a length and a depth), hit rates (with attention "nsa") and decoded examples.

    Raises:
        ValueError: a number or a length out of range, a task that does not fit.
    """
    check_numbers(
        depths=(depths, 1), examples=(examples, 1), batch_size=(batch_size, 1), generate=(generate, 0), seed=(seed, 0)
    )
    tasks, lengths = tuple(dict.fromkeys(tasks)), tuple(dict.fromkeys(lengths))
    if depths > 101:
        raise ValueError(f"{depths=} must be at most 101: depths are whole percents")
    context = run.config.context
    documents = getattr(load_own_corpus(run), split) if text is None else load_documents(text)
    sentences = make_haystack(documents, run.tokenizer)
    maker = NeedleMaker(run.tokenizer, sentences)
    check_lengths(run, lengths, beyond_context=beyond_context)
    chosen, left_out = _choose(
        maker,
        tasks,
        lengths or tuple(sorted({context // 8, context // 4, context // 2, context} - {0})),
        may_leave_out=not (tasks and lengths),
    )
    percents = [round(100 * i / max(1, depths - 1)) for i in range(depths)]
    named = [document.name for document in documents]
    haystack = text or f"{run.config.data.text} ({split}): {', '.join(named[:3])}{', ...' * (len(named) > 3)}"
    settings = dict(
        run=describe_run(run),
        examples=examples,
        batch_size=batch_size,
        seed=seed,
    )
    text_sha256 = hashlib.sha256(b"".join(x.tobytes() for x in sentences)).hexdigest()
    selects = run.config.model.attention == "nsa"
    answers = SelectionAnswers(run.network) if selects else Answers(run.network)
    measure = functools.partial(score, answers, run.params, config=run.config.model.nsa)

    def make(task: NeedleTask, length: int, depth: int, index: int) -> Needles:
        return maker.make(Draws(seed, TASKS.index(task), length, depth, index), task, length=length, depth=depth)

    results: dict[str, Any] = {}
    with Parts(folder, "niah", settings, total=len(chosen) * (depths + bool(generate))) as parts:
        for line in left_out:
            parts.say(line)
        if not selects:
            parts.say(f"{run.folder} has attention={run.config.model.attention!r}, which selects nothing: no hit rates")
        for task, length in chosen:
            result = results.setdefault(task, dict(haystack=_describe_haystack(task, haystack), cells=[]))
            known = dict(task=task, length=length, text=text_sha256 if RECIPES[task].haystack == "text" else None)
            for depth in percents:
                name = f"{task} length {length} depth {depth}"
                result["cells"].append(
                    parts(
                        name,
                        _measure_cell,
                        measure,
                        functools.partial(make, task, length, depth),
                        length,
                        depth,
                        examples,
                        batch_size,
                        of=known | dict(depth=depth),
                    )
                )
            if generate:
                some = functools.partial(
                    _measure_decoding, run, measure, functools.partial(make, task, length), percents, batch_size
                )
                name = f"{task} length {length} decoded"
                of = known | dict(depths=percents, decoded=generate)
                result.setdefault("decoded", []).append(parts(name, some, length, generate, of=of))
    return dict(
        run=str(run.folder),
        step=run.step,
        context=context,
        attention=run.config.model.attention,
        tokenizer=run.config.data.tokenizer,
        differs_from_ruler=(
            "haystack text in place of the essays; words of train/words.py; other prompts; lengths in tokens of the run's "
            "tokenizer; values are expected in order, each token behind the right ones before it, where RULER looks for them "
            "anywhere in what a model generates"
        ),
        left_out=left_out,
        tasks=results,
    )


def mean_hit_rates(result: dict[str, Any]) -> dict[str, list]:
    """Of what `evaluate_niah` returned: title -> `[L][K]`, means over the depths of a task's longest length; {} without NSA."""
    rates = {}
    for task, found in result["tasks"].items():
        longest = max(cell["length"] for cell in found["cells"])
        some = [cell for cell in found["cells"] if "hit_rate" in cell and cell["length"] == longest]
        if some:
            chance = np.mean([cell["hit_rate_of_random_blocks"] for cell in some])
            title = f"{task}, {longest} tokens\nblocks at random: {chance:.0%}"
            rates[title] = np.mean([cell["hit_rate"] for cell in some], axis=0).tolist()
    return rates


def describe(result: dict[str, Any]) -> Iterator[str]:
    """Lines to be read of what `evaluate_niah` returned: means over the depths."""
    for task, found in result["tasks"].items():
        yield f"{task}, haystack: {found['haystack']}"
        decoded = {one["length"]: one for one in found.get("decoded", ())}
        for length in sorted({cell["length"] for cell in found["cells"]}):
            cells = [cell for cell in found["cells"] if cell["length"] == length]

            def mean(name: str, cells: Sequence[dict[str, Any]] = cells) -> Any:
                return np.mean([cell[name] for cell in cells], axis=0)

            shares = "  ".join(f"{name} {mean(name):6.1%}" for name in ("exact", "values", "tokens"))
            line = f"  length {length:>6}  {shares}"
            if "hit_rate" in cells[0]:
                rates, chance = mean("hit_rate"), mean("hit_rate_of_random_blocks")
                line += f"  selected {rates.mean():.1%} (best head {rates.max():.1%}, at random {chance:.1%})"
            yield line
            if one := decoded.get(length):
                yield (
                    f"    {one['examples']} decoded, {one['agree']:.0%} as teacher forcing says (of {one['tokens_compared']} "
                    f"tokens), {one['exact']:.0%} exact"
                )


def _choose(
    maker: NeedleMaker, tasks: tuple[NeedleTask, ...], lengths: tuple[int, ...], *, may_leave_out: bool
) -> tuple[list[tuple[NeedleTask, int]], list[str]]:
    """The tasks and lengths that go together, and lines that say which do not."""
    if unknown := [task for task in tasks if task not in RECIPES]:
        raise ValueError(f"there is no task {unknown[0]!r}, choose from {', '.join(RECIPES)}")
    chosen, left_out = [], []
    for task in tasks or TASKS:
        short = [length for length in lengths if may_leave_out and length < maker.least_length(task)]
        if short:
            named = ", ".join(map(str, short))
            left_out.append(
                f"left out: {task} at {named} tokens, as its needles and question need {maker.least_length(task)}"
            )
        for length in lengths:
            if length in short:
                continue
            try:
                maker.check(task, length=length)
                chosen.append((task, length))
            except ValueError as error:
                if not may_leave_out:
                    raise
                left_out.append(f"left out: {task} at {length} tokens, {error}")
    if not chosen:
        raise ValueError("no task fits:\n  " + "\n  ".join(left_out))
    return chosen, left_out


def _describe_haystack(task: NeedleTask, text: str) -> str:
    kinds = dict(
        noise="repeated sentences", needles="needles of other keys", text=f"{text}, in place of RULER's essays"
    )
    return kinds[RECIPES[task].haystack]


def _measure_cell(
    measure: Callable[[Sequence[Needles]], list[Score]],
    make: Callable[[int], Needles],
    length: int,
    depth: int,
    examples: int,
    batch_size: int,
) -> dict[str, Any]:
    scores: list[Score] = []
    for first in range(0, examples, batch_size):
        scores += measure([make(index) for index in range(first, first + batch_size)])
    scores = scores[:examples]
    cell: dict[str, Any] = dict(
        length=length,
        depth=depth,
        examples=examples,
        **{name: float(np.mean([getattr(one, name) for one in scores])) for name in ("exact", "values", "tokens")},
    )
    hit_rates = [one.hit_rate for one in scores if one.hit_rate is not None]
    if hit_rates:
        cell["hit_rate"] = np.mean(hit_rates, axis=0)
        cell["hit_rate_of_random_blocks"] = float(np.mean([one.chance for one in scores if one.chance is not None]))
    return cell


def _measure_decoding(
    run: Run,
    measure: Callable[[Sequence[Needles]], list[Score]],
    make: Callable[[int, int], Needles],
    percents: Sequence[int],
    batch_size: int,
    length: int,
    count: int,
) -> dict[str, Any]:
    """Of examples over all depths. All programs have the shapes of a length: whatever the prompts', they are compiled once."""
    places = [percents[index * len(percents) // count] for index in range(count)]
    found, exact = [], 0
    for first in range(0, count, batch_size):
        here = range(first, min(first + batch_size, count))
        some = [make(places[index], places[:index].count(places[index])) for index in here]
        filled = some + some[-1:] * (batch_size - len(some))
        starts = np.asarray([example.answer_start for example in filled], np.int32)
        longest = -(-max(length - start for start in starts.tolist()) // ANSWER_MULTIPLE) * ANSWER_MULTIPLE
        generated = decode(run, np.stack([example.tokens for example in filled]), starts, longest)
        for example, one, text in zip(some, measure(filled), generated):
            expected = example.tokens[example.answer_start :]
            found.append(agreement(expected, one.predicted, text[: len(expected)]))
            exact += bool((text[: len(expected)] == expected).all())
    return dict(
        length=length,
        examples=count,
        agree=sum(one.agrees for one in found) / count,
        tokens_compared=sum(one.compared for one in found),
        exact=exact / count,
    )
