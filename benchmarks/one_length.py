"""Everything that `benchmarks.attention` measures at one length, as a row of its record.

What fails, as for want of memory, leaves its error in the place of its times, and what is skipped the reason.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from benchmarks import baselines, kernels, peer
from benchmarks.checks import check_tail, of_tail, tail_jobs
from benchmarks.problems import InputKind, Operands, Shape, attend, draw
from benchmarks.report import PASSES, Entry, ratios
from benchmarks.timing import (
    attempt,
    compile_program,
    passes_from,
    passes_jobs,
    shortened,
    time_passes,
    unfailed,
)
from nsa_jax import NSAConfig
from nsa_jax.overlap import union_sizes
from pallas_kernels.tiles import tiles_for

SEED = 1


def jobs(shape: Shape, *, length: int, config: NSAConfig, with_parts: bool) -> dict[str, Callable[[], Any]]:
    """Compilations of what `measure_length` runs, for `compile_all`."""
    wanted = {name for name, reason in _skipped(shape, length).items() if reason is None}
    nsa = _nsa_jobs(shape, length=length, config=config, with_parts=with_parts)
    return nsa | _dense_jobs(shape, length=length, config=config, wanted=wanted)


def _skipped(shape: Shape, length: int) -> dict[str, str | None]:
    """Why a baseline is not measured, or None."""
    no_cudnn = baselines.why_not_cudnn(shape.dtype)
    return {"full": no_cudnn, "window": no_cudnn, "shipped": baselines.why_not_shipped(length)}


def measure_length(
    compiled: dict[str, Any],
    shape: Shape,
    *,
    length: int,
    config: NSAConfig,
    kinds: tuple[InputKind, ...],
    alike: float,
    with_parts: bool,
    with_peer: bool,
) -> dict[str, Any]:
    """Check and time one thing after the other; `compiled` is what `jobs` gave.

    Raises:
        AssertionError: the kernels' results for the last queries are wrong.
    """

    def make(kind: InputKind) -> tuple[Operands, Array]:
        return jax.block_until_ready(draw(SEED, shape=shape, length=length, config=config, kind=kind, alike=alike))

    skipped = _skipped(shape, length)
    skipped["peer"] = peer.why_not(shape) if with_peer else "not asked for: --peer, --peer-lengths"
    wanted = {name for name, reason in skipped.items() if reason is None}
    row: dict[str, Any] = {"kv_heads": shape.kv_heads, "length": length}
    row |= {"nsa": {}, "parts": {}, "unions": {}, "checks": {}}
    row |= {name: {"skipped": reason} for name, reason in skipped.items() if reason is not None}
    for kind in kinds:
        operands, cotangent = make(kind)
        try:
            row["checks"][kind], row["unions"][kind] = _check(compiled, operands, cotangent)
        except AssertionError:
            raise
        except Exception as error:
            row["checks"][kind] = {"error": shortened(error)}
            row["nsa"][kind] = {which: {"skipped": "it could not be checked"} for which in PASSES}
            continue
        row["nsa"][kind] = time_passes(passes_from("nsa", compiled), tuple(operands), cotangent)
        if with_parts:
            row["parts"][kind] = _time_parts(compiled, operands, cotangent)
    # Full attention takes the same time whatever the numbers are.
    operands, cotangent = make(kinds[0])
    for name, keys in (("full", operands.selected), ("window", operands.window)):
        if name in wanted:
            problem = jax.jit(baselines.dense_arguments)(operands.query, keys, cotangent)
            row[name] = time_passes(passes_from(name, compiled), *problem)
            del problem
    if "shipped" in wanted:
        try:
            row["shipped"] = _time_shipped(compiled, jax.jit(baselines.shipped_arguments)(operands, cotangent))
        except Exception as error:
            row["shipped"] = {"error": shortened(error)}
    del operands, cotangent, keys
    if "peer" in wanted:
        row["peer"] = peer.measure_peer(shape, length=length, config=config)
    row["ratios"] = {kind: ratios(row["full"], entries) for kind, entries in row["nsa"].items()}
    return row


# ------------------------------------------------------------------------------------------------------------ compiling


def _shapes(shape: Shape, length: int, config: NSAConfig) -> tuple[Operands, Any]:
    return jax.eval_shape(lambda: draw(SEED, shape=shape, length=length, config=config))


def _nsa_jobs(shape: Shape, *, length: int, config: NSAConfig, with_parts: bool) -> dict[str, Callable[[], Any]]:
    """Compilations of NSA's passes and of its kernels alone."""
    operands, cotangent = _shapes(shape, length, config)

    def nsa(*operands: Any) -> Array:
        return attend(Operands(*operands), config=config)

    tiles = tiles_for(operands.query, shape.kv_heads, shape.value_head_dim)
    jobs = passes_jobs("nsa", nsa, tuple(operands), cotangent)
    jobs["blocks"] = lambda: compile_program(
        lambda operands: kernels.chosen(operands, config=config, tiles=tiles), operands
    )
    jobs |= tail_jobs(operands, cotangent, config=config)
    if not with_parts:
        return jobs

    def prepare(operands: Operands, cotangent: Array) -> kernels.Prepared:
        return kernels.prepare(operands, cotangent, config=config, tiles=tiles)

    def job(part: kernels.Kernel) -> Callable[[], Any]:
        return lambda: compile_program(part, prepared)

    prepared = jax.eval_shape(prepare, operands, cotangent)
    jobs["prepare"] = lambda: compile_program(prepare, operands, cotangent)
    parts = kernels.parts(config=config, scale=shape.head_dim**-0.5, tiles=tiles)
    return jobs | {f"parts.{name}": job(part) for name, part in parts.items()}


