"""Checkpoints: exact, whole or absent, the right ones kept, and plain words when something is wrong."""

import errno
import functools
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train import checkpoint
from train.checkpoint import CheckpointError, Checkpoints

ROOT = Path(__file__).parents[1]


class Counters(NamedTuple):
    step: jax.Array
    key: jax.Array


def make_state(seed=0, width=6):
    kernel_key, embed_key, key = jax.random.split(jax.random.key(seed), 3)
    params = {
        "layers": [{"kernel": jax.random.normal(kernel_key, (5, width))}, {"scale": None}],
        "embed": jax.random.normal(embed_key, (7, 3)).astype(jnp.bfloat16),
        "none_yet": jnp.zeros((0, 3)),
    }
    return {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "counters": Counters(jnp.int32(-3), jax.random.key_data(key)),
    }


def bits(tree):
    return jax.tree.map(lambda leaf: (leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()), tree)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


def fill(folder, steps, **options):
    """Saves these steps, each with a state made from its number."""
    with Checkpoints(folder, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"step": step}, validation_loss=None)


@pytest.mark.parametrize("like", ["arrays", "shapes", "shardings"])
def test_restores_every_bit(folder, like):
    state = make_state()
    # Not-a-number with a payload, minus zero, the smallest subnormal: nothing that is recomputed would keep them.
    odd = np.array([0x7FC01234, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    state["params"]["odd"] = jnp.asarray(odd)
    state["numpy"] = np.arange(4, dtype=np.int64) << 40
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec()
    )
    abstract = {
        "arrays": state,
        "shapes": {**jax.eval_shape(lambda: {**state, "numpy": 0}), "numpy": state["numpy"]},
        "shardings": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state()),
    }[like]
    if like == "shardings":
        state = make_state()

    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, state, {}, validation_loss=None)
        restored, step = checkpoints.restore(abstract)

    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    if like == "shardings":
        assert restored["params"]["embed"].sharding == sharding
    else:
        assert isinstance(restored["numpy"], np.ndarray)
        assert isinstance(restored["counters"].step, jax.Array)


def test_arrays_may_be_donated_at_once(folder):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(x):
        return x * 0 - 7

    x = jax.random.normal(jax.random.key(0), (700, 1000))
    expected = np.array(x)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"x": x}, {}, validation_loss=None)
        for _ in range(3):
            x = overwrite(x)
        restored, _ = checkpoints.restore({"x": x})
    np.testing.assert_array_equal(restored["x"], expected)


def test_save_returns_before_the_checkpoint_is_there(folder, monkeypatch):
    go_on, file_sha256 = threading.Event(), checkpoint._file_sha256

    def slow_sha256(path):
        assert go_on.wait(timeout=30)
        return file_sha256(path)

    monkeypatch.setattr(checkpoint, "_file_sha256", slow_sha256)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(), {}, validation_loss=None)
        assert checkpoints.steps() == ()
        assert checkpoints.failure() is None
        go_on.set()
        checkpoints.wait()
        assert checkpoints.steps() == (1,)
        assert checkpoints.failure() is None


def test_keeps_the_last_and_the_best(folder):
    state = {"x": jnp.arange(3)}
    losses = [3.0, 1.0, None, 2.0, float("nan"), 1.0, -float("inf")]
    kept, best = [], []
    with Checkpoints(folder, keep_last=2) as checkpoints:
        assert checkpoints.best_step() is None
        for step, loss in enumerate(losses):
            checkpoints.save(step, state, {}, validation_loss=loss)
            checkpoints.wait()
            kept.append(checkpoints.steps())
            best.append(checkpoints.best_step())
    assert kept == [(0,), (0, 1), (1, 2), (1, 2, 3), (1, 3, 4), (1, 4, 5), (1, 5, 6)]
    assert best == [0, 1, 1, 1, 1, 1, 1]
    assert sorted(path.name for path in folder.iterdir()) == ["1", "5", "6"]

    again = Checkpoints(folder, keep_last=2, read_only=True)  # by another process, later
    assert again.steps() == (1, 5, 6)
    assert again.best_step() == 1


def test_without_validation_none_is_the_best(folder):
    fill(folder, range(4), keep_last=1)
    checkpoints = Checkpoints(folder, read_only=True)
    assert checkpoints.steps() == (3,)
    assert checkpoints.best_step() is None


def test_going_back_keeps_what_is_written_now(folder):
    fill(folder, [100, 200, 300], keep_last=2)
    with Checkpoints(folder, keep_last=2) as checkpoints:
        checkpoints.save(250, make_state(250), {"again": True}, validation_loss=None)
        checkpoints.wait()
        assert checkpoints.steps() == (250, 300)
        checkpoints.save(100, make_state(1), {"again": True}, validation_loss=None)
        checkpoints.wait()
        assert checkpoints.steps() == (100, 250, 300)


