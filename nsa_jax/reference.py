"""What Native Sparse Attention means, in plain `jax.numpy`: also the "xla" implementation.

Follows arXiv 2502.11089, section 3, in its order. The functions above "Whole batches" read one sequence and one key/value
head, so that their shapes are the paper's; below it they are lifted over heads and sequences, in chunks of queries, so that
no array grows as T x S.

In the paper, positions and indices count from 1; here from 0. Shape letters are in `shapes.py`, and two more:

    Q  queries in a chunk, or all        X  keys that a chunk reads
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from nsa_jax.config import NSAConfig
from nsa_jax.shapes import Blocks, CompressedKey, Gates, KeyValue, Out, Position, Query, SegmentIds

# Scores per query head that a chunk of queries may hold: bounds the memory of a forward and a backward pass.
CHUNK_SCORES = 2**18
MAX_CHUNK = 512
MIN_WINDOW_TILE = 16

# Stands for minus infinity in masked scores; finite, because (-inf) - (-inf) would be NaN in a row that sees nothing.
MASKED = -1e30
NO_BLOCK = -1


# ------------------------------------------------------------------------------------------------ one sequence, one head


# Never TF32.
_dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def probabilities(
    query: Float[Array, "Q G H"], key: Float[Array, "X H"], visible: Bool[Array, "Q X"], scale: float
) -> Float[Array, "Q G X"]:
    """Softmax of `scale * q.k` over the visible keys, in float32; zeros for a query that sees none (eq. 2, 8).

    Differs from the paper: eq. 8 prints no scale; it is the softmax of the compressed branch, which has one.
    """
    num_queries, group, size = query.shape
    # The group's heads are rows of one matrix: they read the same keys.
    rows, visible = query.reshape(num_queries * group, size), jnp.repeat(visible, group, axis=0)
    scores = jnp.where(visible, _dot("rh,xh->rx", rows, key) * scale, MASKED)
    highest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True, initial=MASKED))
    weights = jnp.where(visible, jnp.exp(scores - highest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return (weights / jnp.where(total == 0.0, 1.0, total)).reshape(num_queries, group, key.shape[0])


def attention(
    query: Float[Array, "Q G H"],
    key: Float[Array, "X H"],
    value: Float[Array, "X V"],
    visible: Bool[Array, "Q X"],
    scale: float,
) -> Float[Array, "Q G V"]:
    """`softmax(scale * q.k) v` over the visible keys, in float32 (eq. 2); zeros for a query that sees none."""
    # A key that no query sees may hold anything, and 0 * NaN is NaN, forward and backward.
    seen = jnp.any(visible, axis=0)[:, None]
    key, value = jnp.where(seen, key, 0), jnp.where(seen, value, 0)
    p = probabilities(query, key, visible, scale)
    num_queries, group, num_keys = p.shape
    out = _dot("rx,xv->rv", p.reshape(num_queries * group, num_keys), value)
    return out.reshape(num_queries, group, value.shape[-1])


def segment_starts(segment_ids: Int32[Array, "S"]) -> Int32[Array, "S"]:
    """Position of the first token of each token's segment: ids 0 0 0 5 5 give 0 0 0 3 3."""
    return jnp.searchsorted(segment_ids, segment_ids, side="left").astype(jnp.int32)


def _same_segment(
    positions: Int32[Array, "Q"], keys: Int32[Array, "X"], segment_ids: Int32[Array, "S"] | None
) -> Bool[Array, "Q X"] | bool:
    if segment_ids is None:
        return True
    last = segment_ids.shape[0] - 1
    return segment_ids[jnp.clip(positions, 0, last)][:, None] == segment_ids[jnp.clip(keys, 0, last)][None, :]


def visible_compressed(
    positions: Int32[Array, "Q"], num_compressed: int, segment_ids: Int32[Array, "S"] | None, config: NSAConfig
) -> Bool[Array, "Q C"]:
    """Compressed token i, of tokens `i*d .. i*d + l-1`, is seen from its last token on (eq. 7).

    With segments, its first token must be of the query's; so is its last then, which lies between that and the query.
    """
    first = jnp.arange(num_compressed, dtype=jnp.int32) * config.compress_stride
    last = first + config.compress_block - 1
    return (last[None, :] <= positions[:, None]) & _same_segment(positions, first, segment_ids)


