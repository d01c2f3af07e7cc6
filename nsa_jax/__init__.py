"""Native Sparse Attention (arXiv 2502.11089) for JAX.

Names are loaded when first used (PEP 562), so that `import nsa_jax` and `nsa_jax.config` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "KeyValue": "nsa_jax.shapes",
    "NSACache": "nsa_jax.cache",
    "NSAConfig": "nsa_jax.config",
    "NativeSparseAttention": "nsa_jax.module",
    "mean_compress": "nsa_jax.compression",
    "nsa_attention": "nsa_jax.ops",
    "save_attention": "nsa_jax.ops",
    "select_blocks": "nsa_jax.ops",
}

__all__ = [
    "KeyValue",
    "NSACache",
    "NSAConfig",
    "NativeSparseAttention",
    "mean_compress",
    "nsa_attention",
    "save_attention",
    "select_blocks",
]

if TYPE_CHECKING:
    from nsa_jax.cache import NSACache as NSACache
    from nsa_jax.compression import mean_compress as mean_compress
    from nsa_jax.config import NSAConfig as NSAConfig
    from nsa_jax.module import NativeSparseAttention as NativeSparseAttention
    from nsa_jax.ops import nsa_attention as nsa_attention
    from nsa_jax.ops import save_attention as save_attention
    from nsa_jax.ops import select_blocks as select_blocks
    from nsa_jax.shapes import KeyValue as KeyValue


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nsa_jax' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
