"""What `benchmarks.decode` measures: one step of attention against a cache, and one of a whole model.

A step takes tens of microseconds: its calls are queued inside one jitted loop. A GPU keeps in its L2 cache what a small
problem reads, and a model with many layers would find none of it there; so the loop goes through several problems, together
larger than L2, in turn.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from benchmarks.checks import REFERENCE
from benchmarks.problems import Shape
from benchmarks.timing import CALLS_IN_LOOP, attempt, compile_all, measure, repeated, unfailed
from nsa_jax import KeyValue, NSACache, NSAConfig, ops
from nsa_jax.shapes import Gates, Out, Query
from nsa_jax.testing import assert_as_accurate
from pallas_kernels import decode_step
from pallas_kernels.tiles import Tiles
from train.config import ModelConfig
from train.model import Network, cast_matrices

L2_BYTES = 50 * 2**20  # of an H100 or H200
TIMES_L2 = 3  # the problems of a loop read so many times as much
MOST_COPIES = 16
FEWEST_TURNS = 2
CHECKED = (2048, 1, 31, 64, 777)  # lengths of the sequences of the first check


class Step(NamedTuple):
    """One query a sequence, and the cache that it reads."""

    query: Query
    compressed: KeyValue
    selected: KeyValue
    window: KeyValue  # a ring
    gates: Gates
    lengths: Int32[Array, "B"]


@functools.partial(jax.jit, static_argnames=("shape", "length", "config"))
def draw(seed: int, *, shape: Shape, length: int, config: NSAConfig) -> Step:
    """Seeded Gaussian queries, keys and values, and uniform gates; each cache is full."""
    keys = jax.random.split(jax.random.key(seed), 8)

    def normal(key: Array, length: int, heads: int, size: int) -> Array:
        return jax.random.normal(key, (shape.batch, length, heads, size), shape.dtype)

    def branch(key: Array, value: Array, length: int) -> KeyValue:
        return KeyValue(
            normal(key, length, shape.kv_heads, shape.head_dim),
            normal(value, length, shape.kv_heads, shape.value_head_dim),
        )

    return Step(
        normal(keys[0], 1, shape.heads, shape.head_dim),
        branch(keys[1], keys[2], config.num_compressed(length)),
        branch(keys[3], keys[4], length),
        branch(keys[5], keys[6], config.window),
        jax.random.uniform(keys[7], (shape.batch, 1, shape.heads, 3)).astype(shape.dtype),
        jnp.full((shape.batch,), length, jnp.int32),
    )


def attend(step: Step, *, config: NSAConfig, implementation: Any = "pallas") -> Out:
    return ops.decode_step(**step._asdict(), config=config, implementation=implementation)


def full_attention(step: Step, *, scale: float) -> Out:
    """cuDNN's full attention to the tokens of the selected branch, as its KV cache; heads of one size."""
    size, value_size = step.query.shape[-1], step.selected.value.shape[-1]
    if size != value_size:
        raise ValueError(f"cuDNN reads heads of one size, not {size} and {value_size}, and a cache is not to be padded")
    more: dict[str, Any] = dict(scale=scale, key_value_seq_lengths=step.lengths, implementation="cudnn")
    return jax.nn.dot_product_attention(step.query, *step.selected, **more)


def tokens_read(config: NSAConfig, length: int) -> int:
    """By a step of one sequence and key/value head: 5631 of 65536, at the paper's sizes."""
    blocks = min(config.num_selected, config.num_blocks(length))
    own = length - (config.num_blocks(length) - 1) * config.select_block
    # The query's own block, which may be shorter, is among the chosen ones where any is forced to be local.
    selected = blocks * config.select_block - (config.select_block - own if config.num_local else 0)
    return config.num_compressed(length) + selected + min(config.window, length)


def bytes_read(tokens: int, shape: Shape) -> int:
    itemsize = jnp.dtype(shape.dtype).itemsize
    return tokens * shape.batch * shape.kv_heads * (shape.head_dim + shape.value_head_dim) * itemsize


def copies_for(step_bytes: int) -> int:
    """How many problems a loop goes through."""
    return max(1, min(MOST_COPIES, math.ceil(TIMES_L2 * L2_BYTES / step_bytes)))


# -------------------------------------------------------------------------------------------------------------- checking


def check_ragged(shape: Shape, *, config: NSAConfig) -> dict[str, Any]:
    """Sequences of different lengths up to 2048, against the reference.

    Raises:
        AssertionError: they are wrong.
    """
    shape = Shape(len(CHECKED), shape.heads, shape.kv_heads, shape.head_dim, shape.value_head_dim, shape.dtype)
    step = draw(0, shape=shape, length=max(CHECKED), config=config)._replace(lengths=jnp.asarray(CHECKED, jnp.int32))
    out = jax.jit(functools.partial(attend, config=config))(step)
    return {"lengths": list(CHECKED), "error": check(compile_all(judge_jobs(step, config)), out, step)}


def judge_jobs(step: Any, config: NSAConfig) -> dict[str, Callable[[], Any]]:
    """Compilations of what `check` runs; a step as shapes will do."""
    judge = jax.jit(functools.partial(attend, config=config, implementation="xla"))
    jobs = {"judge.exact": lambda: judge.lower(jax.eval_shape(_widened, step)).compile(REFERENCE)}
    if step.query.dtype != jnp.float32:
        jobs["judge.rounded"] = lambda: judge.lower(step).compile(REFERENCE)
    return jobs


