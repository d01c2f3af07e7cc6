"""One step of decoding in kernels, interpreted on a CPU with small tiles: at every length of a sequence, what loops give.

All lengths are one batch, each sequence a cache of its own, with NaN wherever that length may read nothing.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from nsa_jax import KeyValue, NSAConfig
from nsa_jax.ops import IMPLEMENTATIONS
from nsa_jax.testing import CASES, SMALL, Case, assert_as_accurate, make_inputs
from pallas_kernels import decode_attention, tiles
from pallas_kernels.flash import Tile
from tests import oracle
from tests.posed import ring_of
from tests.programs import QUICK
from tests.test_lowering import for_cuda, read_kernels, verified_kernels

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[1]
# Several tiles, splits and parts of the window at lengths of tens of tokens.
TILES = dataclasses.replace(
    tiles.rule("float32", 16, 16, 1),
    decode_compressed=Tile(0, 16, 4, 2),
    decode_choice=Tile(0, 0, 4, 1),
    decode_selected=Tile(0, 16, 4, 2),
    decode_programs=999,
    decode_selected_programs=999,
)


# What tests put something else in place of.
PATCHED = ("MAX_SPLITS", "HELD_SCORES", "JOINED", "outside_units")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(decode_attention, "MAX_SPLITS", 3)
    monkeypatch.setattr(decode_attention, "HELD_SCORES", 16)
    monkeypatch.setattr(decode_attention, "JOINED", 2)


def caches(case: Case, inputs, lengths, *, unread=np.nan):
    """Of a text, at each of its lengths: compressed, selected, ring."""

    def until(pair, ends):
        end = np.asarray(ends)[:, None, None, None]
        rows = np.arange(pair.key.shape[1])[None, :, None, None]
        return KeyValue(*(jnp.asarray(np.where(rows < end, x, np.asarray(unread, x.dtype))) for x in pair))

    counts = [case.config.num_compressed(length) for length in lengths]
    window = jax.tree.map(lambda x: np.broadcast_to(x, (len(lengths), *x.shape[1:])), inputs.window)
    ring = ring_of(window, lengths, case.config.window, unwritten=unread)
    return until(inputs.compressed, counts), until(inputs.selected, lengths), ring


def kernels(case: Case):
    """The step as one program for each shape; it knows what a test has patched."""
    patched = tuple(getattr(decode_attention, name) for name in PATCHED)
    return _kernels(case.config, case.head_dim**-0.5, patched)


@functools.cache
def _kernels(config: NSAConfig, scale: float, patched: tuple):
    more = dict(config=config, scale=scale, tiles=TILES, interpret=True)
    # A partial of its own, so that jax remembers no trace of it with other values.
    return jax.jit(functools.partial(pallas_kernels.decode_step, **more), compiler_options=QUICK)


def at(case: Case, inputs, lengths):
    """Query and gates at each of the lengths; the text's queries are those of its last `case.queries` positions."""
    rows = np.asarray(lengths) - 1 - (case.keys - case.queries)
    return (jnp.asarray(np.asarray(x)[0, rows][:, None]) for x in (inputs.query, inputs.gates))


def decode(case: Case, inputs, lengths, **options):
    """The step at each of the lengths."""
    query, gates = at(case, inputs, lengths)
    return kernels(case)(query, *caches(case, inputs, lengths, **options), gates, jnp.asarray(lengths, jnp.int32))


def exact(case: Case, inputs, lengths):
    rows = np.asarray(lengths) - 1 - (case.keys - case.queries)
    where = dict(config=case.config, query_start=case.keys - case.queries)
    blocks = oracle.select_blocks(inputs.query, inputs.compressed.key, num_keys=case.keys, **where)
    return oracle.attention(*inputs[:5], selected_blocks=blocks, **where)[0, rows][:, None]


PLAIN = dataclasses.replace(CASES["plain"], batch=1, queries=130, keys=130)
EVERY = list(range(1, 131))  # its lengths: all tests of it run one program


@functools.cache
def plain():
    """Its inputs, and what loops make of them."""
    inputs = make_inputs(PLAIN)
    return inputs, exact(PLAIN, inputs, EVERY)


