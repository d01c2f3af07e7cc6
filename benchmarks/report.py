"""What measurements come to: ratios, break-even lengths, tables. Plain numbers in, text out."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.record import table

PASSES = ("forward", "backward", "both")
Entry = dict[str, Any]


def ratios(full: Entry, nsa: Entry) -> dict[str, float]:
    """Times of full attention over NSA's, for each pass that both have."""
    return {
        which: full[which]["ms"] / nsa[which]["ms"]
        for which in PASSES
        if "ms" in full.get(which, {}) and "ms" in nsa.get(which, {})
    }


class BreakEven(NamedTuple):
    """The length from which NSA's forward + backward is the faster one; between measured lengths, in logarithms."""

    tokens: float | None
    meaning: str


def points(results: Sequence[dict[str, Any]], kv_heads: int, kind: str) -> list[tuple[int, float]]:
    """Lengths and ratios of forward + backward."""
    rows = (row for row in results if row["kv_heads"] == kv_heads)
    return [(row["length"], row["ratios"][kind]["both"]) for row in rows if "both" in row["ratios"].get(kind, {})]


def break_even(measured: Sequence[tuple[int, float]]) -> BreakEven:
    """From lengths and their ratios full / NSA: 0.5 at 4096 and 2.0 at 16384 break even at 8192.

    If the ratio crosses 1 more than once, the last time counts: from there on NSA stays ahead.
    """
    measured = sorted(measured)
    if not measured:
        return BreakEven(None, "not measured")
    behind = [i for i, (_, ratio) in enumerate(measured) if ratio < 1.0]
    if not behind:
        return BreakEven(float(measured[0][0]), "at most: the shortest length measured")
    last = behind[-1]
    if last == len(measured) - 1:
        return BreakEven(None, f"more than {measured[-1][0]}, the longest length measured")
    (short, low), (long, high) = measured[last], measured[last + 1]
    share = -math.log(low) / (math.log(high) - math.log(low))
    return BreakEven(math.exp(math.log(short) + share * (math.log(long) - math.log(short))), "interpolated")


def summary(row: dict[str, Any]) -> str:
    """One line of a row, as soon as it is measured."""
    said = [f"cuDNN {_times(row['full'])}"]
    said += [f"NSA ({kind}) {_times(entries)}" for kind, entries in row["nsa"].items()]
    lines = [f"  {row['length']} tokens, forward / backward / both in ms: " + "; ".join(said)]
    for name in ("full", "window", "shipped", "peer"):
        if "skipped" in row[name]:
            lines.append(f"    {name} is skipped: {row[name]['skipped']}")
    return "\n".join(lines)


def report(record: dict[str, Any]) -> str:
    """The tables at the end."""
    header = ["K  length  inputs", *(f"NSA {x}" for x in PASSES), *(f"cuDNN {x}" for x in PASSES)]
    header += [*(f"ratio {x}" for x in PASSES), "NSA MiB", "cuDNN MiB", "union of 4"]
    lines, parts = [], []
    for row in record["results"]:
        full = row["full"]
        for kind, entries in row["nsa"].items():
            place = f"{row['kv_heads']:<2} {row['length']:>7} {kind}"
            cells = [_number(x.get(which, {}).get("ms")) for x in (entries, full) for which in PASSES]
            cells += [_number(row["ratios"][kind].get(which)) for which in PASSES]
            memory = [x.get("both", {}).get("temporary_bytes") for x in (entries, full)]
            cells += [_number(None if size is None else size / 2**20, 0) for size in memory]
            lines.append([place, *cells, _number(row["unions"].get(kind, {}).get("4"), 1)])
            if kind in row["parts"]:
                parts.append((place, row["parts"][kind]))
    text = [
        "",
        "Times in ms; memory of forward + backward beyond arguments, output and gradients.",
        table(header, lines),
    ]
    if parts:
        names = [name for name in parts[0][1] if name != "error"]
        body = [[name, *(_number(entries.get(name, {}).get("ms"), 3) for _, entries in parts)] for name in names]
        text += ["", "Kernels alone, ms", table(["kernel", *(place for place, _ in parts)], body)]
    for name in ("window", "shipped", "peer"):
        rows = [row for row in record["results"] if "forward" in row.get(name, {})]
        body = [
            [
                f"{row['kv_heads']:<2} {row['length']:>7}",
                *(_number(row[name].get(which, {}).get("ms")) for which in PASSES),
            ]
            for row in rows
        ]
        if body:
            title = {"window": "cuDNN, window alone", "shipped": "JAX's own Pallas attention", "peer": "fla-core's NSA"}
            text += ["", f"{title[name]}, ms", table(["K  length", *PASSES], body)]
    failures = [line for row in record["results"] for line in errors(row)]
    if failures:
        text += ["", "Failed:", *failures]
    text.append("")
    for found in record["break_even"]:
        tokens = "" if found["tokens"] is None else f"{found['tokens']:.0f} tokens, "
        text.append(
            f"break-even of forward + backward, K={found['kv_heads']}, {found['inputs']}: {tokens}{found['meaning']}"
        )
    return "\n".join(text)


def errors(entry: Any, place: str = "") -> list[str]:
    """What failed, with its place in the record."""
    if not isinstance(entry, dict):
        return []
    if not place:
        place = f"K={entry['kv_heads']} length={entry['length']}"
    found = [f"  {place}: {entry['error']}"] if "error" in entry else []
    return found + [line for name, below in entry.items() for line in errors(below, f"{place} {name}")]


def _times(entries: Entry) -> str:
    return " / ".join(_number(entries.get(which, {}).get("ms")) for which in PASSES)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
