"""`python -m benchmarks.attention`: the passes of `nsa_attention` beside full attention, on one GPU.

At each length: forward, backward and both of NSA (its own selection, gradients with respect to the query, all keys and
values, and the gates) and of full attention through cuDNN; the window alone through cuDNN; JAX's own Pallas attention; each
kernel of NSA alone; and memory. First, the kernels are checked against the reference, with the same heads, dtype and config
at up to 4096 tokens, and at each length on the last queries; if they are wrong, nothing is timed.
"""

import dataclasses
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from benchmarks.command import WrongResult, command_line

PROG = "python -m benchmarks.attention"


@dataclasses.dataclass(frozen=True)
class Options:
    """Time Native Sparse Attention against full attention on one GPU, and write what was measured."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
    """Sequence lengths, in tokens."""
    heads: int = 64
    """Query heads."""
    kv_heads: tuple[int, ...] = (4,)
    """Key/value heads; everything is measured for each number given."""
    head_dim: int = 128
    """Head size of queries and keys."""
    value_head_dim: int = 128
    """Head size of values; full attention pads the smaller of the two."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of queries, keys and values."""
    batch: int = 1
    """Sequences."""
    inputs: Literal["random", "alike", "both"] = "both"
    """Queries drawn each by itself, neighbours alike as in text, or one after the other."""
    alike: float = 0.9
    """Correlation of queries of a run of 64, where they are alike."""
    parts: bool = True
    """Also time each kernel alone."""
    peer: bool = False
    """Also time fla-core's NSA, where torch and it are installed; it computes something else. Its own autotuning, which is
    not part of the times, takes about a minute a length."""
    peer_lengths: tuple[int, ...] = ()
    """The same, at these of the lengths alone."""
    json: Path | None = None
    """Record; docs/results/attention_DEVICE.json if not given."""
    plot: Path | None = None
    """Figure; docs/figures/attention.png if not given."""

    def kinds(self) -> tuple[Literal["random", "alike"], ...]:
        return ("random", "alike") if self.inputs == "both" else (self.inputs,)

    def with_peer(self, length: int) -> bool:
        return length in self.peer_lengths or (self.peer and not self.peer_lengths)


def run(options: Options, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, printing as it goes; returns the record, which is written after each length.

    Raises:
        NoGPU: there is no GPU.
        WrongResult: the kernels are wrong; nothing was timed from there on.
        ValueError: the options fit no problem.
    """
    from benchmarks import one_length, peer
    from benchmarks.checks import check_kernels
    from benchmarks.figure import describe, draw_attention
    from benchmarks.problems import Shape
    from benchmarks.record import ROOT, gpu, new_record, save, slug
    from benchmarks.report import break_even, points, report, summary
    from benchmarks.timing import compile_groups
    from nsa_jax import NSAConfig

    o, kinds = options, options.kinds()
    shapes = [Shape(o.batch, o.heads, k, o.head_dim, o.value_head_dim, o.dtype) for k in options.kv_heads]
    if not options.lengths or not shapes or min(options.lengths) < 1:
        raise ValueError(f"lengths={options.lengths} and kv_heads={options.kv_heads} must each hold positive numbers")
    if unknown := sorted(set(o.peer_lengths) - set(o.lengths)):
        raise ValueError(f"peer_lengths={unknown} must be among lengths={o.lengths}: NSA is timed at the same")
    device = gpu("benchmarks.attention")
    config = NSAConfig()
    path = options.json or ROOT / "docs" / "results" / f"attention_{slug(device.device_kind)}.json"
    record = new_record(device, "benchmarks.attention", arguments)
    record |= dict(options=_plain(options), config=dataclasses.asdict(config), checks=[], results=[], break_even=[])
    if options.head_dim != options.value_head_dim:
        record["full_attention_head_dim"] = max(options.head_dim, options.value_head_dim)
    if any(map(options.with_peer, options.lengths)):
        record["peer_differs"] = list(peer.DIFFERS)
        print("--peer: fla-core's NSA computes something else:", *(f"  - {line}" for line in peer.DIFFERS), sep="\n")

    plans = [(shape, length) for shape in shapes for length in sorted(o.lengths)]
    programs = {
        (shape, length): one_length.jobs(shape, length=length, config=config, with_parts=o.parts)
        for shape, length in plans
    }
    print(f"{device.device_kind}: {sum(map(len, programs.values()))} programs to compile", flush=True)
    try:
        with ThreadPoolExecutor(1) as beside:
            compiling = beside.submit(compile_groups, programs)
            for shape in shapes:
                print(shape, flush=True)
                for check in check_kernels(shape, length=max(o.lengths), config=config, kinds=kinds, alike=o.alike):
                    record["checks"].append({"kv_heads": shape.kv_heads} | check)
                    print(f"  correct at {check['length']} tokens, {check['inputs']} inputs", flush=True)
            compiled = compiling.result()
        more: dict[str, Any] = dict(kinds=kinds, alike=o.alike, with_parts=o.parts)
        for shape, length in plans:
            more |= dict(length=length, with_peer=o.with_peer(length))
            row = one_length.measure_length(compiled[shape, length], shape, config=config, **more)
            record["results"].append(row)
            print(summary(row), flush=True)
            save(record, path)
    except AssertionError as error:
        record["wrong"] = str(error)
        save(record, path)
        raise WrongResult(str(error)) from error
    for shape in shapes:
        for kind in kinds:
            found = break_even(points(record["results"], shape.kv_heads, kind))
            record["break_even"].append({"kv_heads": shape.kv_heads, "inputs": kind} | found._asdict())
    save(record, path)
    print(report(record))
    picture = options.plot or ROOT / "docs" / "figures" / "attention.png"
    try:
        draw_attention(record["results"], picture, title=describe(shapes[0], device.device_kind))
        print(f"written: {path}, {picture}")
    except ImportError as error:
        print(f"written: {path}; no figure: {error}")
    return record


def _plain(options: Options) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    return command_line(PROG, Options, lambda options: run(options, argv), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
