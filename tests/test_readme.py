"""The README's Python blocks run, one after the other; its commands are understood; what it links to exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.record import NoGPU
from train.__main__ import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run(capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
        # What a block says that it prints is what it prints.
        promised = re.findall(r"print\(.*?\)  # (.*)", block)
        assert capsys.readouterr().out.splitlines() == promised


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README)
    for link in links:
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_the_code_map_is_complete():
    for package in ("nsa_jax", "pallas_kernels", "train"):
        for path in (ROOT / package).glob("*.py"):
            if path.stem not in ("__init__", "__main__"):
                assert f"`{path.stem}`" in README or f"{path.stem}.py" in README, path


@pytest.mark.parametrize("command", re.findall(r"^python -m train (.*?)(?:  #.*)?$", README, flags=re.MULTILINE))
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def understood(*args, **kwargs):
        raise ValueError("understood")

    monkeypatch.setattr("train.loop.train", understood)
    monkeypatch.setattr("train.runs.open_run", understood)
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err == "error: understood\n"


@pytest.mark.parametrize("line", re.findall(r"^python -m (benchmarks\.[^#\n]*)", README, flags=re.MULTILINE))
def test_benchmarks_are_understood(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def no_gpu(program: str):
        raise NoGPU("understood")

    monkeypatch.setattr("benchmarks.record.gpu", no_gpu)
    module, *arguments = shlex.split(line)
    assert importlib.import_module(module).main(arguments) == 2
    assert capsys.readouterr().err == "error: understood\n"


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@|TODO", README)
