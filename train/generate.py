"""Text from a model: prompts go into the cache, in chunks where they are long; then token after token, in one compiled loop.

Two programs do it. `read` reads a chunk of the prompts; `advance` draws tokens up to a number that it is given when
it is called, so that the same compiled loop draws all of them at once or, for a text that is shown as it comes, a few at
each call. (Between two calls the state is donated: no cache is copied. A callback out of the loop would show text too, but
it would hold the device up at every token, and an exception in it, such as a closed pipe, would end as an error of XLA.)
"""

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from train.model import Network, Params, cast_matrices
from train.runs import Run
from train.tokenizer import Tokenizer

# Tokens of each prompt that are read at once: bounds the memory that reading takes beside the cache.
PREFILL_CHUNK = 4096
# Tokens between two looks at what was drawn, when text is streamed.
STREAM_TOKENS = 8
DEFAULT_MAX_TOKENS = 200
NO_TOKEN = -1
# Logits divided by less could overflow; far above it, the most likely token is drawn always.
LEAST_TEMPERATURE = 1e-6


class Sampling(NamedTuple):
    """How a token is drawn from its logits: `softmax(logits / temperature)`, cut by `top_k`, then by `top_p`.

    `temperature` 0 takes the most likely. `top_k` keeps that many of the most likely, and those as likely as the last of
    them. `top_p` keeps the smallest set of most likely tokens whose probability, after temperature and `top_k`, is at least
    p; among equally likely ones the lower ids come first. With probabilities 0.25, 0.5, 0.25, `top_p` 0.5 keeps the second
    alone, 0.6 the first and the second, 0.8 all three. None: all are kept.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Raise `ValueError` for what cannot be drawn with."""
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be 0, which takes the most likely token, or a finite number of at "
                f"least {LEAST_TEMPERATURE}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps all tokens)")


