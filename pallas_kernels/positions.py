"""Where queries are and which keys they may read: all of NSA's visibility, as arrays that the kernels look up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels import flash
from pallas_kernels.flash import Config, Ranges


class Positions(NamedTuple):
    """Of each query, in tokens: none ever decreases along T.

    `last` is the last token that it may read, `first` the first: of its segment, or 0.
    """

    position: Int32[Array, "B T"]
    last: Int32[Array, "B T"]
    first: Int32[Array, "B T"]


def positions(
    query_start: int | Array, segment_ids: Int32[Array, "B S"] | None, *, batch: int, num_queries: int, num_keys: int
) -> Positions:
    """Query row r of a sequence has position `query_start + r`; past the end it reads what the last token reads,
    of a window what is left of its own."""
    start = jnp.broadcast_to(jnp.asarray(query_start, jnp.int32), (batch,))
    position = start[:, None] + jnp.arange(num_queries, dtype=jnp.int32)[None, :]
    last = jnp.minimum(position, num_keys - 1)
    if segment_ids is None:
        return Positions(position, last, jnp.zeros_like(last))

    def first_of_segment(ids: Array, last: Array) -> Array:
        return flash.search(ids, ids[last], side="left")

    return Positions(position, last, jax.vmap(first_of_segment)(segment_ids, last))


def token_ranges(where: Positions) -> Ranges:
    """What a query may read of the tokens themselves: query 5 reads 0 .. 5."""
    return Ranges(where.first, where.last + 1)


def window_ranges(where: Positions, window_start: int | Array, *, length: int, config: Config) -> Ranges:
    """The last w tokens, as indices of the window branch's keys: w=3, query 5 reads 3, 4, 5 if those start at 0."""
    start = jnp.broadcast_to(jnp.asarray(window_start, jnp.int32), where.position.shape[:1])[:, None]
    low = jnp.maximum(where.position - config.window + 1, where.first) - start
    return Ranges(jnp.clip(low, 0, length), jnp.clip(where.position + 1 - start, 0, length))


def ring_ranges(where: Positions, *, config: Config) -> Ranges:
    """The last w tokens, as rows of a ring that holds token p in row p % w: w=3, query 1 reads 0, 1, query 5 all three."""
    high = jnp.minimum(where.position + 1, config.window)
    return Ranges(jnp.zeros_like(high), high)


def compressed_ranges(where: Positions, *, config: Config) -> Ranges:
    """The compressed tokens whose tokens, `i*d .. i*d + l - 1`, are all readable: l=8, d=4, query 12 reads 0 and 1."""
    l, d = config.compress_block, config.compress_stride
    high, _ = flash.divide(jnp.maximum(where.last - l + 1 + d, 0), d)
    return Ranges(flash.divide(where.first + d - 1, d)[0], high)


def forced_ranges(where: Positions, *, config: Config) -> tuple[Ranges, ...]:
    """The tokens of the blocks that every query chooses, its first and its last: l'=16, query 40 has 0 .. 15 and 16 .. 40.

    Of one kind alone if the config forces no other.
    """
    candidates = candidate_blocks(where, config=config)
    end = where.last + 1
    after_initial = jnp.minimum((candidates.first + config.num_initial) * config.select_block, end)
    ranges: tuple[Ranges, ...] = (Ranges(where.first, after_initial),) if config.num_initial else ()
    if config.num_local:
        local = (candidates.own - config.num_local + 1) * config.select_block
        ranges += (Ranges(jnp.maximum(jnp.maximum(local, after_initial), where.first), end),)
    return ranges


class BlockRanges(NamedTuple):
    """The candidates of each query's selection: blocks `first .. own`."""

    first: Int32[Array, "B T"]
    own: Int32[Array, "B T"]


def candidate_blocks(where: Positions, *, config: Config) -> BlockRanges:
    """From the block of the segment's first token to the query's own: l'=16, query 40 of one segment has 0, 1, 2."""
    return BlockRanges(*(flash.divide(token, config.select_block)[0] for token in (where.first, where.last)))
