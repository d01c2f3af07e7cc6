"""Each phi against a loop over blocks that copies their tokens; how each starts, its dtypes, the memory it needs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from nsa_jax import NSAConfig, mean_compress
from nsa_jax.compression import COMPRESSIONS
from nsa_jax.testing import SMALL
from tests.programs import equations

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE, BATCH, HEADS = 5, 2, 3
PHI = pytest.mark.parametrize("phi", COMPRESSIONS)
LEARNED = pytest.mark.parametrize("phi", ["linear", "mlp", "gated_pool"])


def config_of(block, stride):
    return NSAConfig(compress_block=block, compress_stride=stride, select_block=2 * block, window=1)


def make(phi, config, *, seed=0, **arguments):
    """A module whose every parameter is Gaussian, gates and positions too."""
    module = nnx.eval_shape(lambda: COMPRESSIONS[phi](SIZE, config=config, rngs=nnx.Rngs(0), **arguments))
    graph, state = nnx.split(module)
    draw = np.random.default_rng(seed)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.5 * draw.normal(size=x.shape), x.dtype), state))


@functools.cache
def fresh(phi, config):
    """A module as its initialisers make it."""
    return nnx.jit(lambda: COMPRESSIONS[phi](SIZE, config=config, rngs=nnx.Rngs(0)))()


def tokens_of(length, *, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(BATCH, length, HEADS, SIZE)).astype(dtype)


def parameters(module):
    """Parameters by name, in float64."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...], np.float64) for path, variable in flat}


# The judge: a block is the tokens i*d .. i*d+l-1, copied; one formula a phi.


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def block_linear(block, kernel, position):
    kernel = kernel.reshape(*position.shape, -1)
    return sum((block[:, j] + position[j]) @ kernel[j] for j in range(len(position)))


def mean_block(block, p):
    return sum(block[:, j] for j in range(block.shape[1])) / block.shape[1]


def linear_block(block, p):
    return block_linear(block, p["blocks.kernel"], p["blocks.position"])


def mlp_block(block, p):
    return gelu(block_linear(block, p["blocks.kernel"], p["blocks.position"])) @ p["out.kernel"] + p["out.bias"]


def gated_pool_block(block, p):
    logits = np.stack([block[:, j] @ p["gate.kernel"] + p["position"][j] for j in range(block.shape[1])])
    weights = np.exp(logits - logits.max(axis=0))
    return sum(weights[j] * block[:, j] for j in range(block.shape[1])) / weights.sum(axis=0)


BLOCKS = {"mean": mean_block, "linear": linear_block, "mlp": mlp_block, "gated_pool": gated_pool_block}


def judge(phi, tokens, p, config):
    tokens, l, d = np.asarray(tokens, np.float64), config.compress_block, config.compress_stride
    count = max(0, (tokens.shape[1] - l) // d + 1)
    out = np.zeros((BATCH, count, HEADS, SIZE))
    for i in range(count):
        out[:, i] = BLOCKS[phi](tokens[:, i * d : i * d + l].copy(), p)
    return out


@PHI
@pytest.mark.parametrize("block, stride", [(8, 4), (6, 6), (12, 4), (5, 1)])
def test_equals_a_loop_over_copied_blocks(phi, block, stride):
    config = config_of(block, stride)
    module = make(phi, config)
    for length in (block + stride - 1, 3 * block + stride):
        tokens = tokens_of(length)
        out = nnx.jit(lambda module, tokens: module(tokens))(module, tokens)
        expected = judge(phi, tokens, parameters(module), config)
        np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5, err_msg=f"{length=}")


def test_mean_compress_needs_no_module():
    tokens = jnp.asarray(tokens_of(31))
    expected = judge("mean", tokens, {}, SMALL)
    np.testing.assert_allclose(mean_compress(tokens, config=SMALL), expected, rtol=1e-5, atol=1e-6)
    assert not jax.tree.leaves(nnx.state(make("mean", SMALL)))


