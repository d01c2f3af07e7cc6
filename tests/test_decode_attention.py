"""One step of decoding in kernels, interpreted on a CPU with small tiles: at every length of a sequence, what loops give.

All lengths are one batch, each sequence a cache of its own, with NaN wherever that length may read nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from nsa_jax import KeyValue, NSAConfig
from nsa_jax.ops import IMPLEMENTATIONS
from nsa_jax.testing import CASES, SMALL, Case, assert_as_accurate, make_inputs
from pallas_kernels import decode_attention, tiles
from pallas_kernels.flash import Ranges, Tile
from pallas_kernels.positions import compressed_ranges
from tests import oracle
from tests.posed import ring_of
from tests.programs import QUICK
from tests.test_lowering import for_cuda, verified_kernels

pytestmark = pytest.mark.usefixtures("quick_compilation", "uncollected")

# Several tiles, splits and parts of the window at lengths of tens of tokens.
TILES = dataclasses.replace(
    tiles.rule("float32", 16, 16, 1),
    decode_compressed=Tile(0, 16, 4, 2),
    decode_choice=Tile(0, 0, 4, 1),
    decode_selected=Tile(0, 16, 4, 2),
    decode_programs=999,
    decode_selected_programs=999,
)


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
        return KeyValue(*(jnp.where(rows < end, x, unread).astype(x.dtype) for x in pair))

    counts = [case.config.num_compressed(length) for length in lengths]
    window = jax.tree.map(lambda x: np.broadcast_to(x, (len(lengths), *x.shape[1:])), inputs.window)
    ring = ring_of(window, lengths, case.config.window, unwritten=unread)
    return until(inputs.compressed, counts), until(inputs.selected, lengths), ring


def decode(case: Case, inputs, lengths, **options):
    """The step at each of the lengths; the text's queries are those of its last `case.queries` positions."""
    rows = np.asarray(lengths) - 1 - (case.keys - case.queries)
    query, gates = (x[0, rows][:, None] for x in (inputs.query, inputs.gates))
    more = dict(config=case.config, scale=case.head_dim**-0.5, tiles=TILES, interpret=True)
    run = jax.jit(functools.partial(pallas_kernels.decode_step, **more), compiler_options=QUICK)
    return run(query, *caches(case, inputs, lengths, **options), gates, jnp.asarray(lengths, jnp.int32))


def exact(case: Case, inputs, lengths):
    rows = np.asarray(lengths) - 1 - (case.keys - case.queries)
    where = dict(config=case.config, query_start=case.keys - case.queries)
    blocks = oracle.select_blocks(inputs.query, inputs.compressed.key, num_keys=case.keys, **where)
    return oracle.attention(*inputs[:5], selected_blocks=blocks, **where)[0, rows][:, None]


STEPS = {
    "plain": dataclasses.replace(CASES["plain"], batch=1, queries=130, keys=130),
    **{
        name: CASES[name] for name in ("shorter_than_compress_block", "odd_length", "group_5", "group_16", "long_block")
    },
    **{name: CASES[name] for name in ("no_overlap", "deep_overlap", "more_slots_than_blocks", "many_forced")},
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
    """As `xla` decodes; gates may be wider. Every length alone has the bits that it has among others."""
    case = CASES[name]
    inputs, lengths = make_inputs(case, dtype=dtype), [1, 8, 21, 33, case.keys]
    if dtype == "bfloat16":
        inputs = inputs._replace(gates=inputs.gates.astype(jnp.float32))
    rows = np.asarray(lengths) - 1
    inexact = IMPLEMENTATIONS["xla"].decode_step(
        inputs.query[0, rows][:, None],
        *caches(case, inputs, lengths, unread=0.0),
        inputs.gates[0, rows][:, None],
        jnp.asarray(lengths, jnp.int32),
        config=case.config,
        scale=case.head_dim**-0.5,
    )
    got = decode(case, inputs, lengths)
    assert_as_accurate(got, inexact, exact(case, inputs, lengths))
    alone = decode(case, inputs, lengths[2:3])
    np.testing.assert_array_equal(np.asarray(alone[0], np.float32), np.asarray(got[2], np.float32))


def test_blocks_that_are_not_chosen_are_not_read():
    case = dataclasses.replace(CASES["plain"], batch=1, queries=1, keys=130, query_start=129)
    inputs = make_inputs(case)
    where = dict(config=case.config, query_start=129)
    blocks = oracle.select_blocks(inputs.query, inputs.compressed.key, num_keys=130, **where)
    chosen = (blocks[0, 0, :, :, None] == np.arange(130) // SMALL.select_block).any(axis=1)  # [K, tokens]
    assert chosen.sum(axis=1).tolist() == [50, 50]  # the last block has two tokens
    wanted = exact(case, inputs, [130])
    selected = jax.tree.map(lambda x: jnp.where(chosen.T[None, :, :, None], x, jnp.nan), inputs.selected)
    assert_as_accurate(
        decode(case, inputs._replace(selected=selected), [130]), jnp.asarray(wanted, jnp.float32), wanted
    )


def test_lengths_of_nothing_and_of_too_much_give_numbers():
    case = CASES["plain"]
    inputs, lengths = make_inputs(dataclasses.replace(case, batch=1)), [0, 70, 71, 99]
    arrays = caches(case, inputs, [0, 70, 70, 70], unread=0.0)
    query, gates = (jnp.broadcast_to(x[:, -1:], (4, 1, *x.shape[2:])) for x in (inputs.query, inputs.gates))
    more = dict(config=case.config, scale=0.25, tiles=TILES, interpret=True)
    run = jax.jit(functools.partial(pallas_kernels.decode_step, **more), compiler_options=QUICK)
    out = run(query, *arrays, gates, jnp.asarray(lengths, jnp.int32))
    assert np.isfinite(out).all() and not np.any(out[0])


def test_ties_go_to_the_lower_index():
    """All scores but the forced blocks' are tied: of 13 blocks 0, 11 and 12 are forced, the fourth is block 1."""
    case = Case(config=SMALL, queries=5, keys=200)
    inputs = make_inputs(case)
    inputs = inputs._replace(compressed=jax.tree.map(jnp.zeros_like, inputs.compressed))
    block = np.arange(200) // SMALL.select_block
    read = np.isin(block, [0, 1, 11, 12])[None, :, None, None]
    selected = jax.tree.map(lambda x: jnp.where(read, x, jnp.nan), inputs.selected)
    assert np.isfinite(decode(case, inputs._replace(selected=selected), [200])).all()


# Planted faults: each must be seen by the comparison with the loops.


def short_ring(where, *, config):
    return Ranges(jnp.zeros_like(where.last), jnp.minimum(where.last + 1, config.window - 1))


def early_compressed_token(where, *, config):
    return compressed_ranges(where._replace(last=where.last + 1), config=config)


FAULTS = [
    ("ring_ranges", short_ring),
    ("compressed_ranges", early_compressed_token),
    ("outside_units", lambda place, units, shared: jnp.zeros(place.shape)),
]


@pytest.mark.parametrize("name, wrong", FAULTS, ids=[name for name, _ in FAULTS])
def test_planted_faults_are_found(name, wrong, monkeypatch):
    case = dataclasses.replace(CASES["plain"], batch=1, queries=60, keys=200, query_start=140)
    inputs, lengths = make_inputs(case), list(range(141, 201))
    wanted = exact(case, inputs, lengths)
    monkeypatch.setattr(decode_attention, name, wrong)
    found = decode(case, inputs, lengths, unread=0.0)
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