def check(compiled: dict[str, Any], out: Out, step: Step) -> float:
    """The largest error of a step's output, over the largest value; `compiled` is what `judge_jobs` gave.

    Raises:
        AssertionError: it errs more than twice as much as the reference in the same dtype.
    """
    exact = unfailed(compiled["judge.exact"])(_widened(step))
    rounded = exact if step.query.dtype == jnp.float32 else unfailed(compiled["judge.rounded"])(step)
    assert_as_accurate(out, rounded, exact, name="decode step", terms=step.selected.key.shape[1])
    return float(jnp.max(jnp.abs(out.astype(jnp.float32) - exact)) / jnp.max(jnp.abs(exact)))


def _widened(step: Step) -> Step:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, step)


def one_sequence(step: Step, sequence: int = 0) -> Step:
    return jax.tree.map(lambda x: x[sequence : sequence + 1], step)


# ---------------------------------------------------------------------------------------------------------------- timing


class Loop(NamedTuple):
    """A compiled loop of `steps` calls, some for each of several problems in turn; it returns the last result of each."""

    compiled: Any
    steps: int

    def time(self, problems: tuple[Step, ...]) -> dict[str, Any]:
        """The entry of one step."""

        entry = attempt(lambda: measure(lambda: self.compiled(*problems)).of_each(self.steps))
        memory = self.compiled.memory_analysis()
        return entry | {"temporary_bytes": int(memory.temp_size_in_bytes)}


def compile_loop(function: Callable[[Step], Any], problem: Any, copies: int) -> Loop:
    turns = max(FEWEST_TURNS, -(-CALLS_IN_LOOP // copies))

    def in_turn(*problems: Step) -> tuple[Any, ...]:
        return tuple(function(problem) for problem in problems)

    compiled = jax.jit(repeated(in_turn, turns)).lower(*[problem] * copies).compile()
    return Loop(compiled, turns * copies)


def with_tiles(tiles: Tiles, *, config: NSAConfig, scale: float) -> Callable[[Step], Out]:
    return lambda step: decode_step(*step, config=config, scale=scale, tiles=tiles)


# ----------------------------------------------------------------------------------------------------------- whole model


class Model(NamedTuple):
    """A compiled loop of `steps` steps of a model; the caches pass through it, donated, and end with the lengths they had."""

    network: Network
    compiled: Any
    steps: int
    tokens: Any  # shapes
    caches: Any

    def time(self) -> dict[str, Any]:
        """The entry of one step; parameters are random, and caches, which are full but for the tokens to come."""
        params, length = self.network.init(0), self.caches[0].max_length
        state = [jnp.zeros(self.tokens.shape, jnp.int32), _random(self.caches)]
        state[1] = _started(state[1], length - self.steps)

        def call() -> Any:
            state[:] = self.compiled(params, *state)
            return state[0]

        entry = attempt(lambda: measure(call).of_each(self.steps))
        memory = self.compiled.memory_analysis()
        sizes = dict(temporary_bytes=memory.temp_size_in_bytes, aliased_bytes=memory.alias_size_in_bytes)
        cache_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state[1]))
        if "ms" in entry:
            entry["tokens_per_second"] = self.tokens.shape[0] / entry["ms"] * 1e3
        return entry | {name: int(size) for name, size in sizes.items()} | {"cache_bytes": cache_bytes}


def compile_model(config: ModelConfig, vocab_size: int, *, batch: int, length: int) -> Model:
    """Greedy decoding near the end of caches of `length` tokens."""
    network, steps = Network(config, vocab_size), CALLS_IN_LOOP
    if length < steps:
        raise ValueError(f"{length=} must be at least {steps}: so many tokens are decoded before a cache is full")

    def run(params: Any, tokens: Array, caches: Any) -> Any:
        # As `train.generate.advance` does.
        model = network.model(cast_matrices(params, config.dtype))
        layers = model.unstacked_layers()

        def one(_: Any, carry: Any) -> Any:
            tokens, caches = carry
            hidden, caches = model.with_cache(tokens, caches, None, layers)
            return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32), caches

        tokens, grown = lax.fori_loop(0, steps, one, (tokens, caches))
        return tokens, _started(grown, length - steps)

    params = network.abstract_params()
    caches = jax.eval_shape(lambda params: network.model(params).init_cache(batch, length), params)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    compiled = jax.jit(run, donate_argnums=(1, 2)).lower(params, tokens, caches).compile()
    return Model(network, compiled, steps, tokens, caches)


def _random(caches: Any) -> Any:
    """Standard normal numbers, one key for each array; lengths are 0."""
    leaves, treedef = jax.tree.flatten(caches)
    drawn = []
    for key, x in zip(jax.random.split(jax.random.key(0), len(leaves)), leaves, strict=True):
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        drawn.append(jax.random.normal(key, x.shape, x.dtype) if floats else jnp.zeros(x.shape, x.dtype))
    return jax.tree.unflatten(treedef, drawn)


def _started(caches: Any, seen: int) -> tuple[NSACache, ...]:
    return tuple(cache._replace(lengths=jnp.full_like(cache.lengths, seen)) for cache in caches)