def importance(p_cmp: Float[Array, "Q C"], num_blocks: int, config: NSAConfig) -> Float[Array, "Q M"]:
    """Score of each selection block: a compressed token gives its probability once for each d tokens they share (eq. 9).

    For l=32, d=16, l'=64, block j has weights 1, 2, 2, 2, 1 on compressed tokens 4j-1 .. 4j+3.

    Differs from the paper: eq. 9 as printed has minus signs, which read 0-based is one block off.
    """
    # A unit is d tokens: compressed token i lies on units i .. i + l/d - 1, block j on units j*l'/d .. (j+1)*l'/d - 1.
    num_shared = config.compress_block // config.compress_stride
    shares = [jnp.pad(p_cmp, ((0, 0), (r, num_shared - 1 - r))) for r in range(num_shared)]
    units = functools.reduce(jnp.add, shares)
    per_block = config.select_block // config.compress_stride
    units = jnp.pad(units, ((0, 0), (0, num_blocks * per_block - units.shape[1])))
    return units.reshape(-1, num_blocks, per_block).sum(axis=-1)


def choose_blocks(
    scores: Float[Array, "Q M"],
    positions: Int32[Array, "Q"],
    segment_ids: Int32[Array, "S"] | None,
    config: NSAConfig,
) -> Int32[Array, "Q A"]:
    """The forced blocks and the highest scores, `num_selected` in all, ascending (eq. 11); ties go to the lower index.

    Candidates run from the block of the segment's first token to the query's own. `num_selected=4, num_initial=1,
    num_local=2`: a query in block 9 reads 0, 8, 9 and the best of 1..7; one in block 2 reads 0, 1, 2 and nothing else (-1).
    """
    num_blocks = scores.shape[1]
    block = jnp.arange(num_blocks, dtype=jnp.int32)[None, :]
    own = jnp.minimum(positions // config.select_block, num_blocks - 1)[:, None]
    first = _first_block(positions, segment_ids, config)[:, None]
    candidate = (first <= block) & (block <= own)
    forced = (block < first + config.num_initial) | (block > own - config.num_local)
    scores = jnp.where(candidate, jnp.where(forced, jnp.inf, scores), -jnp.inf)
    scores = jnp.pad(scores, ((0, 0), (0, max(0, config.num_selected - num_blocks))), constant_values=-jnp.inf)
    # lax.top_k promises the lower index first among equals.
    best, index = lax.top_k(scores, config.num_selected)
    return _ascending(jnp.where(best > -jnp.inf, index.astype(jnp.int32), NO_BLOCK))


def _first_block(
    positions: Int32[Array, "Q"], segment_ids: Int32[Array, "S"] | None, config: NSAConfig
) -> Int32[Array, "Q"]:
    if segment_ids is None:
        return jnp.zeros_like(positions)
    start = segment_starts(segment_ids)[jnp.clip(positions, 0, segment_ids.shape[0] - 1)]
    return start // config.select_block


def _ascending(blocks: Int32[Array, "*rows A"]) -> Int32[Array, "*rows A"]:
    """Sorted, unused slots last."""
    unused = jnp.iinfo(jnp.int32).max
    blocks = jnp.sort(jnp.where(blocks < 0, unused, blocks), axis=-1)
    return jnp.where(blocks == unused, NO_BLOCK, blocks)


def selected_attention(
    query: Float[Array, "Q G H"],
    selected: KeyValue,
    blocks: Int32[Array, "Q A"],
    positions: Int32[Array, "Q"],
    segment_ids: Int32[Array, "S"] | None,
    config: NSAConfig,
    scale: float,
) -> Float[Array, "Q G V"]:
    """One softmax over all tokens up to the query's in its blocks (eq. 12)."""
    num_keys, size = selected.key.shape[0], config.select_block
    if _reads_all(blocks.shape[1], num_keys, config):
        token = jnp.arange(num_keys, dtype=jnp.int32)
        chosen = jnp.any(blocks[:, :, None] == jnp.arange(config.num_blocks(num_keys))[None, None, :], axis=1)
        chosen = jnp.repeat(chosen, size, axis=1)[:, :num_keys]
        visible = chosen & (token[None, :] <= positions[:, None]) & _same_segment(positions, token, segment_ids)
        return attention(query, *selected, visible, scale)

    def one_query(query: Array, blocks: Array, position: Array) -> Array:
        token = (blocks[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None, :]).reshape(-1)
        visible = jnp.repeat(blocks >= 0, size) & (token <= position) & (token < num_keys)
        visible = visible[None, :] & _same_segment(position[None], token, segment_ids)
        token = jnp.clip(token, 0, num_keys - 1)
        return attention(query[None], selected.key[token], selected.value[token], visible, scale)[0]

    return jax.vmap(one_query)(query, blocks, positions)


def _reads_all(num_chosen: int, num_keys: int, config: NSAConfig) -> bool:
    """Whether all keys under a mask cost less than the chosen blocks gathered for each query: a matter of speed alone."""
    return 8 * num_chosen * config.select_block >= num_keys


def window_attention(
    query: Float[Array, "Q G H"],
    window: KeyValue,
    positions: Int32[Array, "Q"],
    window_start: Int32[Array, ""],
    segment_ids: Int32[Array, "S"] | None,
    config: NSAConfig,
    scale: float,
) -> Float[Array, "Q G V"]:
    """Attention to exactly w keys, `t-w+1 .. t` (3.3.3): window=3, query 5 sees 3, 4, 5.

    The queries' positions are consecutive; the first key's is `window_start`, and keys at negative positions do not exist.

    Differs from the paper: its `k_{t-w:t}`, read literally, holds w+1 tokens; its table 4 counts w.
    """
    # A tile of queries reads its own keys and those of a window before: few that no query of it sees.
    num_queries, length = query.shape[0], window.key.shape[0]
    tile = min(num_queries, max(config.window, MIN_WINDOW_TILE))
    num_tiles = -(-num_queries // tile)
    reach = min(length, tile + config.window - 1)

    def one_tile(query: Array, start: Array) -> Array:
        positions = start + jnp.arange(tile, dtype=jnp.int32)
        first = jnp.clip(start - (config.window - 1) - window_start, 0, length - reach)
        key, value = (lax.dynamic_slice_in_dim(x, first, reach) for x in window)
        token = window_start + first + jnp.arange(reach, dtype=jnp.int32)
        ago = positions[:, None] - token[None, :]
        visible = (ago >= 0) & (ago < config.window) & (token >= 0)[None, :]
        return attention(query, key, value, visible & _same_segment(positions, token, segment_ids), scale)

    tiles = jnp.pad(query, ((0, num_tiles * tile - num_queries), (0, 0), (0, 0)))
    starts = positions[0] + jnp.arange(num_tiles, dtype=jnp.int32) * tile
    out = jax.vmap(one_tile)(tiles.reshape(num_tiles, tile, *query.shape[1:]), starts)
    return out.reshape(num_tiles * tile, *out.shape[2:])[:num_queries]


# ------------------------------------------------------------------------------------------------------- whole batches


def select_blocks(
    query: Query,
    compressed_key: CompressedKey,
    *,
    config: NSAConfig,
    num_keys: int,
    scale: float,
    query_start: Position,
    segment_ids: SegmentIds | None,
) -> Blocks:
    """Blocks that each query reads, `[B, T, K, num_selected]`; see `nsa_jax.select_blocks`."""
    num_compressed = compressed_key.shape[1]

    def one_head(query: Array, compressed_key: Array, start: Array, segment_ids: Array | None) -> Array:
        def chunk(query: Array, positions: Array) -> Array:
            visible = visible_compressed(positions, num_compressed, segment_ids, config)
            p_cmp = probabilities(query, compressed_key, visible, scale).sum(axis=1)  # over the group (eq. 10)
            scores = importance(p_cmp, config.num_blocks(num_keys), config)
            return choose_blocks(scores, positions, segment_ids, config)

        return _in_chunks(chunk, (query,), start, keys_read=num_compressed)

    # No gradient passes through a choice.
    query, compressed_key = jax.tree.map(lax.stop_gradient, _widened((query, compressed_key)))
    arrays = (_grouped(query, compressed_key.shape[2]), compressed_key)
    return _over_sequences_and_heads(one_head, arrays, (query_start,), segment_ids)


def canonical_blocks(
    blocks: Blocks, *, config: NSAConfig, num_keys: int, query_start: Position, segment_ids: SegmentIds | None
) -> Int32[Array, "B T K slots"]:
    """A caller's blocks in the form of `select_blocks`: future, unknown and other segments' dropped, each once, ascending.

    Query in block 2 of 4: `7 2 -1 0 2 3` becomes `0 2 -1 -1`; there are no more slots than blocks.
    """
    start = jnp.asarray(query_start, jnp.int32).reshape(-1, 1)
    positions = jnp.broadcast_to(start + jnp.arange(blocks.shape[1], dtype=jnp.int32)[None, :], blocks.shape[:2])
    if segment_ids is None:
        first = jnp.zeros_like(positions)
    else:
        first = jax.vmap(_first_block, in_axes=(0, 0, None))(positions, segment_ids, config)
    own = jnp.minimum(positions // config.select_block, config.num_blocks(num_keys) - 1)
    readable = (first[:, :, None, None] <= blocks) & (blocks <= own[:, :, None, None]) & (blocks >= 0)
    blocks = _ascending(jnp.where(readable, blocks, NO_BLOCK))
    repeated = jnp.pad(blocks[..., 1:] == blocks[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))[..., : blocks.shape[-1]]
    return _ascending(jnp.where(repeated, NO_BLOCK, blocks))[..., : config.num_blocks(num_keys)]


def attend(
    query: Query,
    compressed: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: Gates,
    blocks: Blocks,
    *,
    config: NSAConfig,
    scale: float,
    query_start: Position,
    window_start: Position,
    segment_ids: SegmentIds | None,
) -> Out:
    """The gated sum of the three branches (eq. 5), given the selected blocks in canonical form."""
    kv_heads, dtype = selected.key.shape[2], selected.value.dtype
    num_compressed, num_keys = compressed.key.shape[1], selected.key.shape[1]
    num_chosen = blocks.shape[-1]
    keys_selected = num_keys if _reads_all(num_chosen, num_keys, config) else num_chosen * config.select_block

    def one_head(
        query: Array,
        gates: Array,
        blocks: Array,
        compressed: KeyValue,
        selected: KeyValue,
        window: KeyValue,
        start: Array,
        window_start: Array,
        segment_ids: Array | None,
    ) -> Array:
        def chunk(query: Array, gates: Array, blocks: Array, positions: Array) -> Array:
            visible = visible_compressed(positions, num_compressed, segment_ids, config)
            branches = (
                attention(query, *compressed, visible, scale),
                selected_attention(query, selected, blocks, positions, segment_ids, config, scale),
                window_attention(query, window, positions, window_start, segment_ids, config, scale),
            )
            weighted = [gates[..., i, None] * branch for i, branch in enumerate(branches)]
            return functools.reduce(jnp.add, weighted).astype(dtype)

        keys_read = num_compressed + keys_selected + config.window
        return _in_chunks(chunk, (query, gates, blocks), start, keys_read=keys_read)

    query, gates, compressed, selected, window = _widened((query, gates, compressed, selected, window))
    arrays = (_grouped(query, kv_heads), _grouped(gates, kv_heads), blocks, compressed, selected, window)
    out = _over_sequences_and_heads(one_head, arrays, (query_start, window_start), segment_ids)
    return out.reshape(*query.shape[:-1], out.shape[-1])


def _widened(arrays: Any) -> Any:
    """In float32 throughout: the result is rounded once, and so is each gradient, however many chunks add to it."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), arrays)


def _grouped(x: Float[Array, "B T N D"], kv_heads: int) -> Float[Array, "B T K G D"]:
    batch, length, num_heads, size = x.shape
    return x.reshape(batch, length, kv_heads, num_heads // kv_heads, size)


def _over_sequences_and_heads(
    one_head: Callable, arrays: tuple, starts: tuple[Position, ...], segment_ids: SegmentIds | None
) -> Array:
    """Lift `one_head(*arrays, *starts, segment_ids)` over the heads (axis 2) and sequences (axis 0) of the arrays."""
    positions = [jnp.asarray(start, jnp.int32) for start in starts]

    def one_sequence(arrays: tuple, starts: list[Array], segment_ids: Array | None) -> Array:
        return jax.vmap(lambda arrays: one_head(*arrays, *starts, segment_ids), in_axes=1, out_axes=1)(arrays)

    axes = [0 if start.ndim else None for start in positions]
    return jax.vmap(one_sequence, in_axes=(0, axes, 0))(arrays, positions, segment_ids)


def _in_chunks(function: Callable, arrays: tuple[Array, ...], start: Array, *, keys_read: int) -> Array:
    """`function(*arrays, positions)` for chunks of the arrays' first axis, computed again in the backward pass.

    Without the second computation, the probabilities of all chunks would be kept: T x S numbers.
    """
    length = arrays[0].shape[0]
    size = max(1, min(length, MAX_CHUNK, CHUNK_SCORES // max(1, keys_read)))
    if size >= length:
        return function(*arrays, start + jnp.arange(length, dtype=jnp.int32))
    num_chunks = -(-length // size)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, num_chunks * size - length), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, size, *x.shape[1:])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_chunk(inputs: Any) -> Array:
        index, chunks = inputs
        return function(*chunks, start + index * size + jnp.arange(size, dtype=jnp.int32))

    out = lax.map(one_chunk, (jnp.arange(num_chunks, dtype=jnp.int32), tuple(split(x) for x in arrays)))
    return out.reshape(num_chunks * size, *out.shape[2:])[:length]