def test_same_step_is_replaced(folder):
    fill(folder, [1])
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(seed=9), {"again": True}, validation_loss=None)
        assert checkpoints.metadata(1) == {"again": True}
        assert bits(checkpoints.restore(make_state())[0]) == bits(make_state(seed=9))
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_metadata_is_json_at_the_time_of_saving(folder):
    metadata = {"config": {"width": 64, "rate": 1e-3 / 3}, "names": ["é", None, True]}
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(), metadata, validation_loss=0.5)
        expected = {**metadata}
        metadata["config"] = "changed"
        checkpoints.save(2, make_state(), {}, validation_loss=0.5)
        assert checkpoints.metadata(1) == expected
        assert checkpoints.metadata() == {}


def test_rejects_what_it_cannot_save(folder):
    with Checkpoints(folder) as checkpoints:
        save = functools.partial(checkpoints.save, validation_loss=None)
        with pytest.raises(TypeError, match=r"leaf \['n'\] of the state is of type int: it must be an array"):
            save(1, {"n": 3}, {})
        with pytest.raises(TypeError, match=r"leaf \['key'\] .* use its jax.random.key_data"):
            save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(TypeError, match="set is not JSON serializable"):
            save(1, make_state(), {"a": {1, 2}})
        with pytest.raises(ValueError, match="step=-1 must be at least 0"):
            save(-1, make_state(), {})
        assert checkpoints.steps() == ()
    with pytest.raises(ValueError, match="keep_last=0 must be at least 1"):
        Checkpoints(folder, keep_last=0)


def test_nothing_there(folder):
    checkpoints = Checkpoints(folder, read_only=True)
    for read in (checkpoints.metadata, lambda: checkpoints.restore(make_state())):
        with pytest.raises(CheckpointError, match=f"no checkpoint in {re.escape(str(folder))}"):
            read()
    assert checkpoints.steps() == ()
    assert not folder.exists()
    fill(folder, [200, 300])
    for read in (checkpoints.metadata, functools.partial(checkpoints.restore, make_state())):
        with pytest.raises(CheckpointError, match=r"no checkpoint of step=250 in .*: there are 200, 300"):
            read(step=250)


def test_read_only_writes_and_cleans_nothing(folder):
    fill(folder, [1])
    (folder / "2.incomplete").mkdir()
    checkpoints = Checkpoints(folder, read_only=True)
    with pytest.raises(CheckpointError, match="read_only=True"):
        checkpoints.save(3, make_state(), {}, validation_loss=None)
    assert checkpoints.steps() == (1,)
    assert {path.name for path in folder.iterdir()} == {"1", "2.incomplete"}


def test_another_model(folder):
    fill(folder, [1])
    state = make_state(width=8)
    state["params"]["embed"] = state["params"]["embed"].astype(jnp.float32)
    state["more"] = {str(i): jnp.zeros(i) for i in range(9)}
    del state["counters"]
    with pytest.raises(CheckpointError) as raised:
        Checkpoints(folder, read_only=True).restore(state)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{folder / '1'} does not fit this model:"
    assert "  ['more']['0']: saved nothing, wanted float32[0]" in lines
    # The kernel and its two moments, the embedding, nine more, two counters: 15, of which five are shown.
    assert lines[6] == "  and 10 more"
    assert lines[7].startswith("The model of this run folder was built with another config")

    state = make_state(width=8)
    with pytest.raises(CheckpointError, match=r"\['kernel'\]: saved float32\[5,6\], wanted float32\[5,8\]\n"):
        Checkpoints(folder, read_only=True).restore(state)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit, Path.unlink])
