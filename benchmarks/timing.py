"""Ahead-of-time compilation, and the rule of measurement.

A time is the median of several rounds of queued calls, each round ended by one `block_until_ready`, after a warm-up; so it
holds no dispatch that hides behind the device's work. Below `SHORT_MS` dispatch does not hide: the calls are queued inside
one jitted loop.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

ROUND_SECONDS = 0.05
ROUNDS, ROUNDS_OF_LONG_CALLS = 5, 3
LONG_SECONDS = 1.0
MOST_CALLS = 50
SHORT_MS, CALLS_IN_LOOP = 0.1, 20


class Timing(NamedTuple):
    """A measured time; `calls` a round."""

    ms: float
    rounds_ms: tuple[float, ...]
    calls: int
    in_loop: bool = False

    def of_each(self, steps: int) -> "Timing":
        """Of one of so many steps that a call queues."""
        rounds = tuple(ms / steps for ms in self.rounds_ms)
        return Timing(statistics.median(rounds), rounds, steps, in_loop=True)

    def entry(self) -> dict[str, Any]:
        """For the record."""
        return self._asdict() | {"rounds_ms": list(self.rounds_ms)}


def measure(
    call: Callable[[], Any],
    *,
    loop: Callable[[int], Callable[[], Any]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time a call, by the rule above.

    Args:
        call: queues work on the device and returns its arrays.
        loop: for a number of calls, a function that queues as many of them as one program; made only if `call` is short.
        clock: seconds.
    """
    jax.block_until_ready(call())
    one = _seconds(call, 1, clock)
    calls = max(1, min(MOST_CALLS, int(ROUND_SECONDS / max(one, 1e-9))))
    timing = _rounds(call, calls, ROUNDS if one < LONG_SECONDS else ROUNDS_OF_LONG_CALLS, clock)
    if loop is None or timing.ms >= SHORT_MS:
        return timing
    looped = loop(CALLS_IN_LOOP)
    jax.block_until_ready(looped())
    return _rounds(looped, 1, ROUNDS, clock).of_each(CALLS_IN_LOOP)


def _rounds(call: Callable[[], Any], calls: int, rounds: int, clock: Callable[[], float]) -> Timing:
    times = tuple(_seconds(call, calls, clock) * 1e3 / calls for _ in range(rounds))
    return Timing(statistics.median(times), times, calls)


def _seconds(call: Callable[[], Any], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return clock() - start


def repeated(function: Callable[..., Any], calls: int) -> Callable[..., Any]:
    """`function`, called `calls` times, one after the other: a program for jit.

    Arguments and result pass a barrier together, so that to XLA the next call's arguments depend on the last call's result:
    it can neither move the call out of the loop nor run it once. Every result is carried, so that none is dropped. One turn
    is no loop to XLA: two calls are the fewest.
    """
    if calls < 2:
        raise ValueError(f"{calls=} must be at least 2")

    def program(*arguments: Any) -> Any:
        def step(_: Any, state: Any) -> Any:
            arguments, _ = state
            return lax.optimization_barrier((arguments, function(*arguments)))

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *arguments))
        return lax.fori_loop(0, calls, step, (arguments, nothing))[1]

    return program


class Program(NamedTuple):
    """A compiled function. Its inputs are arguments, never constants: a constant may be folded into the result."""

    function: Callable[..., Any]
    compiled: Any
    out_shapes: Any

    def time(self, *arguments: Any) -> Timing:
        def loop(calls: int) -> Callable[[], Any]:
            compiled = jax.jit(repeated(self.function, calls)).lower(*arguments).compile()
            return lambda: compiled(*arguments)

        return measure(lambda: self.compiled(*arguments), loop=loop)

    def temporary_bytes(self) -> int:
        """Memory that the program holds at its peak beyond its arguments and its results.

        XLA plans all buffers of a program before it runs. `temp_size_in_bytes` is the size of the one allocation in which
        the intermediates live, including the workspaces that library calls ask for; arguments and results (for a backward
        program: the gradients) are allocated apart and not in it. Buffers whose lifetimes do not overlap share bytes.
        """
        return int(self.compiled.memory_analysis().temp_size_in_bytes)


