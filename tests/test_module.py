"""The Flax module: recomputed by hand from its parameters, rule 10, packing, parameters and their gradients, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from nsa_jax import NativeSparseAttention, NSAConfig, ops
from nsa_jax.compression import COMPRESSIONS
from nsa_jax.module import rotate
from nsa_jax.testing import SMALL
from tests import oracle
from tests.programs import equations

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Compressed token i ends at 2i + 3; block j holds 4j .. 4j + 3; of eight blocks a query reads three.
TINY = NSAConfig(
    compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_initial=1, num_local=1, window=5
)
SIZES = dict(
    num_heads=4, in_features=10, num_kv_heads=2, head_dim=6, value_head_dim=3, config=TINY, compression="linear"
)


def abstract(**arguments):
    """The module without its numbers."""
    return nnx.eval_shape(lambda: NativeSparseAttention(**{**SIZES, **arguments}, rngs=nnx.Rngs(0)))


def make(**arguments):
    """A module whose every parameter is Gaussian: gates, biases, norms and positions too."""
    graph, state = nnx.split(abstract(**arguments))
    draw = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.6 * draw.normal(size=x.shape), x.dtype), state))


@functools.cache
def initialised(**arguments):
    """The module as its initialisers make it."""
    return nnx.jit(lambda: NativeSparseAttention(**{**SIZES, **arguments}, rngs=nnx.Rngs(0)))()


LEARNING = [{"compression": "mlp", "use_bias": True}, {"compression": "gated_pool", "normalize_qk": True}]


def gaussian(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def parameters(module):
    """Parameters by name."""
    return {name: variable.get_value() for name, variable in variables(module).items()}


def variables(module):
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))}


apply = nnx.jit(lambda module, x, segment_ids=None: module(x, segment_ids=segment_ids))
project = nnx.jit(lambda module, x, **arguments: module.project(x, **arguments))
look = functools.partial(nnx.eval_shape, lambda module, x: module(x))
select = nnx.jit(lambda module, x, segment_ids=None: module.select_blocks(x, segment_ids=segment_ids))
UNALIGNED = np.asarray([[0] * 7 + [1] * 2 + [2] * 21, [0] * 16 + [5] * 14], np.int32)


# By hand: from x and the parameters in float64, with the loops of the oracle.


def rms_normalise(x, scale):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, positions, theta):
    """Pairs (x[j], x[j + H/2]) are complex numbers; the one of index j turns by position * theta ** (-2j / H)."""
    half = x.shape[-1] // 2
    frequency = np.asarray([theta ** (-2 * j / x.shape[-1]) for j in range(half)])
    number = x[..., :half] + 1j * x[..., half:]
    number = number * np.exp(1j * positions[:, :, None, None] * frequency)
    return np.concatenate([number.real, number.imag], axis=-1)


def by_hand(module, x, segment_ids=None, *, give=None):
    """The layer's output; or what it gives to select_blocks, rotated queries and compressed keys."""
    p = {name: np.asarray(value, np.float64) for name, value in parameters(module).items()}
    x, config = np.asarray(x, np.float64), module.config
    batch, length, _ = x.shape
    ids = np.zeros((batch, length), np.int32) if segment_ids is None else segment_ids
    positions = np.asarray([[t - list(row).index(row[t]) for t in range(length)] for row in ids])

    def project(name, subscripts):
        return np.einsum(subscripts, x, p[f"{name}.kernel"]) + np.expand_dims(
            p.get(f"{name}.bias", np.float64(0)), (0, 1)
        )

    query = project("query", "bte,enh->btnh")
    keys = project("key", "bte,ejkh->btjkh").transpose(2, 0, 1, 3, 4)
    values = project("value", "bte,ejkv->btjkv").transpose(2, 0, 1, 3, 4)
    gates = 1 / (1 + np.exp(-project("gate", "bte,enj->btnj")))

    def compress(tokens, name):
        """The linear phi."""
        position = p[f"{name}.blocks.position"]
        kernel = p[f"{name}.blocks.kernel"].reshape(*position.shape, -1)
        l, d = config.compress_block, config.compress_stride
        out = np.zeros((batch, config.num_compressed(length), *tokens.shape[2:]))
        for i in range(out.shape[1]):
            out[:, i] = sum((tokens[:, i * d + j] + position[j]) @ kernel[j] for j in range(l))
        return out

    compressed_key, compressed_value = compress(keys[0], "compress_key"), compress(values[0], "compress_value")
    selected_key, window_key = keys[1], keys[2]
    if module.normalize_qk:
        query = rms_normalise(query, p["query_norm.scale"])
        compressed_key = rms_normalise(compressed_key, p["key_norm_cmp.scale"])
        selected_key = rms_normalise(selected_key, p["key_norm_slc.scale"])
        window_key = rms_normalise(window_key, p["key_norm_win.scale"])
    if module.rope_theta is not None:
        firsts = np.arange(compressed_key.shape[1]) * config.compress_stride
        query = turn(query, positions, module.rope_theta)
        compressed_key = turn(compressed_key, positions[:, firsts], module.rope_theta)
        selected_key = turn(selected_key, positions, module.rope_theta)
        window_key = turn(window_key, positions, module.rope_theta)
    if give == "selection":
        return query, compressed_key
    pairs = (compressed_key, compressed_value), (selected_key, values[1]), (window_key, values[2])
    out = oracle.attention(query, *pairs, gates, config=config, segment_ids=segment_ids)
    return np.einsum("btnv,nvo->bto", out, p["out.kernel"]) + p.get("out.bias", 0)


