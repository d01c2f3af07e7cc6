"""What must hold before anything is timed: a wrong kernel has no time.

The kernels' output and all their gradients are judged by `nsa_jax.testing.assert_as_accurate`: the reference in float32,
from the same rounded inputs and with the same blocks, is exact; the reference in the inputs' dtype is the measure. Their
choice of blocks is judged by the reference's scores.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from benchmarks.problems import InputKind, Operands, Shape, attend, draw
from benchmarks.timing import compile_all, unfailed
from nsa_jax import NSAConfig, select_blocks
from nsa_jax.shapes import Blocks
from nsa_jax.testing import assert_as_accurate, assert_best_blocks, block_scores

LONGEST = 4096
# The reference runs once: XLA's search for its fastest matrix products would take most of the benchmark's time.
REFERENCE: dict[str, Any] = {"xla_gpu_autotune_level": 0}
TAIL = 256  # queries of a long sequence that are checked


def check_kernels(
    shape: Shape, *, length: int, config: NSAConfig, kinds: tuple[InputKind, ...], alike: float, name: str = "pallas"
) -> list[dict[str, Any]]:
    """Output, gradients and choices of an implementation, at min(length, 4096) tokens.

    Returns:
        For each kind of input what was found, for the record.

    Raises:
        AssertionError: they are wrong.
    """
    length = min(length, LONGEST)
    problems = {kind: draw(0, shape=shape, length=length, config=config, kind=kind, alike=alike) for kind in kinds}
    operands, cotangent = problems[kinds[0]]
    blocks = jnp.zeros((shape.batch, length, shape.kv_heads, config.num_selected), jnp.int32)
    wide = _widened(operands)
    judged, judge = gradients(config, name), gradients(config, "xla")
    choose = functools.partial(select_blocks, config=config, num_keys=length)
    compiled = compile_all(
        {
            "actual": lambda: jax.jit(judged).lower(operands, blocks, cotangent).compile(),
            "rounded": lambda: jax.jit(judge).lower(operands, blocks, cotangent).compile(REFERENCE),
            "exact": lambda: jax.jit(judge).lower(wide, blocks, _widened(cotangent)).compile(REFERENCE),
            "chosen": lambda: (
                jax.jit(functools.partial(choose, implementation=name))
                .lower(operands.query, operands.compressed.key)
                .compile()
            ),
            "best": lambda: (
                jax.jit(functools.partial(best_blocks, config=config, num_keys=length))
                .lower(wide.query, wide.compressed.key)
                .compile(REFERENCE)
            ),
        }
    )
    compiled = {name: unfailed(program) for name, program in compiled.items()}

    found = []
    for kind, (operands, cotangent) in problems.items():
        wide = _widened(operands)
        blocks, scores = compiled["best"](wide.query, wide.compressed.key)
        results = (
            compiled["actual"](operands, blocks, cotangent),
            compiled["rounded"](operands, blocks, cotangent),
            compiled["exact"](wide, blocks, _widened(cotangent)),
        )
        errors = judge_all(*results)
        chosen = compiled["chosen"](operands.query, operands.compressed.key)
        rows = assert_best_blocks(chosen, blocks, scores)
        found.append({"length": length, "inputs": kind, "errors": errors, "tied_rows_that_differ": rows})
    return found


def tail_jobs(operands: Operands, cotangent: Any, *, config: NSAConfig) -> dict[str, Callable[[], Any]]:
    """Compilations of what `check_tail` runs; arguments as shapes."""
    length = operands.query.shape[1]
    run = gradients(config, "xla", query_start=max(0, length - TAIL))

    def exact(operands: Operands, blocks: Blocks, cotangent: Array) -> Any:
        places = dict(num_keys=length, query_start=max(0, length - TAIL))
        best, scores = best_blocks(operands.query, operands.compressed.key, config=config, **places)
        return run(operands, blocks, cotangent), best, scores

    def arguments(operands: Operands, cotangent: Array, wide: bool) -> tuple[Operands, Blocks, Array]:
        batch, length, kv_heads = operands.selected.key.shape[:3]
        blocks = jnp.zeros((batch, length, kv_heads, config.num_selected), jnp.int32)
        return _tail(operands, blocks, cotangent, wide=wide)

    def job(function: Callable[..., Any], wide: bool) -> Callable[[], Any]:
        shapes = jax.eval_shape(functools.partial(arguments, wide=wide), operands, cotangent)
        return lambda: jax.jit(function).lower(*shapes).compile(REFERENCE)

    return {"tail.rounded": job(run, False), "tail.exact": job(exact, True)}


def of_tail(cotangent: Array) -> Array:
    """0 but for the last queries."""
    return cotangent.at[:, :-TAIL].set(0)


def check_tail(
    compiled: dict[str, Any], operands: Operands, cotangent: Array, blocks: Blocks, out: Array, gradient: Operands
) -> dict[str, Any]:
    """The last queries of a sequence of any length: output, all gradients, and choice.

    Args:
        compiled: what `tail_jobs` gave.
        operands, cotangent: of the whole sequence.
        blocks: that the kernels chose.
        out, gradient: of the kernels, to be judged; with the cotangent `of_tail`, so that no other query adds to dk and dv.

    Raises:
        AssertionError: they are wrong.
    """
    rounded = unfailed(compiled["tail.rounded"])(*_tail(operands, blocks, cotangent, wide=False))
    exact, best, scores = unfailed(compiled["tail.exact"])(*_tail(operands, blocks, cotangent, wide=True))
    rows = assert_best_blocks(blocks[:, -TAIL:], best, scores)
    last = gradient._replace(query=gradient.query[:, -TAIL:], gates=gradient.gates[:, -TAIL:])
    actual = out[:, -TAIL:], last._asdict()
    errors = judge_all(*((out, _of_few_heads(gradient)) for out, gradient in (actual, rounded, exact)))
    return {"queries": min(TAIL, out.shape[1]), "errors": errors, "tied_rows_that_differ": rows}


def _of_few_heads(gradient: dict[str, Any]) -> dict[str, Any]:
    """Of dk and dv those of the first key/value head and of the last: they are long, and are judged on the host."""
    return {
        name: of if name in ("query", "gates") else jax.tree.map(lambda x: x[:, :, :: max(1, x.shape[2] - 1)], of)
        for name, of in gradient.items()
    }


def _tail(operands: Operands, blocks: Blocks, cotangent: Array, *, wide: bool) -> tuple[Operands, Blocks, Array]:
    """The last queries, with all keys."""
    last = operands._replace(query=operands.query[:, -TAIL:], gates=operands.gates[:, -TAIL:])
    cotangent = cotangent[:, -TAIL:]
    if wide:
        last, cotangent = _widened(last), _widened(cotangent)
    return last, blocks[:, -TAIL:], cotangent


def best_blocks(
    query: Array, compressed_key: Array, *, config: NSAConfig, num_keys: int, query_start: int = 0
) -> tuple[Blocks, Float[Array, "B T K M"]]:
    """The reference's choice, and the scores of all blocks."""
    places: dict[str, Any] = dict(config=config, num_keys=num_keys, query_start=query_start)
    chosen = select_blocks(query, compressed_key, implementation="xla", **places)
    return chosen, block_scores(query, compressed_key, **places)


