"""Speed knobs of the kernels: how much a program holds. None of them changes what is computed.

`tiles.json` holds what `python -m benchmarks.tune` found fastest, by device, dtype, head sizes and G; `rule` is for all else.
Nothing is timed when a program is traced.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from pallas_kernels import flash
from pallas_kernels.block_selection import PACKED
from pallas_kernels.flash import Tile, head_parts
from pallas_kernels.support import capability_of, default_device

# Two queries of the paper's groups: their union costs nothing where choices differ, and saves where they are alike.
SELECTED_ROWS = 32
# Groups that fill too little of a tile of one query.
BY_BLOCK_BELOW = 8
# A few for each processor of a large GPU: one that waits for memory wants others beside it.
DECODE_PROGRAMS = 264
DECODE_SELECTED_PROGRAMS = 192
# Which the rule holds whole, where a program can, for small groups to go by block: the paper's.
BLOCK = 64
# Their programs hold all heads of a query, however few rows they are given; `selected_dkv` in each tile that passes.
WHOLE_GROUPS = ("scores", "selected_forward", "selected_dq", "selected_dkv")
# Those of them that each of this package's functions runs.
OF_FUNCTION = {"attend": WHOLE_GROUPS, "select_blocks": ("scores",), "decode_step": ()}
# KiB of shared memory that a program may have, by compute capability; on any other supported GPU as many as on the smallest.
SHARED_KIB = {"8.0": 163, "9.0": 227, "10.0": 227}
LEAST_SHARED_KIB = 99
TABLE = Path(__file__).with_name("tiles.json")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A tile for each kernel; where rows or keys are 0, the kernel itself knows how many it holds."""

    window_forward: Tile
    window_dkv: Tile
    compressed_forward: Tile
    range_dq: Tile  # of all that is read in ranges
    compressed_dkv: Tile
    scores: Tile
    choice: Tile
    selected_forced: Tile
    selected_forward: Tile
    selected_dq: Tile
    selected_dkv: Tile
    selected_by_block: Tile  # forward by block
    selected_add: Tile  # sums of partial results
    decode_compressed: Tile
    decode_choice: Tile
    decode_selected: Tile
    decode_programs: int  # that share the compressed tokens of all sequences
    decode_selected_programs: int  # that share their chosen blocks; of the window each reads about as much
    by_block: bool  # whether the selected branch's forward and dq go by block


