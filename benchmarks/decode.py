"""`python -m benchmarks.decode`: one step of decoding beside full attention on its KV cache, on one GPU.

For each number of sequences and each length: the attention step of NSA (`nsa_jax.ops.decode_step`, which is what the module
calls) and that of cuDNN; the bytes that the step must read, and so the rate at which it does; and the step of a whole language
model, its cache donated. First, the kernels are checked against the reference: sequences of different lengths, and for each
length and number of sequences that is timed, the first and the last sequence; if they are wrong, nothing more is timed.

`--tune` times tiles of the three kernels instead, and writes the fastest into pallas_kernels/tiles.json.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.command import WrongResult, command_line

PROG = "python -m benchmarks.decode"

# Of a tile: (rows, keys, warps, stages); the kernels know their rows.
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "decode_compressed": ((0, 32, 2, 4), (0, 64, 4, 2), (0, 64, 4, 3), (0, 64, 4, 4), (0, 128, 4, 2)),
    "decode_programs": (264, 320, 396, 512, 640, 792),
    "decode_choice": ((0, 0, 1, 1), (0, 0, 2, 1), (0, 0, 4, 1), (0, 0, 8, 1), (0, 0, 16, 1)),
    "decode_selected": ((0, 32, 4, 3), (0, 32, 4, 4), (0, 64, 2, 2), (0, 64, 4, 2), (0, 64, 4, 3), (0, 64, 4, 4)),
    "decode_selected_programs": (64, 96, 128, 192, 256, 384),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Time decoding with Native Sparse Attention against full attention on one GPU, and write what was measured."""

    lengths: tuple[int, ...] = (8192, 16384, 32768, 65536, 131072, 262144)
    """Tokens in each cache."""
    batches: tuple[int, ...] = (1, 8, 24)
    """Sequences; everything is measured for each number given, as memory allows."""
    heads: int = 64
    """Query heads."""
    kv_heads: int = 4
    """Key/value heads."""
    head_dim: int = 128
    """Head size of queries and keys."""
    value_head_dim: int = 128
    """Head size of values."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of queries, keys and values."""
    model: bool = True
    """Also time the step of a language model, the preset "base" with random parameters."""
    tune: bool = False
    """Time tiles at the first length and each number of sequences instead, and write those that are best in sum."""
    json: Path | None = None
    """Record; docs/results/decode_DEVICE.json if not given. With --tune, the table of tiles."""
    plot: Path | None = None
    """Figure; docs/figures/decode.png if not given."""