def gradients(
    config: NSAConfig, implementation: str, *, query_start: int = 0
) -> Callable[[Operands, Blocks, Array], tuple[Array, dict[str, Any]]]:
    """`(operands, blocks, cotangent) -> (output, gradient of each operand by name)`."""

    def run(operands: Operands, blocks: Blocks, cotangent: Array) -> tuple[Array, dict[str, Any]]:
        more = dict(query_start=query_start, selected_blocks=blocks)
        out, vjp = jax.vjp(lambda x: attend(x, config=config, implementation=implementation, **more), operands)
        return out, vjp(cotangent.astype(out.dtype))[0]._asdict()

    return run


def judge_all(actual: Any, rounded: Any, exact: Any) -> dict[str, float]:
    """`assert_as_accurate` of each array; returns the largest error of each, over the largest exact value."""
    named = jax.tree_util.tree_flatten_with_path(actual)[0]
    errors = {}
    for (path, got), want, ideal in zip(named, jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        place = "out" if len(path) == 1 else "d" + jax.tree_util.keystr(path[1:], simple=True, separator=".")
        assert_as_accurate(got, want, ideal, name=place)
        error = float(jnp.max(jnp.abs(got.astype(jnp.float32) - ideal), initial=0.0))
        errors[place] = error / max(float(jnp.max(jnp.abs(ideal), initial=0.0)), 1e-30)
    return errors


def _widened(arrays: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
