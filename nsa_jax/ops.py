"""The two public functions: check the inputs, look the implementation up, compose selection and attention, once."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int32

import pallas_kernels
from nsa_jax import reference
from nsa_jax.cache import unroll
from nsa_jax.config import NSAConfig, check_attention_inputs, check_decode_inputs, check_inputs
from nsa_jax.shapes import Blocks, CompressedKey, Gates, KeyValue, Out, Position, Query, SegmentIds

ImplementationName = Literal["xla", "pallas", "pallas_interpret"]


class Implementation(NamedTuple):
    """One way to compute NSA; signatures as in `reference.py`, but `attend` chooses the blocks itself if they are None.

    `decode_step(query, compressed, selected, window, gates, lengths, *, config, scale)` is the function of that name, below.
    The names of `SAVED_NAMES` are attached inside `attend`, where the backward pass finds them.
    """

    select_blocks: Callable[..., Blocks]
    attend: Callable[..., Out]
    decode_step: Callable[..., Out]


# Compiled as a whole, so that a call outside of any jit does not compile operation by operation.
_select_blocks_xla = jax.jit(reference.select_blocks, static_argnames=("config", "num_keys", "scale"), inline=True)
_attend_given_blocks_xla = jax.jit(reference.attend, static_argnames=("config", "scale"), inline=True)
_canonical_blocks = jax.jit(reference.canonical_blocks, static_argnames=("config", "num_keys"), inline=True)

_STATIC = ("config", "scale", "interpret")
_select_blocks_pallas = jax.jit(pallas_kernels.select_blocks, static_argnames=(*_STATIC, "num_keys"), inline=True)
_attend_pallas = jax.jit(pallas_kernels.attend, static_argnames=_STATIC, inline=True)
_decode_step_pallas = jax.jit(pallas_kernels.decode_step, static_argnames=_STATIC, inline=True)


def _attend_xla(
    query: Query,
    compressed: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: Gates,
    blocks: Blocks | None,
    *,
    window_start: Position,
    **where: Any,
) -> Out:
    if blocks is None:
        blocks = _select_blocks_xla(query, compressed.key, num_keys=selected.key.shape[1], **where)
    blocks = checkpoint_name(blocks, "nsa_blocks")
    out = _attend_given_blocks_xla(
        query, compressed, selected, window, gates, blocks, window_start=window_start, **where
    )
    return checkpoint_name(out, "nsa_out")


def _decode_step_xla(
    query: Query,
    compressed: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: Gates,
    lengths: Int32[Array, "B"],
    **sizes: Any,
) -> Out:
    # An empty sequence reads what one of a single token would.
    where = dict(query_start=jnp.maximum(lengths - 1, 0), segment_ids=None, **sizes)
    near, window_start = unroll(window, lengths), lengths - window.key.shape[1]
    return _attend_xla(query, compressed, selected, near, gates, None, window_start=window_start, **where)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "xla": Implementation(_select_blocks_xla, _attend_xla, _decode_step_xla),
    "pallas": Implementation(_select_blocks_pallas, _attend_pallas, _decode_step_pallas),
    "pallas_interpret": Implementation(
        *(functools.partial(f, interpret=True) for f in (_select_blocks_pallas, _attend_pallas, _decode_step_pallas))
    ),
}

# "xla" has one output, "nsa_out", and no log-sum-exps. Under this policy a rematerialised layer keeps what attention
# computed, so that its forward pass does not run twice.
SAVED_NAMES = (
    "nsa_blocks",
    "nsa_out",
    *(f"nsa_{x}_{branch}" for x in ("out", "lse") for branch in ("cmp", "slc", "win")),
)
save_attention = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)


def nsa_attention(
    query: Query,
    *,
    compressed: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: Gates,
    config: NSAConfig,
    scale: float | None = None,
    query_start: Position = 0,
    window_start: Position = 0,
    segment_ids: SegmentIds | None = None,
    selected_blocks: Blocks | None = None,
    implementation: ImplementationName | None = None,
) -> Out:
    """Native Sparse Attention: the gated sum of compressed, selected and window attention, causal.

        out[t] = g_cmp[t] * o_cmp[t] + g_slc[t] * o_slc[t] + g_win[t] * o_win[t]      (eq. 5 of arXiv 2502.11089)

    Each branch has its own keys and values (3.3.3). Query head n reads key/value head `n // (N // K)`. Scores, softmax and
    the gated sum are in float32, the result is rounded to the values' dtype; the kernels round each branch's output too.

    Args:
        query: `[B, T, N, H]`, float32, bfloat16 or float16; keys and values have the same dtype.
        compressed: keys `[B, C, K, H]` and values `[B, C, K, V]` of the compressed tokens, C = `config.num_compressed(S)`;
            `mean_compress` makes them, or a learned phi of `nsa_jax.compression`.
        selected: keys `[B, S, K, H]` and values `[B, S, K, V]` of the tokens; S may exceed T.
        window: the same for the sliding window, `[B, W, K, H]` and `[B, W, K, V]`; W is S where nothing is left out.
        gates: `[B, T, N, 3]`, for compressed, selected, window, in [0, 1] (not checked); the query's dtype or float32.
        config: sizes of the three branches.
        scale: factor of the scores; `H ** -0.5` if None.
        query_start: position, in tokens, of the first query: one for all sequences (int or traced int32) or int32 `[B]`.
        window_start: position of the window branch's first key, likewise; negative positions are never read.
        segment_ids: int32 `[B, S]`, non-decreasing: packed documents. A query sees its own segment alone.
        selected_blocks: int32 `[B, T, K, A]`, any A: read instead of the selection. -1, future and unknown blocks read
            nothing; a repeated block counts once.
        implementation: "xla", "pallas", "pallas_interpret", or None: the best for this device.

    Returns:
        `[B, T, N, V]` in the values' dtype. At positions of S and beyond it is finite and otherwise unspecified.

    Raises:
        ValueError: a shape, dtype, position or the config breaks a rule.
        NotImplementedError: the named implementation does not exist here.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from nsa_jax import KeyValue, NSAConfig, mean_compress, nsa_attention
        >>> config = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=32)
        >>> key, value = jax.random.normal(jax.random.key(0), (2, 1, 256, 2, 64))
        >>> query = jax.random.normal(jax.random.key(1), (1, 256, 4, 64))
        >>> out = nsa_attention(
        ...     query,
        ...     compressed=KeyValue(mean_compress(key, config=config), mean_compress(value, config=config)),
        ...     selected=KeyValue(key, value),
        ...     window=KeyValue(key, value),
        ...     gates=jnp.full((1, 256, 4, 3), 1 / 3),
        ...     config=config,
        ... )
        >>> out.shape
        (1, 256, 4, 64)
    """
    check_attention_inputs(
        query,
        compressed=compressed,
        selected=selected,
        window=window,
        gates=gates,
        config=config,
        scale=scale,
        query_start=query_start,
        window_start=window_start,
        segment_ids=segment_ids,
        selected_blocks=selected_blocks,
    )
    _check_non_decreasing(segment_ids)
    num_keys, scale, blocks = selected.key.shape[1], _scale(scale, query), selected_blocks
    if blocks is not None:
        where = dict(query_start=query_start, segment_ids=segment_ids)
        blocks = _canonical_blocks(blocks, config=config, num_keys=num_keys, **where)
    chosen = _implementation(
        implementation,
        "attend",
        query,
        kv_heads=selected.key.shape[2],
        config=config,
        num_slots=config.num_selected if blocks is None else blocks.shape[3],
        num_keys=num_keys,
        value_size=selected.value.shape[3],
        scale=scale,
    )
    return chosen.attend(
        query,
        compressed,
        selected,
        window,
        gates,
        blocks,
        config=config,
        scale=scale,
        query_start=query_start,
        window_start=window_start,
        segment_ids=segment_ids,
    )


def select_blocks(
    query: Query,
    compressed_key: CompressedKey,
    *,
    config: NSAConfig,
    num_keys: int,
    scale: float | None = None,
    query_start: Position = 0,
    segment_ids: SegmentIds | None = None,
    implementation: ImplementationName | None = None,
) -> Blocks:
    """The blocks that each query reads in the selected branch (eq. 8-11 of arXiv 2502.11089).

        p = softmax over the visible compressed tokens of (scale * q . k_cmp)
        score[j] = sum over the group's heads and over i of p[i] * (tokens that compressed token i and block j share) / d

    The first `num_initial` and the last `num_local` candidate blocks are forced; the highest scores fill `num_selected`;
    ties go to the lower index. No gradient passes.

    Args:
        query: `[B, T, N, H]`.
        compressed_key: `[B, C, K, H]`, C = `config.num_compressed(num_keys)`.
        config: sizes.
        num_keys: S, tokens that the blocks divide.
        scale, query_start, segment_ids, implementation: as in `nsa_attention`.

    Returns:
        int32 `[B, T, K, config.num_selected]`: ascending block indices, then -1 in unused slots.

    Raises:
        ValueError, NotImplementedError: as `nsa_attention`.

    Example:
        >>> import jax
        >>> from nsa_jax import NSAConfig, mean_compress, select_blocks
        >>> config = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4)
        >>> key, query = jax.random.normal(jax.random.key(0), (2, 1, 256, 2, 64))
        >>> blocks = select_blocks(query, mean_compress(key, config=config), config=config, num_keys=256)
        >>> blocks[0, 20, 0].tolist()  # a query in block 1: the first block, its own, no third
        [0, 1, -1, -1]
    """
    check_inputs(
        query,
        config=config,
        num_keys=num_keys,
        compressed_key=compressed_key,
        scale=scale,
        query_start=query_start,
        segment_ids=segment_ids,
    )
    _check_non_decreasing(segment_ids)
    scale = _scale(scale, query)
    chosen = _implementation(
        implementation,
        "select_blocks",
        query,
        kv_heads=compressed_key.shape[2],
        config=config,
        num_slots=config.num_selected,
        num_keys=num_keys,
        value_size=query.shape[3],
        scale=scale,
    )
    return chosen.select_blocks(
        query,
        compressed_key,
        config=config,
        num_keys=num_keys,
        scale=scale,
        query_start=query_start,
        segment_ids=segment_ids,
    )


def decode_step(
    query: Query,
    *,
    compressed: KeyValue,
    selected: KeyValue,
    window: KeyValue,
    gates: Gates,
    lengths: Int32[Array, "B"],
    config: NSAConfig,
    scale: float | None = None,
    implementation: ImplementationName | None = None,
) -> Out:
    """`nsa_attention` of one query a sequence, its last token, to the cache that holds it; without gradient.

    Args:
        query: `[B, 1, N, H]`.
        compressed, selected: `[B, C, K, ...]` and `[B, S, K, ...]`, of which a sequence's own tokens are read and no more.
        window: `[B, w, K, ...]`, w = `config.window`: a ring. The token at position p is in row `p % w`.
        gates: `[B, 1, N, 3]`.
        lengths: int32 `[B]`: tokens of each sequence, the query's own included.
        config, scale, implementation: as in `nsa_attention`.

    Returns:
        `[B, 1, N, V]` in the values' dtype; where a length is 0 or above S, finite and otherwise unspecified.

    Raises:
        ValueError, NotImplementedError: as `nsa_attention`.
    """
    check_decode_inputs(
        query,
        compressed=compressed,
        selected=selected,
        window=window,
        gates=gates,
        lengths=lengths,
        config=config,
        scale=scale,
    )
    scale = _scale(scale, query)
    chosen = _implementation(
        implementation,
        "decode_step",
        query,
        kv_heads=selected.key.shape[2],
        config=config,
        num_slots=config.num_selected,
        num_keys=selected.key.shape[1],
        value_size=selected.value.shape[3],
        scale=scale,
    )
    return chosen.decode_step(query, compressed, selected, window, gates, lengths, config=config, scale=scale)


def _scale(scale: float | None, query: Query) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _implementation(
    name: str | None,
    function: Literal["attend", "select_blocks", "decode_step"],
    query: Query,
    *,
    kv_heads: int,
    config: NSAConfig,
    num_slots: int,
    num_keys: int,
    value_size: int,
    scale: float,
) -> Implementation:
    """The named implementation, or the best for this device and problem; NotImplementedError if the named one cannot.

    Args:
        name: of `IMPLEMENTATIONS`, or None.
        function: which of its functions will be called.
    """
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={name!r} is unknown: choose from {[*IMPLEMENTATIONS]} or None")
    if name == "xla" or (name is None and pallas_kernels.default_device().platform != "gpu"):
        return IMPLEMENTATIONS["xla"]
    sizes = dict(num_slots=num_slots, num_keys=num_keys, value_size=value_size)
    reason = pallas_kernels.why_not(query, kv_heads=kv_heads, config=config, scale=scale, **sizes)
    if name != "pallas_interpret":
        reason = pallas_kernels.why_not_here() or reason
        reason = reason or pallas_kernels.why_no_room(function, query, kv_heads, value_size)
    if reason is None:
        return IMPLEMENTATIONS[name or "pallas"]
    if name is None:
        _warn_once(f"implementation=None uses 'xla', which is much slower on a GPU: {reason}")
        return IMPLEMENTATIONS["xla"]
    raise NotImplementedError(f"implementation={name!r}: {reason}; use 'xla' or None")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _check_non_decreasing(segment_ids: SegmentIds | None) -> None:
    # Values can be read only outside of a trace; inside one, the caller's word is taken.
    if segment_ids is None or isinstance(segment_ids, jax.core.Tracer):
        return
    if np.any(np.diff(np.asarray(segment_ids), axis=1) < 0):
        raise ValueError("segment_ids must be non-decreasing along each sequence: number the documents in their order")