def run(options: Options, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, printing as it goes; returns the record, which is written after each row.

    Raises:
        NoGPU: there is no GPU.
        WrongResult: the kernels are wrong; nothing was timed from there on.
        ValueError: the options fit no problem.
    """
    from benchmarks.figure import draw_decode
    from benchmarks.problems import Shape
    from benchmarks.record import ROOT, gpu, new_record, save, slug
    from benchmarks.steps import check_ragged
    from benchmarks.timing import compile_groups
    from nsa_jax import NSAConfig

    o, config = options, NSAConfig()
    if not o.lengths or not o.batches or min(*o.lengths, *o.batches) < 1:
        raise ValueError(f"lengths={o.lengths} and batches={o.batches} must each hold positive numbers")
    shapes = [Shape(batch, o.heads, o.kv_heads, o.head_dim, o.value_head_dim, o.dtype) for batch in o.batches]
    device = gpu("benchmarks.decode")
    record = new_record(device, "benchmarks.decode", arguments)
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(o).items()}
    record |= dict(options=plain, config=dataclasses.asdict(config), results=[])
    path = options.json or ROOT / "docs" / "results" / f"decode_{slug(device.device_kind)}.json"
    print(f"{device.device_kind}, {shapes[0]}", flush=True)
    try:
        record["check"] = check_ragged(shapes[0], config=config)
        print(f"  correct at {record['check']['lengths']} tokens", flush=True)
        if options.tune:
            record["tiles"] = tune(shapes, length=o.lengths[0], config=config, device=device, table=options.json)
            return record
        more: dict[str, Any] = dict(config=config, with_model=o.model)
        programs = {length: _jobs(shapes, length=length, **more) for length in sorted(o.lengths)}
        print(f"  {sum(map(len, programs.values()))} programs to compile", flush=True)
        for length, compiled in compile_groups(programs).items():
            for row in measure_length(compiled, shapes, length=length, **more):
                record["results"].append(row)
                print(summary(row), flush=True)
                save(record, path)
    except AssertionError as error:
        record["wrong"] = str(error)
        save(record, path)
        raise WrongResult(str(error)) from error
    print(report(record))
    picture = options.plot or ROOT / "docs" / "figures" / "decode.png"
    try:
        size = f"{o.head_dim}" if o.head_dim == o.value_head_dim else f"{o.head_dim}/{o.value_head_dim}"
        heads = f"{o.heads} query heads and {o.kv_heads} key/value heads of {size}"
        draw_decode(record["results"], picture, title=f"One step of decoding: {device.device_kind}, {o.dtype}, {heads}")
        print(f"written: {path}, {picture}")
    except ImportError as error:
        print(f"written: {path}; no figure: {error}")
    return record


def _jobs(shapes: Sequence[Any], *, length: int, config: Any, with_model: bool) -> dict[str, Callable[[], Any]]:
    """Compilations of what `measure_length` runs, for `compile_all`."""
    import functools

    import jax

    from benchmarks import baselines, steps
    from train.config import PRESETS

    draw = functools.partial(steps.draw, 0, length=length, config=config)
    jobs: dict[str, Callable[[], Any]] = {}
    for shape in shapes:
        problem, copies = jax.eval_shape(functools.partial(draw, shape=shape)), _plan(shape, length, config)[1]
        nsa = functools.partial(steps.attend, config=config)
        jobs[f"nsa.{shape.batch}"] = functools.partial(steps.compile_loop, nsa, problem, copies)
        if baselines.why_not_cudnn(shape.dtype) is None:
            full = functools.partial(steps.full_attention, scale=shape.head_dim**-0.5)
            jobs[f"full.{shape.batch}"] = functools.partial(steps.compile_loop, full, problem, copies)
        if with_model:
            sizes = dict(batch=shape.batch, length=length)
            jobs[f"model.{shape.batch}"] = functools.partial(
                steps.compile_model, PRESETS["base"][1].model, 8192, **sizes
            )
    alone = dataclasses.replace(shapes[0], batch=1)
    return jobs | steps.judge_jobs(jax.eval_shape(functools.partial(draw, shape=alone)), config)


def _plan(shape: Any, length: int, config: Any) -> tuple[int, int]:
    """Bytes of a step, and problems in a loop."""
    from benchmarks import steps

    size = steps.bytes_read(steps.tokens_read(config, length), shape)
    return size, steps.copies_for(size)


def measure_length(
    compiled: dict[str, Any], shapes: Sequence[Any], *, length: int, config: Any, with_model: bool
) -> Any:
    """A row of the record for each number of sequences; what fails, as for want of memory, leaves its error.

    Args:
        compiled: what `_jobs` gave.

    Raises:
        AssertionError: the kernels are wrong.
    """
    from benchmarks import baselines, steps
    from benchmarks.timing import shortened

    no_full = baselines.why_not_cudnn(shapes[0].dtype)
    for shape in shapes:
        size, copies = _plan(shape, length, config)
        row: dict[str, Any] = dict(batch=shape.batch, length=length, bytes=size, copies=copies)
        row["full_bytes"] = steps.bytes_read(length, shape)
        loops = {
            name: compiled[f"{name}.{shape.batch}"] for name in ("nsa", "full") if name == "nsa" or no_full is None
        }
        try:
            row |= _measure_attention(compiled, loops, shape, length=length, config=config, copies=copies)
        except AssertionError:
            raise
        except Exception as error:
            row |= {name: {"error": shortened(error)} for name in loops}
        if no_full is not None:
            row["full"] = {"skipped": no_full}
        if with_model:
            row["model"] = _attempt(compiled[f"model.{shape.batch}"])
        if "ms" in row["nsa"]:
            row["terabytes_per_second"] = size / row["nsa"]["ms"] / 1e9
            if "ms" in row["full"]:
                row["ratio"] = row["full"]["ms"] / row["nsa"]["ms"]
        yield row


def _measure_attention(
    compiled: dict[str, Any], loops: dict[str, Any], shape: Any, *, length: int, config: Any, copies: int
) -> dict[str, Any]:
    """Check the first and the last sequence, then time; the problems are gone when this returns."""
    import jax

    from benchmarks import steps
    from benchmarks.timing import unfailed

    problems = tuple(
        jax.block_until_ready(steps.draw(seed, shape=shape, length=length, config=config)) for seed in range(copies)
    )
    out = unfailed(loops["nsa"]).compiled(*problems)[0]
    errors = [
        steps.check(compiled, out[i : i + 1], steps.one_sequence(problems[0], i)) for i in sorted({0, shape.batch - 1})
    ]
    return {"errors_of_sequences": errors} | {name: _attempt(loop, problems) for name, loop in loops.items()}


def _attempt(compiled: Any, *arguments: Any) -> dict[str, Any]:
    from benchmarks.timing import shortened, unfailed

    try:
        return unfailed(compiled).time(*arguments)
    except Exception as error:
        return {"error": shortened(error)}


# ---------------------------------------------------------------------------------------------------------------- tiles


def tune(
    shapes: Sequence[Any], *, length: int, config: Any, device: Any, table: Path | None = None
) -> dict[str, list[tuple[float, Any]]]:
    """Of each knob the candidates, the others being as they are, with the mean over numbers of sequences of their time in
    proportion to the present one's; the best are written to the table.

    One knob after the other, each starting from the best of those before it.
    """
    import functools

    import jax
    import jax.numpy as jnp

    from benchmarks import steps
    from benchmarks.record import git_state
    from benchmarks.timing import compile_all, shortened, unfailed
    from benchmarks.tune import disagreement, format_table, merged
    from pallas_kernels.flash import Tile
    from pallas_kernels.support import capability_of
    from pallas_kernels.tiles import TABLE, tiles_for

    shape = shapes[0]
    draw = functools.partial(steps.draw, length=length, config=config)
    best = tiles_for(jnp.zeros((1, 1, shape.heads, shape.head_dim), shape.dtype), shape.kv_heads, shape.value_head_dim)
    sized = [(shape, steps.copies_for(steps.bytes_read(steps.tokens_read(config, length), shape))) for shape in shapes]
    found: dict[str, list[tuple[float, Any]]] = {}
    for knob, candidates in CANDIDATES.items():
        values: list[Any] = [x if isinstance(x, int) else Tile(*x) for x in candidates]
        values = list(dict.fromkeys([getattr(best, knob), *values]))

        def job(value: Any, shape: Any, copies: int, knob: str = knob, best: Any = best) -> Callable[[], Any]:
            tiles = dataclasses.replace(best, **{knob: value})
            function = steps.with_tiles(tiles, config=config, scale=shape.head_dim**-0.5)
            problem = jax.eval_shape(functools.partial(draw, 0, shape=shape))
            return lambda: steps.compile_loop(function, problem, copies)

        pairs = [(value, shape, copies) for value in values for shape, copies in sized]
        compiled = compile_all({f"{value} {shape}": job(value, shape, copies) for value, shape, copies in pairs})
        ratios: dict[Any, list[float]] = {value: [] for value in values}
        for shape, copies in sized:
            problems = tuple(jax.block_until_ready(draw(seed, shape=shape)) for seed in range(copies))
            expected = present = None
            for value in values:
                try:
                    loop = unfailed(compiled[f"{value} {shape}"])
                    out = loop.compiled(*problems)[0]
                    expected = out if expected is None else expected
                    if (reason := disagreement(out, expected)) is not None:
                        print(f"  {knob} {value}: WRONG, left out: {reason}", flush=True)
                        continue
                    ms = loop.time(problems)["ms"]
                except Exception as error:
                    print(f"  {knob} {value}, {shape.batch} sequences: {shortened(error)[:160]}", flush=True)
                    continue
                present = ms if present is None else present
                ratios[value].append(ms / present)
                print(
                    f"  {knob} {tuple(value) if isinstance(value, Tile) else value}, {shape.batch}: {ms * 1e3:.1f} us",
                    flush=True,
                )
            del problems
        whole = [(sum(x) / len(x), value) for value, x in ratios.items() if len(x) == len(sized)]
        found[knob] = sorted(whole, key=lambda pair: pair[0])
        if whole:
            best = dataclasses.replace(best, **{knob: found[knob][0][1]})
    commit, dirty = git_state()
    entry = {
        "device": device.device_kind,
        "compute_capability": capability_of(device),
        "dtype": shape.dtype,
        "head_dim": shape.head_dim,
        "value_head_dim": shape.value_head_dim,
        "group": shape.heads // shape.kv_heads,
        "jax": jax.__version__,
        "length": length,
        "commit": None if commit is None else commit[:12] + ("-dirty" if dirty else ""),
        "tiles": {knob: list(value) if isinstance(value, Tile) else value for knob, ((_, value), *_) in found.items()},
    }
    path = table or TABLE
    path.write_text(format_table(merged(json.loads(path.read_text()) if path.exists() else [], entry)))
    print(f"best: {entry['tiles']}\nwritten: {path}")
    return found


# --------------------------------------------------------------------------------------------------------------- reports


def summary(row: dict[str, Any]) -> str:
    """A line for a row of the record."""
    parts = [f"  B={row['batch']} {row['length']} tokens: NSA {_us(row['nsa'])}, cuDNN {_us(row['full'])}"]
    if "ratio" in row:
        parts.append(f"{row['ratio']:.1f}x")
    if "terabytes_per_second" in row:
        parts.append(f"{row['terabytes_per_second']:.2f} TB/s")
    if "model" in row:
        parts.append(f"model {_us(row['model'])}")
    return ", ".join(parts)


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    from benchmarks.record import table

    header = ["B  tokens", "NSA us", "cuDNN us", "ratio", "MB read", "TB/s", "problems", "model us", "tokens/s"]
    rows = [
        [
            f"{row['batch']:<2} {row['length']:>7}",
            _us(row["nsa"]),
            _us(row["full"]),
            f"{row['ratio']:.1f}" if "ratio" in row else "-",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['terabytes_per_second']:.2f}" if "terabytes_per_second" in row else "-",
            str(row["copies"]),
            _us(row.get("model", {})),
            f"{row['model']['tokens_per_second']:.0f}" if "tokens_per_second" in row.get("model", {}) else "-",
        ]
        for row in record["results"]
    ]
    text = [
        "",
        "One step. Each loop goes through so many problems, in turn, so that L2 holds little of what a step reads.",
    ]
    text.append(table(header, rows))
    for row in record["results"]:
        for name in ("nsa", "full", "model"):
            if "error" in row.get(name, {}):
                text.append(f"  failed: B={row['batch']} {row['length']} tokens, {name}: {row[name]['error']}")
    return "\n".join(text)


def _us(entry: dict[str, Any]) -> str:
    return f"{entry['ms'] * 1e3:.1f}" if "ms" in entry else "-"


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    return command_line(PROG, Options, lambda options: run(options, argv), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
