"""Watching a run: a progress line, `metrics.jsonl`, TensorBoard."""

import contextlib
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

# Dense 16-bit matrix peak, FLOP/s, by jax's `device_kind`: NVIDIA's data sheets of the SXM parts. The whole name, because
# "NVIDIA H200 NVL" is a slower part.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
}


def peak_flops(device_kind: str) -> float | None:
    """The device's peak, or None where it is not known: a wrong one would give a wrong utilisation."""
    return PEAK_FLOPS.get(device_kind)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a killed run left half-written is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Reporter:
    """Writes what a run does to the terminal, to `metrics.jsonl` in the run folder, and to TensorBoard if installed.

    Args:
        folder: the run folder, which exists.
        first_step: steps done before this start; rows of later ones, from a run that was killed, are dropped.
        steps: steps of the whole run.
        tokens_per_step: targets in a step.
        flops_per_token: the model's own, of forward and backward.
        peak: the device's peak, FLOP/s, or None.
        bytes_per_token: of the training text.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        peak: float | None,
        bytes_per_token: float,
    ):
        self._steps, self._tokens_per_step, self._bytes_per_token = steps, tokens_per_step, bytes_per_token
        self._flops_per_token, self._peak = flops_per_token, peak
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= first_step]
        rewritten = self.path.with_suffix(".tmp")
        rewritten.write_text("".join(json.dumps(row) + "\n" for row in kept))
        rewritten.replace(self.path)
        self._file: TextIO | None = self.path.open("a")
        self._tensorboard = _tensorboard(folder, first_step)
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._live: Live | None = None
        self._clock, self._clock_step = time.perf_counter(), first_step

    def __enter__(self) -> "Reporter":
        if self._console.is_terminal:
            self._live = Live(Text(""), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        if self._file:
            self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(line, markup=False)
        sys.stdout.flush()

    def restart_clock(self, step: int) -> None:
        """Leave what happened since the last row out of the speed: compilation, a measurement, a checkpoint."""
        self._clock, self._clock_step = time.perf_counter(), step

    def train(self, step: int, *, loss: float, grad_norm: float, learning_rate: float, skipped: int) -> None:
        """Report that `step` steps are done; the loss, in nats per token, is the last one's."""
        now = time.perf_counter()
        seconds, done = now - self._clock, step - self._clock_step
        self._clock, self._clock_step = now, step
        row: dict[str, Any] = dict(
            step=step,
            loss=loss,
            bits_per_byte=bits_per_byte(loss, self._bytes_per_token),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            skipped=skipped,
        )
        line = (
            f"step {step}/{self._steps}  loss {loss:.4f}  bpb {row['bits_per_byte']:.3f}  lr {learning_rate:.2e}  "
            f"gnorm {grad_norm:.2f}"
        )
        if done:
            speed = done * self._tokens_per_step / seconds
            row["tokens_per_second"] = speed
            line += f"  {_si(speed)} tok/s"
            if self._peak:
                row["mfu"] = speed * self._flops_per_token / self._peak
                line += f"  MFU {row['mfu']:.1%}"
            line += f"  ETA {duration((self._steps - step) * seconds / done)}"
        if skipped:
            line += f"  skipped {skipped}"
        self._write(row)
        if self._live:
            self._live.update(Text(line), refresh=True)
        else:
            self.say(line)

    def validation(self, step: int, *, loss: float, bits_per_byte: float) -> None:
        """Report a validation loss, in nats per token."""
        self._write(dict(step=step, validation_loss=loss, validation_bits_per_byte=bits_per_byte))
        self.say(f"step {step}/{self._steps}  validation loss {loss:.4f}  bpb {bits_per_byte:.3f}")

    def _write(self, row: dict[str, Any]) -> None:
        # JSON has no NaN or infinity.
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        # A full disk must not end the training.
        if self._file:
            try:
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()
            except OSError as error:
                self.say(f"warning: {self.path} can't be written ({error}): from here on it has no metrics")
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None
        if self._tensorboard:
            try:
                self._tensorboard.write(row)
            except OSError as error:
                self.say(
                    f"warning: {self._tensorboard.folder} can't be written ({error}): from here on it has no metrics"
                )
                self._tensorboard.close()
                self._tensorboard = None


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Comparable between tokenizers, as the loss is not."""
    return nats_per_token / math.log(2) / bytes_per_token


class _TensorBoard:
    """An event file for TensorBoard.

    Written here and now: tensorboardX's `SummaryWriter` leaves it to a thread, which a full disk ends, and then waits for
    that thread for ever.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import scalar

        self.folder = folder
        self._event, self._scalar = Event, scalar
        folder.mkdir(exist_ok=True)
        self._records = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        self._write(file_version="brain.Event:2")
        # TensorBoard drops what an earlier start wrote for this step and later ones.
        self._write(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._flushed = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                self._write(step=row["step"], summary=self._scalar(key, value))
        # Flushing waits for the disk.
        if time.monotonic() - self._flushed > 30:
            self._records.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._records.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def _tensorboard(folder: Path, first_step: int) -> _TensorBoard | None:
    try:
        with warnings.catch_warnings():
            # tensorboardX's generated protobuf code warns on import, which is nothing that a user can mend.
            warnings.simplefilter("ignore", DeprecationWarning)
            return _TensorBoard(folder / "tensorboard", first_step)
    except ImportError:
        return None


def _si(number: float) -> str:
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