@PHI
@pytest.mark.parametrize("length", [15, 7])  # five blocks, and one alone
def test_gradients_equal_those_of_the_loop(phi, length):
    """In a random direction of tokens and parameters, by central difference of the loop in float64."""
    config = config_of(6, 2)
    module, tokens = make(phi, config), tokens_of(length)
    p, names = parameters(module), list(parameters(module))
    graph, state = nnx.split(module)
    cotangent = np.random.default_rng(2).normal(size=judge(phi, tokens, p, config).shape)

    def loss(state, tokens):
        return (nnx.merge(graph, state)(tokens) * cotangent.astype(np.float32)).sum()

    gradients, tokens_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, tokens)
    gradients = dict(zip(names, (np.asarray(x, np.float64) for x in jax.tree.leaves(gradients)), strict=True))

    def difference(direction, tokens_direction):
        sums = []
        for step in (1e-5, -1e-5):
            moved = {name: p[name] + step * direction[name] for name in names}
            sums.append((judge(phi, tokens + step * tokens_direction, moved, config) * cotangent).sum())
        return (sums[0] - sums[1]) / 2e-5

    draw = np.random.default_rng(3)
    still = {name: np.zeros_like(x) for name, x in p.items()}
    direction = draw.normal(size=tokens.shape)
    numeric = difference(still, direction)
    np.testing.assert_allclose((np.asarray(tokens_gradient) * direction).sum(), numeric, rtol=1e-4)
    for name in names:
        direction = draw.normal(size=p[name].shape)
        numeric = difference({**still, name: direction}, np.zeros_like(tokens))
        np.testing.assert_allclose((gradients[name] * direction).sum(), numeric, rtol=1e-4, err_msg=name)


@PHI
@pytest.mark.parametrize("length", [0, 1, 7])
def test_fewer_tokens_than_a_block_give_none(phi, length):
    module = make(phi, SMALL)
    graph, state = nnx.split(module)

    def loss(state, tokens):
        out = nnx.merge(graph, state)(tokens)
        return out.sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, tokens_of(length))
    assert out.shape == (BATCH, 0, HEADS, SIZE)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient[1:], 0)


@PHI
def test_a_token_touches_its_own_blocks_alone(phi):
    """l=8, d=4: token 13 is in blocks 2 (8..15) and 3 (12..19); tokens past the last whole block are in none."""
    module, tokens = make(phi, SMALL), tokens_of(27)
    apply = nnx.jit(lambda module, tokens: module(tokens))
    for token, touched in [(0, {0}), (13, {2, 3}), (23, {4}), (24, set())]:
        changed = tokens.copy()
        changed[:, token] = np.nan
        rows = np.isnan(np.asarray(apply(module, changed))).any(axis=(0, 2, 3))
        assert set(np.flatnonzero(rows)) == touched, token


# How they start.