def sample(logits: Float[Array, "B vocab"], keys: Array, sampling: Sampling) -> Int32[Array, "B"]:
    """One token for each row of logits, with the row's own key of `keys` `[B]`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
        probability = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
        # A token stays if those before it do not suffice.
        before = jnp.cumsum(probability, axis=-1) - probability
        rank = jnp.argsort(order, axis=-1)
        # The first always does, even if p is 0 in float32.
        stays = jnp.take_along_axis(before < sampling.top_p, rank, axis=-1) | (rank == 0)
        logits = jnp.where(stays, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


class State(NamedTuple):
    """B sequences, read so far and drawn so far; `read` and `advance` take it (donated) and give the next."""

    hidden: Float[Array, "B E"]  # the model's output at each row's last token
    caches: tuple
    tokens: Int32[Array, "B max_tokens"]  # drawn; NO_TOKEN behind them
    drawn: Int32[Array, ""]  # draws of each row that is not done
    done: Bool[Array, "B"]


@functools.partial(jax.jit, static_argnames=("network", "batch", "max_length", "max_tokens"))
def empty_state(network: Network, params: Params, *, batch: int, max_length: int, max_tokens: int) -> State:
    """Nothing read, nothing drawn."""
    return State(
        hidden=jnp.zeros((batch, network.config.model_dim), network.config.dtype),
        caches=network.model(params).init_cache(batch, max_length),
        tokens=jnp.full((batch, max_tokens), NO_TOKEN, jnp.int32),
        drawn=jnp.int32(0),
        done=jnp.zeros((batch,), bool),
    )


@functools.partial(jax.jit, static_argnames="network", donate_argnames="state")
def read(
    network: Network, params: Params, state: State, tokens: Int32[Array, "B T"], lengths: Int32[Array, "B"]
) -> State:
    """Read the first `lengths[b]` tokens of each row, behind what was read before."""
    hidden, caches = network.model(params).with_cache(tokens, state.caches, lengths)
    newest = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    return state._replace(hidden=jnp.where((lengths > 0)[:, None], newest, state.hidden), caches=caches)


@functools.partial(jax.jit, static_argnames=("network", "sampling", "stop"), donate_argnames="state")
def advance(
    network: Network,
    params: Params,
    state: State,
    keys: Array,
    limits: Int32[Array, "B"],
    until: int | Int32[Array, ""],
    *,
    sampling: Sampling,
    stop: tuple[int, ...],
) -> State:
    """Draw on until each row has drawn `until` tokens, or is done: has drawn `limits[b]` tokens, or one of `stop`.

    The i-th draw of row b depends on the model's output there, `keys[b]` and i alone, not on `until` or the other rows.
    """
    # Once, not at every token.
    model = network.model(cast_matrices(params, network.config.dtype))
    layers = model.unstacked_layers()

    def going_on(state: State) -> Array:
        return (state.drawn < until) & ~state.done.all()

    def one_token(state: State) -> State:
        row_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.drawn)
        token = sample(model.logits(state.hidden[:, None])[:, 0], row_keys, sampling)
        done = functools.reduce(jnp.logical_or, [token == each for each in stop], state.done)
        tokens = state.tokens.at[:, state.drawn].set(jnp.where(done, NO_TOKEN, token))
        done = done | (state.drawn + 1 >= limits)
        # A row that is done reads no more: its cache may be full.
        hidden, caches = model.with_cache(token[:, None], state.caches, (~done).astype(jnp.int32), layers)
        return State(hidden[:, 0], caches, tokens, state.drawn + 1, done)

    return lax.while_loop(going_on, one_token, state)


def _chunks(
    prompt: Int32[Array, "B T"], lengths: Int32[Array, "B"], chunk: int
) -> list[tuple[Int32[Array, "B chunk"], Int32[Array, "B"]]]:
    """Tokens and lengths for `read`: chunks of one size, so that one compiled program reads them all."""
    chunk = min(chunk, prompt.shape[1])
    prompt = jnp.pad(prompt, ((0, 0), (0, -prompt.shape[1] % chunk)))
    return [
        (prompt[:, start : start + chunk], jnp.clip(lengths - start, 0, chunk))
        for start in range(0, prompt.shape[1], chunk)
    ]


def generate_tokens(
    network: Network,
    params: Params,
    prompt: Int32[Array, "B T"],
    key: Array,
    *,
    max_tokens: int,
    sampling: Sampling,
    stop: int | tuple[int, ...] | None = None,
    lengths: Int32[Array, "B"] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Int32[Array, "B max_tokens"]:
    """Continue prompts by `max_tokens` tokens each; from a `stop` token on come -1.

    Args:
        network, params: the model.
        prompt: int32 `[B, T]`, T at least 1.
        key: random key, which row b folds b into; or `[B]` keys, one for each row.
        max_tokens: tokens to draw; the model's context should hold T + max_tokens.
        sampling: how to draw.
        stop: ends a sequence, and so does each of several; None: nothing does.
        lengths: int32 `[B]`, at least 1: the first `lengths[b]` tokens of row b are its prompt; all T if None.
        prefill_chunk: tokens of each prompt that are read at once.
    """
    batch, length = prompt.shape
    stop = (stop,) if isinstance(stop, int) else tuple(stop or ())
    lengths = jnp.full((batch,), length, jnp.int32) if lengths is None else lengths
    keys = key if key.ndim else jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    state = empty_state(network, params, batch=batch, max_length=length + max_tokens, max_tokens=max_tokens)
    for tokens, real in _chunks(prompt, lengths, prefill_chunk):
        state = read(network, params, state, tokens, real)
    limits = jnp.full((batch,), max_tokens, jnp.int32)
    return advance(network, params, state, keys, limits, max_tokens, sampling=sampling, stop=stop).tokens


def prompt_tokens(
    tokenizer: Tokenizer, prompt: str, context: int, *, name: str = "the prompt"
) -> Int32[np.ndarray, "T"]:
    """The tokens of a prompt; the end of a document, behind which another begins, for an empty one.

    Raises:
        ValueError: the prompt leaves no room in the context, or is empty where the tokenizer has no such token.
    """
    tokens = tokenizer.encode(prompt)
    if not len(tokens):
        if tokenizer.end_of_document is None:
            raise ValueError(
                f"{name} is empty, and this tokenizer has no token to begin a document with: give a prompt"
            )
        return np.asarray([tokenizer.end_of_document], np.int32)
    if len(tokens) >= context:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, but the model's context is {context}: "
            f"shorten it to at most {context - 1}"
        )
    return tokens


def stop_tokens(tokenizer: Tokenizer, stop: str | None) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's end of a document, where it has one, and that of `stop`, if given.

    Raises:
        ValueError: `stop` is not one token.
    """
    ends = () if tokenizer.end_of_document is None else (tokenizer.end_of_document,)
    if stop is None:
        return ends
    tokens = tokenizer.encode(stop)
    if len(tokens) != 1:
        raise ValueError(
            f"stop={stop!r} must be one token of the run's tokenizer, but it is {len(tokens)}: {tokens.tolist()[:8]}; "
            "give a shorter text, or none to stop at the end of a document"
        )
    return (*ends, int(tokens[0]))