def tiles_for(query: Any, kv_heads: int, value_size: int) -> Tiles:
    """The table's tiles for the default device, or the rule's."""
    num_heads, size = query.shape[2:]
    device = default_device()
    return _lookup(device.device_kind, capability_of(device), str(query.dtype), size, value_size, num_heads // kv_heads)


@functools.cache
def _lookup(device: str, capability: str, dtype: str, size: int, value_size: int, group: int) -> Tiles:
    """Entries of these sizes are merged kernel by kernel, the nearest last, so that what was not tuned for this G is as for
    another: a kernel hardly knows how many of its rows are heads of one token. But `selected_dkv` of small groups is another
    kernel, which also forms dq, and how many keys it holds decides whether they go by block.
    """
    safe = rule(dtype, size, value_size, group)

    def near(entry: dict[str, Any]) -> bool:
        return (entry["group"] < BY_BLOCK_BELOW) == safe.by_block

    def distance(entry: dict[str, Any]) -> tuple[bool, bool, float]:
        return entry["device"] != device, not near(entry), abs(math.log2(entry["group"] / group))

    # H100 and H200 are one chip with two memories: the same capability will do.
    entries = [
        entry
        for entry in json.loads(TABLE.read_text())
        if entry["compute_capability"] == capability
        and (entry["dtype"], entry["head_dim"], entry["value_head_dim"]) == (dtype, size, value_size)
    ]
    tuned: dict[str, Any] = {}
    for entry in sorted(entries, key=distance, reverse=True):
        for kernel, tile in entry["tiles"].items():
            if near(entry) or kernel != "selected_dkv":
                tuned[kernel] = Tile(*tile) if isinstance(tile, list) else tile
    found = dataclasses.replace(safe, **tuned)
    sizes: dict[str, Any] = dict(capability=capability, dtype=dtype, size=size, value_size=value_size, group=group)
    held: dict[str, Any] = {name: as_held(name, getattr(found, name), **sizes) for name in WHOLE_GROUPS}
    return dataclasses.replace(found, **held)


def as_held(kernel: str, tile: Tile, *, capability: str, dtype: str, size: int, value_size: int, group: int) -> Tile:
    """The tile that a kernel has if it is given this one: with rows for all heads of a query.

    It has warps in proportion where these rows stay, fewer tiles under way and then fewer keys where it would not fit.
    """
    rows = max(16, flash.next_power_of_2(group))
    if kernel not in WHOLE_GROUPS or tile.rows >= rows:
        return tile
    warps = tile.warps if kernel == "selected_dkv" else min(8, tile.warps * rows // tile.rows)
    tile = tile._replace(rows=rows, warps=warps)
    while tile.stages > 1 or tile.keys > 16:
        if shared_bytes(kernel, tile, dtype, size, value_size) <= shared_limit(capability):
            break
        tile = tile._replace(stages=tile.stages - 1) if tile.stages > 1 else tile._replace(keys=tile.keys // 2)
    return tile


def shared_bytes(kernel: str, tile: Tile, dtype: str, size: int, value_size: int) -> int:
    """What a program holds at most in shared memory: what stays in it, and what passes, so many tiles under way."""
    width, value_width = (sum(part.width for part in head_parts(x)) for x in (size, value_size))
    rows, keys, _, stages = tile
    if kernel == "scores":
        held = (rows + PACKED * keys * stages) * width
    elif kernel.endswith("_dkv") or kernel == "selected_by_block":
        held = (keys + rows * stages) * (width + value_width)
    else:
        held = (rows + keys * stages) * (width + value_width)
    return held * jnp.dtype(dtype).itemsize


def shared_limit(capability: str) -> int:
    """Bytes."""
    return SHARED_KIB.get(capability, LEAST_SHARED_KIB) * 2**10


def why_no_room(function: str, query: Any, kv_heads: int, value_size: int) -> str | None:
    """Why programs that hold all heads of a query do not fit on the default device; None if they do.

    Args:
        function: of `OF_FUNCTION`.
    """
    device = default_device()
    limit = shared_limit(capability_of(device))
    found, dtype, size = tiles_for(query, kv_heads, value_size), str(query.dtype), query.shape[3]
    held = [shared_bytes(name, getattr(found, name), dtype, size, value_size) for name in OF_FUNCTION[function]]
    most = max(held, default=0)
    if most <= limit:
        return None
    return (
        f"{query.shape[2] // kv_heads} {dtype} query heads of {size} and {value_size} for each key/value head take "
        f"{most // 2**10} KiB of a program's shared memory, and {device.device_kind} has {limit // 2**10}"
    )


def rule(dtype: str, size: int, value_size: int, group: int) -> Tiles:
    """Tiles that fit any supported GPU, the smallest of which lets a program have 99 KiB, before `as_held` makes room for
    all heads of a query: then, too, but for float32 and more than 32 heads of sizes that have more than 300 numbers together.

    A tile of keys and values, of which two are under way, has 32 KiB, and one of rows too. By block, a program holds one tile
    of keys for good, in 64 KiB; so do dk and dv where the group is small.
    """
    itemsize = jnp.dtype(dtype).itemsize
    width, value_width = (sum(part.width for part in head_parts(x)) for x in (size, value_size))
    held = (width + value_width) * itemsize
    most = _power_of_2_below(2**15 // held, 16, 64)
    tile = Tile(most, most, 4, 2)
    # Small tiles, more of them under way: there is little else that hides the way to memory.
    decode = Tile(0, most // 2, 4, 4) if most > 16 else Tile(0, most, 4, 2)
    # Keys of several places at once.
    scored = _power_of_2_below(2**15 // (PACKED * width * itemsize), 16, min(32, most) if most > 16 else 16)
    scores = tile._replace(keys=scored, stages=2 if PACKED * scored * width * itemsize <= 2**15 else 1)
    kept = _power_of_2_below(2**16 // held, 16, 128)
    passing = _power_of_2_below((88 * 2**10 - kept * held) // (2 * held), 16, most)
    by_block = Tile(passing, kept, 4, 2 if (kept + 2 * passing) * held <= 96 * 2**10 else 1)
    selected = Tile(min(SELECTED_ROWS, most), most, 2, 2)
    # 128 numbers of the sums of 4 warps to a thread.
    selected_dkv = tile._replace(keys=min(most, _power_of_2_below(2**14 // (width + value_width), 16, 128)))
    passing = (96 * 2**10 // held - BLOCK) // 2
    if group < BY_BLOCK_BELOW and selected_dkv.keys < BLOCK and passing >= 16:
        warps = 4 if BLOCK * (width + value_width) <= 2**14 else 8
        selected_dkv = Tile(_power_of_2_below(passing, 16, most), BLOCK, warps, 2)
    return Tiles(
        window_forward=tile,
        window_dkv=tile,
        compressed_forward=tile,
        range_dq=tile,
        compressed_dkv=tile,
        scores=scores,
        choice=Tile(1, 0, 1, 1),
        selected_forced=tile,
        selected_forward=selected,
        selected_dq=selected,
        selected_dkv=selected_dkv,
        selected_by_block=by_block,
        selected_add=Tile(16, 0, 4, 1),
        decode_compressed=decode,
        decode_choice=Tile(0, 0, 8, 1),
        decode_selected=decode,
        decode_programs=DECODE_PROGRAMS,
        decode_selected_programs=DECODE_SELECTED_PROGRAMS,
        by_block=group < BY_BLOCK_BELOW,
    )


def _power_of_2_below(value: int, least: int, most: int) -> int:
    return max(least, min(most, 1 << max(0, value.bit_length() - 1)))
