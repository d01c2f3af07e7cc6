"""What must hold before anything is timed: a wrong kernel has no time.

The kernels' output and all their gradients are judged by `nsa_jax.testing.assert_as_accurate`: the reference in float32,
from the same rounded inputs and with the same blocks, is exact; the reference in the inputs' dtype is the measure.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from benchmarks.problems import InputKind, Operands, Shape, attend, draw
from benchmarks.timing import compile_all, unfailed
from nsa_jax import NSAConfig, reference, select_blocks
from nsa_jax.shapes import Blocks
from nsa_jax.testing import assert_as_accurate

LONGEST = 4096
# The reference runs once: XLA's search for its fastest matrix products would take most of the benchmark's time.
REFERENCE: dict[str, Any] = {"xla_gpu_autotune_level": 0}
TAIL = 256  # queries of a long sequence that are checked
# Two blocks are tied when their float32 scores, sums of a few hundred probabilities, differ by no more.
TIE = 1e-4


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
                jax.jit(functools.partial(choose, implementation="xla"))
                .lower(wide.query, wide.compressed.key)
                .compile(REFERENCE)
            ),
        }
    )
    compiled = {name: unfailed(program) for name, program in compiled.items()}

    found = []
    for kind, (operands, cotangent) in problems.items():
        wide = _widened(operands)
        blocks = compiled["best"](wide.query, wide.compressed.key)
        results = (
            compiled["actual"](operands, blocks, cotangent),
            compiled["rounded"](operands, blocks, cotangent),
            compiled["exact"](wide, blocks, _widened(cotangent)),
        )
        errors = judge_all(*results)
        chosen = compiled["chosen"](operands.query, operands.compressed.key)
        rows = judge_choice(chosen, blocks, wide, config=config)
        found.append({"length": length, "inputs": kind, "errors": errors, "tied_rows_that_differ": rows})
    return found


def tail_jobs(operands: Operands, cotangent: Any, *, config: NSAConfig) -> dict[str, Callable[[], Any]]:
    """Compilations of what `check_tail` runs; arguments as shapes."""
    start = max(0, operands.query.shape[1] - TAIL)
    run = jax.jit(gradients(config, "xla", query_start=start, of_keys=False))

    def arguments(operands: Operands, cotangent: Array, wide: bool) -> tuple[Operands, Blocks, Array]:
        batch, length, kv_heads = operands.selected.key.shape[:3]
        blocks = jnp.zeros((batch, length, kv_heads, config.num_selected), jnp.int32)
        return _tail(operands, blocks, cotangent, wide=wide)

    def job(wide: bool) -> Callable[[], Any]:
        shapes = jax.eval_shape(functools.partial(arguments, wide=wide), operands, cotangent)
        return lambda: run.lower(*shapes).compile(REFERENCE)

    return {"tail.rounded": job(False), "tail.exact": job(True)}


def check_tail(
    compiled: dict[str, Any], operands: Operands, cotangent: Array, blocks: Blocks, out: Array, gradient: Operands
) -> dict[str, Any]:
    """The last queries of a sequence of any length: output, and gradients with respect to query and gates.

    Args:
        compiled: what `tail_jobs` gave.
        operands, cotangent: of the whole sequence.
        blocks: that the kernels chose.
        out, gradient: of the kernels, to be judged.

    Raises:
        AssertionError: they are wrong.
    """
    rounded, exact = (
        unfailed(compiled[f"tail.{name}"])(*_tail(operands, blocks, cotangent, wide=wide))
        for name, wide in (("rounded", False), ("exact", True))
    )
    actual = (out[:, -TAIL:], {"query": gradient.query[:, -TAIL:], "gates": gradient.gates[:, -TAIL:]})
    return {"queries": min(TAIL, out.shape[1]), "errors": judge_all(actual, rounded, exact)}


def _tail(operands: Operands, blocks: Blocks, cotangent: Array, *, wide: bool) -> tuple[Operands, Blocks, Array]:
    """The last queries, with all keys."""
    last = operands._replace(query=operands.query[:, -TAIL:], gates=operands.gates[:, -TAIL:])
    cotangent = cotangent[:, -TAIL:]
    if wide:
        last, cotangent = _widened(last), _widened(cotangent)
    return last, blocks[:, -TAIL:], cotangent


def gradients(
    config: NSAConfig, implementation: str, *, query_start: int = 0, of_keys: bool = True
) -> Callable[[Operands, Blocks, Array], tuple[Array, dict[str, Any]]]:
    """`(operands, blocks, cotangent) -> (output, gradient of each operand by name)`."""

    def run(operands: Operands, blocks: Blocks, cotangent: Array) -> tuple[Array, dict[str, Any]]:
        named = operands._asdict()
        wanted = {name: named[name] for name in (named if of_keys else ("query", "gates"))}

        def function(wanted: dict[str, Any]) -> Array:
            more = dict(query_start=query_start, selected_blocks=blocks)
            return attend(operands._replace(**wanted), config=config, implementation=implementation, **more)

        out, vjp = jax.vjp(function, wanted)
        return out, vjp(cotangent.astype(out.dtype))[0]

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


def judge_choice(chosen: Blocks, best: Blocks, operands: Operands, *, config: NSAConfig) -> int:
    """Every choice is the reference's, except between blocks whose scores tie; returns the number of rows that differ.

    Args:
        chosen: judged.
        best: the reference's, of these operands.
        operands: in float32.

    Raises:
        AssertionError: a row differs where scores do not tie.
    """
    differs = np.argwhere(np.any(np.asarray(chosen) != np.asarray(best), axis=-1))
    num_keys = operands.selected.key.shape[1]
    for sequence, token, head in differs.tolist():
        scores = np.asarray(_scores(operands, sequence, token, head, num_keys=num_keys, config=config))
        got, want = (set(x[sequence, token, head].tolist()) - {-1} for x in (chosen, best))
        gained, lost = scores[sorted(got - want)], scores[sorted(want - got)]
        tied = len(gained) == len(lost) and (not len(lost) or lost.max() - gained.min() <= TIE * lost.max())
        if not tied:
            raise AssertionError(
                f"selection: sequence {sequence}, query {token}, key/value head {head} chose {sorted(got)}, "
                f"but {sorted(want)} score higher: {lost.tolist()} against {gained.tolist()}"
            )
    return len(differs)


def _scores(
    operands: Operands, sequence: int, token: int, head: int, *, num_keys: int, config: NSAConfig
) -> Float[Array, "M"]:
    key = operands.compressed.key[sequence, :, head]
    group = operands.query.shape[2] // operands.compressed.key.shape[2]
    query = operands.query[sequence, token, head * group : (head + 1) * group]
    position = jnp.full((1,), token, jnp.int32)
    visible = reference.visible_compressed(position, key.shape[0], None, config)
    p_cmp = reference.probabilities(query[None], key, visible, query.shape[-1] ** -0.5).sum(axis=1)
    return reference.importance(p_cmp, config.num_blocks(num_keys), config)[0]


def _widened(arrays: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
