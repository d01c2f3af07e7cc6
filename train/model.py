"""A small decoder-only language model whose attention is one argument: NSA, full, or the window alone."""

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from nsa_jax.cache import NSACache
from nsa_jax.module import NativeSparseAttention, mark_overflow, num_real_tokens, rotate
from nsa_jax.ops import save_attention
from nsa_jax.reference import segment_starts
from nsa_jax.shapes import Key, KeyValue, Lengths, Out, Query, SegmentIds, Value
from train.config import MAX_PACKED_DENSE, ModelConfig

Tokens = Int32[Array, "B T"]
Hidden = Float[Array, "B T E"]
Params = dict[str, Any]

# Logits held at once, in the loss: a vocabulary of 32k and a context of 32k would be 4 GB of float32.
LOGITS_PER_CHUNK = 2**23


class DenseCache(NamedTuple):
    """All keys and values of one layer `[B, max_length, K, ...]`, and the tokens seen so far, int32 `[B]`."""

    tokens: KeyValue
    lengths: Int32[Array, "B"]


class DenseAttention(nnx.Module):
    """Full causal attention, or the last `window` tokens of it, with the interface of `NativeSparseAttention`."""

    def __init__(self, config: ModelConfig, *, kernel_init: Any, out_kernel_init: Any, rngs: nnx.Rngs):
        self.config, self.dtype = config, jnp.dtype(config.dtype)
        heads, kv_heads = config.num_heads, config.num_kv_heads
        project = functools.partial(
            nnx.LinearGeneral, config.model_dim, use_bias=False, dtype=self.dtype, kernel_init=kernel_init, rngs=rngs
        )
        self.query = project((heads, config.head_dim))
        self.key = project((kv_heads, config.head_dim))
        self.value = project((kv_heads, config.value_head_dim))
        self.out = nnx.LinearGeneral(
            (heads, config.value_head_dim),
            config.model_dim,
            axis=(-2, -1),
            use_bias=False,
            dtype=self.dtype,
            kernel_init=out_kernel_init,
            rngs=rngs,
        )
        if config.normalize_qk:
            self.query_norm = nnx.RMSNorm(config.head_dim, dtype=self.dtype, rngs=rngs)
            self.key_norm = nnx.RMSNorm(config.head_dim, dtype=self.dtype, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        *,
        segment_ids: SegmentIds | None = None,
        cache: DenseCache | None = None,
        lengths: Lengths | None = None,
    ) -> Hidden | tuple[Hidden, DenseCache]:
        length = x.shape[1]
        if cache is None:
            position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], x.shape[:2])
            if segment_ids is None:
                return self.out(self._attend(*self._project(x, position), mask=None))
            if length > MAX_PACKED_DENSE:
                raise ValueError(
                    f"packed documents with dense attention need a mask of {length} x {length}: at most {MAX_PACKED_DENSE}"
                )
            query, key, value = self._project(x, position - jax.vmap(segment_starts)(segment_ids))
            same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
            return self.out(self._attend(query, key, value, mask=same))

        if segment_ids is not None:
            raise ValueError("cache and segment_ids do not go together: decode each document as a sequence of its own")
        capacity = cache.tokens.key.shape[1]
        num_real = num_real_tokens(cache.lengths, length, lengths, max_length=capacity)
        position = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
        query, key, value = self._project(x, position)
        real = jnp.arange(length, dtype=jnp.int32)[None, :] < num_real[:, None]
        rows = jnp.where(real, position, capacity)
        write = jax.vmap(lambda old, rows, new: old.at[rows].set(new.astype(old.dtype), mode="drop"))
        tokens = KeyValue(write(cache.tokens.key, rows, key), write(cache.tokens.value, rows, value))
        ago = position[:, None, :, None] - jnp.arange(capacity, dtype=jnp.int32)[None, None, None, :]
        visible = ago >= 0
        if self.config.attention == "window":
            visible &= ago < self.config.nsa.window
        out = self.out(dense_attention(query, *tokens, mask=visible))
        out = mark_overflow(out, cache.lengths, num_real, max_length=capacity)
        return out, DenseCache(tokens, cache.lengths + num_real)

    def init_cache(self, batch_size: int, max_length: int) -> DenseCache:
        shape = (batch_size, max_length, self.config.num_kv_heads)
        key, value = (
            jnp.zeros((*shape, size), self.dtype) for size in (self.config.head_dim, self.config.value_head_dim)
        )
        return DenseCache(KeyValue(key, value), jnp.zeros((batch_size,), jnp.int32))

    def _project(self, x: Hidden, position: Int32[Array, "B T"]) -> tuple[Array, Array, Array]:
        query, key = self.query(x), self.key(x)
        if self.config.normalize_qk:
            query, key = self.query_norm(query), self.key_norm(key)
        theta = self.config.rope_theta
        return rotate(query, position, theta=theta), rotate(key, position, theta=theta), self.value(x)

    def _attend(self, query: Array, key: Array, value: Array, *, mask: Array | None) -> Array:
        window = (self.config.nsa.window - 1, 0) if self.config.attention == "window" else None
        # cuDNN reads 16-bit numbers, and heads of one size.
        use_cudnn = jax.default_backend() == "gpu" and query.dtype.itemsize == 2 and query.shape[-1] == value.shape[-1]
        out = dense_attention(
            query,
            key,
            value,
            mask=mask,
            is_causal=True,
            local_window_size=window,
            implementation="cudnn" if use_cudnn else "xla",
        )
        return checkpoint_name(out, "nsa_out")  # what `save_attention` saves


