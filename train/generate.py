"""Text from a model: the prompt goes into the cache at once, then one token after the other, in one compiled program."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from train.model import Network, Params
from train.runs import Run
from train.tokenizer import Tokenizer


class Sampling(NamedTuple):
    """How a token is drawn from its logits.

    `temperature` 0 takes the most likely; `top_k` keeps that many of the most likely, all if None.
    """

    temperature: float = 0.8
    top_k: int | None = None

    def check(self) -> None:
        """Raise `ValueError` for what cannot be drawn with."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0 takes the most likely token)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")


def sample(logits: Float[Array, "B vocab"], key: Array, sampling: Sampling) -> Int32[Array, "B"]:
    """One token for each row of logits."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits / sampling.temperature).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("network", "max_tokens", "sampling", "stop"))
def generate_tokens(
    network: Network,
    params: Params,
    prompt: Int32[Array, "B T"],
    key: Array,
    *,
    max_tokens: int,
    sampling: Sampling,
    stop: int | None = None,
) -> Int32[Array, "B max_tokens"]:
    """Continue prompts by `max_tokens` tokens each; after a `stop` token come -1.

    Args:
        network, params: the model.
        prompt: int32 `[B, T]`, T at least 1.
        key: random key.
        max_tokens: tokens to draw; the model's context should hold T + max_tokens.
        sampling: how to draw.
        stop: ends a sequence; None: nothing does.
    """
    model = network.model(params)
    batch, length = prompt.shape
    hidden, caches = model.with_cache(prompt, model.init_cache(batch, length + max_tokens))

    def going_on(carry: tuple) -> Array:
        index, _, _, _, done = carry
        return (index < max_tokens) & ~done.all()

    def one_token(carry: tuple) -> tuple:
        index, logits, caches, tokens, done = carry
        drawn = sample(logits, jax.random.fold_in(key, index), sampling)
        if stop is not None:
            done = done | (drawn == stop)
        tokens = tokens.at[:, index].set(jnp.where(done, -1, drawn))
        hidden, caches = model.with_cache(drawn[:, None], caches)
        return index + 1, model.logits(hidden)[:, 0], caches, tokens, done

    tokens = jnp.full((batch, max_tokens), -1, jnp.int32)
    first = (jnp.int32(0), model.logits(hidden[:, -1:])[:, 0], caches, tokens, jnp.zeros((batch,), bool))
    return lax.while_loop(going_on, one_token, first)[3]


def prompt_tokens(tokenizer: Tokenizer, prompt: str, context: int) -> Int32[np.ndarray, "T"]:
    """The tokens of a prompt; the end of a document, behind which another begins, for an empty one.

    Raises:
        ValueError: the prompt leaves no room in the context, or is empty where the tokenizer has no such token.
    """
    tokens = tokenizer.encode(prompt)
    if not len(tokens):
        if tokenizer.end_of_document is None:
            raise ValueError(
                "the prompt is empty, and this tokenizer has no token to begin a document with: give a prompt"
            )
        return np.asarray([tokenizer.end_of_document], np.int32)
    if len(tokens) >= context:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, but the model's context is {context}: "
            f"shorten it to at most {context - 1}"
        )
    return tokens


def generate(run: Run, prompt: str, *, sampling: Sampling, max_tokens: int | None, seed: int) -> str:
    """The continuation of a prompt, without the prompt; it ends early where the model ends the document.

    Raises:
        ValueError: the prompt does not fit, see `prompt_tokens`, or a number is out of range.
    """
    sampling.check()
    context = run.config.context
    tokens = prompt_tokens(run.tokenizer, prompt, context)
    room = context - len(tokens)
    max_tokens = min(200, room) if max_tokens is None else max_tokens
    if not 1 <= max_tokens <= room:
        raise ValueError(
            f"{max_tokens=} must lie between 1 and {room}: the prompt has {len(tokens)} of the context's {context} tokens"
        )
    drawn = generate_tokens(
        run.network,
        run.params,
        jnp.asarray(tokens, jnp.int32)[None],
        jax.random.key(seed),
        max_tokens=max_tokens,
        sampling=sampling,
        stop=run.tokenizer.end_of_document,
    )
    return run.tokenizer.decode(np.asarray(drawn[0]))
