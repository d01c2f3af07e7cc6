"""Checkpoints of a run: saved in the background, whole or not there at all, checked when read.

Orbax writes and reads the arrays, and only this module knows it. The rest is plain files, one folder a step:

    DIR/300/manifest.json   step, validation loss, metadata, leaves (dtype and shape), files (size and SHA-256)
    DIR/300/state/          the arrays, as `orbax.checkpoint.StandardCheckpointer` writes them
    DIR/400.incomplete/     being written, or left by a process that was killed: never listed, removed at the next opening
    DIR/100.deleted/        being removed: the same

The manifest is written last; then the folder gets its final name, and that rename makes it a checkpoint. The manifest has
checksums because Orbax has none for array data: of a flipped bit there it restores wrong numbers without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

PyTree = Any

_MANIFEST = "manifest.json"
_STATE = "state"
_INCOMPLETE = ".incomplete"
_DELETED = ".deleted"
_LEAVES_SHOWN = 5


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, found or read; the message says which, why, and what to do."""


class Checkpoints:
    """The checkpoints in one folder: those of the last steps, and the one with the lowest validation loss.

    One process writes, whatever the number of its devices; others may read meanwhile (`read_only=True`). Close it, best with
    `with`: a save that is in flight when the interpreter ends is lost.

    ```python
    with Checkpoints(Path("runs/x/checkpoints")) as checkpoints:
        checkpoints.save(100, state, {"config": {"width": 64}}, validation_loss=1.25)  # goes on in the background
        if problem := checkpoints.failure():  # the disk is full, say: training goes on, the next save tries again
            print(problem)
        checkpoints.wait()
        state, step = checkpoints.restore(state)
    ```

    Args:
      directory: the folder; the first save makes it.
      keep_last: how many of the highest steps stay. The best one, and the one just written, stay in any case.
      read_only: write and clean nothing.

    Raises:
      ValueError: `keep_last` is below 1.
    """

    def __init__(self, directory: Path, *, keep_last: int = 3, read_only: bool = False) -> None:
        if keep_last < 1:
            raise ValueError(f"{keep_last=} must be at least 1: a run resumes from its last checkpoint")
        self.directory = Path(directory).absolute()
        self.keep_last = keep_last
        self.read_only = read_only
        self._orbax: Any = None
        self._thread: threading.Thread | None = None  # of the save in flight
        self._failure: str | None = None  # not yet told
        if not read_only:
            for suffix in (_INCOMPLETE, _DELETED):
                for leftover in self.directory.glob(f"*{suffix}"):
                    shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints on disk, ascending."""
        if not self.directory.is_dir():
            return ()
        return tuple(sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal()))

    def best_step(self) -> int | None:
        """The step with the lowest validation loss (of equals the first); None if no checkpoint has one."""
        losses = {}
        for step in self.steps():
            with contextlib.suppress(_Damage):  # `restore` reports it
                loss = _read_manifest(self._folder(step))["validation_loss"]
                if loss is not None and math.isfinite(loss):
                    losses[step] = loss
        return min(losses, key=losses.__getitem__) if losses else None

    def save(self, step: int, state: PyTree, metadata: dict[str, Any], *, validation_loss: float | None) -> None:
        """Saves; returns once the arrays are copied off their devices, so that they may be donated.

        Waits first for a save still in flight. A failure to write (a full disk, say) is not raised here: `failure`, `wait`
        or `close` tells it. A checkpoint of the same step is replaced.

        Args:
          step: at least 0.
          state: pytree of jax or numpy arrays; of random keys, their `jax.random.key_data`.
          metadata: anything that JSON can hold.
          validation_loss: lower is better; None or not finite is never the best.

        Raises:
          CheckpointError: opened with `read_only`, or there are several processes.
          ValueError, TypeError: the step is negative, a leaf is no array, or the metadata is not JSON.
        """
        import jax

        if self.read_only:
            raise CheckpointError(f"{self.directory} was opened with read_only=True: open it without, to save {step=}")
        if step < 0:
            raise ValueError(f"{step=} must be at least 0")
        if (processes := jax.process_count()) > 1:
            raise CheckpointError(f"{processes} processes share this run, but only one can write checkpoints: use one")
        leaves = _named_leaves(state)
        manifest = {
            "step": int(step),
            "validation_loss": None if validation_loss is None else float(validation_loss),
            "metadata": metadata,
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
        }
        # A copy; and what JSON cannot hold is an error now rather than in the background.
        manifest = json.loads(json.dumps(manifest))
        self._join()
        incomplete = self._folder(step, _INCOMPLETE)
        with self._keeping_failure(step):
            shutil.rmtree(incomplete, ignore_errors=True)
            incomplete.mkdir(parents=True)
            # Orbax takes no arrays of size 0; their description in the manifest is all there is to know.
            self._checkpointer().save(incomplete / _STATE, {name: leaf for name, leaf in leaves.items() if leaf.size})
            self._thread = threading.Thread(target=self._commit, args=(step, manifest), name=f"checkpoint-{step}")
            self._thread.start()

    def failure(self) -> str | None:
        """What went wrong with a save, and what to do; None if nothing did, or while one is in flight. Never blocks.

        A failure is told once: by this, `wait` or `close`.
        """
        if self._thread is not None and self._thread.is_alive():
            return None
        failure, self._failure = self._failure, None
        return failure

    def wait(self) -> None:
        """Returns when the save in flight is on disk.

        Raises:
          CheckpointError: a save failed, and that is not told yet.
        """
        self._join()
        if failure := self.failure():
            raise CheckpointError(failure)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """The metadata saved with a step (None: the latest).

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged: the manifest has changed, or a file is missing or
            of another size (what the files contain, `restore` checks).
        """
        metadata: dict[str, Any] = self._read(step)[1]["metadata"]
        return metadata

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, int]:
        """Reads the state of a step (None: the latest), bit for bit as it was saved.

        Args:
          abstract_state: pytree of arrays or `jax.ShapeDtypeStruct`, with the structure, shapes and dtypes that were saved.
            A leaf goes where its `sharding` says; without one, to the default device; for a numpy leaf it stays numpy.

        Returns:
          The state, structured like `abstract_state`, and its step.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or it is of another model.
        """
        import jax
        import numpy as np

        step, manifest = self._read(step, contents=True)
        folder = self._folder(step)
        wanted = _named_leaves(abstract_state)
        _check_model(manifest["leaves"], wanted, folder)
        arrays = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}  # for their shape and dtype
        try:
            arrays |= self._checkpointer().restore(folder / _STATE, {name: x for name, x in arrays.items() if x.size})
        except Exception as error:
            raise CheckpointError(
                f"{folder} is as it was saved, but Orbax cannot read it ({type(error).__name__}: {error}): "
                "was it saved with a newer Orbax, or is memory short?"
            ) from error
        leaves = [
            jax.device_put(arrays[name], leaf.sharding) if hasattr(leaf, "sharding") else arrays[name]
            for name, leaf in wanted.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), step

    def close(self) -> None:
        """Waits for the save in flight and releases Orbax.

        Raises:
          CheckpointError: as `wait`.
        """
        self._join()
        if self._orbax is not None:
            self._orbax.close()
            self._orbax = None
            logging.getLogger("absl").removeFilter(_drop_orbax_traceback)
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the block comes first

    def _folder(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step}{suffix}"

    def _checkpointer(self) -> Any:
        if self._orbax is None:
            import orbax.checkpoint  # here, because it takes half a second

            self._orbax = orbax.checkpoint.StandardCheckpointer()
            logging.getLogger("absl").addFilter(_drop_orbax_traceback)
        return self._orbax

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _commit(self, step: int, manifest: dict[str, Any]) -> None:
        """In the background: waits for Orbax, makes the folder a checkpoint, and removes those that need not stay."""
        incomplete = self._folder(step, _INCOMPLETE)
        with self._keeping_failure(step):
            self._checkpointer().wait_until_finished()
            manifest["files"] = {
                path.relative_to(incomplete).as_posix(): {"bytes": path.stat().st_size, "sha256": _file_sha256(path)}
                for path in sorted(incomplete.rglob("*"))
                if path.is_file()
            }
            record = {"sha256": _manifest_sha256(manifest), "manifest": manifest}
            (incomplete / _MANIFEST).write_text(json.dumps(record, indent=1), encoding="utf-8")
            self._delete(step)
            incomplete.rename(self._folder(step))
            steps = self.steps()
            for old in set(steps) - {*steps[-self.keep_last :], self.best_step(), step}:
                self._delete(old)

    def _delete(self, step: int) -> None:
        """Removes a checkpoint, if there is one. It is renamed first: of a process killed halfway, nothing stays listed."""
        deleted = self._folder(step, _DELETED)
        shutil.rmtree(deleted, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self._folder(step).rename(deleted)
        shutil.rmtree(deleted, ignore_errors=True)

    @contextlib.contextmanager
    def _keeping_failure(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failure = f"checkpoint {step} could not be saved in {self.directory}: {type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                existing = next(path for path in (self.directory, *self.directory.parents) if path.exists())
                self._failure += (
                    f"\nThat disk had {shutil.disk_usage(existing).free / 2**20:,.0f} MiB free: make room, or check that "
                    "the folder may be written to. The next save tries again; the checkpoints on disk are as they were: "
                    f"{_listed(self.steps())}."
                )
            shutil.rmtree(self._folder(step, _INCOMPLETE), ignore_errors=True)

    def _read(self, step: int | None, *, contents: bool = False) -> tuple[int, dict[str, Any]]:
        """Step and manifest of a checkpoint; every error that its files can give."""
        self._join()
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}: check the path, or train first")
        step = steps[-1] if step is None else step
        if step not in steps:
            raise CheckpointError(f"no checkpoint of {step=} in {self.directory}: there are {_listed(steps)}")
        folder = self._folder(step)
        try:
            return step, _read_manifest(folder, contents=contents)
        except _Damage as damage:
            message = f"checkpoint {step} is damaged: in {folder}, {damage}. "
        for before in reversed(steps[: steps.index(step)]):
            with contextlib.suppress(_Damage):
                _read_manifest(self._folder(before), contents=True)
                remedy = (
                    f"The checkpoint before it, step {before}, is whole: use --step {before} or move {folder} away "
                    "(`run` has no --step: once that folder is gone, it goes on from the one before)"
                )
                raise CheckpointError(message + remedy)
        raise CheckpointError(f"{message}No checkpoint before it is whole: bring it back from a copy, or train anew")


class _Damage(Exception):
    """What is wrong with the files of a checkpoint."""


def _read_manifest(folder: Path, *, contents: bool = False) -> dict[str, Any]:
    """The manifest, checked, and the files against it: their sizes, and with `contents` every byte."""
    try:
        record = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        manifest: dict[str, Any] = record["manifest"]
        if record["sha256"] != _manifest_sha256(manifest):
            raise ValueError("its checksum does not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Damage(f"{_MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    for name, saved in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
            if size != saved["bytes"]:
                raise _Damage(f"{name} has {size} bytes and had {saved['bytes']} when it was saved")
            if contents and _file_sha256(folder / name) != saved["sha256"]:
                raise _Damage(f"{name} has changed since it was saved (its checksum does not fit)")
        except OSError as error:
            raise _Damage(f"{name} cannot be read ({error.strerror})") from error
    return manifest


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_sha256(manifest: dict[str, Any]) -> str:
    # What JSON has read, it writes again as it was: keys in their order, floats to the last bit.
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path, as Python would write it: `['params']['embed']`."""
    import jax

    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(f"leaf {name} of the state is of type {type(leaf).__name__}: it must be an array")
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"leaf {name} of the state has dtype {leaf.dtype}: use its jax.random.key_data")
    return leaves


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _check_model(saved: dict[str, str], wanted: dict[str, Any], folder: Path) -> None:
    """Raises a CheckpointError that shows the first few leaves that differ, if any do."""
    described = {name: _describe(leaf) for name, leaf in wanted.items()}
    lines = [
        f"  {name}: saved {saved.get(name, 'nothing')}, wanted {described.get(name, 'nothing')}"
        for name in described | saved
        if saved.get(name) != described.get(name)
    ]
    if len(lines) > _LEAVES_SHOWN:
        lines[_LEAVES_SHOWN:] = [f"  and {len(lines) - _LEAVES_SHOWN} more"]
    if lines:
        raise CheckpointError(
            "\n".join([f"{folder} does not fit this model:", *lines])
            + "\nThe model of this run folder was built with another config: use that one, or another run folder"
        )


def _listed(steps: tuple[int, ...]) -> str:
    return ", ".join(map(str, steps)) or "none"


def _drop_orbax_traceback(record: logging.LogRecord) -> bool:
    """For a failed save Orbax logs some 150 lines from three threads, and raises what `failure` then tells in three."""
    return not (record.exc_info and "orbax" in record.pathname)
