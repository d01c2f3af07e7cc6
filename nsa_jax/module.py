"""The Flax module: projections, rotary position, gates, compression; then `nsa_attention`, with or without a cache."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float, Int32

from nsa_jax import ops
from nsa_jax.cache import NSACache, check_cache, extend, init_cache, recent_window
from nsa_jax.compression import COMPRESSIONS
from nsa_jax.config import NSAConfig, check_segment_ids
from nsa_jax.reference import segment_starts
from nsa_jax.shapes import Blocks, Gates, Key, KeyValue, Lengths, Out, Position, Query, SegmentIds


class Projections(NamedTuple):
    """What attention reads of x: rotated queries and keys, and the keys from which compressed ones are made, unrotated."""

    query: Query
    compression: KeyValue
    selected: KeyValue
    window: KeyValue
    gates: Gates


class NativeSparseAttention(nnx.Module):
    """Native Sparse Attention (arXiv 2502.11089) as a layer: causal self-attention from x to x.

    Follows the conventions of `flax.nnx.MultiHeadAttention`. Where the paper is silent: rotary position turns the queries
    and the per-token keys of the selected and window branches at their positions; compressed keys are made from unrotated
    keys and turned at their first token's position. With packed documents, positions restart in each.

    Args:
        num_heads: N, query heads.
        in_features: size of x's last axis.
        num_kv_heads: K, key/value heads; `num_heads` if None. Each of the three branches has its own K.
        head_dim: H, of queries and keys; `in_features // num_heads` if None. Even, unless `rope_theta` is None.
        value_head_dim: V, of values; H if None.
        out_features: size of the result's last axis; `in_features` if None.
        config: sizes of the three branches; the paper's if None.
        compression: phi, one of "mean", "linear", "mlp", "gated_pool"; see `nsa_jax.compression`.
        rope_theta: base of the rotary wavelengths; None leaves positions out.
        normalize_qk: RMS-normalise queries and keys over H, before rotary; compressed keys after phi.
        implementation: see `nsa_attention`.
        dtype: of the computation; None infers it from x and the parameters.
        param_dtype: of the parameters.
        precision: of the projections and of phi; attention to float32 is always at the highest.
        use_bias: whether query, key, value and output projections have a bias.
        kernel_init, out_kernel_init, bias_init, out_bias_init: initialisers; the `out_` ones default to the others.
        gate_kernel_init, gate_bias_init: of the gates' projection; zeros by default, so that each gate starts at 1/2.
        kernel_metadata, out_kernel_metadata, bias_metadata, out_bias_metadata, gate_kernel_metadata: metadata of the
            parameters, such as `{"out_sharding": (None, "tensor")}`. Query kernels are `[in, N, H]`, key and value kernels
            `[in, 3, K, H]` with the branches in the order compressed, selected, window; the gates' `[in, N, 3]`; the
            output's `[N, V, out]`.
        rngs: random streams for the initialisers.

    Raises:
        ValueError: sizes that do not fit each other, or an unknown compression.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from nsa_jax import NSAConfig, NativeSparseAttention
        >>> config = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=32)
        >>> attention = NativeSparseAttention(8, 128, num_kv_heads=2, config=config, rngs=nnx.Rngs(0))
        >>> attention(jnp.ones((1, 200, 128))).shape
        (1, 200, 128)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        out_features: int | None = None,
        config: NSAConfig | None = None,
        compression: str = "mlp",
        rope_theta: float | None = 10_000.0,
        normalize_qk: bool = False,
        implementation: ops.ImplementationName | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        use_bias: bool = False,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = nnx.initializers.zeros_init(),
        out_bias_init: Initializer | None = None,
        gate_kernel_init: Initializer = nnx.initializers.zeros_init(),
        gate_bias_init: Initializer = nnx.initializers.zeros_init(),
        kernel_metadata: Mapping[str, Any] | None = None,
        out_kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
        out_bias_metadata: Mapping[str, Any] | None = None,
        gate_kernel_metadata: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        config = NSAConfig() if config is None else config
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} must be a positive multiple of {num_kv_heads=}")
        if head_dim is None:
            if in_features % num_heads:
                raise ValueError(f"{in_features=} must be a multiple of {num_heads=}, or head_dim be given")
            head_dim = in_features // num_heads
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"{head_dim=} must be even for rotary position; rope_theta=None leaves that out")
        if compression not in COMPRESSIONS:
            raise ValueError(f"{compression=} is unknown: choose from {', '.join(COMPRESSIONS)}")

        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.in_features, self.out_features = in_features, in_features if out_features is None else out_features
        self.head_dim, self.value_head_dim = head_dim, value_head_dim
        self.config, self.rope_theta, self.normalize_qk = config, rope_theta, normalize_qk
        self.implementation, self.dtype, self.param_dtype = implementation, dtype, param_dtype

        def project(features: tuple[int, ...]) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                in_features,
                features,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                bias_init=bias_init,
                kernel_metadata=dict(kernel_metadata or {}),
                bias_metadata=dict(bias_metadata or {}),
                rngs=rngs,
            )

        self.query = project((num_heads, head_dim))
        self.key = project((3, num_kv_heads, head_dim))
        self.value = project((3, num_kv_heads, value_head_dim))
        self.gate = nnx.LinearGeneral(
            in_features,
            (num_heads, 3),
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=gate_kernel_init,
            bias_init=gate_bias_init,
            kernel_metadata=dict(gate_kernel_metadata or {}),
            rngs=rngs,
        )
        self.out = nnx.LinearGeneral(
            (num_heads, value_head_dim),
            self.out_features,
            axis=(-2, -1),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            kernel_metadata=dict(out_kernel_metadata or {}),
            bias_metadata=dict(out_bias_metadata or {}),
            rngs=rngs,
        )
        phi: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, precision=precision, kernel_init=kernel_init)
        self.compress_key = COMPRESSIONS[compression](head_dim, config=config, rngs=rngs, **phi)
        self.compress_value = COMPRESSIONS[compression](value_head_dim, config=config, rngs=rngs, **phi)
        if normalize_qk:
            norm: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            self.query_norm = nnx.RMSNorm(head_dim, **norm)
            self.key_norm_cmp = nnx.RMSNorm(head_dim, **norm)
            self.key_norm_slc = nnx.RMSNorm(head_dim, **norm)
            self.key_norm_win = nnx.RMSNorm(head_dim, **norm)

    @overload
    def __call__(self, x: Float[Array, "B T E"], *, segment_ids: SegmentIds | None = None) -> Float[Array, "B T O"]: ...

    @overload
    def __call__(
        self, x: Float[Array, "B T E"], *, cache: NSACache, lengths: Lengths | None = None
    ) -> tuple[Float[Array, "B T O"], NSACache]: ...

    def __call__(
        self,
        x: Float[Array, "B T E"],
        *,
        segment_ids: SegmentIds | None = None,
        cache: NSACache | None = None,
        lengths: Lengths | None = None,
    ) -> Float[Array, "B T O"] | tuple[Float[Array, "B T O"], NSACache]:
        """Attention of x to itself, or, with a cache, to all that the cache has seen and x.

        Args:
            x: `[B, T, in_features]`.
            segment_ids: int32 `[B, T]`, non-decreasing: packed documents, each seeing itself alone. Not with a cache.
            cache: from `init_cache` or an earlier call; x continues its sequences. Any T: prefill in one call or in chunks,
                and decoding (T = 1), are one function, and give what one call without cache gives.
            lengths: int32 `[B]`, or a list of B ints, with a cache: the first `lengths[b]` tokens of `x[b]` are real; all T
                if None. The others do not enter the cache, and their outputs are finite and unspecified.

        Returns:
            `[B, T, out_features]`; with a cache, that and the cache grown by x. Tokens past the cache's `max_length` are not
            written, and their outputs are NaN, where lengths are traced.

        Raises:
            ValueError: a wrong shape, a cache of another layer's sizes or beside `segment_ids`, `lengths` without a cache, or,
                where lengths are concrete, more tokens than `max_length`.
        """
        if cache is not None:
            if segment_ids is not None:
                raise ValueError(
                    "cache and segment_ids do not go together: decode each document as a sequence of its own"
                )
            return self._with_cache(x, cache, lengths)
        if lengths is not None:
            raise ValueError("lengths is for calls with a cache; without one, padding after the end changes nothing")
        projections = self.project(x, segment_ids=segment_ids)
        out = ops.nsa_attention(
            projections.query,
            compressed=self._compress(projections.compression, segment_ids),
            selected=projections.selected,
            window=projections.window,
            gates=projections.gates,
            config=self.config,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return self.out(out)

    def init_cache(self, batch_size: int, max_length: int, *, dtype: Dtype | None = None) -> NSACache:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens.

        `dtype` is the module's, or else its parameters', if None. Attention to a cache is computed in the cache's dtype, the
        rest of the layer in its own: bfloat16 halves what a float32 layer keeps and reads, and rounds queries, keys, values
        and what attention makes of them.
        """
        dtype = dtype or self.dtype or self.param_dtype
        return init_cache(
            batch_size,
            max_length,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_head_dim=self.value_head_dim,
            config=self.config,
            dtype=jnp.dtype(dtype),
        )

    def project(
        self, x: Float[Array, "B T E"], *, segment_ids: SegmentIds | None = None, start: Position = 0
    ) -> Projections:
        """Queries, keys, values and gates of x, whose first token is at position `start`: what `inspect` looks at."""
        self._check(x, segment_ids)
        positions = _positions(x.shape[:2], start, segment_ids)
        query, key, value = self.query(x), self.key(x), self.value(x)
        key_cmp, key_slc, key_win = (key[:, :, i] for i in range(3))
        value_cmp, value_slc, value_win = (value[:, :, i] for i in range(3))
        if self.normalize_qk:
            query, key_slc, key_win = self.query_norm(query), self.key_norm_slc(key_slc), self.key_norm_win(key_win)
        return Projections(
            query=self._rotate(query, positions),
            compression=KeyValue(key_cmp, value_cmp),
            selected=KeyValue(self._rotate(key_slc, positions), value_slc),
            window=KeyValue(self._rotate(key_win, positions), value_win),
            gates=jax.nn.sigmoid(self.gate(x).astype(jnp.float32)),
        )

    def select_blocks(self, x: Float[Array, "B T E"], *, segment_ids: SegmentIds | None = None) -> Blocks:
        """The blocks that each token of x reads, int32 `[B, T, K, A]`; see `nsa_jax.select_blocks`."""
        projections = self.project(x, segment_ids=segment_ids)
        return ops.select_blocks(
            projections.query,
            self._compress(projections.compression, segment_ids).key,
            config=self.config,
            num_keys=x.shape[1],
            segment_ids=segment_ids,
            implementation=self.implementation,
        )

    def _check(self, x: Float[Array, "B T E"], segment_ids: SegmentIds | None) -> None:
        if x.ndim != 3 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [B, T, in_features={self.in_features}], but its shape is {x.shape}")
        if segment_ids is not None:
            check_segment_ids(segment_ids, x.shape[:2])

    def _compress(self, tokens: KeyValue, segment_ids: SegmentIds | None) -> KeyValue:
        """Compressed tokens of a whole sequence."""
        count = self.config.num_compressed(tokens.key.shape[1])
        positions = _positions(tokens.key.shape[:2], 0, segment_ids)
        return self._compress_at(tokens, positions[:, :: self.config.compress_stride][:, :count])

    def _compress_at(self, tokens: KeyValue, positions: Int32[Array, "B C"]) -> KeyValue:
        key, value = self.compress_key(tokens.key), self.compress_value(tokens.value)
        if self.normalize_qk:
            key = self.key_norm_cmp(key)
        return KeyValue(self._rotate(key, positions), value)

    def _rotate(self, x: Key, positions: Int32[Array, "B S"]) -> Key:
        return x if self.rope_theta is None else rotate(x, positions, theta=self.rope_theta)

    def _with_cache(
        self, x: Float[Array, "B T E"], cache: NSACache, lengths: Lengths | None
    ) -> tuple[Float[Array, "B T O"], NSACache]:
        self._check(x, None)
        batch, num_new = x.shape[:2]
        sizes = dict(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, value_head_dim=self.value_head_dim)
        check_cache(cache, batch_size=batch, **sizes, config=self.config)
        num_real = num_real_tokens(cache.lengths, num_new, lengths, max_length=cache.max_length)
        projections = self.project(x, start=cache.lengths)
        grown = extend(
            cache,
            compression=projections.compression,
            selected=projections.selected,
            window=projections.window,
            num_real=num_real,
            compress=self._compress_at,
            config=self.config,
        )
        attend: Callable[..., Out]
        where: dict[str, Any]
        if num_new == 1:
            attend, window, where = ops.decode_step, grown.window, dict(lengths=grown.lengths)
        else:
            window, start = recent_window(cache, projections.window, num_real, self.config)
            attend, where = ops.nsa_attention, dict(query_start=cache.lengths, window_start=start)
        # Queries take the cache's dtype, rather than all that the cache holds theirs at every step.
        query = projections.query
        out = attend(
            query.astype(grown.selected.key.dtype),
            compressed=grown.compressed,
            selected=grown.selected,
            window=window,
            gates=projections.gates,
            config=self.config,
            implementation=self.implementation,
            **where,
        )
        out = self.out(out.astype(query.dtype))
        return mark_overflow(out, cache.lengths, num_real, max_length=cache.max_length), grown


def num_real_tokens(
    seen: Int32[Array, "B"], num_new: int, lengths: Lengths | None, *, max_length: int
) -> Int32[Array, "B"]:
    """How many of the new tokens of each sequence are real: `lengths`, or all.

    Raises:
        ValueError: lengths are no integers `[B]`, or, where they can be read, do not fit.
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(lengths))
    given = num_new if lengths is None else jnp.asarray(lengths) if traced else np.asarray(lengths)
    if not isinstance(given, int):
        if given.shape != seen.shape or not jnp.issubdtype(given.dtype, jnp.integer):
            raise ValueError(
                f"lengths must be int32 [B] = {seen.shape}, but it is {given.dtype} of shape {given.shape}"
            )
        if not traced and ((given < 0) | (given > num_new)).any():
            raise ValueError(f"lengths={given} must lie between 0 and the {num_new} tokens of x")
    if not traced and not isinstance(seen, jax.core.Tracer):
        after = np.asarray(seen) + given
        if (after > max_length).any():
            raise ValueError(
                f"the cache has room for max_length={max_length} tokens, but sequence {int(after.argmax())} would hold "
                f"{int(after.max())}: make it with init_cache(batch_size, max_length={int(after.max())}) or more"
            )
    return jnp.clip(jnp.broadcast_to(jnp.asarray(given, jnp.int32), seen.shape), 0, num_new)


def mark_overflow(
    out: Float[Array, "B T O"], seen: Int32[Array, "B"], num_real: Int32[Array, "B"], *, max_length: int
) -> Float[Array, "B T O"]:
    """NaN for the real tokens that found no room in the cache, so that a traced overflow cannot pass for a result."""
    index = jnp.arange(out.shape[1], dtype=jnp.int32)[None, :]
    lost = (seen[:, None] + index >= max_length) & (index < num_real[:, None])
    return jnp.where(lost[:, :, None], jnp.nan, out)


def rotate(x: Key, positions: Int32[Array, "B S"], *, theta: float) -> Key:
    """Rotary position in its half-rotation form: pairs (x[j], x[j + H/2]) turned by `position * theta ** (-2j / H)`."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _positions(shape: tuple[int, ...], start: Position, segment_ids: SegmentIds | None) -> Int32[Array, "B S"]:
    """Positions for rotary: they restart in each segment."""
    position = jnp.asarray(start, jnp.int32).reshape(-1, 1) + jnp.arange(shape[1], dtype=jnp.int32)[None, :]
    position = jnp.broadcast_to(position, shape)
    return position if segment_ids is None else position - jax.vmap(segment_starts)(segment_ids)