BY_HAND = {
    "plain": {},
    "packed, normalised": {"segments": UNALIGNED, "normalize_qk": True, "rope_theta": 100.0},
    "biases, no positions": {"use_bias": True, "rope_theta": None, "out_features": 7},
}


@pytest.mark.parametrize("case", BY_HAND)
def test_equals_the_layer_by_hand(case):
    arguments = dict(BY_HAND[case])
    segment_ids = arguments.pop("segments", None)
    module, x = make(**arguments), gaussian(2, 30, 10)
    expected = by_hand(module, x, segment_ids)
    np.testing.assert_allclose(apply(module, x, segment_ids), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("segment_ids", [None, UNALIGNED], ids=["one document", "packed"])
def test_select_blocks_gives_what_the_layer_reads(segment_ids):
    """The layer equals, just above, what the oracle computes with its own choice; so this is that choice."""
    module, x = make(normalize_qk=True), gaussian(2, 30, 10)
    query, compressed_key = by_hand(module, x, segment_ids, give="selection")
    expected = oracle.select_blocks(query, compressed_key, config=TINY, num_keys=30, segment_ids=segment_ids)
    blocks = select(module, x, segment_ids)
    assert blocks.dtype == jnp.int32 and blocks.shape == (2, 30, 2, 3)
    np.testing.assert_array_equal(blocks, expected)


# Positions.


def test_rotate_turns_pairs_half_a_head_apart():
    x, positions = gaussian(2, 5, 3, 8), np.asarray([[0, 1, 2, 3, 70], [9, 8, 7, 6, 5]], np.int32)
    turned = rotate(jnp.asarray(x), jnp.asarray(positions), theta=100.0)
    np.testing.assert_allclose(turned, turn(x, positions, 100.0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(turned[0, 0], x[0, 0], rtol=1e-6)  # position 0 turns nothing
    assert rotate(jnp.ones((1, 1, 1, 2), jnp.bfloat16), jnp.ones((1, 1), jnp.int32), theta=10.0).dtype == jnp.bfloat16


@pytest.mark.parametrize("start", [1000, (3, 64)], ids=str)
def test_scores_depend_on_distances_alone(start):
    module, x = make(), gaussian(2, 9, 10)
    here, there = project(module, x), project(module, x, start=jnp.asarray(start, jnp.int32))
    assert np.abs(np.asarray(there.query - here.query)).max() > 0.1

    def scores(projections, keys):
        return np.einsum("btkgh,bskh->btskg", np.reshape(projections.query, (2, 9, 2, 2, 6)), keys)

    for branch in ("selected", "window"):
        before, after = (scores(projections, getattr(projections, branch).key) for projections in (here, there))
        np.testing.assert_allclose(after, before, atol=2e-3)
    for name in ("compression", "gates"):  # what is not turned
        for one, other in zip(jax.tree.leaves(getattr(here, name)), jax.tree.leaves(getattr(there, name)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_positions_restart_in_each_segment():
    x = gaussian(1, 5, 10)
    ids = np.asarray([[3] * 5 + [4] * 5], np.int32)
    projections = project(make(), np.concatenate([x, x], axis=1), segment_ids=ids)
    for array in jax.tree.leaves(projections):
        np.testing.assert_allclose(array[:, 5:], array[:, :5], rtol=1e-6, atol=1e-6)


# What a token reads.


def test_packed_equals_separate():
    """Documents of 12, 8 and 11 tokens that begin on multiples of l' = 4: beside each other, and one by one."""
    module, lengths = make(compression="mlp", normalize_qk=True), [12, 8, 11]
    documents = gaussian(3, 12, 10)  # the rest of the shorter ones is padding, which a causal layer does not read
    packed = np.concatenate([document[:length] for document, length in zip(documents, lengths, strict=True)])[None]
    together = apply(module, packed, np.repeat(np.arange(3, dtype=np.int32), lengths)[None])
    apart = apply(module, documents)
    for document, length, start in zip(apart, lengths, [0, 12, 20], strict=True):
        np.testing.assert_allclose(together[0, start : start + length], document[:length], rtol=1e-5, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    module, x = make(normalize_qk=True, rope_theta=100.0), gaussian(2, 30, 10)
    out = np.asarray(apply(module, x, UNALIGNED))
    for document in (0, 1, 2):
        own = np.equal(UNALIGNED, document)
        changed = np.where(own[:, :, None], gaussian(2, 30, 10, seed=9), x)
        np.testing.assert_array_equal(np.asarray(apply(module, changed, UNALIGNED))[~own], out[~own])


def test_no_token_reads_the_future():
    module, x = make(), gaussian(2, 30, 10)
    out = np.asarray(apply(module, x))
    for now in (0, 3, 12, 28):
        changed = np.where(np.arange(30)[:, None] > now, gaussian(2, 30, 10, seed=9), x)
        np.testing.assert_array_equal(np.asarray(apply(module, changed))[:, : now + 1], out[:, : now + 1])


def test_every_token_reads_the_past():
    """Token 0 by the first block, all others' keys and values by the window."""
    module, x = make(), gaussian(2, 30, 10)
    out = np.asarray(apply(module, x))
    changed = x.copy()
    changed[:, 0] += 1
    assert (np.abs(np.asarray(apply(module, changed)) - out).max(axis=-1) > 1e-6).all()


# Parameters.


def shapes(module):
    return {name: value.shape for name, value in parameters(module).items()}


def test_shapes_of_parameters_and_outputs():
    module = abstract(out_features=7, use_bias=True, normalize_qk=True)
    phi = {"key": 6, "value": 3}
    assert shapes(module) == {
        "query.kernel": (10, 4, 6),
        "query.bias": (4, 6),
        "key.kernel": (10, 3, 2, 6),
        "key.bias": (3, 2, 6),
        "value.kernel": (10, 3, 2, 3),
        "value.bias": (3, 2, 3),
        "gate.kernel": (10, 4, 3),
        "gate.bias": (4, 3),
        "out.kernel": (4, 3, 7),
        "out.bias": (7,),
        **{f"compress_{name}.blocks.kernel": (4 * size, size) for name, size in phi.items()},
        **{f"compress_{name}.blocks.position": (4, size) for name, size in phi.items()},
        "query_norm.scale": (6,),
        **{f"key_norm_{branch}.scale": (6,) for branch in ("cmp", "slc", "win")},
    }
    assert look(module, jnp.zeros((2, 30, 10))).shape == (2, 30, 7)


def test_sizes_that_are_not_given():
    module = abstract(
        num_kv_heads=None, head_dim=None, value_head_dim=None, num_heads=5, config=None, compression="mlp"
    )
    assert module.config == NSAConfig()
    found = shapes(module)
    assert found["query.kernel"] == (10, 5, 2) and found["key.kernel"] == found["value.kernel"] == (10, 3, 5, 2)
    assert found["out.kernel"] == (5, 2, 10) and "out.bias" not in found and "query_norm.scale" not in found
    assert found["compress_key.out.bias"] == (2,)  # the paper's MLP
    assert shapes(abstract(head_dim=8, value_head_dim=None))["value.kernel"] == (10, 3, 2, 8)


@pytest.mark.parametrize("phi", COMPRESSIONS)
def test_every_phi_has_its_parameters(phi):
    names = {name.removeprefix("compress_key.") for name in shapes(abstract(compression=phi)) if "compress_key" in name}
    assert (
        names
        == {
            "mean": set(),
            "linear": {"blocks.kernel", "blocks.position"},
            "mlp": {"blocks.kernel", "blocks.position", "out.kernel", "out.bias"},
            "gated_pool": {"gate.kernel", "position"},
        }[phi]
    )


def test_initialisers_go_where_they_say():
    constant = nnx.initializers.constant
    names = ("kernel_init", "out_kernel_init", "bias_init", "out_bias_init", "gate_kernel_init", "gate_bias_init")
    module = initialised(use_bias=True, **{name: constant(i + 1.0) for i, name in enumerate(names)})
    value = {name: float(array.reshape(-1)[0]) for name, array in parameters(module).items()}
    assert value["query.kernel"] == value["key.kernel"] == value["value.kernel"] == 1
    assert value["compress_key.blocks.kernel"] == value["compress_value.blocks.kernel"] == 1
    assert value["query.bias"] == value["key.bias"] == value["value.bias"] == 3
    assert (value["out.kernel"], value["out.bias"], value["gate.kernel"], value["gate.bias"]) == (2, 4, 5, 6)
    module = initialised(use_bias=True, kernel_init=constant(1.0), bias_init=constant(3.0))
    assert (module.out.kernel[0, 0, 0], module.out.bias[0]) == (1, 3)
    assert not module.gate.kernel[...].any() and not module.gate.bias[...].any()


def test_gates_start_at_a_half():
    gates = project(initialised(**LEARNING[0]), gaussian(2, 5, 10)).gates
    assert gates.shape == (2, 5, 4, 3) and gates.dtype == jnp.float32
    np.testing.assert_array_equal(gates, 0.5)


@pytest.mark.parametrize("arguments", LEARNING, ids=str)
def test_every_parameter_learns(arguments):
    """From the initial values on: no gradient is zero, in any branch."""
    graph, state = nnx.split(initialised(**arguments))
    x, weights = jnp.asarray(gaussian(2, 30, 10)), gaussian(2, 30, 10, seed=2)
    gradient = jax.jit(jax.grad(lambda state: (nnx.merge(graph, state)(x) * weights).sum()))(state)
    gradients = {name: np.asarray(value) for name, value in parameters(nnx.merge(graph, gradient)).items()}
    assert set(gradients) == set(shapes(nnx.merge(graph, state)))
    for name, array in gradients.items():
        assert np.isfinite(array).all(), name
        branch_axis = {"key": -3, "value": -3, "gate": -1}.get(name.split(".")[0])
        parts = [array] if branch_axis is None else np.moveaxis(array, branch_axis, 0)
        for part in parts:
            assert np.abs(part).max() > 1e-6, name


# Dtypes.


def test_bfloat16_beside_float32_parameters():
    """Every block is read, so that no choice depends on rounding."""
    module, x = make(config=SMALL, normalize_qk=True, dtype=jnp.bfloat16), gaussian(2, 40, 10)
    assert {array.dtype for array in parameters(module).values()} == {jnp.dtype(jnp.float32)}
    out = apply(module, x)
    assert out.dtype == jnp.bfloat16
    expected = by_hand(module, x)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.04 * np.abs(expected).max())


@pytest.mark.parametrize(
    "dtype, param_dtype, x_dtype, result",
    [
        (None, jnp.float32, jnp.float32, jnp.float32),
        (None, jnp.float32, jnp.bfloat16, jnp.float32),
        (None, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.float32, jnp.float32, jnp.float16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32),
    ],
)
@pytest.mark.parametrize("phi", COMPRESSIONS)
def test_dtypes(phi, dtype, param_dtype, x_dtype, result):
    module = abstract(compression=phi, normalize_qk=True, dtype=dtype, param_dtype=param_dtype)
    assert {array.dtype for array in parameters(module).values()} == {jnp.dtype(param_dtype)}
    assert look(module, jnp.zeros((1, 12, 10), x_dtype)).dtype == result


@pytest.mark.parametrize(
    "dtype, param_dtype, given, result",
    [
        (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16),
        (None, jnp.bfloat16, jnp.bfloat16, jnp.float32),
    ],
)
@pytest.mark.parametrize("name, length", [("decode_step", 1), ("nsa_attention", 7)])
def test_a_cache_is_read_in_its_own_dtype(name, length, dtype, param_dtype, given, result, monkeypatch):
    """As it is kept: nothing as long as it is cast."""
    calls = []

    def attend(query, **arguments):
        calls.append((query, arguments))
        return query[..., :3]

    monkeypatch.setattr(ops, name, attend)
    module = make(dtype=dtype, param_dtype=param_dtype)

    def run(x):
        out, grown = module(x, cache=module.init_cache(2, 30, dtype=given))
        [(query, read)] = calls
        assert read["compressed"] is grown.compressed and read["selected"] is grown.selected
        assert {x.dtype for x in jax.tree.leaves((query, grown[:-1], read["window"]))} == {jnp.dtype(given)}
        assert read["gates"].dtype == jnp.float32
        return out

    assert jax.eval_shape(run, jnp.zeros((2, length, 10))).dtype == result


@pytest.mark.parametrize("dtype, given", [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_decoding_from_a_cache_of_another_dtype(dtype, given):
    """Every block is read, so that no choice depends on rounding."""
    module, x = make(config=SMALL, normalize_qk=True, dtype=dtype), gaussian(2, 40, 10)
    expected = by_hand(module, x)
    step = nnx.jit(lambda module, x, cache: module(x, cache=cache))
    out, cache = step(module, x[:, :38], module.init_cache(2, 40, dtype=given))
    outs = [out]
    for position in (38, 39):
        out, cache = step(module, x[:, position : position + 1], cache)
        outs.append(out)
    assert {x.dtype for x in outs} == {jnp.dtype(dtype)}
    out = np.concatenate([np.asarray(x, np.float32) for x in outs], axis=1)
    np.testing.assert_allclose(out, expected, atol=0.04 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_a_cache_is_of_a_dtype_that_attention_computes_in(dtype):
    message = f"dtype={jnp.dtype(dtype)} of a cache must be one of float32, bfloat16, float16"
    with pytest.raises(ValueError, match=message):
        abstract().init_cache(2, 30, dtype=dtype)


# Flax and JAX around it.


@functools.cache
def plain():
    return make()


def test_split_merge_and_jit():
    module, x = plain(), gaussian(2, 30, 10)
    graph, state = nnx.split(module)
    functional = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    np.testing.assert_array_equal(apply(module, x), functional)
    other = jax.tree.map(lambda x: -x, state)
    assert not np.allclose(apply(nnx.merge(graph, other), x), functional)


def test_linen():
    """Through `nnx.bridge.to_linen`: the same parameters, by the same names, give the same output."""
    module, x = plain(), jnp.asarray(gaussian(2, 30, 10))
    linen = nnx.bridge.to_linen(NativeSparseAttention, **SIZES)
    variables = jax.eval_shape(linen.init, jax.random.key(0), x)
    params = nnx.to_pure_dict(nnx.state(module))
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    out = jax.jit(linen.apply)({"params": params}, x)
    np.testing.assert_allclose(out, apply(module, x), rtol=1e-5, atol=1e-5)


SHARDED = dict(
    use_bias=True,
    compression="mean",
    kernel_init=nnx.initializers.zeros_init(),
    kernel_metadata={"out_sharding": (None, "tensor")},
    out_kernel_metadata={"out_sharding": ("tensor",)},
    bias_metadata={"out_sharding": ("tensor",)},
    out_bias_metadata={"out_sharding": (None,)},
    gate_kernel_metadata={"out_sharding": (None, "tensor", None)},
)


def test_metadata_of_parameters_shards_them():
    """As in other Flax layers; the default, everywhere above, needs no mesh."""
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        module = NativeSparseAttention(**{**SIZES, **SHARDED}, rngs=nnx.Rngs(0))
        assert module.gate.kernel[...].sharding.spec == PartitionSpec(None, "tensor", None)
        assert apply(module, gaussian(2, 30, 10)).shape == (2, 30, 10)
    found = {name: variable.get_metadata().get("out_sharding") for name, variable in variables(module).items()}
    assert found["query.kernel"] == found["key.kernel"] == found["value.kernel"] == (None, "tensor")
    assert found["query.bias"] == found["key.bias"] == found["value.bias"] == ("tensor",)
    assert found["out.kernel"] == ("tensor",) and found["out.bias"] == (None,)
    assert found["gate.kernel"] == (None, "tensor", None) and found["gate.bias"] is None


def test_metadata_of_any_kind_needs_no_mesh():
    module = abstract(kernel_metadata={"my_axes": "x"})
    assert module.query.kernel.get_metadata()["my_axes"] == "x"
    assert "my_axes" not in module.out.kernel.get_metadata()


def test_a_layer_of_the_papers_size_costs_nothing_to_look_at():
    module = nnx.eval_shape(
        lambda: NativeSparseAttention(
            64, 2560, num_kv_heads=4, head_dim=192, value_head_dim=128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
        )
    )
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(nnx.state(module)))
    assert shapes(module)["key.kernel"] == (2560, 3, 4, 192)
    out = look(module, jax.ShapeDtypeStruct((1, 65536, 2560), jnp.bfloat16))
    assert out.shape == (1, 65536, 2560) and out.dtype == jnp.bfloat16


# Errors.


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a positive multiple of num_kv_heads=3"),
        ({"num_kv_heads": 8}, "num_heads=4 must be a positive multiple of num_kv_heads=8"),
        ({"num_kv_heads": 0}, "num_heads=4 must be a positive multiple of num_kv_heads=0"),
        ({"num_heads": 0, "num_kv_heads": None}, "num_heads=0 must be a positive multiple of num_kv_heads=0"),
        ({"head_dim": None}, "in_features=10 must be a multiple of num_heads=4, or head_dim be given"),
        ({"head_dim": 5}, "head_dim=5 must be even for rotary position; rope_theta=None leaves that out"),
        ({"compression": "max"}, "compression='max' is unknown: choose from mean, linear, mlp, gated_pool"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_sizes_that_do_not_fit(arguments, message, unchecked_shapes):
    with pytest.raises(ValueError, match=f"^{message}"):
        abstract(**arguments)


def test_an_odd_head_size_without_rotary_is_taken():
    assert look(abstract(head_dim=5, rope_theta=None), jnp.zeros((1, 12, 10))).shape == (1, 12, 10)


ids = functools.partial(jnp.zeros, dtype=jnp.int32)
CALLS = [
    ((2, 12, 9), {}, r"x must be \[B, T, in_features=10\], but its shape is \(2, 12, 9\)"),
    ((12, 10), {}, r"x must be \[B, T, in_features=10\], but its shape is \(12, 10\)"),
    ((2, 12, 10), {"lengths": ids(2)}, "lengths is for calls with a cache"),
    ((2, 12, 10), {"segment_ids": ids((2, 12)), "cache": 30}, "cache and segment_ids do not go together"),
    (
        (2, 12, 10),
        {"segment_ids": ids((2, 11))},
        r"segment_ids must be \[B, S\] = \(2, 12\), but its shape is \(2, 11\)",
    ),
    ((2, 12, 10), {"segment_ids": ids((12,))}, r"segment_ids must be \[B, S\] = \(2, 12\), but its shape is \(12,\)"),
    (
        (2, 12, 10),
        {"segment_ids": ids((3, 12))},
        r"segment_ids must be \[B, S\] = \(2, 12\), but its shape is \(3, 12\)",
    ),
    ((2, 12, 10), {"segment_ids": jnp.zeros((2, 12))}, "segment_ids has dtype float32; it must be int32"),
    ((2, 12, 10), {"segment_ids": ids((2, 12)).at[0, 3].set(1)}, "segment_ids must be non-decreasing"),
]


@pytest.mark.parametrize("shape, arguments, message", CALLS, ids=[message[:40] for _, _, message in CALLS])
def test_calls_that_do_not_fit(shape, arguments, message, unchecked_shapes):
    module = plain()
    if "cache" in arguments:
        arguments = {**arguments, "cache": module.init_cache(2, arguments["cache"])}
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda module, x: module(x, **arguments), module, jnp.zeros(shape))


@pytest.mark.parametrize("phi", COMPRESSIONS)
def test_precision_reaches_every_product(phi):
    """Of projections and phi, of a text and of a token beside a cache; attention's own have it already."""

    def products(precision, length):
        module = abstract(compression=phi, precision=precision)
        graph, state = nnx.split(module)
        cache = None if length > 1 else module.init_cache(1, 12)
        program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x, cache=cache))(
            state, jnp.zeros((1, length, 10))
        )
        return [x.params["precision"] for x in equations(program.jaxpr) if x.primitive.name == "dot_general"]

    for length in (12, 1):
        found, default = products("highest", length), products(None, length)
        assert set(found) == {(lax.Precision.HIGHEST, lax.Precision.HIGHEST)}
        # Five projections, and phi of keys and of values, are not attention's.
        of_phi = {"mean": 0, "linear": 1, "mlp": 2, "gated_pool": 1}[phi] + (length > 1 and phi in ("linear", "mlp"))
        assert default.count(None) == 5 + 2 * of_phi


def test_the_implementation_is_passed_on():
    module = abstract(implementation="pallas")
    with pytest.raises(NotImplementedError, match="implementation='pallas'"):
        look(module, jnp.zeros((1, 12, 10)))
    with pytest.raises(NotImplementedError, match="implementation='pallas'"):
        nnx.eval_shape(lambda module, x: module.select_blocks(x), module, jnp.zeros((1, 12, 10)))