class Continuation(NamedTuple):
    """What came after a prompt, without it, and without the token that ended it."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]  # ended by a stop token, or by the number of tokens
    prompt_tokens: int
    seed: int  # with which the prompt gets this text alone


class Speed(NamedTuple):
    """Seconds of the compiled programs alone, without their compilation, for all rows of a batch together."""

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    decode_steps: int

    def __str__(self) -> str:
        step = 1000 * self.decode_seconds / max(1, self.decode_steps)
        return (
            f"prefill: {self.prefill_tokens} tokens in {self.prefill_seconds:.3f} s, "
            f"{self.prefill_tokens / self.prefill_seconds:.1f} tokens/s; "
            f"decode: {self.decode_tokens} tokens in {self.decode_seconds:.3f} s, "
            f"{self.decode_tokens / self.decode_seconds:.1f} tokens/s, {step:.2f} ms a step"
        )


class Generated(NamedTuple):
    continuations: tuple[Continuation, ...]
    speed: Speed


def generate_batch(
    run: Run,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    max_tokens: int | None = None,
    seed: int = 0,
    stop: str | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    on_text: Callable[[int, str, bool], None] | None = None,
) -> Generated:
    """Continue prompts of any lengths at once; each gets what it gets alone (up to rounding, which differs by shape).

    Args:
        run: the model.
        prompts: texts, one or more; the empty one begins a document.
        sampling: how to draw.
        max_tokens: tokens to draw for each; 200, or what a prompt leaves of the context, if None.
        seed: prompt i is drawn with seed + i: alone with that seed, it gets the same text.
        stop: a text of one token that ends a text; the end of a document always does.
        prefill_chunk: tokens of each prompt that are read at once.
        on_text: called with a prompt's number, new text of it, and whether that is its end, while drawing goes on. The
            pieces are whole characters, and add up to the text.

    Raises:
        ValueError: a prompt does not fit, see `prompt_tokens`, or a number is out of range.
    """
    sampling.check()
    if not prompts:
        raise ValueError("there is no prompt: give one or more")
    if prefill_chunk < 1:
        raise ValueError(f"{prefill_chunk=} must be at least 1 token")
    if not 0 <= seed <= 2**31 - len(prompts):
        raise ValueError(f"{seed=} must be in 0 .. {2**31 - len(prompts)}, as prompt i is drawn with seed + i")
    network, params, tokenizer, context = run.network, run.params, run.tokenizer, run.config.context
    stop_ids = stop_tokens(tokenizer, stop)
    names = (
        ["the prompt"] if len(prompts) == 1 else [f"prompt {i} of {len(prompts)}" for i in range(1, 1 + len(prompts))]
    )
    rows = [prompt_tokens(tokenizer, text, context, name=name) for text, name in zip(prompts, names, strict=True)]
    limits = []
    for tokens, name in zip(rows, names, strict=True):
        room = context - len(tokens)
        limits.append(min(DEFAULT_MAX_TOKENS, room) if max_tokens is None else max_tokens)
        if not 1 <= limits[-1] <= room:
            raise ValueError(
                f"{max_tokens=} must lie between 1 and {room}: "
                f"{name} has {len(tokens)} of the context's {context} tokens"
            )

    lengths = np.asarray([len(tokens) for tokens in rows], np.int32)
    prompt = jnp.asarray(np.stack([np.pad(tokens, (0, lengths.max() - len(tokens))) for tokens in rows]), jnp.int32)
    state = empty_state(
        network,
        params,
        batch=len(rows),
        max_length=int((lengths + limits).max()),
        max_tokens=max(limits),
    )
    draw = functools.partial(
        advance,
        network,
        params,
        keys=jnp.stack([jax.random.key(seed + row) for row in range(len(rows))]),
        limits=jnp.asarray(limits, jnp.int32),
        sampling=sampling,
        stop=stop_ids,
    )
    chunks = _chunks(prompt, jnp.asarray(lengths), prefill_chunk)
    # Compiles both programs: rows of no tokens leave no trace, and no token is drawn.
    state = read(network, params, state, chunks[0][0], jnp.zeros_like(chunks[0][1]))
    state = jax.block_until_ready(draw(state=state, until=0))

    start = time.perf_counter()
    for chunk, real in chunks:
        state = read(network, params, state, chunk, real)
    jax.block_until_ready(state)
    prefill_seconds, decode_seconds, count = time.perf_counter() - start, 0.0, 0
    pieces = [Pieces(tokenizer) for _ in rows]
    while count < max(limits) and not all(piece.ended for piece in pieces):
        until = max(limits) if on_text is None else min(count + STREAM_TOKENS, max(limits))
        start = time.perf_counter()
        state = jax.block_until_ready(draw(state=state, until=until))
        decode_seconds += time.perf_counter() - start
        # To the host before the next call, which takes the state.
        new, done = np.asarray(state.tokens)[:, count:until], np.asarray(state.done)
        count = int(state.drawn)
        for row, piece in enumerate(pieces):
            if not piece.ended:
                text = piece.add(new[row][new[row] != NO_TOKEN], last=bool(done[row]))
                if on_text is not None and (text or piece.ended):
                    on_text(row, text, piece.ended)
    continuations = tuple(
        Continuation(
            text=piece.text,
            tokens=len(piece.ids),
            finish="length" if len(piece.ids) == limit else "stop",
            prompt_tokens=int(length),
            seed=seed + row,
        )
        for row, (piece, limit, length) in enumerate(zip(pieces, limits, lengths, strict=True))
    )
    decode_tokens = sum(continuation.tokens for continuation in continuations)
    return Generated(continuations, Speed(int(lengths.sum()), prefill_seconds, decode_tokens, decode_seconds, count))


class Pieces:
    """The text of tokens that come a few at a time, in pieces that end between two characters.

    A character's bytes may be in several tokens: what reads as U+FFFD at the end is kept back until more is known.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self.text, self.ended = "", False

    def add(self, ids: Sequence[int] | Int32[np.ndarray, "tokens"], *, last: bool) -> str:
        """The new text; with `last`, all that is left of it."""
        self.ids += map(int, ids)
        text = self._tokenizer.decode(np.asarray(self.ids, np.int32))
        text = text if last else text.rstrip("\ufffd")
        new, self.ended = text[len(self.text) :], last
        self.text += new
        return new


