"""How much the choices of neighbouring queries overlap: it decides how much a kernel that reads blocks for several saves."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from nsa_jax.shapes import Blocks

UNIONS = (2, 4, 8, 16)


def mean_unions(blocks: Blocks, count: int) -> Float[Array, "K"]:
    """Mean number of different blocks among the choices of `count` adjacent queries, for each key/value head.

    Queries `0 .. count-1` are one group, `count .. 2*count-1` the next; a last group that is not full is left out. Two queries
    that chose `0 2 5` and `0 3 5` have a union of 4. NaN if T < count.
    """
    # One head at a time: sorted copies of all the choices would be several times as large.
    return jnp.stack([_mean_union(blocks[:, :, head], count) for head in range(blocks.shape[2])])


def mean_union(blocks: Blocks, count: int) -> float:
    """The mean of `mean_unions` over the heads."""
    return float(jnp.mean(mean_unions(blocks, count)))


def union_sizes(blocks: Blocks) -> dict[str, float]:
    """`mean_union` of 2, 4, 8 and 16 queries, for the record."""
    return {str(count): mean_union(blocks, count) for count in UNIONS}


@functools.partial(jax.jit, static_argnames="count")
def _mean_union(blocks: Int32[Array, "B T A"], count: int) -> Float[Array, ""]:
    batch, length, slots = blocks.shape
    groups = length // count
    chosen = blocks[:, : groups * count].reshape(batch, groups, count * slots)
    chosen = jnp.sort(chosen, axis=-1)
    new = jnp.concatenate([jnp.ones_like(chosen[..., :1], bool), chosen[..., 1:] != chosen[..., :-1]], axis=-1)
    return jnp.mean(jnp.sum(new & (chosen >= 0), axis=-1).astype(jnp.float32))