STEPS = {
    "plain": PLAIN,
    **{name: CASES[name] for name in ("shorter_than_compress_block", "odd_length", "group_5", "long_block")},
    **{name: CASES[name] for name in ("no_overlap", "deep_overlap", "more_slots_than_blocks")},
    # A program holds 32 rows.
    "group_20": dataclasses.replace(CASES["group_16"], heads=20),
    "nothing_forced_window_1": Case(
        config=dataclasses.replace(SMALL, num_initial=0, num_local=0, num_selected=2, window=1)
    ),
    "parts_of_a_block": Case(config=NSAConfig(4, 1, 32, 2, 0, 1, 40), heads=1, kv_heads=1, keys=101, queries=60),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_attention_at_every_length(name):
    case = STEPS[name]
    inputs, lengths = make_inputs(case), list(range(case.keys - case.queries + 1, case.keys + 1))
    wanted = exact(case, inputs, lengths)
    assert_as_accurate(decode(case, inputs, lengths), jnp.asarray(wanted, jnp.float32), wanted)


@pytest.mark.parametrize("name, dtype", [("head_sizes_differ", "float16"), ("odd_length", "bfloat16")])
def test_in_16_bits_it_is_as_accurate_as_the_reference(name, dtype):
    """As `xla` decodes; gates may be wider."""
    case = CASES[name]
    inputs, lengths = make_inputs(case, dtype=dtype), [1, 8, 21, 33, case.keys]
    if dtype == "bfloat16":
        inputs = inputs._replace(gates=inputs.gates.astype(jnp.float32))
    more = dict(config=case.config, scale=case.head_dim**-0.5)
    reference = jax.jit(functools.partial(IMPLEMENTATIONS["xla"].decode_step, **more))
    query, gates = at(case, inputs, lengths)
    arrays = caches(case, inputs, lengths, unread=0.0)
    inexact = reference(query, *arrays, gates, jnp.asarray(lengths, jnp.int32))
    assert_as_accurate(decode(case, inputs, lengths), inexact, exact(case, inputs, lengths))


def with_blocks(inputs, read):
    """Caches at every length, of whose blocks those that `read` `[lengths, K, blocks]` does not name are NaN."""
    compressed, selected, window = caches(PLAIN, inputs, EVERY)
    tokens = read[:, :, np.arange(130) // SMALL.select_block].swapaxes(1, 2)
    unread = np.float32(np.nan)
    return compressed, jax.tree.map(lambda x: jnp.asarray(np.where(tokens[..., None], x, unread)), selected), window


def test_blocks_that_are_not_chosen_are_not_read():
    inputs, wanted = plain()
    blocks = oracle.select_blocks(inputs.query, inputs.compressed.key, num_keys=130, config=SMALL)[0]
    chosen = (blocks[..., None] == np.arange(9)).any(axis=2)
    assert chosen[-1].sum(axis=1).tolist() == [4, 4]
    query, gates = at(PLAIN, inputs, EVERY)
    out = kernels(PLAIN)(query, *with_blocks(inputs, chosen), gates, jnp.asarray(EVERY, jnp.int32))
    assert_as_accurate(out, jnp.asarray(wanted, jnp.float32), wanted)


def test_lengths_of_nothing_and_of_too_much_give_numbers():
    inputs, _ = plain()
    lengths = np.resize([0, 130, 131, 159], 130)
    arrays = caches(PLAIN, inputs, np.minimum(lengths, 130).tolist(), unread=0.0)
    query, gates = at(PLAIN, inputs, np.full(130, 130))
    out = kernels(PLAIN)(query, *arrays, gates, jnp.asarray(lengths, jnp.int32))
    assert np.isfinite(out).all() and not np.any(out[::4])


def test_ties_go_to_the_lower_index():
    """All scores but the forced blocks' are tied: at 70 tokens, of five blocks 0, 3 and 4 are forced, and block 1 is read.

    There each of 16 compressed tokens has a probability of exactly 1/16. What is no power of two, XLA may round in one place
    of a vector as it does not in another.
    """
    inputs, _ = plain()
    inputs = inputs._replace(compressed=jax.tree.map(jnp.zeros_like, inputs.compressed))
    own, block = (np.asarray(EVERY)[:, None] - 1) // SMALL.select_block, np.arange(9)[None, :]
    read = (block <= 1) | ((block <= own) & (block >= own - 1))
    query, gates = at(PLAIN, inputs, EVERY)
    cache = with_blocks(inputs, np.broadcast_to(read[:, None], (130, 2, 9)))
    out = np.asarray(kernels(PLAIN)(query, *cache, gates, jnp.asarray(EVERY, jnp.int32)))
    num_compressed = np.asarray([SMALL.num_compressed(length) for length in EVERY])
    exact = num_compressed & (num_compressed - 1) == 0
    assert {20, 36, 70} <= set(np.asarray(EVERY)[exact].tolist()) and np.isfinite(out[exact]).all()


def test_vmap_is_a_loop():
    """Over everything: sequences on two axes instead of one. Over the gates alone: all else is the same for each."""
    inputs, wanted = plain()
    step, (query, gates) = kernels(PLAIN).__wrapped__, at(PLAIN, inputs, EVERY)
    cache, lengths = caches(PLAIN, inputs, EVERY), jnp.asarray(EVERY, jnp.int32)
    arrays = jax.tree.map(np.asarray, (query, *cache, gates, lengths))
    halves = jax.tree.map(lambda x: x.reshape(2, 65, *x.shape[1:]), arrays)
    out = np.asarray(jax.jit(jax.vmap(step), compiler_options=QUICK)(*halves))
    assert_as_accurate(jnp.asarray(out.reshape(wanted.shape)), jnp.asarray(wanted, jnp.float32), wanted)
    several = np.stack([gates, 1 - np.asarray(gates)])
    over_gates = jax.vmap(lambda gates: step(query, *cache, gates, lengths))
    found = jax.jit(over_gates, compiler_options=QUICK)(several)
    for got, gates in zip(found, several, strict=True):
        one = kernels(PLAIN)(query, *cache, gates, lengths)
        assert_as_accurate(got, one, one)


WIDE = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nsa_jax import NativeSparseAttention, NSAConfig
from tests.programs import QUICK

assert jax.numpy.arange(3).dtype == "int64"
sizes = dict(num_kv_heads=1, head_dim=8, config=NSAConfig(4, 2, 4, 3, 1, 1, 5))
layer, judge = (
    NativeSparseAttention(2, 16, **sizes, implementation=name, rngs=nnx.Rngs(0)) for name in ("pallas_interpret", "xla")
)
graph, state = nnx.split(layer)
step = jax.jit(lambda state, x, cache: nnx.merge(graph, state)(x, cache=cache), compiler_options=QUICK)
x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 26, 16)), jnp.float32)
cache, outs = layer.init_cache(2, 26), []
for token in jnp.split(x, 26, axis=1):
    out, cache = step(state, token, cache)
    outs.append(out)