class InOrder:
    """Writes streamed texts one after the other, in the order of their prompts: what is drawn of a later one waits its turn.

    Args:
        prompts: written each before its text.
        write: takes text.
    """

    def __init__(self, prompts: Sequence[str], write: Callable[[str], object]):
        self._prompts, self._write = prompts, write
        self._waiting, self._ended, self._row = [""] * len(prompts), [False] * len(prompts), -1
        self._next()

    def __call__(self, row: int, text: str, ended: bool) -> None:
        """An `on_text` of `generate_batch`."""
        self._waiting[row] += text
        self._ended[row] = ended
        while self._row < len(self._prompts):
            text, self._waiting[self._row] = self._waiting[self._row], ""
            if text:
                self._write(text)
            if not self._ended[self._row]:
                return
            self._write("\n")
            self._next()

    def _next(self) -> None:
        self._row += 1
        if self._row < len(self._prompts):
            self._write(heading(self._row, len(self._prompts)) + self._prompts[self._row])


def heading(row: int, count: int) -> str:
    """The line above one of several texts; none above a single one."""
    return f"--- {row + 1} of {count}\n" if count > 1 else ""


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: a line of UTF-8 text each, or, in a .jsonl file, a JSON string each, which may hold line ends.

    Lines of white space alone are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 text, has no prompt, or a line of a .jsonl file is no JSON string.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): give a file with a prompt in each line") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt: object = line.removesuffix("\r")
        if path.suffix == ".jsonl":
            try:
                prompt = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} of {path} is not JSON ({error}): write a JSON string a line"
                ) from error
        if not isinstance(prompt, str):
            raise ValueError(f"line {number} of {path} is JSON, but no string: write a JSON string a line")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} has no prompt: write one in each line")
    return prompts


def generate(run: Run, prompt: str, *, sampling: Sampling, max_tokens: int | None, seed: int) -> str:
    """The continuation of a prompt, without the prompt; it ends early where the model ends the document.

    Raises:
        ValueError: as in `generate_batch`.
    """
    return generate_batch(run, [prompt], sampling=sampling, max_tokens=max_tokens, seed=seed).continuations[0].text
