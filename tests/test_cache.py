"""Decoding: the cached layer gives what one call without cache gives, at every position, however the text arrives."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from nsa_jax import KeyValue, NativeSparseAttention, NSACache, NSAConfig
from nsa_jax import cache as cache_module
from nsa_jax.compression import COMPRESSIONS
from nsa_jax.testing import SMALL
from tests.programs import QUICK
from train.config import ModelConfig
from train.model import DenseAttention

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Compressed token i ends at 2i + 3; block j holds 4j .. 4j + 3; of eight blocks a query reads three.
TINY = NSAConfig(
    compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_initial=1, num_local=1, window=5
)
SIZES = dict(num_heads=4, in_features=10, num_kv_heads=2, head_dim=6, value_head_dim=3, config=TINY)
LENGTH = 31  # odd: the last compressed token and block are incomplete
BATCH = 3


@functools.cache
def make(phi="mlp", normalize_qk=True, **arguments):
    """A module whose every parameter is Gaussian."""
    arguments = {**SIZES, "compression": phi, "normalize_qk": normalize_qk, **arguments}
    graph, state = nnx.split(nnx.eval_shape(lambda: NativeSparseAttention(**arguments, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.6 * draw.normal(size=x.shape), x.dtype), state))


def text(*, batch=BATCH, length=LENGTH, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, length, 10)).astype(np.float32)


@functools.cache
def uncached(module):
    """The judge: one call without cache."""
    return np.asarray(nnx.jit(lambda module, x: module(x))(module, text()))


@nnx.jit
def step(module, x, cache, lengths=None):
    return module(x, cache=cache, lengths=lengths)


@nnx.jit
def roll(module, chunks, cache, lengths):
    """Chunks `[steps, B, T, E]` one after the other in one program, of which `lengths` `[steps, B]` are real."""

    def one(cache, chunk):
        out, cache = module(chunk[0], cache=cache, lengths=chunk[1])
        return cache, out

    cache, out = lax.scan(one, cache, (chunks, lengths))
    return out, cache


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def deal(x, takes, size):
    """Chunks of `size` of which the first `takes[step, b]` continue sequence b of x; the rest are NaN."""
    chunks = np.full((len(takes), x.shape[0], size, x.shape[2]), np.nan, np.float32)
    for b in range(x.shape[0]):
        start = 0
        for chunk, take in zip(chunks[:, b], takes[:, b], strict=True):
            chunk[:take] = x[b, start : start + take]
            start += take
    return chunks


def collect(out, takes):
    """The real outputs of each sequence in their order."""
    return [
        np.concatenate([chunk[:take] for chunk, take in zip(np.asarray(out)[:, b], takes[:, b], strict=True)])
        for b in range(takes.shape[1])
    ]


# However the text arrives: all of LENGTH, so that each boundary of a compressed token, block and window is crossed.

KINDS = [("mean", True), ("linear", False), ("mlp", True), ("gated_pool", False)]


@pytest.mark.parametrize("phi, normalize_qk", KINDS[2:])
def test_token_by_token(phi, normalize_qk):
    module = make(phi, normalize_qk)
    chunks = text().transpose(1, 0, 2)[:, :, None]
    out, cache = roll(module, chunks, module.init_cache(BATCH, LENGTH), jnp.ones((LENGTH, BATCH), jnp.int32))
    close(out[:, :, 0].transpose(1, 0, 2), uncached(module))
    np.testing.assert_array_equal(cache.lengths, LENGTH)


# Of each sequence, chunks of 0 to 7 tokens of its own, up to all of it; seven from an even and from an odd position.
RAGGED = np.asarray([[6, 0, 1], [1, 1, 6], [6, 4, 0], [0, 2, 3], [4, 4, 2], [0, 7, 7], [3, 6, 5], [6, 0, 7], [5, 3, 0]])


def roll_ragged(module, x, takes, *, padding=np.nan):
    chunks = deal(x, takes, 7)
    chunks = np.where(np.isnan(chunks), np.float32(padding), chunks)
    return roll(module, chunks, module.init_cache(x.shape[0], LENGTH + 3), jnp.asarray(takes, jnp.int32))


@pytest.mark.parametrize("phi, normalize_qk", KINDS[1:3])
def test_ragged_chunks(phi, normalize_qk):
    """What pads them is NaN, and never leaks."""
    module = make(phi, normalize_qk)
    out, cache = roll_ragged(module, text(), RAGGED)
    np.testing.assert_array_equal(cache.lengths, [31, 27, 31])
    for got, expected in zip(collect(out, RAGGED), uncached(module), strict=True):
        close(got, expected[: len(got)])
    for array in jax.tree.leaves(cache):
        assert np.isfinite(array).all()


def test_each_sequence_equals_itself_alone():
    """Beside sequences that never begin, whose tokens are all NaN."""
    module, x = make(), text()
    out, caches = roll_ragged(module, x, RAGGED)
    for b in range(BATCH):
        takes = np.where(np.arange(BATCH) == b, RAGGED, 0)
        alone, cache = roll_ragged(module, x, takes)
        np.testing.assert_array_equal(collect(alone, takes)[b], collect(out, RAGGED)[b])
        for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(caches), strict=True):
            np.testing.assert_array_equal(one[b], other[b])
            assert not np.delete(one, b, axis=0).any()


def test_padding_leaves_no_trace():
    """Whatever it holds, the cache is the same to the bit, and outputs, where the padding is finite, are finite."""
    module, x = make(), text()
    out, cache = roll_ragged(module, x, RAGGED)
    other_out, other_cache = roll_ragged(module, x, RAGGED, padding=3.0)
    assert np.isfinite(other_out).all()
    for one, other in zip(collect(out, RAGGED), collect(other_out, RAGGED), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(other_cache), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("phi, normalize_qk", KINDS[2:])
def test_prefill_in_one_call_then_decoding(phi, normalize_qk):
    """The prompts' lengths differ; from there on, one token at a time."""
    module, x = make(phi, normalize_qk), text()
    prompts = np.asarray([23, 1, 14])
    padded = np.where(np.arange(23)[None, :, None] < prompts[:, None, None], x[:, :23], np.nan)
    out, cache = step(module, padded, module.init_cache(BATCH, LENGTH), jnp.asarray(prompts, jnp.int32))
    for b, prompt in enumerate(prompts):
        close(out[b, :prompt], uncached(module)[b, :prompt])

    takes = (prompts[None] + np.arange(LENGTH)[:, None] < LENGTH).astype(np.int32)
    rest = np.stack([np.roll(x[b], -prompt, axis=0) for b, prompt in enumerate(prompts)])
    out, cache = roll(module, deal(rest, takes, 1), cache, takes)
    np.testing.assert_array_equal(cache.lengths, LENGTH)
    for b, got in enumerate(collect(out, takes)):
        close(got, uncached(module)[b, prompts[b] :])


