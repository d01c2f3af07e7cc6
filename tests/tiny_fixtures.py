"""A run folder trained once for all tests, and quick compilation: a pytest plugin, as conftest.py would make all tests pay."""

import contextlib
import io
from collections.abc import Iterator

import pytest

from tests.tiny import Trained, compiling_quickly, make_config, write_text
from train import loop


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    with compiling_quickly():
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Not to be written to: tests that need to, copy it."""
    base = tmp_path_factory.mktemp("tiny")
    text = write_text(base / "text.txt")
    config, folder, output = make_config(text), base / "run", io.StringIO()
    programs = {}
    with compiling_quickly(), contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        for name in ("make_train_step", "LossMeter"):

            def make_and_keep(*args, name=name, make=getattr(loop, name)):
                return programs.setdefault(name, make(*args))

            patch.setattr(loop, name, make_and_keep)
        run = loop.train(config, folder)
    return Trained(folder, config, text, output.getvalue(), run, programs)


@pytest.fixture
def compiled(tiny_run: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` takes the programs that the tiny run has compiled; its configuration must be that one's."""
    for name, program in tiny_run.programs.items():
        monkeypatch.setattr(loop, name, lambda *_, program=program: program)
