"""Full attention, what a user would pick instead: cuDNN through `jax.nn`, and the Pallas kernel that ships with JAX."""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.problems import Operands
from nsa_jax import KeyValue

SHIPPED_LONGEST = 32768
# (block_q, block_k, block_q_dkv, block_kv_dkv, block_q_dq, block_kv_dq); the first are its defaults.
SHIPPED_BLOCKS = ((128, 128, 32, 32, 32, 32), (128, 64, 64, 64, 64, 64))


def padded_size(head_dim: int, value_head_dim: int) -> int:
    """The head size at which full attention is timed: the baselines want one size for queries, keys and values."""
    return max(head_dim, value_head_dim)


def dense_arguments(query: Array, keys: KeyValue, cotangent: Array) -> tuple[tuple[Array, Array, Array], Array]:
    """Query, key, value and cotangent for full attention: heads padded with zeros where H and V differ."""
    size = padded_size(query.shape[-1], keys.value.shape[-1])
    query, key, value, cotangent = (_padded(x, size) for x in (query, *keys, cotangent))
    return (query, key, value), cotangent


def cudnn(*, scale: float, window: int | None = None) -> Callable[[Array, Array, Array], Array]:
    """Causal attention through cuDNN; to the last `window` tokens alone, if given."""
    return functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


def shipped_arguments(operands: Operands, cotangent: Array) -> tuple[tuple[Array, Array, Array], Array]:
    """The same with keys and values repeated for every query head, as that kernel has no grouped heads.

    Neither the repetition nor the sum of its gradients over a group is timed: its times are a little too good.
    """
    (query, key, value), cotangent = dense_arguments(operands.query, operands.selected, cotangent)
    group = query.shape[2] // key.shape[2]
    return (query, jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)), cotangent


def shipped(blocks: tuple[int, ...], *, scale: float) -> Callable[[Array, Array, Array], Array]:
    """JAX's own Pallas attention, with these block sizes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"jax\.experimental\.pallas\.ops\.gpu\.attention is", DeprecationWarning)
        module: Any = importlib.import_module("jax.experimental.pallas.ops.gpu.attention")
    names = ("block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = module.BlockSizes(**dict(zip(names, blocks, strict=True)))
    attend = functools.partial(module.mha, segment_ids=None, sm_scale=scale, causal=True, block_sizes=sizes)
    return lambda query, key, value: attend(query, key, value)


def why_not_cudnn(dtype: str) -> str | None:
    """Why cuDNN's attention is not timed; None if it is."""
    return f"cuDNN's attention takes 16-bit floats, not {dtype}" if dtype == "float32" else None


def why_not_shipped(length: int) -> str | None:
    """Why JAX's own kernel is not timed; None if it is."""
    if length > SHIPPED_LONGEST:
        return f"longer than {SHIPPED_LONGEST}: it needs keys and values repeated for every query head, and minutes"
    if length % 128:
        return f"the length {length} is not a multiple of its blocks of 128"
    return None


def _padded(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[-1]))) if x.shape[-1] < size else x
