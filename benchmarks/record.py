"""Where and how a measurement was made: device, versions, commit, command. Written as JSON beside the numbers."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from benchmarks.command import NoGPU
from pallas_kernels.support import capability_of

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "torch")
# Fields of every record; programs add their own.
FIELDS = ("command", "date", "device", "python", "packages", "driver", "commit", "dirty")


def gpu(program: str) -> jax.Device:
    """The default device, if it is a GPU.

    Raises:
        NoGPU: it is none.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise NoGPU(f"{program} needs a GPU that JAX sees (jax.devices()); this device is {device.device_kind}")
    return device


def new_record(device: jax.Device, program: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The fields of `FIELDS`."""
    commit, dirty = git_state()
    return {
        "command": " ".join(["python", "-m", program, *arguments]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "compute_capability": capability_of(device),
        },
        "python": sys.version.split()[0],
        "packages": {name: found for name in PACKAGES if (found := _installed(name)) is not None},
        "driver": _driver(),
        "commit": commit,
        "dirty": dirty,
    }


def git_state() -> tuple[str | None, bool | None]:
    """The commit checked out, and whether a tracked file differs from it; None where git cannot tell."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return commit or None, None if commit is None or changes is None else bool(changes)


def slug(device_kind: str) -> str:
    """For file names: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rewritten = path.with_suffix(".tmp")
    rewritten.write_text(json.dumps(record, indent=1) + "\n")
    rewritten.replace(path)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    lines = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return lines.splitlines()[0] if lines else None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