assert {str(array.dtype) for array in (*outs, *jax.tree.leaves(cache[:-1]))} == {"float32"}
assert cache.lengths.dtype == "int32" and cache.lengths.tolist() == [26, 26]
expected = jax.jit(lambda: judge(x))()
np.testing.assert_allclose(jnp.concatenate(outs, axis=1), expected, rtol=1e-4, atol=1e-5)
assert abs(expected).max() > 0.1
"""


def test_decoding_where_64_bit_numbers_are_on():
    """From the first token to over all boundaries; int32 stays int32 in the kernels and in the cache."""
    environment = os.environ | dict(JAX_ENABLE_X64="1", JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_PLATFORMS="cpu")
    command = [sys.executable, "-c", WIDE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_planted_fault_is_found(monkeypatch):
    """By the comparison with loops. It changes which blocks are chosen, and nothing else: no other would show less."""
    inputs, wanted = plain()
    monkeypatch.setattr(decode_attention, "outside_units", lambda place, units, shared: jnp.zeros(place.shape))
    found = decode(PLAIN, inputs, EVERY, unread=0.0)
    with pytest.raises(AssertionError, match=r"result: error"):
        assert_as_accurate(found, jnp.asarray(wanted, jnp.float32), wanted)


# Lowered for CUDA. They are not run.

MODELS = [(16, 128, 128), (16, 192, 128), (4, 96, 96), (1, 32, 32), (12, 128, 64), (64, 256, 256)]


def shapes(config, *, batch, length, kv_heads, group, size, value_size, dtype):
    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def branch(length):
        return KeyValue(array(batch, length, kv_heads, size), array(batch, length, kv_heads, value_size))

    heads = kv_heads * group
    pairs = map(branch, (config.num_compressed(length), length, config.window))
    return array(batch, 1, heads, size), *pairs, array(batch, 1, heads, 3), array(batch, dtype="int32")


def lowered(config, **sizes):
    run = functools.partial(pallas_kernels.decode_step, config=config, scale=0.1)
    with for_cuda():
        return jax.jit(run).trace(*shapes(config, **sizes)).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("group", "size", "value_size"), MODELS)
def test_sizes_of_models_lower_for_cuda(group, size, value_size):
    sizes = dict(kv_heads=4, group=group, size=size, value_size=value_size, dtype="bfloat16")
    program = lowered(NSAConfig(), batch=24, length=2**18, **sizes)
    assert verified_kernels(program) == 3
    for name in ("compressed", "choice", "selected"):
        assert f"nsa_decode_{name}" in program.as_text()


@pytest.mark.parametrize("length", [1, 2**16])
def test_what_a_program_stores_is_published_before_it_arrives(length):
    """All of its threads meet between the last store of a partial result and the addition; the counter stays in place."""
    sizes = dict(kv_heads=4, group=16, size=128, value_size=128, dtype="bfloat16")
    *_, kernel = read_kernels(lowered(NSAConfig(), batch=24, length=length, **sizes))
    assert kernel.name == "nsa_decode_selected"
    lines = kernel.text.splitlines()
    [barrier] = [i for i, line in enumerate(lines) if re.fullmatch(r" {4}(gpu|ttg)\.barrier.*", line)]
    [arrival] = [i for i, line in enumerate(lines) if " = tt.atomic_rmw " in line]
    assert re.match(r" {4}%\d+ = tt.atomic_rmw add, acq_rel, gpu, ", lines[arrival])
    stores = [i for i, line in enumerate(lines) if "tt.store" in line]
    loads = [i for i, line in enumerate(lines) if "tt.load" in line]
    assert min(stores) < barrier < arrival < max(stores)
    assert not any(barrier < i < arrival for i in stores + loads)
    # The last operand but for the compressed branch's output is the second of four results.
    arguments = kernel.text.split("\n")[1].count("!tt.ptr")
    assert kernel.aliases == [(arguments - 5 - (length > 1), 1)]


CONFIGS = [
    (SMALL, "float16"),
    (NSAConfig(8, 4, 12, 4, 1, 2, 20), "float32"),
    (NSAConfig(4, 1, 64, 3, 1, 1, 30), "float32"),
    (NSAConfig(1, 1, 1, 3, 1, 1, 1), "bfloat16"),
    (NSAConfig(num_selected=1024, window=4096), "float32"),
]


@pytest.mark.parametrize("config, dtype", CONFIGS, ids=str)
def test_configs_lower_for_cuda(config, dtype):
    sizes = dict(kv_heads=2, group=2, size=16, value_size=24, dtype=dtype)
    for length in (1, 5000):
        kernels = 3 if config.num_compressed(length) else 2
        assert verified_kernels(lowered(config, batch=1, length=length, **sizes)) == kernels


@pytest.mark.parametrize("config, dtype", CONFIGS[:2], ids=str)
def test_configs_lower_where_64_bit_numbers_are_on(config, dtype):
    with jax.enable_x64(True):
        program = lowered(config, batch=1, length=5000, kv_heads=2, group=2, size=16, value_size=24, dtype=dtype)
    assert verified_kernels(program) == 3
