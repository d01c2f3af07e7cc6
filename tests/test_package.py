"""The wheel holds the library and nothing else, and imports where nothing else is installed than what it asks for."""

import ast
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import jax, nsa_jax, pallas_kernels
from flax import nnx
assert not hasattr(nsa_jax, "train")
config = nsa_jax.NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=32)
attention = nsa_jax.NativeSparseAttention(2, 16, config=config, rngs=nnx.Rngs(0))
print(attention(jax.numpy.ones((1, 40, 16))).shape, nsa_jax.__file__)
"""


def run(*command: object, **kwargs) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_library_alone(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"nsa_jax", "pallas_kernels"}
    assert {"nsa_jax/py.typed", "pallas_kernels/py.typed", "pallas_kernels/tiles.json", "nsa_jax/module.py"} <= set(
        names
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_is_used_from_an_empty_environment(wheel: Path, tmp_path: Path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel],
        capture_output=True,
        text=True,
    )
    if installed.returncode:
        # Without a package index the dependencies come from this environment; the wheel itself is installed alone.
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", wheel)
        (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    printed = run(python, "-c", USE, cwd=tmp_path, env=environment)
    assert printed.startswith("(1, 40, 16)") and str(tmp_path) in printed


LAYERS = {
    "pallas_kernels": {"pallas_kernels"},
    "nsa_jax": {"nsa_jax", "pallas_kernels"},
    "train": {"train", "nsa_jax"},
}


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_one_way(package: str):
    ours = {"nsa_jax", "pallas_kernels", "train", "benchmarks", "tests"}
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                top = module.split(".")[0]
                assert top not in ours or top in LAYERS[package], f"{path} imports {module}"


def test_triton_is_known_to_the_kernels_alone():
    for package in ("nsa_jax", "train"):
        for path in (ROOT / package).rglob("*.py"):
            assert "triton" not in path.read_text().lower(), path
