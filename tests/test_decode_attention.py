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
from nsa_jax.testing import CASES, SMALL, Case, assert_as_accurate, make_inputs
from pallas_kernels import decode_attention, tiles
from pallas_kernels.flash import Tile
from tests import oracle
from tests.posed import ring_of
from tests.programs import QUICK

pytestmark = pytest.mark.usefixtures("quick_compilation", "uncollected")

# Several tiles, splits and parts of the window at lengths of tens of tokens.
TILES = dataclasses.replace(
    tiles.rule("float32", 16, 16, 1),
    decode_compressed=Tile(0, 16, 4, 2),
    decode_choice=Tile(0, 16, 4, 2),
    decode_selected=Tile(0, 16, 4, 2),
    decode_programs=999,
)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(decode_attention, "MAX_SPLITS", 3)
    monkeypatch.setattr(decode_attention, "WINDOW_PART", 16)
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