def dense_attention(query: Query, key: Key, value: Value, **options: Any) -> Out:
    """`jax.nn.dot_product_attention`, which wants heads of one size: zeros make them so, and change nothing."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]

    def widen(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, max(head_dim, value_dim) - x.shape[-1])))

    out = jax.nn.dot_product_attention(widen(query), widen(key), widen(value), scale=head_dim**-0.5, **options)
    return out[..., :value_dim]


class SwiGLU(nnx.Module):
    """`out(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, kernel_init: Any, out_kernel_init: Any, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.dtype(config.dtype), rngs=rngs)
        self.gate = linear(config.model_dim, config.mlp_dim, kernel_init=kernel_init)
        self.up = linear(config.model_dim, config.mlp_dim, kernel_init=kernel_init)
        self.out = linear(config.mlp_dim, config.model_dim, kernel_init=out_kernel_init)

    def __call__(self, x: Hidden) -> Hidden:
        return self.out(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
    """Attention, then SwiGLU, each after an RMSNorm and added to its input."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        kernel_init = nnx.initializers.lecun_normal()
        # The residual sum of 2 * num_layers terms starts with the variance of one.
        out_kernel_init = nnx.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "truncated_normal")
        inits: dict[str, Any] = dict(kernel_init=kernel_init, out_kernel_init=out_kernel_init, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(config.model_dim, dtype=dtype, rngs=rngs)
        self.attention: NativeSparseAttention | DenseAttention
        if config.attention == "nsa":
            self.attention = NativeSparseAttention(
                config.num_heads,
                config.model_dim,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                value_head_dim=config.value_head_dim,
                config=config.nsa,
                compression=config.compression,
                rope_theta=config.rope_theta,
                normalize_qk=config.normalize_qk,
                implementation=config.implementation,
                dtype=dtype,
                **inits,
            )
        else:
            self.attention = DenseAttention(config, **inits)
        self.mlp_norm = nnx.RMSNorm(config.model_dim, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(config, **inits)

    def __call__(self, x: Hidden, segment_ids: SegmentIds | None) -> Hidden:
        out: Any = self.attention(self.attention_norm(x), segment_ids=segment_ids)
        x = x + out
        return x + self.mlp(self.mlp_norm(x))

    def with_cache(self, x: Hidden, cache: Any, lengths: Lengths | None) -> tuple[Hidden, Any]:
        out, cache = self.attention(self.attention_norm(x), cache=cache, lengths=lengths)
        x = x + out
        return x + self.mlp(self.mlp_norm(x)), cache


class LanguageModel(nnx.Module):
    """Tokens to logits.

    The layers' parameters are stacked along a leading axis: training scans over it, decoding unrolls it.

    Args:
        config: sizes.
        vocab_size: tokens of the tokenizer; `padded_vocab_size` rounds it up for the matrices.
        rngs: random streams.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
        self.config, self.vocab_size = config, vocab_size
        self.padded_vocab_size = -(-vocab_size // 64) * 64
        dtype = jnp.dtype(config.dtype)
        embedding_init = nnx.initializers.normal(config.model_dim**-0.5)
        self.embed = nnx.Embed(
            self.padded_vocab_size, config.model_dim, dtype=dtype, embedding_init=embedding_init, rngs=rngs
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs=rngs)

        self.layers = stack(rngs)
        self.norm = nnx.RMSNorm(config.model_dim, dtype=dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.head = nnx.Linear(config.model_dim, self.padded_vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

    def hidden(self, tokens: Tokens, segment_ids: SegmentIds | None = None) -> Hidden:
        """The last layer's output, normalised."""
        graph, stacked = nnx.split(self.layers)

        def layer(x: Hidden, state: Any) -> tuple[Hidden, None]:
            return nnx.merge(graph, state)(x, segment_ids), None

        if self.config.remat != "none":
            policy = save_attention if self.config.remat == "attention" else None
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        x, _ = lax.scan(layer, self.embed(tokens), stacked)
        return self.norm(x)

    def unstacked_layers(self) -> list[Layer]:
        """Each layer with its own parameters."""
        graph, stacked = nnx.split(self.layers)
        each = [jax.tree.map(operator.itemgetter(i), stacked) for i in range(self.config.num_layers)]
        return [nnx.merge(graph, state) for state in each]

    def logits(self, hidden: Float[Array, "*rows E"]) -> Float[Array, "*rows vocab"]:
        """Float32 logits of the tokenizer's tokens; those that only pad the vocabulary are left out."""
        logits = self.embed.attend(hidden) if self.config.tie_embeddings else self.head(hidden)
        return logits[..., : self.vocab_size].astype(jnp.float32)

    def __call__(self, tokens: Tokens, segment_ids: SegmentIds | None = None) -> Float[Array, "B T vocab"]:
        return self.logits(self.hidden(tokens, segment_ids))

    def losses(self, tokens: Tokens, targets: Tokens, segment_ids: SegmentIds | None = None) -> Float[Array, "B T"]:
        """Cross-entropy of each target, in nats, float32; logits are made in chunks and again in the backward pass."""
        hidden = self.hidden(tokens, segment_ids)
        batch, length, size = hidden.shape
        rows, targets = hidden.reshape(-1, size), targets.reshape(-1)
        chunk = max(1, LOGITS_PER_CHUNK // self.padded_vocab_size)
        if chunk >= rows.shape[0]:
            return _cross_entropy(self.logits(rows), targets).reshape(batch, length)
        num_chunks = -(-rows.shape[0] // chunk)
        padding = num_chunks * chunk - rows.shape[0]
        rows = jnp.pad(rows, ((0, padding), (0, 0))).reshape(num_chunks, chunk, size)
        padded = jnp.pad(targets, (0, padding)).reshape(num_chunks, chunk)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def one_chunk(inputs: tuple[Array, Array]) -> Array:
            return _cross_entropy(self.logits(inputs[0]), inputs[1])

        return lax.map(one_chunk, (rows, padded)).reshape(-1)[: batch * length].reshape(batch, length)

    def init_cache(self, batch_size: int, max_length: int) -> tuple[NSACache | DenseCache, ...]:
        """An empty cache a layer."""
        attention = self.unstacked_layers()[0].attention
        return tuple(attention.init_cache(batch_size, max_length) for _ in range(self.config.num_layers))

    def with_cache(
        self,
        tokens: Tokens,
        caches: tuple,
        lengths: Lengths | None = None,
        layers: list[Layer] | None = None,
    ) -> tuple[Hidden, tuple]:
        """`hidden` of tokens that continue the caches' sequences; see `NativeSparseAttention`.

        `layers` are `unstacked_layers()`: made before a loop that calls this, they are not cut out of the stack in it.
        """
        x, grown = self.embed(tokens), []
        for layer, cache in zip(layers or self.unstacked_layers(), caches, strict=True):
            # All have seen the same tokens: what follows from their number alone is computed once, for all layers.
            x, cache = layer.with_cache(x, cache._replace(lengths=caches[0].lengths), lengths)
            grown.append(cache)
        return self.norm(x), tuple(grown)


def cast_matrices(params: Params, dtype: str) -> Params:
    """Parameters of which those are in `dtype` that the layers of a model of this dtype cast to it at every call.

    The others are read as they are, such as gated pooling's positions, or are small.
    """

    def cast(path: tuple[Any, ...], x: Array) -> Array:
        return x.astype(dtype) if path[-1].key in ("kernel", "bias", "embedding") else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _cross_entropy(logits: Float[Array, "*rows vocab"], targets: Int32[Array, "*rows"]) -> Float[Array, "*rows"]:
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


class Network:
    """A model apart from its parameters, which are plain nested dicts of arrays: what jit, optax and checkpoints like best.

    Args:
        config: sizes.
        vocab_size: of the tokenizer.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        self.config, self.vocab_size = config, vocab_size
        model = nnx.eval_shape(lambda: self._build(jax.random.key(0)))
        self._graph, self._abstract = nnx.split(model)

    def _build(self, key: Array) -> LanguageModel:
        return LanguageModel(self.config, self.vocab_size, rngs=nnx.Rngs(key))

    def init(self, seed: int) -> Params:
        """Fresh parameters."""
        return jax.jit(lambda key: nnx.to_pure_dict(nnx.state(self._build(key))))(jax.random.key(seed))

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters."""
        return nnx.to_pure_dict(self._abstract)

    def model(self, params: Params) -> LanguageModel:
        """The model with these parameters."""
        state = jax.tree.map(lambda x: x, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def num_params(self) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(self.abstract_params()))

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of training on one token: 6 per matrix parameter, and attention's own.

        Attention costs `2 (H + V)` per head and key read forward and twice that backward; the keys read are the mean over
        the positions of the context. Of NSA, its selection scores count (2 H per head and compressed token, no backward).
        """
        config, params = self.config, self.abstract_params()
        matrices = 0.0
        for path, x in _paths(params):
            if path[-1] == "kernel":
                phi = any(name.startswith("compress_") for name in path)
                # phi works on each key/value head, and but for the gates of gated pooling once every d tokens.
                uses = config.num_kv_heads / (1 if path[-2] == "gate" else config.nsa.compress_stride) if phi else 1
                matrices += math.prod(x.shape) * uses
        # Looking an embedding up costs nothing; as the output matrix it is a product like others.
        if config.tie_embeddings:
            matrices += math.prod(params["embed"]["embedding"].shape)
        keys, compressed = mean_keys_read(config, context)
        heads = config.num_layers * config.num_heads
        attention = heads * (6 * (config.head_dim + config.value_head_dim) * keys + 2 * config.head_dim * compressed)
        return 6 * matrices + attention


def mean_keys_read(config: ModelConfig, context: int) -> tuple[float, float]:
    """Keys that a query reads, and compressed tokens among them, in the mean over the positions of a context."""
    nsa = config.nsa
    visible = compressed = 0
    for position in range(context):
        own = position % nsa.select_block + 1
        before = position // nsa.select_block
        window = min(position + 1, nsa.window)
        if config.attention == "full":
            visible += position + 1
        elif config.attention == "window":
            visible += window
        else:
            seen = nsa.num_compressed(position + 1)
            compressed += seen
            visible += seen + window + own + min(before, nsa.num_selected - 1) * nsa.select_block
    return visible / context, compressed / context


def _paths(tree: Params, prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    leaves = []
    for name, value in tree.items():
        path = (*prefix, name)
        leaves += _paths(value, path) if isinstance(value, dict) else [(path, value)]
    return leaves
