"""What evaluations share: parts that are kept as they come, progress, and a model's answers at given positions.

An evaluation is many parts, each computed apart. OUTPUT/NAME.parts.jsonl holds the settings, and a line for each part that is
done: the same command goes on from there after whatever interrupted it, and its results are the same to the last digit.
"""

import functools
import hashlib
import importlib.util
import json
import signal
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

from train.config import differences, to_dict
from train.errors import Interrupted
from train.model import Params
from train.report import duration, read_metrics
from train.runs import Run, versions

SECONDS_BETWEEN_LINES = 5.0


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

    Args:
        folder: for the results; made if need be.
        name: of the evaluation.
        settings: JSON values. All that results depend on, but for the code: with others, or after a change of the code, the
            parts kept there are dropped, and that is said.
        total: number of parts.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], *, total: int):
        self.path, self._name, self._total, self._done = folder / f"{name}.parts.jsonl", name, total, 0
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._live: Live | None = None
        settings = json.loads(json.dumps(settings | dict(code_sha256=code_sha256())))
        folder.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(self.path)
        if kept and (lines := differences(kept[0].get("settings", {}), settings)):
            self.say(f"{self.path} is of other settings, so it starts anew:\n  " + "\n  ".join(lines))
            kept = []
        self._results: dict[str, Any] = {row["part"]: row["result"] for row in kept[1:]}
        if self._results:
            self.say(f"{self.path} has {len(self._results)} of {total} parts: going on")
        # Written whole, so that a line that a killed process left half-written is gone.
        rows = [{"settings": settings}, *({"part": part, "result": result} for part, result in self._results.items())]
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(self.path)
        self._file = self.path.open("a")
        self._started = self._last_line = time.monotonic()
        self._computed = 0

    def __enter__(self) -> "Parts":
        if self._console.is_terminal:
            self._live = Live(Text(""), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._file.close()
        if kind is KeyboardInterrupt:
            message = (
                f"{self._name} stopped at part {self._done} of {self._total}; what is done is in {self.path}: "
                "the same command goes on from there"
            )
            raise Interrupted(signal.SIGINT, message) from None

    def __call__(self, part: str, compute: Callable[..., Any], *args: Any) -> Any:
        """The result of a part: as it was kept, or `compute(*args)` now, with arrays and tuples as lists."""
        if part not in self._results:
            result = json.loads(json.dumps(compute(*args), default=np.ndarray.tolist))
            self._file.write(json.dumps({"part": part, "result": result}) + "\n")
            self._file.flush()
            self._results[part] = result
            self._computed += 1
        self._done += 1
        self._show(part)
        return self._results[part]

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