def _dense_jobs(shape: Shape, *, length: int, config: NSAConfig, wanted: set[str]) -> dict[str, Callable[[], Any]]:
    """Compilations of full attention and of cuDNN's window."""
    operands, cotangent = _shapes(shape, length, config)
    scale = shape.head_dim**-0.5
    problem = jax.eval_shape(baselines.dense_arguments, operands.query, operands.selected, cotangent)
    jobs: dict[str, Callable[[], Any]] = {}
    if "full" in wanted:
        jobs |= passes_jobs("full", baselines.cudnn(scale=scale), *problem)
    if "window" in wanted:
        jobs |= passes_jobs("window", baselines.cudnn(scale=scale, window=config.window), *problem)
    if "shipped" in wanted:
        problem = jax.eval_shape(baselines.shipped_arguments, operands, cotangent)
        for blocks in baselines.SHIPPED_BLOCKS:
            jobs |= passes_jobs(f"shipped.{blocks}", baselines.shipped(blocks, scale=scale), *problem)
    return jobs


# --------------------------------------------------------------------------------------------------- checking and timing


def _check(compiled: dict[str, Any], operands: Operands, cotangent: Array) -> tuple[dict[str, Any], dict[str, float]]:
    """What `check_tail` found, and the unions of the blocks that the kernels chose."""
    blocks = unfailed(compiled["blocks"]).compiled(operands)
    out, gradient = unfailed(compiled["nsa.both"]).compiled(of_tail(cotangent), *operands)
    found = check_tail(compiled, operands, cotangent, blocks, out, Operands(*gradient))
    return found, union_sizes(blocks)


def _time_parts(compiled: dict[str, Any], operands: Operands, cotangent: Array) -> Entry:
    try:
        prepared = jax.block_until_ready(unfailed(compiled["prepare"]).compiled(operands, cotangent))
    except Exception as error:
        return {"error": shortened(error)}

    def one(program: Any) -> Entry:
        return attempt(lambda: unfailed(program).time(prepared))

    marked = "parts."
    return {name.removeprefix(marked): one(compiled[name]) for name in compiled if name.startswith(marked)}


def _time_shipped(compiled: dict[str, Any], problem: Any) -> Entry:
    """The best block sizes of each pass."""
    tried = {
        blocks: time_passes(passes_from(f"shipped.{blocks}", compiled), *problem) for blocks in baselines.SHIPPED_BLOCKS
    }
    best = {}
    for which in PASSES:
        blocks = min(tried, key=lambda blocks: tried[blocks][which].get("ms", math.inf))
        best[which] = tried[blocks][which] | {"blocks": list(blocks)}
    return best
