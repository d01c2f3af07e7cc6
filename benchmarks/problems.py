"""Inputs at the size of real models, drawn on the device."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nsa_jax import KeyValue, NSAConfig, nsa_attention
from nsa_jax.shapes import Gates, Out, Query

RUN = 64  # neighbouring queries that have a part in common

InputKind = Literal["random", "alike"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a problem but for its length, by DESIGN's names."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")


class Operands(NamedTuple):
    """What attention is differentiated with respect to."""

    query: Query
    compressed: KeyValue
    selected: KeyValue
    window: KeyValue
    gates: Gates


def attend(operands: Operands, *, config: NSAConfig, implementation: Any = "pallas", **more: Any) -> Out:
    """`nsa_attention` of operands."""
    return nsa_attention(
        operands.query,
        compressed=operands.compressed,
        selected=operands.selected,
        window=operands.window,
        gates=operands.gates,
        config=config,
        implementation=implementation,
        **more,
    )


@functools.partial(jax.jit, static_argnames=("shape", "length", "config", "kind", "alike"))
def draw(
    seed: int, *, shape: Shape, length: int, config: NSAConfig, kind: InputKind = "random", alike: float = 0.9
) -> tuple[Operands, Float[Array, "B T N V"]]:
    """Seeded Gaussian operands (gates uniform) and a Gaussian cotangent of the output.

    Args:
        seed: of all draws.
        kind: "random": every query is drawn by itself, so that neighbours choose blocks as strangers do. "alike": see
            `alike_queries`.
        alike: a of `alike_queries`.
    """
    keys = jax.random.split(jax.random.key(seed), 9)

    def normal(key: Array, length: int, heads: int, size: int) -> Array:
        return jax.random.normal(key, (shape.batch, length, heads, size)).astype(shape.dtype)

    def branch(key: Array, value: Array, length: int) -> KeyValue:
        return KeyValue(
            normal(key, length, shape.kv_heads, shape.head_dim),
            normal(value, length, shape.kv_heads, shape.value_head_dim),
        )

    query_shape = (shape.batch, length, shape.heads, shape.head_dim)
    query = jax.random.normal(keys[0], query_shape) if kind == "random" else alike_queries(keys[0], query_shape, alike)
    operands = Operands(
        query.astype(shape.dtype),
        branch(keys[1], keys[2], config.num_compressed(length)),
        branch(keys[3], keys[4], length),
        branch(keys[5], keys[6], length),
        jax.random.uniform(keys[7], (shape.batch, length, shape.heads, 3)).astype(shape.dtype),
    )
    return operands, normal(keys[8], length, shape.heads, shape.value_head_dim)


def alike_queries(key: Array, shape: tuple[int, int, int, int], alike: float) -> Float[Array, "B T N H"]:
    """Unit Gaussian queries of which those of a run of 64 are correlated by `alike`, as neighbours in text are.

    query[t] = sqrt(a) * common[t // 64] + sqrt(1 - a) * own[t]
    """
    if not 0.0 <= alike <= 1.0:
        raise ValueError(f"{alike=} must be in [0, 1]: the correlation of two queries of a run")
    common_key, own_key = jax.random.split(key)
    batch, length, heads, size = shape
    common = jax.random.normal(common_key, (batch, -(-length // RUN), heads, size))
    common = jnp.repeat(common, RUN, axis=1)[:, :length]
    return alike**0.5 * common + (1.0 - alike) ** 0.5 * jax.random.normal(own_key, shape)
