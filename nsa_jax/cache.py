"""What decoding keeps of one layer, and how it grows.

Per sequence: the keys and values of all tokens for the selected branch, the compressed tokens (1/d as many), the last w
tokens of the window branch as a ring, and the last l tokens before compression, from which the next compressed token is made
when its block completes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from nsa_jax.config import FLOATS, NSAConfig
from nsa_jax.shapes import KeyValue


class NSACache(NamedTuple):
    """The cache of one attention layer: a pytree of arrays with fixed shapes, given to functions and returned by them.

    `compressed` is `[B, C, K, ...]` with C = `config.num_compressed(max_length)`; `selected` `[B, max_length, K, ...]`;
    `window` `[B, w, K, ...]`, the token at position p in row `p % w`; `uncompressed` `[B, l, K, ...]`, likewise in row `p % l`;
    `lengths` int32 `[B]`: tokens seen so far. Rows that nothing was written to are zero.

    Its memory is that of one branch's keys and values and little more: the paper's sizes, 64k tokens and H = V = 128 make
    it 1.07 times as large, where full attention's cache is 1. (Its three branches have three sets of K/V; two are not kept.)
    """

    compressed: KeyValue
    selected: KeyValue
    window: KeyValue
    uncompressed: KeyValue
    lengths: Int32[Array, "B"]

    @property
    def max_length(self) -> int:
        return self.selected.key.shape[1]


def init_cache(
    batch_size: int,
    max_length: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    value_head_dim: int,
    config: NSAConfig,
    dtype: jnp.dtype,
) -> NSACache:
    """An empty cache for sequences of up to `max_length` tokens."""
    for name, number in (("batch_size", batch_size), ("max_length", max_length)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} must be a positive integer")
    if str(jnp.dtype(dtype)) not in FLOATS:
        raise ValueError(
            f"{dtype=!s} of a cache must be one of {', '.join(FLOATS)}, in which attention to it is computed"
        )

    def zeros(length: int) -> KeyValue:
        shape = (batch_size, length, num_kv_heads)
        return KeyValue(jnp.zeros((*shape, head_dim), dtype), jnp.zeros((*shape, value_head_dim), dtype))

    branches = {name: zeros(length) for name, length in _num_rows(max_length, config).items()}
    return NSACache(**branches, lengths=jnp.zeros((batch_size,), jnp.int32))


def _num_rows(max_length: int, config: NSAConfig) -> dict[str, int]:
    compressed = config.num_compressed(max_length)
    return dict(compressed=compressed, selected=max_length, window=config.window, uncompressed=config.compress_block)


def check_cache(
    cache: NSACache, *, batch_size: int, num_kv_heads: int, head_dim: int, value_head_dim: int, config: NSAConfig
) -> None:
    """Raise `ValueError` for a cache that `init_cache` makes for no `max_length` with these sizes."""
    if not isinstance(cache, NSACache):
        raise ValueError(f"cache must be an NSACache, as init_cache makes it, but it is a {type(cache).__name__}")
    if cache.lengths.ndim != 1 or cache.lengths.dtype != jnp.int32:
        raise ValueError(
            f"cache.lengths must be int32 [B], but it is {cache.lengths.dtype} of shape {cache.lengths.shape}"
        )
    if cache.lengths.shape != (batch_size,):
        raise ValueError(f"the cache holds {cache.lengths.shape[0]} sequences, but x has {batch_size}")
    dtype, remedy = cache.selected.key.dtype, "make the cache with init_cache of the layer that reads it"
    if str(dtype) not in FLOATS:
        raise ValueError(f"cache.selected.key has {dtype=!s}, which must be one of {', '.join(FLOATS)}: {remedy}")
    for name, num_rows in _num_rows(cache.max_length, config).items():
        for which, letter, size in (("key", "H", head_dim), ("value", "V", value_head_dim)):
            array, shape = getattr(getattr(cache, name), which), (batch_size, num_rows, num_kv_heads, size)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"cache.{name}.{which} must be {dtype} [B, rows, K, {letter}] = {shape}, "
                    f"but it is {array.dtype} of shape {array.shape}: {remedy}"
                )


class Window(NamedTuple):
    """Keys and values of the window branch for a chunk of queries: the last w tokens of the cache, then the chunk's own."""

    keys_values: KeyValue
    start: Int32[Array, "B"]  # position of the first; negative while the ring is not full