def compile_program(function: Callable[..., Any], *shapes: Any) -> Program:
    """Compile for arguments of these shapes (`jax.ShapeDtypeStruct`s or arrays, in any pytrees)."""
    traced = jax.jit(function).trace(*shapes)
    out_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), traced.out_info)
    return Program(function, traced.lower().compile(), out_shapes)


class Passes(NamedTuple):
    """Forward, backward and both of a function, each its own program; a failure stands in the place of its program."""

    forward: Program | Exception
    both: Program | Exception
    backward: tuple[Program, Program] | Exception  # forward that also returns the vjp function; the vjp function


def passes_jobs(
    name: str, function: Callable[..., Any], arguments: tuple[Any, ...], cotangent: Any
) -> dict[str, Callable[[], Any]]:
    """Compilations for `compile_all`; `passes_from` collects what they gave.

    `both` is `(cotangent, *arguments) -> (function(*arguments), gradients)`. The backward pass alone is the vjp function,
    which is a pytree with the forward's residuals: it is an argument of the timed program.
    """

    def both(cotangent: Any, *arguments: Any) -> Any:
        out, vjp = jax.vjp(function, *arguments)
        return out, vjp(cotangent)

    def backward() -> tuple[Program, Program]:
        first = compile_program(lambda *arguments: jax.vjp(function, *arguments), *arguments)
        return first, compile_program(lambda vjp, cotangent: vjp(cotangent), first.out_shapes[1], cotangent)

    return {
        f"{name}.forward": lambda: compile_program(function, *arguments),
        f"{name}.both": lambda: compile_program(both, cotangent, *arguments),
        f"{name}.backward": backward,
    }


def passes_from(name: str, compiled: Mapping[str, Any]) -> Passes:
    return Passes(*(compiled[f"{name}.{which}"] for which in Passes._fields))


def time_passes(passes: Passes, arguments: tuple[Any, ...], cotangent: Any) -> dict[str, dict[str, Any]]:
    """Entries `forward`, `backward` and `both` (whose entry also has `temporary_bytes`) for the record."""

    def backward() -> Timing:
        first, second = unfailed(passes.backward)
        vjp = jax.block_until_ready(first.compiled(*arguments))[1]
        return second.time(vjp, cotangent)

    entries = {
        "forward": attempt(lambda: unfailed(passes.forward).time(*arguments)),
        "backward": attempt(backward),
        "both": attempt(lambda: unfailed(passes.both).time(cotangent, *arguments)),
    }
    if not isinstance(passes.both, Exception):
        entries["both"]["temporary_bytes"] = passes.both.temporary_bytes()
    return entries


def attempt(timed: Callable[[], Timing]) -> dict[str, Any]:
    """The entry of a measurement; one that fails, as for want of memory, leaves its error and ends nothing."""
    try:
        return timed().entry()
    except Exception as error:
        return {"error": shortened(error)}


def unfailed(result: Any) -> Any:
    """What `compile_all` gave, raised if it is an error."""
    if isinstance(result, Exception):
        raise result
    return result


def shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


def compile_groups(groups: Mapping[Any, Mapping[str, Callable[[], Any]]]) -> dict[Any, dict[str, Any]]:
    """`compile_all` of each group's jobs, all side by side."""
    compiled = compile_all({(group, name): job for group, jobs in groups.items() for name, job in jobs.items()})
    return {group: {name: compiled[group, name] for name in jobs} for group, jobs in groups.items()}


def compile_all(jobs: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Run compilations side by side (compiling releases Python's lock); each gives its result, or the exception it raised."""

    def one(job: Callable[[], Any]) -> Any:
        try:
            return job()
        except Exception as error:
            return error

    with ThreadPoolExecutor(cpu_count() or 1) as pool:
        return dict(zip(jobs, pool.map(one, jobs.values()), strict=True))
