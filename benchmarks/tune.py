"""`python -m benchmarks.tune`: the fastest tiles of each kernel on this GPU, written into pallas_kernels/tiles.json.

For each kernel a list of candidates, the tiles of the table and of `tiles.rule` among them, is compiled, checked against the
result with the rule's tiles, and timed alone, as `kernels.py` describes. What is timed is what will run: tiles have rows for
all heads of a query (`tiles.as_held`), and the selected branch goes the way that it will go with what is written.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.command import command_line

PROG = "python -m benchmarks.tune"
# (rows, keys, warps, stages)
Candidate = tuple[int, int, int, int]

CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "window_forward": (
        *((128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        *((64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 3)),
    ),
    "window_dkv": (
        *((32, 64, 4, 3), (64, 64, 4, 2), (32, 128, 8, 2), (64, 64, 8, 2)),
        *((64, 64, 8, 3), (32, 32, 4, 2), (32, 64, 8, 3)),
    ),
    "compressed_forward": (
        *((128, 32, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
        *((128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3)),
    ),
    "range_dq": (
        (128, 64, 8, 3),
        (128, 64, 8, 2),
        (128, 32, 8, 3),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (32, 32, 4, 2),
    ),
    "compressed_dkv": (
        *((32, 64, 4, 3), (32, 64, 4, 4), (64, 64, 4, 2), (32, 32, 4, 2)),
        *((64, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2), (64, 64, 8, 3), (32, 64, 8, 3)),
    ),
    "scores": ((128, 16, 4, 2), (128, 16, 8, 2), (128, 16, 8, 3), (128, 32, 8, 2), (64, 16, 4, 2)),
    "choice": ((1, 0, 1, 1), (1, 0, 2, 1), (2, 0, 2, 1)),
    "selected_forced": ((128, 32, 4, 2), (128, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3)),
    "selected_forward": ((16, 32, 1, 2), (16, 64, 1, 2), (16, 32, 2, 3), (32, 32, 2, 2)),
    "selected_dq": ((16, 32, 1, 2), (16, 64, 1, 2), (16, 32, 2, 2), (32, 32, 2, 2)),
    "selected_dkv": (
        *((64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2)),
        *((64, 64, 8, 2), (64, 64, 8, 3), (128, 64, 8, 2), (32, 64, 8, 3)),
    ),
    "selected_by_block": ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (32, 64, 4, 2)),
    "selected_add": ((16, 0, 4, 1), (32, 0, 4, 1), (16, 0, 1, 1)),
}
MOST_ACCUMULATORS = (
    208  # float32 numbers a thread, of sums and scores; tiles with more spill, and take minutes to compile
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Time tiles of every kernel on one GPU, and write the fastest into pallas_kernels/tiles.json."""

    kv_heads: tuple[int, ...] = (4,)
    """Key/value heads; every number given makes entries of its own."""
    heads: int = 64
    """Query heads."""
    head_dim: tuple[int, ...] = (128,)
    """Head sizes of queries and keys, one for each entry."""
    value_head_dim: tuple[int, ...] = ()
    """Head sizes of values, in step with the head sizes of queries; the same if none is given."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of queries, keys and values."""
    length: int = 32768
    """Sequence length, in tokens."""
    batch: int = 1
    """Sequences."""
    inputs: Literal["random", "alike"] = "random"
    """Queries drawn each by itself, or alike among neighbours."""
    kernels: tuple[str, ...] = ()
    """Kernels to tune; those in use for this number of query heads a group if none is given."""
    table: Path | None = None
    """Table to write; pallas_kernels/tiles.json if not given."""
    dry_run: bool = False
    """Print what is best, and write nothing."""

    def head_sizes(self) -> list[tuple[int, int]]:
        values = self.value_head_dim or self.head_dim
        if len(values) != len(self.head_dim):
            raise ValueError(f"value_head_dim={values} must have as many sizes as head_dim={self.head_dim}, or none")
        return list(zip(self.head_dim, values))


