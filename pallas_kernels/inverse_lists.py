"""The queries that chose each block: the selection turned round, in lists cut into pieces of like length.

Every query reads the first block, most blocks are read by few: a program that holds one block works on one piece of its list.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels import flash

PIECE = 1024
PACKED_BELOW = 2**32  # pairs of a list and a query that are sorted as one number each


class Lists(NamedTuple):
    """For each (sequence, key/value head, block), in this order: the queries that chose it, ascending."""

    query: Int32[Array, "L"]  # all lists, one after the other
    ends: Int32[Array, "BKM"]  # where each ends


class Pieces(NamedTuple):
    """Lists cut into pieces of at most `PIECE` queries; unused ones are empty."""

    block: Int32[Array, "P"]  # index of the list
    begin: Int32[Array, "P"]
    end: Int32[Array, "P"]
    list_begin: Int32[Array, "P"]
    ends: Int32[Array, "BKM"]  # where each list's pieces end


def invert(blocks: Int32[Array, "B T K A"], *, num_blocks: int) -> Lists:
    """The list of each block, from `-1`-padded choices."""
    batch, length, kv_heads, slots = blocks.shape
    which = jnp.arange(batch * kv_heads, dtype=jnp.int32).reshape(batch, 1, kv_heads, 1) * num_blocks
    num_lists = batch * kv_heads * num_blocks
    lists = jnp.where(blocks < 0, num_lists, which + blocks).swapaxes(1, 2)
    queries = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[:, None], (length, slots))
    queries = jnp.broadcast_to(queries[None, None], lists.shape)
    lists, queries = lists.reshape(-1), queries.reshape(-1)
    if (num_lists + 1) * length < PACKED_BELOW:
        # Sorting one array is what a GPU does fastest.
        packed = jnp.sort(lists.astype(jnp.uint32) * jnp.uint32(length) + queries.astype(jnp.uint32))
        lists, queries = (packed // length).astype(jnp.int32), (packed % length).astype(jnp.int32)
    else:
        lists, queries = lax.sort((lists, queries), num_keys=1, is_stable=True)
    ends = flash.search(lists, jnp.arange(num_lists, dtype=jnp.int32), side="right")
    return Lists(queries, ends)


def cut(lists: Lists) -> Pieces:
    """As many pieces as there can be at most: their number does not depend on the choices."""
    num_lists = lists.ends.shape[0]
    begins = jnp.concatenate([jnp.zeros((1,), jnp.int32), lists.ends[:-1]])
    ends = jnp.cumsum(-(-(lists.ends - begins) // PIECE), dtype=jnp.int32)
    num_pieces = lists.query.shape[0] // PIECE + num_lists
    piece = jnp.arange(num_pieces, dtype=jnp.int32)
    block = flash.search(ends, piece, side="right")
    used = block < num_lists
    block = jnp.minimum(block, num_lists - 1)
    before = jnp.where(block > 0, ends[block - 1], 0)
    begin = begins[block] + (piece - before) * PIECE
    end = jnp.minimum(begin + PIECE, lists.ends[block])
    return Pieces(block, jnp.where(used, begin, 0), jnp.where(used, end, 0), begins[block], ends)