def test_chunks_and_tokens_through_the_kernels():
    """Boundaries of compressed tokens, blocks and the window lie within chunks and tokens, and between them."""
    graph, state = nnx.split(make(implementation="pallas_interpret"))
    x, cache, outs = text(), make().init_cache(BATCH, LENGTH), []
    step = jax.jit(lambda state, x, cache: nnx.merge(graph, state)(x, cache=cache), compiler_options=QUICK)
    for chunk in np.split(x, [13, 26, 27, 28, 29, 30], axis=1):
        out, cache = step(state, chunk, cache)
        outs.append(out)
    close(np.concatenate(outs, axis=1), uncached(make()))


def test_no_row_of_a_ring_is_written_twice(monkeypatch):
    """Of several tokens on a row the last stays, whatever order a device writes in. Ring of 5, positions from 8 on."""
    written = []

    def record(ring, new, rows, keep):
        written.append((np.asarray(rows), np.asarray(keep)))
        return ring

    monkeypatch.setattr(cache_module, "_write", record)
    ring, new = (KeyValue(jnp.zeros((4, length, 1, 1)), jnp.zeros((4, length, 1, 1))) for length in (5, 13))
    positions = jnp.tile(jnp.arange(8, 21, dtype=jnp.int32), (4, 1))
    cache_module._write_ring(ring, new, positions, jnp.asarray([13, 7, 3, 0], jnp.int32))
    [(rows, keep)] = written
    kept = [list(zip(np.flatnonzero(keep[b]).tolist(), rows[b, keep[b]].tolist(), strict=True)) for b in range(4)]
    assert kept[0] == [(8, 1), (9, 2), (10, 3), (11, 4), (12, 0)]
    assert kept[1] == [(2, 0), (3, 1), (4, 2), (5, 3), (6, 4)]
    assert kept[2] == [(0, 3), (1, 4), (2, 0)] and kept[3] == []