def test_damage_to_any_file_is_noticed(folder, damage):
    fill(folder, [100, 200, 300])
    checkpoints = Checkpoints(folder, read_only=True)
    files = [path for path in (folder / "300").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        damage(path)
        message = (
            rf"(?s)checkpoint 300 is damaged: in {folder}/300, {path.relative_to(folder / '300')} .*"
            rf"The checkpoint before it, step 200, is whole: use --step 200 or move {folder}/300 away"
        )
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(make_state())
        if damage is not flip_a_bit or path.name == "manifest.json":
            with pytest.raises(CheckpointError, match=message):
                checkpoints.metadata()
        path.write_bytes(content)
    assert bits(checkpoints.restore(make_state())[0]) == bits(make_state(300))  # all is as it was


def test_damage_names_a_checkpoint_that_is_whole(folder):
    fill(folder, [100, 200, 300])
    for step in (200, 300):
        flip_a_bit(max((folder / str(step)).rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    checkpoints = Checkpoints(folder, read_only=True)
    with pytest.raises(CheckpointError, match="300 is damaged: .* step 100, is whole: use --step 100"):
        checkpoints.restore(make_state())
    assert bits(checkpoints.restore(make_state(), 100)[0]) == bits(make_state(100))
    empty(folder / "100" / "manifest.json")
    with pytest.raises(CheckpointError, match="300 is damaged: .* No checkpoint before it is whole"):
        checkpoints.restore(make_state())


def test_damaged_checkpoints_do_not_stop_a_run(folder):
    with Checkpoints(folder, keep_last=1) as checkpoints:
        checkpoints.save(1, make_state(), {}, validation_loss=0.5)
        checkpoints.wait()
        empty(folder / "1" / "manifest.json")
        assert checkpoints.best_step() is None
        checkpoints.save(2, make_state(), {}, validation_loss=1.5)
        checkpoints.wait()
        assert checkpoints.steps() == (2,)
        assert checkpoints.best_step() == 2


def full_disk(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


NO_SPACE = r"checkpoint 2 could not be saved in .*No space left on device.*\n.*MiB free: make room.* as they were: 1\."


def test_failure_is_told_once_and_the_next_save_works(folder, monkeypatch):
    fill(folder, [1])
    with Checkpoints(folder) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_file_sha256", full_disk)
            checkpoints.save(2, make_state(2), {}, validation_loss=None)
            with pytest.raises(CheckpointError, match=NO_SPACE):
                checkpoints.wait()
            assert checkpoints.failure() is None
            checkpoints.wait()
            checkpoints.save(2, make_state(2), {}, validation_loss=None)
            checkpoints._join()
        assert [path.name for path in folder.iterdir()] == ["1"]
        checkpoints.save(3, make_state(3), {}, validation_loss=None)  # that 2 failed is told after it as well
        checkpoints._join()
        assert re.match(NO_SPACE, checkpoints.failure())
        assert checkpoints.failure() is None
        assert checkpoints.steps() == (1, 3)
        assert bits(checkpoints.restore(make_state())[0]) == bits(make_state(3))


def test_failure_of_the_last_save_is_told_at_the_end(folder, monkeypatch):
    fill(folder, [1])
    monkeypatch.setattr(checkpoint, "_file_sha256", full_disk)
    with pytest.raises(CheckpointError, match=NO_SPACE), Checkpoints(folder) as checkpoints:
        checkpoints.save(2, make_state(), {}, validation_loss=None)
    with pytest.raises(KeyboardInterrupt) as raised, Checkpoints(folder) as checkpoints:
        checkpoints.save(2, make_state(), {}, validation_loss=None)
        raise KeyboardInterrupt
    assert re.match(NO_SPACE, raised.value.__notes__[0])


def test_failure_before_anything_is_copied(folder):
    folder.parent.mkdir()
    folder.write_text("a file where the folder is to be")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, make_state(), {}, validation_loss=None)
        assert "Error: " in checkpoints.failure()


PROGRAM = """
import os, resource, shutil, signal, sys
from pathlib import Path

from train import checkpoint
assert not {"jax", "orbax", "numpy"} & set(sys.modules), "importing the module must stay cheap"
import jax

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

big = {"x": jax.random.normal(jax.random.key(0), (2000, 1000))}
with checkpoint.Checkpoints(Path(sys.argv[1]), keep_last=1) as checkpoints:
    checkpoints.save(1, big, {}, validation_loss=None)
    checkpoints.wait()
"""


def start(folder, program):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM + program, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment_leaves_whole_checkpoints(tmp_path):
    save = "    checkpoints.save(2, big, {}, validation_loss=None)\n"
    cases = {
        "while Orbax writes": (save + "    die()", {"1", "2.incomplete"}),
        "before the manifest": ("    checkpoint._file_sha256 = die\n" + save, {"1", "2.incomplete"}),
        "while the old one is removed": (
            "    rmtree = shutil.rmtree\n"
            "    shutil.rmtree = lambda path, **_: die() if path.name == '1.deleted' and path.exists() else rmtree(path, **_)\n"
            + save,
            {"1.deleted", "2"},
        ),
    }
    folders = {case: tmp_path / case for case in cases}
    processes = {case: start(folders[case], program) for case, (program, _) in cases.items()}
    for case, (_, left) in cases.items():
        _, errors = processes[case].communicate(timeout=60)
        assert processes[case].returncode == -signal.SIGKILL, (case, errors)
        assert {path.name for path in folders[case].iterdir()} == left, case
        whole = tuple(int(name) for name in left if name.isdecimal())
        assert Checkpoints(folders[case], read_only=True).steps() == whole, case

        with Checkpoints(folders[case]) as checkpoints:
            assert {path.name for path in folders[case].iterdir()} == set(map(str, whole)), case
            _, step = checkpoints.restore({"x": jax.ShapeDtypeStruct((2000, 1000), jnp.float32)})
            assert step == whole[-1], case
            checkpoints.save(2, make_state(), {}, validation_loss=None)
            checkpoints.wait()
            assert 2 in checkpoints.steps(), case


def test_file_size_limit_is_told_in_few_words(tmp_path):
    process = start(
        tmp_path / "x",
        """
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    checkpoints.save(2, big, {}, validation_loss=None)
    checkpoints._join()
    print(checkpoints.failure(), checkpoints.steps(), os.listdir(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    checkpoints.save(3, big, {}, validation_loss=None)
    checkpoints.wait()
    assert checkpoints.failure() is None
    restored, step = checkpoints.restore(big)
    assert (restored["x"] == big["x"]).all()
    print(step, checkpoints.steps())
""",
    )
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")  # no log, no warning, no traceback of Orbax's threads
    problem, remedy, after = output.splitlines()
    assert re.match(r"checkpoint 2 could not be saved in .*File too large", problem)
    assert re.search(r"make room.* as they were: 1\. \(1,\) \['1'\]$", remedy)
    assert after == "3 (3,)"
