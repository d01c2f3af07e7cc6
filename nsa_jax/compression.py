"""phi: the map from the tokens of a compression block to one compressed token (eq. 7), with and without parameters.

Every phi reads `[B, S, K, D]` and gives `[B, C, K, D]`, for keys (D = H) or values (D = V); its parameters are shared by
the K heads. The paper leaves its form open: "a learnable MLP with intra-block position encoding".

Blocks overlap l/d times. To copy tokens into blocks would take l/d times their memory, so all maps here work on *units* of
d tokens: unit u is part r of block u - r, for r = 0 .. l/d - 1, and a block is the sum of its parts. One block alone, such as
each that decoding makes, overlaps none: it is one unit, of l tokens, and its own only part.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike
from jaxtyping import Array, Float

from nsa_jax.config import NSAConfig

Tokens = Float[Array, "B S K D"]
Compressed = Float[Array, "B C K D"]


def mean_compress(tokens: Tokens, *, config: NSAConfig) -> Compressed:
    """The mean of each block: phi without parameters.

        out[i] = mean(tokens[i*d : i*d + l])

    Args:
        tokens: `[B, S, K, D]`, keys (not yet rotated) or values.
        config: its `compress_block` l and `compress_stride` d.

    Returns:
        `[B, C, K, D]` in the tokens' dtype, C = `config.num_compressed(S)`; summed in float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from nsa_jax import NSAConfig, mean_compress
        >>> config = NSAConfig(compress_block=4, compress_stride=2, select_block=4)
        >>> mean_compress(jnp.arange(7.0).reshape(1, 7, 1, 1), config=config).ravel().tolist()
        [1.5, 3.5]
    """
    units = _units(tokens.astype(jnp.float32), config).sum(axis=2)  # [B, U, K, D]
    total = _sum_parts([units] * _num_parts(tokens, config), _num_compressed(tokens, config))
    return (total / config.compress_block).astype(tokens.dtype)


class MeanCompression(nnx.Module):
    """`mean_compress` as a module without parameters; takes the arguments of the others and uses `config` alone."""

    def __init__(
        self,
        size: int,
        *,
        config: NSAConfig,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
    ):
        self.config = config

    def __call__(self, tokens: Tokens) -> Compressed:
        return mean_compress(tokens, config=self.config)


class LinearCompression(nnx.Module):
    """A linear map of the flattened block, with intra-block position embedding.

        out[i] = sum over j < l of W[j] (tokens[i*d + j] + position[j])

    Args:
        size: D, of a token and of its compressed token.
        config: sizes of the block.
        dtype, param_dtype, precision, kernel_init: as in `flax.nnx.Linear`.
        rngs: random streams.
    """

    def __init__(
        self,
        size: int,
        *,
        config: NSAConfig,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
    ):
        kwargs: dict[str, Any] = dict(
            dtype=dtype, param_dtype=param_dtype, precision=precision, kernel_init=kernel_init
        )
        self.blocks = _BlockLinear(size, size, config=config, rngs=rngs, **kwargs)

    def __call__(self, tokens: Tokens) -> Compressed:
        return self.blocks(tokens)


class MLPCompression(nnx.Module):
    """The paper's learnable MLP: position embedding added, the block flattened, two layers.

        out[i] = W2 gelu(sum over j < l of W1[j] (tokens[i*d + j] + position[j])) + b2

    Args:
        size: D, of a token and of its compressed token.
        hidden: width between the layers; `2 * size` if None. With l=32, D=128 a hidden layer as wide as the flattened
            block would cost as much as the window branch.
        config, dtype, param_dtype, precision, kernel_init, rngs: as in `LinearCompression`.
    """

    def __init__(
        self,
        size: int,
        *,
        config: NSAConfig,
        rngs: nnx.Rngs,
        hidden: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
    ):
        hidden = 2 * size if hidden is None else hidden
        kwargs: dict[str, Any] = dict(
            dtype=dtype, param_dtype=param_dtype, precision=precision, kernel_init=kernel_init
        )
        self.blocks = _BlockLinear(size, hidden, config=config, rngs=rngs, **kwargs)
        self.out = nnx.Linear(hidden, size, rngs=rngs, **kwargs)

    def __call__(self, tokens: Tokens) -> Compressed:
        return self.out(jax.nn.gelu(self.blocks(tokens)))


class GatedPoolCompression(nnx.Module):
    """Softmax-gated pooling: each channel is a weighted mean of its block, the weights from the tokens and their places.

        weight[i, j] = softmax over j < l of (Wg tokens[i*d + j] + position[j])
        out[i] = sum over j of weight[i, j] * tokens[i*d + j]

    The form of DeepSeek-V4's compressed attention; more general than the mean, at which it starts.

    Args:
        size: D, of a token and of its compressed token.
        config, dtype, param_dtype, precision, rngs: as in `LinearCompression`.
        kernel_init: not used: the weights Wg and positions start at zero.
    """

    def __init__(
        self,
        size: int,
        *,
        config: NSAConfig,
        rngs: nnx.Rngs,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),
    ):
        self.config = config
        zeros = nnx.initializers.zeros_init()
        kwargs: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, precision=precision)
        self.gate = nnx.Linear(size, size, use_bias=False, kernel_init=zeros, rngs=rngs, **kwargs)
        self.position = nnx.Param(jnp.zeros((config.compress_block, size), param_dtype))

    def __call__(self, tokens: Tokens) -> Compressed:
        num_parts, count = _num_parts(tokens, self.config), _num_compressed(tokens, self.config)
        logits = _units(self.gate(tokens).astype(jnp.float32), self.config)  # [B, U, d, K, D]
        units = _units(tokens.astype(jnp.float32), self.config)
        position = self.position[...].astype(jnp.float32)
        position = position.reshape(num_parts, -1, 1, position.shape[-1])

        # The softmax of a block from those of its parts, by their highest logit, weight and weighted sum.
        part_logits = [logits + position[r][None, None] for r in range(num_parts)]
        highest = _combine_parts([x.max(axis=2) for x in part_logits], count, jnp.maximum)  # [B, C, K, D]
        highest = jax.lax.stop_gradient(highest)
        weight = total = jnp.zeros_like(highest)
        for r, logit in enumerate(part_logits):
            # Each part is compared with the highest of the block that it is part r of.
            exp = jnp.exp(logit[:, r : r + count] - highest[:, :, None])
            weight += exp.sum(axis=2)
            total += (exp * units[:, r : r + count]).sum(axis=2)
        dtype = jnp.result_type(tokens, self.position[...]) if self.gate.dtype is None else self.gate.dtype
        return (total / weight).astype(dtype)


COMPRESSIONS: dict[str, Callable[..., nnx.Module]] = {
    "mean": MeanCompression,
    "linear": LinearCompression,
    "mlp": MLPCompression,
    "gated_pool": GatedPoolCompression,
}


class _BlockLinear(nnx.Module):
    """`sum over j < l of W[j] (tokens[i*d + j] + position[j])`, a matrix product of units for all parts at once."""

    def __init__(
        self,
        size: int,
        out_size: int,
        *,
        config: NSAConfig,
        rngs: nnx.Rngs,
        dtype: Dtype | None,
        param_dtype: Dtype,
        precision: PrecisionLike,
        kernel_init: Initializer,
    ):
        self.config, self.dtype, self.precision = config, dtype, precision
        self.kernel = nnx.Param(kernel_init(rngs.params(), (config.compress_block * size, out_size), param_dtype))
        positions = nnx.initializers.normal(0.02)
        self.position = nnx.Param(positions(rngs.params(), (config.compress_block, size), param_dtype))

    def __call__(self, tokens: Tokens) -> Float[Array, "B C K O"]:
        dtype = jnp.result_type(tokens, self.kernel[...]) if self.dtype is None else self.dtype
        tokens, kernel, position = (x.astype(dtype) for x in (tokens, self.kernel[...], self.position[...]))
        size, out_size = tokens.shape[-1], kernel.shape[-1]
        num_parts, count = _num_parts(tokens, self.config), _num_compressed(tokens, self.config)
        units = _units(tokens, self.config)
        if count == 1:
            # Positions added to the one block cost less than the kernel read again for what they give in all.
            units = units + position[None, None, :, None, :]
        kernel = kernel.reshape(num_parts, -1, size, out_size)
        # u: unit, s: token, p: part.
        products = jnp.einsum("busKi,psio->pbuKo", units, kernel, precision=self.precision)
        out = _sum_parts(list(products), count)
        if count == 1:
            return out
        position = position.reshape(num_parts, -1, size)
        return out + jnp.einsum("psi,psio->o", position, kernel, precision=self.precision)[None, None, None, :]


def _num_parts(tokens: Tokens, config: NSAConfig) -> int:
    return 1 if _num_compressed(tokens, config) == 1 else config.compress_block // config.compress_stride


def _num_compressed(tokens: Tokens, config: NSAConfig) -> int:
    return config.num_compressed(tokens.shape[1])


def _units(tokens: Tokens, config: NSAConfig) -> Float[Array, "B U d K D"]:
    """Tokens as units, `U = C + l/d - 1` of d: those that complete blocks touch; one of l for a single block."""
    num_parts, count = _num_parts(tokens, config), _num_compressed(tokens, config)
    length, num_units = config.compress_block // num_parts, count + num_parts - 1 if count else 0
    batch, _, heads, size = tokens.shape
    return tokens[:, : num_units * length].reshape(batch, num_units, length, heads, size)


def _combine_parts(parts: list[Array], count: int, combine: Callable[[Array, Array], Array]) -> Array:
    """`parts[r][:, u]` is what unit u gives as part r of block u - r: combined over the parts of each block."""
    out = parts[0][:, :count]
    for r, part in enumerate(parts[1:], start=1):
        out = combine(out, part[:, r : r + count])
    return out


def _sum_parts(parts: list[Array], count: int) -> Array:
    return _combine_parts(parts, count, jnp.add)