def test_gated_pool_starts_at_the_mean():
    tokens = jnp.asarray(tokens_of(31))
    module = fresh("gated_pool", SMALL)
    np.testing.assert_allclose(module(tokens), mean_compress(tokens, config=SMALL), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("phi", ["linear", "mlp"])
def test_outputs_start_at_the_scale_of_their_inputs(phi):
    config = NSAConfig()
    tokens = jnp.asarray(tokens_of(500))
    ratio = float(jnp.std(fresh(phi, config)(tokens)) / jnp.std(tokens))
    assert 0.3 < ratio < 2


def test_positions_start_small_and_random():
    position = fresh("linear", NSAConfig()).blocks.position[...]
    assert position.shape == (32, SIZE)
    assert 0.015 < float(jnp.std(position)) < 0.025


# Dtypes.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_the_mean_is_summed_in_float32(dtype):
    config = NSAConfig(compress_block=128, compress_stride=32, select_block=128)
    tokens = jnp.asarray(10 + tokens_of(200), dtype)
    mean = mean_compress(tokens, config=config)
    assert mean.dtype == dtype
    exact = mean_compress(tokens.astype(jnp.float32), config=config)
    np.testing.assert_array_equal(np.asarray(mean, np.float32), np.asarray(exact.astype(dtype), np.float32))


@LEARNED
@pytest.mark.parametrize(
    "tokens_dtype, dtype, param_dtype, result",
    [
        ("float32", None, "float32", "float32"),
        ("bfloat16", None, "float32", "float32"),  # inferred from tokens and parameters, as in nnx.Linear
        ("bfloat16", None, "bfloat16", "bfloat16"),
        ("bfloat16", "bfloat16", "float32", "bfloat16"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("bfloat16", "float32", "float32", "float32"),
        ("float16", "float16", "float32", "float16"),
    ],
)
def test_dtypes(phi, tokens_dtype, dtype, param_dtype, result):
    module = make(phi, SMALL, dtype=dtype and jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(module))} == {jnp.dtype(param_dtype)}
    out = jax.eval_shape(module, jnp.zeros((1, 20, 1, SIZE), tokens_dtype))
    assert out.dtype == jnp.dtype(result)


@LEARNED
def test_low_precision_is_near_the_loop(phi):
    module = make(phi, SMALL, dtype=jnp.bfloat16)
    tokens = jnp.asarray(tokens_of(31), jnp.bfloat16)
    out = np.asarray(nnx.jit(lambda module, tokens: module(tokens))(module, tokens), np.float64)
    expected = judge(phi, np.asarray(tokens, np.float32), parameters(module), SMALL)
    assert np.abs(out - expected).max() < 0.03 * np.abs(expected).max()


# Extremes.


@pytest.mark.parametrize("logit", [1e4, -1e4, 3e38])
def test_a_huge_logit_of_gated_pool_does_not_overflow(logit):
    """l=8, d=4: token 9, alone with a huge logit, is all of blocks 1 (4..11) and 2 (8..15), or none of them."""
    module = make("gated_pool", SMALL)
    module.gate.kernel[...] = jnp.zeros((SIZE, SIZE)).at[0].set(logit)
    module.position[...] = jnp.zeros((8, SIZE))
    tokens = tokens_of(24)
    tokens[..., 0] = 0  # of all but token 9, the logits are zero
    tokens[:, 9, :, 0] = 1
    graph, state = nnx.split(module)

    def loss(state, tokens):
        out = nnx.merge(graph, state)(tokens)
        return (out**2).sum(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, tokens)
    for block in (1, 2):
        others = np.delete(tokens, 9, axis=1)[:, 4 * block : 4 * block + 7]
        expected = tokens[:, 9] if logit > 0 else others.mean(axis=1)
        np.testing.assert_allclose(out[:, block], expected, rtol=1e-5, atol=1e-6)
    for array in jax.tree.leaves((out, gradients)):
        assert np.isfinite(array).all()


# Memory, and work.


@pytest.mark.parametrize("phi, most", [("mean", 0), ("linear", 1), ("mlp", 2), ("gated_pool", 1)])
def test_a_block_alone_takes_one_product_a_layer(phi, most):
    """As at a step of decoding; of several blocks, one more is that of the positions."""
    module = make(phi, SMALL)
    for length, more in ((SMALL.compress_block, 0), (4 * SMALL.compress_block, phi in ("linear", "mlp"))):
        program = jax.make_jaxpr(module)(tokens_of(length)).jaxpr
        assert [x.primitive.name for x in equations(program)].count("dot_general") == most + more


def largest(jaxpr):
    """Elements of the largest array in a program, and its inner ones."""
    sizes = [math.prod(x.aval.shape) for equation in jaxpr.eqns for x in equation.outvars]
    inner = [largest(inner) for equation in jaxpr.eqns for inner in jaxprs_in_params(equation.params)]
    return max(sizes + inner)


@pytest.mark.parametrize("phi, most", [("mean", 1), ("linear", 2), ("gated_pool", 1)])
def test_no_copy_of_the_tokens_for_each_block(phi, most):
    """l=32, d=4: to copy the tokens into their blocks takes 8 times their memory.

    A linear map has l/d products of each unit: 8 for 4 tokens, twice the tokens.
    """
    config = config_of(32, 4)
    module = make(phi, config)
    tokens = jax.ShapeDtypeStruct((1, 1024, 1, SIZE), jnp.float32)
    assert largest(jax.make_jaxpr(module)(tokens).jaxpr) <= most * math.prod(tokens.shape)


@pytest.mark.parametrize("phi, most", [("mean", 1), ("linear", 4)])
def test_memory_of_the_compiled_program(phi, most):
    """Likewise in all, not one array."""
    config = config_of(32, 4)
    graph, state = nnx.split(make(phi, config))
    tokens = jax.ShapeDtypeStruct((1, 4096, 1, SIZE), jnp.float32)
    compiled = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)).lower(state, tokens).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= most * 4 * math.prod(tokens.shape)
