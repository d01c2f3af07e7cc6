"""Looking into programs, and compiling them quickly."""

from collections.abc import Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

# Beside `quick_compilation`, for the interpreted kernels: a fifth of the time. JAX 0.11 has no such option.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of a jaxpr, those of the jaxprs inside it as well."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