def run(options: Options) -> None:
    """Tune each problem in turn; the table is written after each.

    Raises:
        NoGPU: there is no GPU.
        ValueError: the options fit no problem, or name no kernel.
    """
    from benchmarks.problems import Shape
    from benchmarks.record import git_state, gpu, table
    from pallas_kernels.support import capability_of
    from pallas_kernels.tiles import TABLE

    if unknown := sorted(set(options.kernels) - CANDIDATES.keys()):
        raise ValueError(f"there are no kernels {unknown}: choose from {', '.join(CANDIDATES)}")
    shapes = [
        Shape(options.batch, options.heads, kv_heads, size, value_size, options.dtype)
        for kv_heads in options.kv_heads
        for size, value_size in options.head_sizes()
    ]
    device = gpu("benchmarks.tune")
    path = options.table or TABLE
    commit, dirty = git_state()
    import jax

    for shape in shapes:
        print(f"{device.device_kind}, {shape}, {options.length} tokens", flush=True)
        found = tune(shape, length=options.length, kind=options.inputs, only=options.kernels)
        body = [[kernel, *_cells(times)] for kernel, times in found.items()]
        print(table(["kernel", "best tile", "ms", "runner-up", "ms", "tried"], body), flush=True)
        entry = {
            "device": device.device_kind,
            "compute_capability": capability_of(device),
            "dtype": shape.dtype,
            "head_dim": shape.head_dim,
            "value_head_dim": shape.value_head_dim,
            "group": shape.heads // shape.kv_heads,
            "jax": jax.__version__,
            "length": options.length,
            "commit": None if commit is None else commit[:12] + ("-dirty" if dirty else ""),
            "tiles": {kernel: list(times[0][1]) for kernel, times in found.items() if times},
        }
        if entry["tiles"] and not options.dry_run:
            path.write_text(format_table(merged(json.loads(path.read_text()) if path.exists() else [], entry)))
            print(f"written: {path}", flush=True)


def tune(
    shape: Any, *, length: int, kind: Literal["random", "alike"] = "random", only: Sequence[str] = ()
) -> dict[str, list[tuple[float, Candidate]]]:
    """For each kernel the milliseconds of its tiles, best first; tiles that fail or give another result are left out."""
    import jax

    from benchmarks import kernels
    from benchmarks.problems import draw
    from benchmarks.timing import compile_all, compile_program, shortened, unfailed
    from nsa_jax import NSAConfig
    from pallas_kernels.flash import Tile
    from pallas_kernels.support import capability_of
    from pallas_kernels.tiles import tiles_for

    config = NSAConfig()
    operands, cotangent = draw(1, shape=shape, length=length, config=config, kind=kind)
    current = tiles_for(operands.query, shape.kv_heads, shape.value_head_dim)
    capability = capability_of(jax.devices()[0])
    safe, tiles = to_time(shape, config=config, current=current, capability=capability)
    prepare = jax.jit(lambda *arrays: kernels.prepare(*arrays, config=config, tiles=safe))
    prepared = jax.block_until_ready(prepare(operands, cotangent))
    del operands, cotangent
    made = kernels.kernels(config=config, scale=shape.head_dim**-0.5, tiles=safe)
    names = only or kernels.names_in_use(safe, config)

    def job(name: str, tile: Tile) -> Any:
        return lambda: compile_program(made[name](tile), prepared)

    compiled = compile_all({f"{name} {tuple(tile)}": job(name, tile) for name in names for tile in tiles[name]})
    print(f"  {len(compiled)} programs compiled", flush=True)

    found: dict[str, list[tuple[float, Candidate]]] = {}
    for name in names:
        times = []
        try:
            expected = unfailed(compiled[f"{name} {tuple(tiles[name][0])}"]).compiled(prepared)
            jax.block_until_ready(expected)
        except Exception as error:
            print(f"  {name}: {tuple(tiles[name][0])} fails, so that nothing can be checked: {shortened(error)}")
            found[name] = []
            continue
        for tile in tiles[name]:
            try:
                program = unfailed(compiled[f"{name} {tuple(tile)}"])
                if (reason := disagreement(program.compiled(prepared), expected)) is not None:
                    print(f"  {name} {tuple(tile)}: WRONG, left out: {reason}", flush=True)
                    continue
                times.append((program.time(prepared).ms, tuple(tile)))
            except Exception as error:
                print(f"  {name} {tuple(tile)}: {shortened(error)[:160]}", flush=True)
        del expected
        found[name] = sorted(times)
    return found


def to_time(shape: Any, *, config: Any, current: Any, capability: str) -> tuple[Any, dict[str, list[Any]]]:
    """`Tiles` of what runs beside a kernel that is timed; and by kernel the tiles to time.

    The first of a kernel's tiles is the one that the others are compared with: the rule's. But a small group goes by block
    where tiles that hold one fit, and then no others are timed: with any of them written, that is the way it goes.

    Args:
        shape: a `Shape`.
        current: `Tiles` that are in use.
        capability: of the GPU.
    """
    from pallas_kernels.flash import Tile
    from pallas_kernels.selected_attention import held_keys
    from pallas_kernels.tiles import as_held, rule

    group = shape.heads // shape.kv_heads
    sizes: dict[str, Any] = dict(dtype=shape.dtype, size=shape.head_dim, value_size=shape.value_head_dim, group=group)
    safe = rule(**sizes)

    def held(kernel: str, tile: Tile) -> Tile:
        return as_held(kernel, tile, capability=capability, **sizes)

    tiles = {}
    for kernel, candidates in CANDIDATES.items():
        known = [held(kernel, getattr(of, kernel)) for of in (safe, current)]
        more = [held(kernel, Tile(*tile)) for tile in candidates]
        fitting = [tile for tile in more if fits(kernel, tile, shape, capability=capability)]
        # With rows for all heads of a query, several may be the same.
        tiles[kernel] = list(dict.fromkeys([*known, *fitting]))
    if safe.by_block:
        whole = {
            kernel: [tile for tile in tiles[kernel] if held_keys(config, tile) >= config.select_block]
            for kernel in ("selected_dkv", "selected_by_block")
        }
        if all(whole.values()):
            tiles |= whole
    first_of: dict[str, Any] = {kernel: found[0] for kernel, found in tiles.items()}
    return dataclasses.replace(safe, **first_of), tiles