# What the cache is.


def test_shapes_and_dtypes():
    cache = make().init_cache(2, 31, dtype=jnp.bfloat16)
    assert isinstance(cache, NSACache) and cache.max_length == 31
    lengths = {"compressed": 14, "selected": 31, "window": 5, "uncompressed": 4}
    for name, length in lengths.items():
        branch = getattr(cache, name)
        assert branch.key.shape == (2, length, 2, 6) and branch.value.shape == (2, length, 2, 3), name
        assert branch.key.dtype == branch.value.dtype == jnp.bfloat16
        assert not branch.key.any() and not branch.value.any()
    assert cache.lengths.shape == (2,) and cache.lengths.dtype == jnp.int32


@pytest.mark.parametrize(
    "dtype, param_dtype, given, result",
    [
        (None, jnp.float32, None, jnp.float32),
        (jnp.bfloat16, jnp.float32, None, jnp.bfloat16),
        (None, jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_dtype_is_that_of_the_computation_unless_given(dtype, param_dtype, given, result):
    module = nnx.eval_shape(
        lambda: NativeSparseAttention(**SIZES, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    cache = jax.eval_shape(lambda: module.init_cache(1, 8, dtype=given))
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype(result), jnp.dtype(jnp.int32)}


def test_a_cache_of_lower_precision():
    """It keeps its dtype; outputs have that of the computation, and near the exact values."""
    module, x = make("mean", config=SMALL), text()  # all blocks are read: no choice depends on rounding
    expected = uncached(module)
    cache = module.init_cache(BATCH, LENGTH, dtype=jnp.bfloat16)
    out, cache = step(module, x, cache)
    assert out.dtype == jnp.float32
    assert {array.dtype for array in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.int32)}
    np.testing.assert_allclose(out, expected, atol=0.03 * np.abs(expected).max())


def test_a_layer_in_float16():
    """Token by token it gives what the uncached layer gives in float16, up to one rounding of the largest output."""
    module = make("mean", config=SMALL, dtype=jnp.float16)
    chunks = text().transpose(1, 0, 2)[:, :, None]
    out, cache = roll(module, chunks, module.init_cache(BATCH, LENGTH), jnp.ones((LENGTH, BATCH), jnp.int32))
    assert {array.dtype for array in jax.tree.leaves(cache)} == {jnp.dtype(jnp.float16), jnp.dtype(jnp.int32)}
    expected = uncached(module).astype(np.float32)
    assert out.dtype == jnp.float16
    atol = float(jnp.finfo(jnp.float16).eps) * np.abs(expected).max()
    np.testing.assert_allclose(out[:, :, 0].transpose(1, 0, 2).astype(np.float32), expected, rtol=0, atol=atol)


def size_of(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("head_dim, value_head_dim, ratio", [(128, 128, 1.071), (192, 128, 1.071)])
def test_memory_at_64k_is_little_more_than_one_branch(head_dim, value_head_dim, ratio):
    """The paper's sizes: the selected branch, 1/16 of it compressed, 512 tokens of window, 32 before compression.

    Full attention's cache is one branch.
    """
    sizes = dict(num_kv_heads=4, head_dim=head_dim, value_head_dim=value_head_dim)
    module = nnx.eval_shape(lambda: NativeSparseAttention(64, 2560, **sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: module.init_cache(1, 65536))
    one_branch = 65536 * 4 * (head_dim + value_head_dim) * 2
    assert size_of(cache.selected) == one_branch
    assert one_branch < size_of(cache) < 1.1 * one_branch
    assert size_of(cache) / one_branch == pytest.approx(ratio, abs=1e-3)


# JAX around it.


def test_a_donated_cache_is_written_in_place():
    """Without a warning: each array of the cache becomes one of the grown cache."""
    module, x = make(), jnp.asarray(text())
    graph, state = nnx.split(module)

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(state, cache, x):
        return nnx.merge(graph, state)(x, cache=cache)

    cache = module.init_cache(BATCH, LENGTH)
    compiled = decode.lower(state, cache, x[:, :1]).compile()
    size = sum(array.nbytes for array in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes == size
    before = cache
    for t in range(3):
        out, cache = decode(state, cache, x[:, t : t + 1])
        close(out[:, 0], uncached(module)[:, t])
    assert all(array.is_deleted() for array in jax.tree.leaves(before))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_growing_by_a_token_costs_the_same_at_any_length(dtype):
    """In place: what the program holds besides the cache is far below it, and does not depend on `max_length`.

    (Not in bfloat16, which XLA on a CPU widens for every scatter; on a GPU: test_gpu_decode.py.)
    """
    module = make(head_dim=16, value_head_dim=16, dtype=dtype, config=SMALL)
    graph, state = nnx.split(module)

    def grow(state, cache, x):
        module = nnx.merge(graph, state)
        new = module.project(x, start=cache.lengths)
        branches = dict(compression=new.compression, selected=new.selected, window=new.window)
        more = dict(num_real=jnp.ones((2,), jnp.int32), compress=module._compress_at, config=SMALL)
        return cache_module.extend(cache, **branches, **more)

    temporaries = []
    for max_length in (4096, 16384):
        cache = jax.eval_shape(functools.partial(module.init_cache, 2, max_length))
        x = jax.ShapeDtypeStruct((2, 1, 10), dtype)
        found = jax.jit(grow, donate_argnums=1).lower(state, cache, x).compile().memory_analysis()
        assert found.alias_size_in_bytes == size_of(cache)
        temporaries.append(found.temp_size_in_bytes)
    assert temporaries[0] == temporaries[1] < size_of(cache) / 16


def test_in_a_while_loop():
    """As `generate` does: the cache keeps its structure, so that it can be in a carry. (In a scan: `roll`, above.)"""
    module = make()

    def decode(module, x):
        def one(carry):
            out, cache = module(carry[0], cache=carry[1])
            return out, cache

        return lax.while_loop(lambda carry: carry[1].lengths[0] < 9, one, (x, module.init_cache(BATCH, LENGTH)))

    out, cache = nnx.jit(decode)(module, text()[:, :1])
    assert jax.tree.structure(cache) == jax.tree.structure(module.init_cache(BATCH, LENGTH))
    expected, cache = text()[:, :1], module.init_cache(BATCH, LENGTH)
    for _ in range(9):
        expected, cache = step(module, expected, cache)
    close(out, expected)


# Too much, and other errors.


def filled(module, lengths, *, max_length):
    """A cache that holds `lengths[b]` tokens of sequence b."""
    return step(module, text()[:, :12], module.init_cache(BATCH, max_length), jnp.asarray(lengths, jnp.int32))[1]


ROOM = (
    r"the cache has room for max_length=12 tokens, but sequence {} would hold {}: "
    r"make it with init_cache\(batch_size, max_length={}\) or more"
)


@pytest.mark.parametrize(
    "new, lengths, sequence, total",
    [(3, None, 1, 13), (3, [3, 3, 3], 1, 13), (9, [9, 2, 9], 2, 14), (1, None, None, 11), (9, [7, 2, 7], None, 12)],
    ids=str,
)
def test_no_room_where_lengths_are_known(new, lengths, sequence, total):
    module = make()
    cache = module.init_cache(BATCH, 12)._replace(lengths=jnp.asarray([2, 10, 5], jnp.int32))
    x = jnp.asarray(text()[:, :new])
    lengths = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    graph, state = nnx.split(module)

    def run(state, cache, lengths):
        return nnx.merge(graph, state)(x, cache=cache, lengths=lengths)

    if sequence is None:
        # What fits raises nothing; to look is enough.
        jax.eval_shape(lambda state: run(state, cache, lengths), state)
        return
    message = ROOM.format(sequence, total, total)
    with pytest.raises(ValueError, match=message):
        run(state, cache, lengths)
    # Concrete lengths within a trace of other arguments are known as well.
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda state: run(state, cache, lengths), state)


@pytest.mark.parametrize("size", [1, 4])
def test_no_room_where_lengths_are_traced(size):
    """max_length 12: sequence 1 holds 10 and loses its 13th token and all later ones; the others lose nothing."""
    module, x, lengths = make(), text(), [2, 10, 5]
    cache = filled(module, lengths, max_length=12)
    news = np.stack([x[b, length : length + 4] for b, length in enumerate(lengths)])
    if size == 1:
        out, grown = roll(module, news.transpose(1, 0, 2)[:, :, None], cache, jnp.ones((4, BATCH), jnp.int32))
        out = np.asarray(out)[:, :, 0].transpose(1, 0, 2)
    else:
        out, grown = step(module, news, cache, jnp.full((BATCH,), 4, jnp.int32))
    for b, length in enumerate(lengths):
        room = min(4, 12 - length)
        close(out[b, :room], uncached(module)[b, length : length + room])
        assert np.isnan(out[b, room:]).all() and (b == 1 or room == 4)
    np.testing.assert_array_equal(grown.lengths, [6, 14, 9])

    # The tokens that were lost were not written anywhere; nor do later calls hide the loss.
    exact = filled(module, [6, 12, 9], max_length=12)
    for name in ("selected", "compressed", "window", "uncompressed"):
        for one, other in zip(getattr(grown, name), getattr(exact, name), strict=True):
            close(one, other)
    out, _ = step(module, news, grown, jnp.full((BATCH,), 4, jnp.int32))
    assert np.isnan(out[1]).all() and np.isfinite(np.asarray(out)[[0, 2], :3]).all()


def test_padding_that_finds_no_room_is_no_loss():
    module, x = make(), text()
    cache = filled(module, [2, 10, 5], max_length=12)
    out, grown = step(module, x[:, :4], cache, jnp.asarray([4, 2, 0], jnp.int32))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(grown.lengths, [6, 12, 5])


CALLS = [
    (2, None, r"the cache holds 3 sequences, but x has 2"),
    (3, jnp.zeros((2,), jnp.int32), r"lengths must be int32 \[B\] = \(3,\), but it is int32 of shape \(2,\)"),
    (3, jnp.zeros((3, 1), jnp.int32), r"lengths must be int32 \[B\] = \(3,\), but it is int32 of shape \(3, 1\)"),
    (3, jnp.zeros((3,)), r"lengths must be int32 \[B\] = \(3,\), but it is float32 of shape \(3,\)"),
    (3, jnp.asarray([0, 5, 4], jnp.int32), r"lengths=\[0 5 4\] must lie between 0 and the 4 tokens of x"),
    (3, jnp.asarray([0, -1, 4], jnp.int32), r"lengths=\[ 0 -1  4\] must lie between 0 and the 4 tokens of x"),
]


@pytest.mark.parametrize("batch, lengths, message", CALLS, ids=[message[:45] for _, _, message in CALLS])
def test_calls_that_do_not_fit(batch, lengths, message, unchecked_shapes):
    module = make()
    with pytest.raises(ValueError, match=message):
        module(jnp.zeros((batch, 4, 10)), cache=module.init_cache(3, 12), lengths=lengths)


LISTS = [
    ([1.0, 2.0, 3.0], r"lengths must be int32 \[B\] = \(3,\), but it is float64 of shape \(3,\)"),
    ([True, False, True], r"lengths must be int32 \[B\] = \(3,\), but it is bool of shape \(3,\)"),
    (2, r"lengths must be int32 \[B\] = \(3,\), but it is int64 of shape \(\)"),
    ([1, 2], r"lengths must be int32 \[B\] = \(3,\), but it is int64 of shape \(2,\)"),
    ("abc", r"lengths must be int32 \[B\] = \(3,\), but it is <U3 of shape \(\)"),
    # In int32 it would be 0.
    ([1, 2, 2**32], r"lengths=\[ +1 +2 4294967296\] must lie between 0 and the 4 tokens of x"),
    (np.asarray([1, 2, 2**32]), r"lengths=\[ +1 +2 4294967296\] must lie between 0 and the 4 tokens of x"),
]


@pytest.mark.parametrize("lengths, message", LISTS, ids=[message[:45] for _, message in LISTS])
@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_lengths_that_are_no_lengths(attention, lengths, message, unchecked_shapes):
    module = make() if attention == "nsa" else dense()
    cache = jax.eval_shape(lambda: module.init_cache(3, 12))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda cache: module(jnp.zeros((3, 4, 10)), cache=cache, lengths=lengths), cache)


def dense():
    config = ModelConfig(attention="full", model_dim=10, num_heads=1, num_kv_heads=1, head_dim=2, value_head_dim=2)
    init = nnx.initializers.zeros_init()
    return DenseAttention(config, kernel_init=init, out_kernel_init=init, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_lengths_as_a_list(attention):
    """Or in NumPy, of any integers, or of a list of traced numbers."""
    module = make() if attention == "nsa" else dense()
    cache = module.init_cache(3, 12)

    @jax.jit
    def grown(cache):
        x = jnp.zeros((3, 4, 10))
        kinds = (
            [1, 4, 0],
            np.asarray([1, 4, 0]),
            np.asarray([1, 4, 0], np.uint8),
            [jnp.int32(1), cache.lengths[0] + 4, 0],
        )
        return [module(x, cache=cache, lengths=lengths)[1].lengths for lengths in kinds]

    for lengths in grown(cache):
        assert lengths.dtype == jnp.int32 and lengths.tolist() == [1, 4, 0]


def reshaped(which, **changes):
    """An edit of a branch: of one of its arrays, in shapes, other axes or another dtype."""

    def edit(pair):
        x = getattr(pair, which)
        shape = tuple(changes.get(axis, size) for axis, size in zip(("batch", "rows", "heads", "size"), x.shape))
        return pair._replace(**{which: jax.ShapeDtypeStruct(shape, changes.get("dtype", x.dtype))})

    return edit


REMEDY = ": make the cache with init_cache of the layer that reads it"
OTHERS = [
    (
        dict(head_dim=8),
        r"cache.compressed.key must be float32 [B, rows, K, H] = (3, 5, 2, 6), but it is float32 of shape (3, 5, 2, 8)",
    ),
    (
        dict(value_head_dim=6),
        "cache.compressed.value must be float32 [B, rows, K, V] = (3, 5, 2, 3), but it is float32 of shape (3, 5, 2, 6)",
    ),
    (dict(num_kv_heads=4), "= (3, 5, 2, 6), but it is float32 of shape (3, 5, 4, 6)"),
    (dict(config=SMALL), "cache.compressed.key must be"),
    # A ring that is too large held too much for a prompt's queries, and nobody noticed.
    (
        dict(config=dataclasses.replace(TINY, window=6)),
        "cache.window.key must be float32 [B, rows, K, H] = (3, 5, 2, 6), but it is float32 of shape (3, 6, 2, 6)",
    ),
    (dict(config=dataclasses.replace(TINY, window=4)), "cache.window.key must be"),
    (
        dict(uncompressed=reshaped("key", rows=5)),
        "cache.uncompressed.key must be float32 [B, rows, K, H] = (3, 4, 2, 6), but it is float32 of shape (3, 5, 2, 6)",
    ),
    (dict(selected=reshaped("value", rows=13)), "cache.selected.value must be"),
    (dict(window=reshaped("value", batch=1)), "cache.window.value must be"),
    (
        dict(uncompressed=reshaped("value", dtype=jnp.bfloat16)),
        "= (3, 4, 2, 3), but it is bfloat16 of shape (3, 4, 2, 3)",
    ),
    (
        dict(selected=reshaped("key", dtype=jnp.int8)),
        "cache.selected.key has dtype=int8, which must be one of float32, bfloat16, float16",
    ),
]


@pytest.mark.parametrize("change, message", OTHERS, ids=[message[:40] for _, message in OTHERS])
def test_caches_of_other_layers(change, message, unchecked_shapes):
    """For a prompt as for a token."""
    module, edits = make(), {name: edit for name, edit in change.items() if name in NSACache._fields}
    sizes = {name: SIZES[name] for name in ("num_kv_heads", "head_dim", "value_head_dim", "config")} | dict(
        dtype=jnp.float32
    )
    sizes |= {name: value for name, value in change.items() if name not in edits}
    cache = jax.eval_shape(functools.partial(cache_module.init_cache, 3, 12, **sizes))
    cache = cache._replace(**{name: edit(getattr(cache, name)) for name, edit in edits.items()})
    for num_new in (1, 4):
        with pytest.raises(ValueError, match=f"{re.escape(message)}.*{REMEDY}"):
            module(jnp.zeros((3, num_new, 10)), cache=cache)


@pytest.mark.parametrize("shape, dtype", [((), "int32"), ((3, 1), "int32"), ((3,), "int16"), ((3,), "float32")])
def test_lengths_of_a_cache(shape, dtype, unchecked_shapes):
    cache = make().init_cache(3, 12)._replace(lengths=jnp.zeros(shape, dtype))
    message = f"cache.lengths must be int32 [B], but it is {dtype} of shape {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        make()(jnp.zeros((3, 1, 10)), cache=cache)


def test_what_is_no_cache(unchecked_shapes):
    module = make()
    with pytest.raises(ValueError, match="cache must be an NSACache, as init_cache makes it, but it is a list"):
        module(jnp.zeros((3, 1, 10)), cache=[module.init_cache(3, 12)])


@pytest.mark.parametrize("name", ["batch_size", "max_length"])
@pytest.mark.parametrize("value", [0, -1, 2.0, None], ids=repr)
def test_sizes_of_a_cache(name, value, unchecked_shapes):
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a positive integer"):
        make().init_cache(**{"batch_size": 2, "max_length": 8, name: value})


def test_a_cache_for_fewer_tokens_than_a_block():
    module, x = make(), text()
    cache = module.init_cache(BATCH, 3)
    assert cache.compressed.key.shape == (BATCH, 0, 2, 6)
    out, cache = roll(module, x[:, :3].transpose(1, 0, 2)[:, :, None], cache, jnp.ones((3, BATCH), jnp.int32))
    close(out[:, :, 0].transpose(1, 0, 2), uncached(module)[:, :3])


def test_every_phi_is_tried():
    assert {phi for phi, _ in KINDS} == set(COMPRESSIONS)