def extend(
    cache: NSACache,
    *,
    compression: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    num_real: Int32[Array, "B"],
    compress: Callable[[KeyValue, Int32[Array, "B C"]], KeyValue],
    config: NSAConfig,
) -> NSACache:
    """Append T tokens, of which the first `num_real[b]` of sequence b are real; the others leave no trace.

    Args:
        cache: as it was.
        compression, selected, window: each branch's new keys and values, `[B, T, K, ...]`; those for compression are as phi
            reads them, the others as attention does.
        num_real: int32 `[B]`, each from 0 to T.
        compress: from uncompressed keys and values `[B, X, K, ...]` and the positions `[B, C]` of the compressed tokens that
            they give, to those compressed tokens as attention reads them.
        config: sizes.

    Returns:
        The cache with the new tokens. A token at `max_length` or beyond is counted in `lengths` and not written. A jitted
        function to which the cache is donated writes rows of it in place, and no more of them than are new.
    """
    num_new = selected.key.shape[1]
    positions = cache.lengths[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None, :]
    num_written = jnp.clip(cache.max_length - cache.lengths, 0, num_real)
    grown = cache._replace(
        selected=_write(cache.selected, selected, positions, _real(num_new, num_real)),
        window=_write_ring(cache.window, window, positions, num_written),
        uncompressed=_write_ring(cache.uncompressed, compression, positions, num_written),
        lengths=cache.lengths + num_real,
    )
    if num_new == 1:
        # The block that a token completes is the last l tokens: all that the ring now holds.
        tokens = unroll(grown.uncompressed, grown.lengths)
    else:
        tokens = _uncompressed(cache, compression, num_real, config)
    have = _num_compressed(cache.lengths, config)
    count = -(-num_new // config.compress_stride)  # T more tokens complete at most ceil(T / d) blocks
    index = have[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    complete = index < _num_compressed(grown.lengths, config)[:, None]
    compressed = compress(tokens, index * config.compress_stride)
    return grown._replace(compressed=_write(cache.compressed, compressed, index, complete))


def recent_window(cache: NSACache, new: KeyValue, num_real: Int32[Array, "B"], config: NSAConfig) -> Window:
    """The window branch's keys and values for T new tokens; `cache` is as it was before them, the rest as in `extend`."""
    unrolled, new = unroll(cache.window, cache.lengths), _only(_real(new.key.shape[1], num_real), new)
    keys_values = jax.tree.map(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), unrolled, new)
    return Window(keys_values, cache.lengths - config.window)


def unroll(ring: KeyValue, lengths: Int32[Array, "B"]) -> KeyValue:
    """The ring's tokens in the order of their positions, `length - size .. length - 1`."""
    size = ring.key.shape[1]
    return _take(ring, (lengths[:, None] - size + jnp.arange(size, dtype=jnp.int32)[None, :]) % size)


def _real(num_new: int, num_real: Int32[Array, "B"]) -> Bool[Array, "B T"]:
    return jnp.arange(num_new, dtype=jnp.int32)[None, :] < num_real[:, None]


def _only(real: Bool[Array, "B T"], new: KeyValue) -> KeyValue:
    return jax.tree.map(lambda x: jnp.where(real[:, :, None, None], x, 0), new)


def _uncompressed(cache: NSACache, new: KeyValue, num_real: Int32[Array, "B"], config: NSAConfig) -> KeyValue:
    """Those of the last l tokens and T new ones that hold the blocks which the new ones may complete."""
    l, d, num_new = config.compress_block, config.compress_stride, new.key.shape[1]
    # A token that is not real may hold anything, NaN too: it must not meet a real one in a product with zero.
    new = _only(_real(num_new, num_real), new)
    recent = unroll(cache.uncompressed, cache.lengths)
    tokens = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), recent, new)
    # The next block starts at most l - 1 tokens ago; row 0 is l tokens ago.
    start = _num_compressed(cache.lengths, config) * d - (cache.lengths - l)
    row = start[:, None] + jnp.arange((-(-num_new // d) - 1) * d + l, dtype=jnp.int32)[None, :]
    return _take(tokens, jnp.minimum(row, tokens.key.shape[1] - 1))


def _num_compressed(lengths: Int32[Array, "B"], config: NSAConfig) -> Int32[Array, "B"]:
    return jnp.maximum(0, (lengths - config.compress_block) // config.compress_stride + 1)


def _take(x: KeyValue, rows: Int32[Array, "B X"]) -> KeyValue:
    """Rows of `x`, all of which exist."""
    take = functools.partial(jnp.take_along_axis, axis=1, mode="promise_in_bounds")
    return jax.tree.map(lambda x: take(x, rows[:, :, None, None]), x)


def _write(x: KeyValue, new: KeyValue, rows: Int32[Array, "B X"], keep: Bool[Array, "B X"]) -> KeyValue:
    """`x` with the rows that `keep` names replaced by `new`; rows beyond its end are dropped."""
    rows = jnp.where(keep, rows, x.key.shape[1])

    def write(x: Float[Array, "B L K D"], new: Float[Array, "B X K D"]) -> Float[Array, "B L K D"]:
        return jax.vmap(lambda x, rows, new: x.at[rows].set(new.astype(x.dtype), mode="drop"))(x, rows, new)

    return jax.tree.map(write, x, new)


def _write_ring(
    ring: KeyValue, new: KeyValue, positions: Int32[Array, "B X"], num_written: Int32[Array, "B"]
) -> KeyValue:
    # Of several tokens that fall on one row of the ring, the last one stays.
    size = ring.key.shape[1]
    index = jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :]
    keep = (index < num_written[:, None]) & (index >= num_written[:, None] - size)
    return _write(ring, new, positions % size, keep)
