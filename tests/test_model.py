"""train/model.py: one model, whatever the attention, the rematerialisation, and layers scanned or unrolled."""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params

from nsa_jax import NSAConfig, select_blocks
from tests.programs import equations
from tests.tiny import random_params
from train import model as model_module
from train.config import MAX_PACKED_DENSE, PRESETS, AttentionName, ModelConfig, TrainConfig
from train.data import Batch
from train.generate import Sampling, advance, empty_state
from train.model import Network, cast_matrices, mean_keys_read
from train.step import abstract_state, make_train_step

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.usefixtures("quick_compilation")

ATTENTIONS = typing.get_args(AttentionName)
VOCAB = 50  # padded to 64

CONFIG = ModelConfig(
    num_layers=2,
    model_dim=12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    value_head_dim=6,
    mlp_dim=20,
    dtype="float32",
    nsa=NSAConfig(compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_local=1, window=6),
)


def replace(config: ModelConfig = CONFIG, **fields) -> ModelConfig:
    return dataclasses.replace(config, **fields)


def random_tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, shape), jnp.int32)


SEGMENTS = jnp.asarray([[0] * 8 + [1] * 7 + [2] * 4, [0] * 3 + [1] * 16], jnp.int32)


def assert_close(actual, expected, *, rtol: float = 1e-5) -> None:
    """Leaf by leaf, relative to the largest number of the leaf."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(jnp.abs(y).max()), err_msg=str(path))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def unrolled_losses(model, tokens, targets, segment_ids):
    """What `losses` computes, without scan, rematerialisation or chunks."""
    x = model.embed(tokens)
    for layer in model.unstacked_layers():
        x = layer(x, segment_ids)
    return cross_entropy(model.logits(model.norm(x)), targets)


# -------------------------------------------------------------------------------------------------- one loss, many ways


@pytest.mark.parametrize(
    "attention, remats",
    [("nsa", ("attention",)), ("full", ("none",)), ("window", ("full",))],
)
def test_scan_and_every_remat_give_the_losses_and_gradients_of_the_unrolled_model(attention, remats):
    tokens, targets = random_tokens(2, 19), random_tokens(2, 19, seed=1)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(2, 19)), jnp.float32)

    def losses_and_gradient(losses):
        @jax.jit
        def run(params):
            value, pullback = jax.vjp(losses, params)
            return value, pullback(weights)[0]

        return run(params)

    networks = [Network(replace(attention=attention, remat=remat), VOCAB) for remat in remats]
    params = random_params(networks[0])
    expected = losses_and_gradient(lambda params: unrolled_losses(networks[0].model(params), tokens, targets, SEGMENTS))
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(expected[1]))  # no parameter without effect
    for network in networks:
        actual = losses_and_gradient(lambda params, n=network: n.model(params).losses(tokens, targets, SEGMENTS))
        assert_close(actual, expected)


def test_remat_decides_what_is_saved():
    tokens = random_tokens(2, 19)
    layers, heads, value_dim = CONFIG.num_layers, CONFIG.num_heads, CONFIG.value_head_dim
    for attention in ATTENTIONS:
        saved = {}
        for remat in ("none", "attention", "full"):
            network = Network(replace(attention=attention, remat=remat), VOCAB)

            def residuals(params, network=network):
                return jax.vjp(lambda params: network.model(params).losses(tokens, tokens), params)[1]

            saved[remat] = jax.tree.leaves(jax.eval_shape(residuals, network.abstract_params()))
        size = {remat: sum(math.prod(x.shape) for x in leaves) for remat, leaves in saved.items()}
        assert size["none"] > size["attention"] > size["full"], attention
        out = (layers, 2, 19, heads, value_dim)
        assert [out in [x.shape for x in saved[remat]] for remat in ("attention", "full")] == [True, False], attention


def test_tied_embeddings_are_one_matrix_with_two_uses():
    """The gradient of the tied matrix is the sum of those of an untied embedding and head that are equal."""
    tokens, targets = random_tokens(2, 19), random_tokens(2, 19, seed=1)
    tied, untied = (Network(replace(attention="window", tie_embeddings=tie), VOCAB) for tie in (True, False))
    params = random_params(tied)
    assert set(untied.abstract_params()) - set(params) == {"head"}

    def mean_loss(network, params):
        return network.model(params).losses(tokens, targets).mean()

    loss, gradient = jax.jit(jax.value_and_grad(lambda params: mean_loss(tied, params)))(params)
    two = params | {"head": {"kernel": params["embed"]["embedding"].T}}
    untied_loss, untied_gradient = jax.jit(jax.value_and_grad(lambda params: mean_loss(untied, params)))(two)
    head = untied_gradient.pop("head")["kernel"].T
    assert_close(loss, untied_loss)
    assert jnp.abs(head).max() > 0 and jnp.abs(untied_gradient["embed"]["embedding"]).max() > 0
    untied_gradient["embed"]["embedding"] += head
    assert_close(gradient, untied_gradient)


def arrays_of(jaxpr: ClosedJaxpr | Jaxpr) -> set[tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array that a program makes, in its loops and branches too."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    found = set()
    for equation in jaxpr.eqns:
        found |= {(str(x.aval.dtype), x.aval.shape) for x in equation.outvars if hasattr(x.aval, "shape")}
        for inner in jaxprs_in_params(equation.params):
            found |= arrays_of(inner)
    return found


@pytest.mark.parametrize("tie", [True, False])
def test_chunks_of_logits_give_the_same_losses_and_never_hold_them_all(tie, monkeypatch):
    network = Network(replace(attention="window", tie_embeddings=tie), VOCAB)
    params = random_params(network)
    tokens, targets = random_tokens(2, 19), random_tokens(2, 19, seed=1)

    def make_function():
        def weighted(params):
            losses = network.model(params).losses(tokens, targets)
            return (losses * jnp.linspace(0, 1, 38).reshape(2, 19)).sum(), losses

        return jax.value_and_grad(weighted, has_aux=True)

    def most_rows(function):
        arrays = arrays_of(jax.make_jaxpr(function)(params))
        return max(math.prod(shape[:-1]) for dtype, shape in arrays if dtype == "float32" and shape[-1:] == (VOCAB,))

    whole = make_function()
    assert most_rows(whole) == 2 * 19
    monkeypatch.setattr(model_module, "LOGITS_PER_CHUNK", 5 * 64 + 63)  # 5 rows of the padded vocabulary
    chunked = make_function()
    assert most_rows(chunked) == 5
    if tie:
        actual = jax.jit(chunked)(params)
        monkeypatch.undo()
        assert_close(actual, jax.jit(whole)(params))


def test_logits_are_float32_and_of_the_vocabulary_alone():
    for attention in ATTENTIONS:
        network = Network(replace(attention=attention, dtype="bfloat16", tie_embeddings=attention == "full"), VOCAB)
        params = network.abstract_params()
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        tokens = jax.ShapeDtypeStruct((2, 19), jnp.int32)
        hidden = jax.eval_shape(lambda params, tokens, n=network: n.model(params).hidden(tokens), params, tokens)
        logits = jax.eval_shape(lambda params, tokens, n=network: n.model(params)(tokens), params, tokens)
        losses = jax.eval_shape(
            lambda params, tokens, n=network: n.model(params).losses(tokens, tokens), params, tokens
        )
        assert (hidden.shape, hidden.dtype) == ((2, 19, CONFIG.model_dim), jnp.bfloat16)
        assert (logits.shape, logits.dtype) == ((2, 19, VOCAB), jnp.float32)
        assert (losses.shape, losses.dtype) == ((2, 19), jnp.float32)


def test_bfloat16_computes_in_bfloat16_and_trains_float32_parameters():
    config = TrainConfig(name="x", context=19, batch_size=2, steps=200, model=replace(dtype="bfloat16", remat="full"))
    network = Network(config.model, VOCAB)
    state, batch = abstract_state(network, config), abstract_batch(config)
    step = make_train_step(network, config)
    products = {
        dtype
        for dtype, shape in arrays_of(jax.make_jaxpr(step)(state, batch))
        if shape == (2, 19, config.model.mlp_dim)
    }
    assert products == {"bfloat16"}
    new, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics.loss.dtype == metrics.grad_norm.dtype == jnp.float32


# -------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("value_dim", [4, 8, 12])
@pytest.mark.parametrize("attention, window", [("full", 99), ("window", 3)])
def test_dense_attention_by_hand(attention, window, value_dim):
    """`window=3`: query 5 sees 3, 4, 5; heads of queries and values of one size and not."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, 7, heads, size)) for heads, size in ((4, 8), (2, 8), (2, value_dim)))
    config = replace(attention=attention, value_head_dim=value_dim, nsa=dataclasses.replace(CONFIG.nsa, window=3))
    layer = Network(config, VOCAB).model(random_params(Network(config, VOCAB))).unstacked_layers()[0].attention
    actual = layer._attend(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)), mask=None)
    for b, t, n in np.ndindex(2, 7, 4):
        seen = range(max(0, t - window + 1), t + 1)
        scores = np.asarray([query[b, t, n] @ key[b, s, n // 2] for s in seen]) / 8**0.5
        weights = np.exp(scores) / np.exp(scores).sum()
        expected = sum(weight * value[b, s, n // 2] for weight, s in zip(weights, seen, strict=True))
        np.testing.assert_allclose(actual[b, t, n], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_unrolled_model_with_a_cache_equals_the_scanned_one(attention):
    network = Network(replace(attention=attention, remat="attention"), VOCAB)
    params = random_params(network)
    tokens, lengths = random_tokens(3, 19), np.asarray([11, 4, 8], np.int32)
    expected = jax.jit(lambda params: network.model(params).hidden(tokens))(params)
    with_cache = jax.jit(lambda params, *args: network.model(params).with_cache(*args))
    rows = np.arange(3)
    hidden, caches = np.zeros(expected.shape, np.float32), network.model(params).init_cache(3, 19)
    done = np.zeros(3, np.int32)
    # Ragged prompts in two chunks of 7, each row's padding being its own later tokens.
    for _ in range(2):
        columns = np.minimum(done[:, None] + np.arange(7), 18)
        real = np.clip(lengths - done, 0, 7).astype(np.int32)
        out, caches = with_cache(params, tokens[rows[:, None], columns], caches, jnp.asarray(real))
        for row in rows:
            hidden[row, done[row] : done[row] + real[row]] = out[row, : real[row]]
        done += real
    np.testing.assert_array_equal(done, lengths)
    # Then token by token, each row at its own position, until the longest is full.
    for _ in range(19 - 11):
        out, caches = with_cache(params, tokens[rows, done][:, None], caches, None)
        hidden[rows, done] = out[:, 0]
        done += 1
    for row in rows:
        assert_close(hidden[row, : done[row]], expected[row, : done[row]])
    np.testing.assert_array_equal(caches[0].lengths, done)


def test_the_first_layer_counts_for_all():
    network = Network(CONFIG, VOCAB)
    model = network.model(random_params(network))
    with_cache = jax.jit(lambda caches: model.with_cache(random_tokens(2, 5), caches, jnp.asarray([5, 2])))
    first, second = model.init_cache(2, 9)
    expected = with_cache((first, second))
    assert [cache.lengths.tolist() for cache in expected[1]] == [[5, 2], [5, 2]]
    actual = with_cache((first, second._replace(lengths=jnp.asarray([3, 7], jnp.int32))))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("compression, tie_embeddings", [("mlp", True), ("gated_pool", False)])
def test_matrices_cast_beforehand_give_the_same_bits(compression, tie_embeddings):
    network = Network(
        replace(num_layers=1, compression=compression, tie_embeddings=tie_embeddings, dtype="bfloat16"), VOCAB
    )
    params = random_params(network)
    cast = cast_matrices(params, "bfloat16")
    wide = {path[-1].key for path, x in jax.tree_util.tree_leaves_with_path(cast) if x.dtype == jnp.float32}
    assert wide == {"scale", "position"}

    # XLA may leave roundings out on a CPU, but not if told so.
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def run(params):
        model = network.model(params)
        hidden, caches = model.with_cache(random_tokens(2, 9), model.init_cache(2, 12))
        return model.logits(hidden), caches

    jax.tree.map(np.testing.assert_array_equal, run(cast), run(params))


def test_generation_casts_and_unstacks_before_its_loop():
    """What enters the loop: no matrix in float32, and none of several layers."""
    network = Network(replace(dtype="bfloat16"), VOCAB)
    params = network.abstract_params()
    state = jax.eval_shape(lambda params: empty_state(network, params, batch=5, max_length=9, max_tokens=9), params)
    keys, limits = jax.random.split(jax.random.key(0), 5), jnp.full((5,), 9, jnp.int32)
    traced = advance.trace(network, params, state, keys, limits, 9, sampling=Sampling(temperature=0), stop=())
    loop = next(x for x in equations(traced.jaxpr) if x.primitive.name == "while")
    found = {(str(x.aval.dtype), x.aval.shape) for x in loop.invars}
    kernels = [x.shape for path, x in jax.tree_util.tree_leaves_with_path(params["layers"]) if path[-1].key == "kernel"]
    for shape in kernels:
        assert ("bfloat16", shape[1:]) in found and ("float32", shape[1:]) not in found
        assert not {("bfloat16", shape), ("float32", shape)} & found
    assert ("bfloat16", (64, CONFIG.model_dim)) in found and ("float32", (64, CONFIG.model_dim)) not in found


# ---------------------------------------------------------------------------------------------------- packed documents


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_document_does_not_see_its_neighbours(attention):
    """The same document at positions 8 to 14 between two pairs of neighbours, and at the start of a sequence."""
    network = Network(replace(attention=attention), VOCAB)
    params = random_params(network)
    document = random_tokens(7, seed=5)
    tokens = random_tokens(3, 19)
    tokens = tokens.at[:2, 8:15].set(document).at[2, :7].set(document)
    segment_ids = jnp.asarray([[0] * 8 + [1] * 7 + [2] * 4, [0] * 5 + [1] * 3 + [2] * 7 + [3] * 4, [0] * 7 + [1] * 12])
    hidden = jax.jit(lambda params: network.model(params).hidden(tokens, segment_ids.astype(jnp.int32)))(params)
    between, others, alone = hidden[0, 8:15], hidden[1, 8:15], hidden[2, :7]
    np.testing.assert_array_equal(between, others)
    assert_close(between, alone)
    assert np.abs(hidden[0] - hidden[1]).max() > 0.1
    running = jax.jit(lambda params: network.model(params).hidden(tokens))(params)
    assert np.abs(running[0, 8:15] - running[1, 8:15]).max() > 0.1  # without segments it does


def test_packed_documents_in_a_long_context_need_nsa():
    length = MAX_PACKED_DENSE + 1
    tokens = segment_ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    for attention in ATTENTIONS:
        network = Network(replace(attention=attention, num_layers=1), VOCAB)
        hidden = lambda params, *args, n=network: n.model(params).hidden(*args)  # noqa: E731
        jax.eval_shape(hidden, network.abstract_params(), tokens)
        if attention == "nsa":
            jax.eval_shape(hidden, network.abstract_params(), tokens, segment_ids)
        else:
            with pytest.raises(ValueError, match=f"mask of {length} x {length}: at most {MAX_PACKED_DENSE}"):
                jax.eval_shape(hidden, network.abstract_params(), tokens, segment_ids)
            with pytest.raises(ValueError, match=f"context={length} must be at most {MAX_PACKED_DENSE}, or packing"):
                config = PRESETS["small"][1]
                dataclasses.replace(
                    config,
                    context=length,
                    model=replace(config.model, attention=attention),
                    data=dataclasses.replace(config.data, packing="documents"),
                )


# ------------------------------------------------------------------------------------------------- presets, and counts


def abstract_batch(config: TrainConfig, *, segment_ids: bool = False) -> Batch:
    shape = (config.batch_size, config.context)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    return Batch(tokens, tokens, jax.ShapeDtypeStruct(shape, jnp.float32), tokens if segment_ids else None)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("preset, vocab_size, millions", [("small", 4096, (28, 34)), ("base", 8192, (103, 121))])
def test_the_large_presets_compile(preset, vocab_size, millions, attention):
    config = PRESETS[preset][1]
    assert config.data.tokenizer == f"bpe:{vocab_size}"
    config = dataclasses.replace(config, model=replace(config.model, attention=attention))
    network = Network(config.model, vocab_size)
    assert millions[0] <= network.num_params() / 1e6 <= millions[1]
    step = make_train_step(network, config)
    lowered = step.lower(abstract_state(network, config), abstract_batch(config))
    state, metrics = lowered.out_info
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)) == network.num_params()
    assert metrics.loss.shape == ()
    # From shapes alone: nothing of this size is ever held. Quickly, since it is not run. Dense attention on a CPU makes a
    # mask of context x context, and compiling that at 32k crashes jaxlib 0.12; on a GPU cuDNN makes no mask.
    if attention == "nsa" or preset == "small":
        quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        memory = lowered.compile(compiler_options=quickly).memory_analysis()
        if attention == "nsa":
            assert memory.temp_size_in_bytes < 32 * 2**30


def test_mean_keys_read_counts_what_select_blocks_chooses():
    """Against random queries, whatever they prefer: 21 positions, the last block of 4 incomplete."""
    config, length = CONFIG.nsa, 21
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(1, length, 1, 8)), jnp.float32)
    compressed = jnp.asarray(rng.normal(size=(1, config.num_compressed(length), 1, 8)), jnp.float32)
    chosen = select_blocks(query, compressed, config=config, num_keys=length)[0, :, 0]
    keys = seen = 0
    for t in range(length):
        tokens = {block * config.select_block + i for block in chosen[t].tolist() if block >= 0 for i in range(4)}
        complete = [i for i in range(99) if i * config.compress_stride + config.compress_block - 1 <= t]
        keys += len([s for s in tokens if s <= t]) + len(range(max(0, t - config.window + 1), t + 1)) + len(complete)
        seen += len(complete)
    assert mean_keys_read(CONFIG, length) == (keys / length, seen / length)
    assert mean_keys_read(replace(attention="full"), 21) == (11, 0)
    assert mean_keys_read(replace(attention="window"), 21) == ((1 + 2 + 3 + 4 + 5 + 16 * 6) / 21, 0)


# Multiplications of one key/value head's phi for one token, by hand: H=8 of keys, V=6 of values; l=4, d=2.
PHI = {
    "mean": 0,
    # A block of 4 tokens is one product of 4H x H, every 2 tokens.
    "linear": (4 * 8 * 8 + 4 * 6 * 6) / 2,
    # Hidden layers of 2H and 2V, then back.
    "mlp": (4 * 8 * 16 + 16 * 8 + 4 * 6 * 12 + 12 * 6) / 2,
    # A gate of H x H for every token.
    "gated_pool": 8 * 8 + 6 * 6,
}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("attention, compression", [("full", "mlp"), ("window", "mlp"), *(("nsa", phi) for phi in PHI)])
def test_flops_per_token_by_hand(attention, compression, tie):
    """E=12, N=4, K=2, H=8, V=6, F=20, two layers, a vocabulary of 64 once padded, a context of 21."""
    network = Network(replace(attention=attention, compression=compression, tie_embeddings=tie), VOCAB)
    branches = 3 if attention == "nsa" else 1
    projections = 12 * 4 * 8 + branches * 12 * 2 * (8 + 6) + 4 * 6 * 12
    layer = projections + 3 * 12 * 20
    keys, compressed = mean_keys_read(network.config, 21)
    # For each head and key: a product of H for the score, of V for the output; backward twice that.
    scores = 4 * keys * (8 + 6) * 2 * 3
    if attention == "nsa":
        layer += 12 * 4 * 3 + 2 * PHI[compression]  # gates; phi on 2 key/value heads
        scores += 4 * compressed * 8 * 2  # the scores by which blocks are chosen, forward alone
    # A multiplication and an addition, forward once and backward twice.
    expected = 6 * (2 * layer + 12 * 64) + 2 * scores
    assert network.flops_per_token(21) == pytest.approx(expected, rel=1e-12)