def fits(kernel: str, tile: Any, shape: Any, *, capability: str) -> bool:
    """Whether a candidate is worth compiling: what it holds fits into shared memory and, as sums, into registers."""
    from pallas_kernels.block_selection import PACKED
    from pallas_kernels.flash import head_parts
    from pallas_kernels.tiles import shared_bytes, shared_limit

    width, value_width = (sum(part.width for part in head_parts(x)) for x in (shape.head_dim, shape.value_head_dim))
    rows, keys, warps, _ = tile
    if kernel in ("choice", "selected_add"):
        return True
    scores = rows * keys
    if kernel.endswith("_dkv"):
        sums = keys * (width + value_width) + 2 * scores
    elif kernel.endswith("_dq"):
        sums = rows * width + 2 * scores
    elif kernel == "scores":
        sums = PACKED * scores
    else:
        sums = rows * value_width + scores
    if sums > MOST_ACCUMULATORS * 32 * warps:
        return False
    return shared_bytes(kernel, tile, shape.dtype, shape.head_dim, shape.value_head_dim) <= shared_limit(capability)


def disagreement(actual: Any, expected: Any) -> str | None:
    """How a result differs from that of other tiles beyond rounding; None if it does not.

    Floats may differ by a few roundings of the largest; of rows of indices, one in 1000 may (blocks whose scores tie).
    """
    import jax
    import jax.numpy as jnp

    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(want.dtype, jnp.floating):
            share = float(jnp.mean(jnp.any(got != want, axis=-1).astype(jnp.float32)))
            if share > 1e-3:
                return f"{share:.2%} of the rows of indices differ"
            continue
        error, largest = (float(x) for x in _difference(got, want))
        terms = 64 if want.dtype == jnp.float32 else 4
        # A NaN is no smaller than anything.
        if not error <= terms * float(jnp.finfo(want.dtype).eps) * largest:
            return f"an error of {error:.3g} beside {largest:.3g}"
    return None


def _difference(got: Any, want: Any) -> Any:
    import jax
    import jax.numpy as jnp

    def largest(got: Any, want: Any) -> Any:
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        return jnp.max(jnp.abs(got - want)), jnp.max(jnp.abs(want))

    return jax.jit(largest)(got, want)


def _cells(times: Sequence[tuple[float, Candidate]]) -> list[str]:
    cells = [cell for ms, tile in times[:2] for cell in (str(tile), f"{ms:.3f}")]
    return [*cells, *["-"] * (4 - len(cells)), str(len(times))]


# ------------------------------------------------------------------------------------------------------------- the table

KEY = ("device", "compute_capability", "dtype", "head_dim", "value_head_dim", "group")
MADE = ("jax", "length", "commit")


def merged(entries: Sequence[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries with this one among them; it replaces the one of its key, but for tiles of kernels that it has not."""
    before = [other for other in entries if all(other[field] == entry[field] for field in KEY)]
    others = [other for other in entries if other not in before]
    tiles = {kernel: tile for other in before for kernel, tile in other["tiles"].items()} | entry["tiles"]
    return sorted([*others, entry | {"tiles": tiles}], key=lambda entry: tuple(entry[field] for field in KEY))


def format_table(entries: Sequence[dict[str, Any]]) -> str:
    """tiles.json as it is kept: a tile to a line, in the order of `Tiles`."""
    return "[\n" + ",\n".join(_format_entry(entry) for entry in entries) + "\n]\n"


def _format_entry(entry: dict[str, Any]) -> str:
    def fields(names: Sequence[str]) -> str:
        return ", ".join(f"{json.dumps(name)}: {json.dumps(entry[name])}" for name in names if name in entry)

    order = {kernel: place for place, kernel in enumerate(CANDIDATES)}
    kernels = sorted(entry["tiles"], key=lambda kernel: (order.get(kernel, len(order)), kernel))
    tiles = ",\n".join(f"     {json.dumps(kernel)}: {json.dumps(entry['tiles'][kernel])}" for kernel in kernels)
    made = f"   {fields(MADE)},\n" if any(name in entry for name in MADE) else ""
    return f"  {{{fields(KEY)},\n{made}" + '   "tiles": {\n' + tiles + "\n   }}"


def main(argv: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    return command_line(PROG, Options, run, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
