"""The README's Python blocks run, in their order, one after the other; its commands and figures exist."""

import re
from pathlib import Path

import pytest

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
    for package in ("nsa_jax", "train"):
        for path in (ROOT / package).glob("*.py"):
            if path.stem not in ("__init__", "__main__"):
                assert f"`{path.stem}`" in README or f"{path.stem}.py" in README, path
