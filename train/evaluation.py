"""What evaluations share: parts that are kept as they come, progress, and a model's answers at given positions.

An evaluation is many parts, each computed apart. OUTPUT/NAME.parts.jsonl holds a line for each part that is done: the same
command goes on from there after whatever interrupted it, and its results are the same to the last digit.
"""

import functools
import hashlib
import importlib.util
import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32
from rich.console import Console
from rich.live import Live
from rich.text import Text

from train.config import to_dict
from train.errors import Interrupted
from train.model import Params
from train.report import duration
from train.runs import Run, versions

SECONDS_BETWEEN_LINES = 5.0
# Of a file of parts, in bytes: where it is larger, those of other code are dropped.
LARGEST_FILE = 2**24


def describe_run(run: Run) -> dict[str, Any]:
    """What the results of a run depend on: its parameters, its configuration, the software and the device."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(run.params):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return dict(
        step=run.step,
        parameters_sha256=digest.hexdigest(),
        data_sha256=run.data_sha256,
        config=to_dict(run.config),
        versions=versions(),
        device=jax.devices()[0].device_kind,
    )


@functools.cache
def code_sha256() -> str:
    """Of the sources of this checkout: its version says nothing of what was changed in it."""
    digest = hashlib.sha256()
    for package in ("nsa_jax", "pallas_kernels", "train"):
        spec = importlib.util.find_spec(package)
        assert spec and spec.origin
        for path in sorted(Path(spec.origin).parent.glob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(f"{package}/{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()


class Parts:
    """Computes each part of an evaluation once, keeps its result, and shows how far it is.

    >>> with Parts(folder, "niah", settings, total=2) as parts:  # doctest: +SKIP
    ...     results = [parts(f"depth {depth}", measure, depth) for depth in (0, 100)]

    A part is kept with a digest of all that it depends on: the settings, the code, and what the part itself names. A start
    that wants other parts, or of other settings, or after a change of the code, finds only its own, and loses none, until the
    file is larger than 16 MiB: then the parts of other code are dropped, which no start of this code could use.

    Args:
        folder: for the results; made if need be.
        name: of the evaluation.
        settings: JSON values: what all of its parts depend on, but for the code.
        total: number of parts.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], *, total: int):
        self.path, self._name, self._total, self._done = folder / f"{name}.parts.jsonl", name, total, 0
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._live: Live | None = None
        self._handler: Any = None  # of SIGTERM, before
        folder.mkdir(parents=True, exist_ok=True)
        self._code = code_sha256()
        self._settings = _digest(dict(settings, code_sha256=self._code))
        rows, unread = _read_parts(self.path)
        if unread:
            self.say(f"{self.path}: {unread} of its lines cannot be read, and what they held is computed anew")
        if self.path.exists() and self.path.stat().st_size > LARGEST_FILE:
            own_code = [row for row in rows if row["code"] == self._code]
            if dropped := len(rows) - len(own_code):
                self.say(f"{self.path} is larger than {LARGEST_FILE} bytes: {dropped} parts of other code are dropped")
                partial = self.path.with_suffix(".tmp")
                partial.write_text("".join(json.dumps(row) + "\n" for row in own_code), encoding="utf-8")
                partial.replace(self.path)
                rows = own_code
        self._results = {row["key"]: row["result"] for row in rows}
        if rows:
            own = sum(row["settings"] == self._settings for row in rows)
            others = f", {len(rows) - own} of others or of other code" if own < len(rows) else ""
            self.say(f"{self.path} has parts, {own} of these settings{others}: going on")
        self._file = self.path.open("a", encoding="utf-8")
        self._started = self._last_line = time.monotonic()
        self._computed = 0

    def __enter__(self) -> "Parts":
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, _stop)
        if self._console.is_terminal:
            self._live = Live(Text(""), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._file.close()
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            message = (
                f"{self._name} stopped at part {self._done} of {self._total}; what is done is in {self.path}: "
                "the same command goes on from there"
            )
            raise Interrupted(signal.SIGTERM if kind is _Terminated else signal.SIGINT, message) from None

    def __call__(self, part: str, compute: Callable[..., Any], *args: Any, of: Any = None) -> Any:
        """The result of a part: as it was kept, or `compute(*args)` now, with arrays and tuples as lists.

        Args:
            part: its name.
            of: JSON values: what it depends on beside the settings; its name if None.
        """
        key = _digest([self._settings, part if of is None else of])
        if key not in self._results:
            result = json.loads(json.dumps(compute(*args), default=np.ndarray.tolist))
            row = dict(key=key, code=self._code, settings=self._settings, part=part, result=result)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._results[key] = result
            self._computed += 1
        self._done += 1
        self._show(part)
        return self._results[key]

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False)

    def _show(self, part: str) -> None:
        now = time.monotonic()
        line = f"{self._name} {self._done}/{self._total}  {part}"
        if self._computed:
            left = (self._total - self._done) * (now - self._started) / self._computed
            line += f"  ETA {duration(left)}"
        if self._live:
            self._live.update(Text(line), refresh=True)
        elif self._computed and (now - self._last_line > SECONDS_BETWEEN_LINES or self._done == self._total):
            self._last_line = now
            self.say(line)


class _Terminated(KeyboardInterrupt):
    """SIGTERM: it ends an evaluation as Ctrl-C does."""


def _stop(signum: int, frame: Any) -> None:
    raise _Terminated


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _read_parts(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The parts of a file, and the number of its lines that hold none. A last line that is half-written is cut off the file."""
    if not path.exists():
        return [], 0
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        with path.open("r+b") as file:
            file.truncate(whole)
    lines, rows = raw[:whole].split(b"\n")[:-1], []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            continue
        if isinstance(row, dict) and {"key", "code", "settings", "part", "result"} <= row.keys():
            rows.append(row)
    return rows, len(lines) - len(rows)


@runtime_checkable
class Answering(Protocol):
    """What `Answers` asks of a network: `train.model.Network` has it."""

    def model(self, params: Params) -> Any:
        """Something with `hidden(tokens)` and `logits(hidden)`, as `LanguageModel` has them."""


class Answers:
    """The most likely next tokens at given positions; compiled once for each shape."""

    def __init__(self, network: Answering):
        def answer(params: Params, tokens: Int32[Array, "B T"], positions: Int32[Array, "B A"]) -> Int32[Array, "B A"]:
            model = network.model(params)
            hidden = jnp.take_along_axis(model.hidden(tokens), positions[:, :, None], axis=1)
            return jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)

        self._answer = jax.jit(answer)

    def __call__(self, params: Params, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return np.asarray(self._answer(params, jnp.asarray(tokens), jnp.asarray(positions)))


def check_numbers(**numbers: tuple[int, int]) -> None:
    """Raise `ValueError` for a number below the least that it may be: `name=(number, least)`."""
    for name, (number, least) in numbers.items():
        if number < least:
            raise ValueError(f"{name}={number} must be at least {least}")


def check_lengths(run: Run, lengths: tuple[int, ...], *, beyond_context: bool) -> None:
    """Raise `ValueError` for lengths that a run was not trained for, unless that is what is wanted."""
    context = run.config.context
    for length in lengths:
        if length < 1:
            raise ValueError(f"lengths={lengths} must be at least 1")
        if length > context and not beyond_context:
            raise ValueError(
                f"length={length} is longer than the context of {context} tokens that {run.folder} was trained with, where "
                "rotary positions extrapolate and most models fail: give lengths up to that, or --beyond-context to measure it"
            )


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
    return path
