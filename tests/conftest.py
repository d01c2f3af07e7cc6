"""What every test runs under: checked shapes, no silent broadcasting over ranks, and GPU tests only beside a GPU."""

import gc
import importlib.util

import jax
import jaxtyping
import pytest

CHECKED = importlib.util.find_spec("beartype") is not None
if CHECKED:
    from beartype import BeartypeConf, beartype

    # An int is a float, as for every type checker.
    typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))
    # Before the first import of these packages: what is imported already stays unchecked.
    jaxtyping.install_import_hook(["nsa_jax", "pallas_kernels", "train"], f"{__name__}.typechecker")

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects and little garbage.
gc.set_threshold(100_000, 20, 100)


def pytest_report_header() -> str:
    if CHECKED:
        return "shapes: annotations are checked (jaxtyping, beartype)"
    return "shapes: annotations are NOT checked, because beartype is not installed (pip install nsa-jax[dev])"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU; the device here is {jax.devices()[0].device_kind}")


@pytest.fixture
def unchecked_shapes():
    """Calls as a user makes them, without jaxtyping's checks: a wrong shape reaches the library's own error."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="module")
def quick_compilation():
    """For files whose programs run for a millisecond: nearly all of their time would go to optimising them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
