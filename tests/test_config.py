"""`NSAConfig` and every input error: each names the argument, its value and the rule, before anything is traced."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import nsa_jax
from nsa_jax import KeyValue, NSAConfig, nsa_attention, ops, select_blocks
from nsa_jax.testing import SMALL

FIELDS = [field.name for field in dataclasses.fields(NSAConfig)]


# The config.


def test_defaults_are_the_papers():
    assert dataclasses.asdict(NSAConfig()) == {
        "compress_block": 32,
        "compress_stride": 16,
        "select_block": 64,
        "num_selected": 16,
        "num_initial": 1,
        "num_local": 2,
        "window": 512,
    }


def test_config_is_frozen_and_hashable():
    assert NSAConfig() == NSAConfig() and hash(NSAConfig()) == hash(NSAConfig())
    assert len({NSAConfig(), NSAConfig(window=512), NSAConfig(window=513)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        NSAConfig().window = 1


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [-1, 16.0, "16", True, None, np.int64(16)], ids=repr)
def test_fields_are_integers(name, value, unchecked_shapes):
    least = 0 if name in ("num_initial", "num_local") else 1
    message = f"{name}={value!r} must be an integer of at least {least}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NSAConfig(**{name: value})


@pytest.mark.parametrize("name", FIELDS)
def test_only_the_forced_blocks_may_be_zero(name):
    if name in ("num_initial", "num_local"):
        assert getattr(NSAConfig(**{name: 0}), name) == 0
    else:
        with pytest.raises(ValueError, match=f"^{name}=0 must be an integer of at least 1$"):
            NSAConfig(**{name: 0})


RULES = [
    ({"compress_block": 30}, "compress_block=30 must be a multiple of compress_stride=16: try compress_block=32"),
    ({"compress_block": 8}, "compress_block=8 must be a multiple of compress_stride=16: try compress_block=16"),
    ({"select_block": 72}, "select_block=72 must be a multiple of compress_stride=16: try select_block=80"),
    ({"select_block": 8}, "select_block=8 must be a multiple of compress_stride=16: try select_block=32"),
    ({"select_block": 16}, "select_block=16 must be at least compress_block=32"),
    ({"num_selected": 2}, "num_selected=2 must be at least num_initial + num_local = 3"),
    ({"num_initial": 9, "num_local": 8}, "num_selected=16 must be at least num_initial + num_local = 17"),
]


@pytest.mark.parametrize("changes, message", RULES, ids=[message.split(":")[0] for _, message in RULES])
def test_rules_between_fields(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        NSAConfig(**changes)
    # What the message says to try is taken.
    for name, value in re.findall(r"try (\w+)=(\d+)", str(error.value)):
        NSAConfig(**{**changes, name: int(value)})


@pytest.mark.parametrize(
    "fields",
    [
        {"compress_block": 16},  # no overlap
        {"select_block": 32},  # as long as a compressed token's
        {"num_selected": 3},  # only forced blocks
        {"num_initial": 0, "num_local": 0, "num_selected": 1},
        {"compress_block": 1, "compress_stride": 1, "select_block": 1, "window": 1},
    ],
    ids=str,
)
def test_extremes_are_taken(fields):
    config = NSAConfig(**fields)
    assert all(getattr(config, name) == value for name, value in fields.items())


@pytest.mark.parametrize(
    "num_keys, compressed, blocks",
    [
        (1, 0, 1),
        (31, 0, 1),
        (32, 1, 1),
        (47, 1, 1),
        (48, 2, 1),
        (64, 3, 1),
        (65, 3, 2),
        (128, 7, 2),
        (65536, 4095, 1024),
    ],
)
def test_counts_of_compressed_tokens_and_blocks(num_keys, compressed, blocks):
    assert NSAConfig().num_compressed(num_keys) == compressed
    assert NSAConfig().num_blocks(num_keys) == blocks


def test_counts_without_overlap():
    config = NSAConfig(compress_block=16, compress_stride=16)
    assert [config.num_compressed(length) for length in (0, 15, 16, 31, 32)] == [0, 0, 1, 1, 2]


# Imports.


def run_python(code):
    root = Path(nsa_jax.__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)


def test_the_config_needs_neither_jax_nor_flax():
    code = """
import sys
import nsa_jax.config
from nsa_jax import NSAConfig
NSAConfig()
loaded = {"jax", "jaxlib", "flax", "numpy", "jaxtyping", "nsa_jax.ops", "pallas_kernels"} & set(sys.modules)
assert not loaded, loaded
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_public_names():
    assert sorted(nsa_jax.__all__) == nsa_jax.__all__
    for name in nsa_jax.__all__:
        assert getattr(nsa_jax, name) is not None
        assert name in dir(nsa_jax)
    assert nsa_jax.NSAConfig is NSAConfig


def test_unknown_name():
    with pytest.raises(
        AttributeError, match=r"^module 'nsa_jax' has no attribute 'NSAttention'; it has KeyValue, NSACache"
    ):
        nsa_jax.NSAttention  # noqa: B018


# Input errors. B=2, T=5, N=4, K=2, H=6, V=3, S=20, C=4.


def array(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


def pair(length, *, batch=2, heads=2, head_dim=6, value_head_dim=3, dtype=jnp.float32):
    return KeyValue(
        array(batch, length, heads, head_dim, dtype=dtype), array(batch, length, heads, value_head_dim, dtype=dtype)
    )


def segments(*shape, dtype=jnp.int32):
    return jnp.zeros(shape, dtype)


VALID = {
    "query": array(2, 5, 4, 6),
    "compressed": pair(4),
    "selected": pair(20),
    "window": pair(20),
    "gates": array(2, 5, 4, 3),
    "config": SMALL,
}


def attend(arguments):
    query, rest = arguments["query"], {name: x for name, x in arguments.items() if name != "query"}
    return nsa_attention(query, **rest)


def choose(arguments):
    compressed = arguments["compressed"]
    rest = {name: arguments[name] for name in ("config", "scale", "query_start", "segment_ids") if name in arguments}
    return select_blocks(arguments["query"], compressed.key, num_keys=arguments["selected"].key.shape[1], **rest)


@pytest.fixture
def nothing_runs(monkeypatch):
    """An implementation that was called would have been called with wrong arguments."""

    def never(*args, **kwargs):
        raise AssertionError("the implementation was called")

    monkeypatch.setitem(ops.IMPLEMENTATIONS, "xla", ops.Implementation(never, never, never))


def is_array(x):
    return isinstance(x, jax.Array)


def raises_before_tracing(function, arguments, message, *, traced):
    """`ValueError` on a call, and where `traced` within jit as well: with arrays as tracers, all else as it is."""
    with pytest.raises(ValueError, match=message):
        function(arguments)
    if traced:
        leaves, treedef = jax.tree.flatten(arguments)
        where = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

        def inside(arrays):
            filled = dict(zip(where, arrays, strict=True))
            return function(jax.tree.unflatten(treedef, [filled.get(i, leaf) for i, leaf in enumerate(leaves)]))

        with pytest.raises(ValueError, match=message):
            jax.jit(inside)([leaves[i] for i in where])


def shape_of(name, letters, expected, actual):
    return re.escape(f"{name} must be {letters} = {expected}, but its shape is {actual}")


START = r"query_start must be an int, an int32 scalar or int32 \[B\] = \(2,\), not "
SHARED_ERRORS = {
    "config of another type": ({"config": {"window": 3}}, "config must be an NSAConfig, not dict"),
    "config the class": ({"config": NSAConfig}, "config must be an NSAConfig, not type"),
    "query of rank 3": ({"query": array(2, 5, 4)}, r"query must be \[B, T, N, H\], but its shape is \(2, 5, 4\)"),
    "query of integers": (
        {"query": array(2, 5, 4, 6, dtype=jnp.int32)},
        "query has dtype int32; it must be one of float32, bfloat16, float16",
    ),
    "no queries": (
        {"query": array(2, 0, 4, 6), "gates": array(2, 0, 4, 3)},
        r"query must have at least one number, but its shape is \(2, 0, 4, 6\)",
    ),
    "query of another dtype": (
        {"query": array(2, 5, 4, 6, dtype=jnp.bfloat16)},
        "compressed keys has dtype float32, but the query has bfloat16; they must be the same",
    ),
    "query of another batch": (
        {"query": array(3, 5, 4, 6)},
        shape_of("compressed keys", "[B, C, K, H]", (3, 4, 2, 6), (2, 4, 2, 6)),
    ),
    "query of another head size": (
        {"query": array(2, 5, 4, 8)},
        shape_of("compressed keys", "[B, C, K, H]", (2, 4, 2, 8), (2, 4, 2, 6)),
    ),
    "heads not a multiple": (
        {"query": array(2, 5, 3, 6)},
        "query's 3 heads must be a multiple of the 2 key/value heads",
    ),
    "fewer heads than key/value heads": (
        {"query": array(2, 5, 1, 6)},
        "query's 1 heads must be a multiple of the 2 key/value heads",
    ),
    "no key/value heads": ({"compressed": pair(4, heads=0)}, "must be a multiple of the 0 key/value heads"),
    "a compressed token too many": (
        {"compressed": pair(5)},
        shape_of("compressed keys", "[B, C, K, H]", (2, 4, 2, 6), (2, 5, 2, 6)),
    ),
    "compressed tokens of more keys": (
        {"selected": pair(24)},
        shape_of("compressed keys", "[B, C, K, H]", (2, 5, 2, 6), (2, 4, 2, 6)),
    ),
    "compressed tokens of no keys": (
        {"selected": pair(0), "window": pair(0)},
        "num_keys=0 must be a positive integer: the number of keys of the selected branch",
    ),
    "scale a string": ({"scale": "sqrt"}, r"scale must be a Python number or None \(H \*\* -0.5\), not str"),
    "scale an array": ({"scale": jnp.float32(1)}, r"scale must be a Python number or None"),
    "start below zero": ({"query_start": -1}, "query_start=-1 must be at least 0"),
    "start a float": ({"query_start": 1.0}, f"{START}1.0"),
    "start a string": ({"query_start": "0"}, f"{START}'0'"),
    "start a bool": ({"query_start": True}, f"{START}True"),
    "start a float array": ({"query_start": jnp.zeros(())}, START),
    "start of another batch": ({"query_start": segments(3)}, START),
    "start per token": ({"query_start": segments(2, 5)}, START),
    "start of int8": ({"query_start": segments(2, dtype=jnp.int8)}, START),
    "segments of another length": (
        {"segment_ids": segments(2, 19)},
        shape_of("segment_ids", "[B, S]", (2, 20), (2, 19)),
    ),
    "segments of the queries": ({"segment_ids": segments(2, 5)}, shape_of("segment_ids", "[B, S]", (2, 20), (2, 5))),
    "segments without batch": ({"segment_ids": segments(20)}, shape_of("segment_ids", "[B, S]", (2, 20), (20,))),
    "segments of floats": (
        {"segment_ids": segments(2, 20, dtype=jnp.float32)},
        "segment_ids has dtype float32; it must be int32",
    ),
    "segments of uint8": (
        {"segment_ids": segments(2, 20, dtype=jnp.uint8)},
        "segment_ids has dtype uint8; it must be int32",
    ),
}


@pytest.mark.parametrize("function", [attend, choose], ids=lambda function: function.__name__)
@pytest.mark.parametrize("case", SHARED_ERRORS)
def test_shared_input_errors(function, case, unchecked_shapes, nothing_runs):
    changes, message = SHARED_ERRORS[case]
    raises_before_tracing(function, {**VALID, **changes}, message, traced=True)


def test_shapes_are_checked_before_that_in_tests():
    """By jaxtyping, where `unchecked_shapes` does not switch it off: conftest.py."""
    pytest.importorskip("beartype", reason="annotations are not checked without beartype")
    with pytest.raises(jaxtyping.TypeCheckError, match="compressed_key"):
        select_blocks(VALID["query"], array(2, 4, 2, 8), config=SMALL, num_keys=20)


@pytest.mark.parametrize("num_keys", [0, -3, 20.0], ids=repr)
def test_num_keys_of_select_blocks(num_keys, unchecked_shapes, nothing_runs):
    with pytest.raises(ValueError, match=f"num_keys={num_keys!r} must be a positive integer"):
        select_blocks(VALID["query"], VALID["compressed"].key, config=SMALL, num_keys=num_keys)


def test_compressed_keys_of_rank_3(unchecked_shapes, nothing_runs):
    with pytest.raises(ValueError, match=r"the compressed keys must be \[B, C, K, H\], but their shape is \(2, 4, 6\)"):
        select_blocks(VALID["query"], array(2, 4, 6), config=SMALL, num_keys=20)


@pytest.mark.parametrize("function", [attend, choose], ids=lambda function: function.__name__)
def test_segments_must_not_decrease(function, nothing_runs):
    """Where their values are known; a trace takes the caller's word."""
    ids = jnp.asarray([[0] * 20, [0] * 9 + [3] * 4 + [2] * 7], jnp.int32)
    raises_before_tracing(
        function, {**VALID, "segment_ids": ids}, "segment_ids must be non-decreasing along each sequence", traced=False
    )


def changed(branch, part, **sizes):
    """A branch of the right length with one part of other sizes."""
    length = {"compressed": 4, "selected": 20, "window": 20}[branch]
    return VALID[branch]._replace(**{part: getattr(pair(**{"length": length, **sizes}), part)})


BRANCHES = ("compressed", "selected", "window")
CHANGES = [("key", {"batch": 3}), ("key", {"heads": 4}), ("key", {"head_dim": 8}), ("value", {"batch": 3})]
CHANGES += [("value", {"heads": 4}), ("value", {"value_head_dim": 6}), ("value", {"length": 7})]


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("part, sizes", CHANGES, ids=[f"{part} {sizes}" for part, sizes in CHANGES])
def test_shapes_of_the_branches(branch, part, sizes, unchecked_shapes, nothing_runs):
    arguments = {**VALID, branch: changed(branch, part, **sizes)}
    # With K or V of one branch off, which of the three is wrong is not known: any is named.
    message = (
        r"(compressed|selected|window)[. ](key|keys|value) must be \[B, (length|C), K, [HV]\] = .*, but its shape is "
    )
    raises_before_tracing(attend, arguments, message, traced=True)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("part", ["key", "value"])
def test_dtype_and_rank_of_the_branches(branch, part, unchecked_shapes, nothing_runs):
    name = rf"{branch}([.]{part}| keys)"
    arguments = {**VALID, branch: changed(branch, part, dtype=jnp.bfloat16)}
    message = f"{name} has dtype bfloat16, but the query has float32; they must be the same"
    raises_before_tracing(attend, arguments, message, traced=True)

    arguments = {**VALID, branch: VALID[branch]._replace(**{part: array(2, 4, 6)})}
    raises_before_tracing(
        attend, arguments, rf"{branch}.{part} must have 4 axes, but its shape is \(2, 4, 6\)", traced=True
    )


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    "wrong",
    [array(2, 4, 2, 6), list(pair(4)), (*pair(4), None), tuple(pair(20))],
    ids=["array", "list", "three", "tuple"],
)
def test_branches_are_key_value_pairs(branch, wrong, unchecked_shapes, nothing_runs):
    with pytest.raises(ValueError, match=rf"{branch} must be KeyValue\(key, value\), not \w+"):
        attend({**VALID, branch: wrong})


GATES = "[B, T, N, 3]"
ATTENTION_ERRORS = {
    "two gates": ({"gates": array(2, 5, 4, 2)}, shape_of("gates", GATES, (2, 5, 4, 3), (2, 5, 4, 2))),
    "gates per key/value head": ({"gates": array(2, 5, 2, 3)}, shape_of("gates", GATES, (2, 5, 4, 3), (2, 5, 2, 3))),
    "gates of rank 3": ({"gates": array(2, 5, 3)}, shape_of("gates", GATES, (2, 5, 4, 3), (2, 5, 3))),
    "gates of lower precision": (
        {"gates": array(2, 5, 4, 3, dtype=jnp.bfloat16)},
        r"gates have dtype bfloat16; they must have the query's \(float32\) or float32",
    ),
    "gates of integers": ({"gates": array(2, 5, 4, 3, dtype=jnp.int32)}, "gates have dtype int32"),
    "window_start a float": (
        {"window_start": 0.0},
        r"window_start must be an int, an int32 scalar or int32 \[B\] = \(2,\), not 0.0",
    ),
    "window_start of another batch": ({"window_start": segments(3)}, "window_start must be an int, an int32 scalar or"),
    "blocks of rank 3": (
        {"selected_blocks": segments(2, 5, 2)},
        r"selected_blocks must be \[B, T, K, A\], but its shape is \(2, 5, 2\)",
    ),
    "blocks of the query heads": (
        {"selected_blocks": segments(2, 5, 4, 3)},
        shape_of("selected_blocks", "[B, T, K, A]", (2, 5, 2, 3), (2, 5, 4, 3)),
    ),
    "blocks of the keys": (
        {"selected_blocks": segments(2, 20, 2, 3)},
        shape_of("selected_blocks", "[B, T, K, A]", (2, 5, 2, 3), (2, 20, 2, 3)),
    ),
    "blocks of floats": (
        {"selected_blocks": segments(2, 5, 2, 3, dtype=jnp.float32)},
        "selected_blocks has dtype float32; it must be int32",
    ),
    "blocks of int8": (
        {"selected_blocks": segments(2, 5, 2, 3, dtype=jnp.int8)},
        "selected_blocks has dtype int8; it must be int32",
    ),
}


@pytest.mark.parametrize("case", ATTENTION_ERRORS)
def test_attention_input_errors(case, unchecked_shapes, nothing_runs):
    changes, message = ATTENTION_ERRORS[case]
    raises_before_tracing(attend, {**VALID, **changes}, message, traced=True)


@pytest.mark.parametrize("lower", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_gates_beside_a_lower_precision(lower, unchecked_shapes, nothing_runs):
    other = {jnp.bfloat16: jnp.float16, jnp.float16: jnp.bfloat16}[lower]
    arguments = jax.tree.map(lambda x: x.astype(lower) if is_array(x) else x, VALID)
    with pytest.raises(AssertionError, match="the implementation was called"):
        attend({**arguments, "gates": VALID["gates"]})
    with pytest.raises(ValueError, match=rf"gates have dtype {other.__name__}; they must have the query's"):
        attend({**arguments, "gates": VALID["gates"].astype(other)})


# SMALL.window is 20: queries 30..34 of 60 keys read positions 11..34.
@pytest.mark.parametrize(
    "window_start, length, missing",
    [(12, 30, True), (11, 24, False), (11, 23, True), (0, 34, True), (0, 35, False), (-3, 40, False), (-3, 37, True)],
)
def test_window_must_cover_what_its_queries_read(window_start, length, missing, nothing_runs):
    arguments = {**VALID, "compressed": pair(14), "selected": pair(60), "window": pair(length)}
    arguments |= {"query_start": 30, "window_start": window_start}
    if missing:
        message = (
            f"the window branch holds the {length} keys from position {window_start} on, "
            "but queries 30..34 with window=20 read positions 11..34"
        )
        raises_before_tracing(attend, arguments, re.escape(message), traced=True)
    else:
        with pytest.raises(AssertionError, match="the implementation was called"):
            attend(arguments)


@pytest.mark.parametrize("query_start", [0, 18, 25])
def test_window_need_not_hold_what_does_not_exist(query_start, nothing_runs):
    """Neither positions below zero, nor past the last key."""
    with pytest.raises(AssertionError, match="the implementation was called"):
        attend({**VALID, "query_start": query_start})


RIGHT = [
    {},
    {"scale": 2},
    {"scale": 0.5},
    {"query_start": 3},
    {"query_start": jnp.int32(3)},
    {"query_start": segments(2)},
    {"segment_ids": segments(2, 20)},
]


@pytest.mark.parametrize("function", [attend, choose], ids=lambda function: function.__name__)
@pytest.mark.parametrize("changes", RIGHT, ids=str)
def test_what_is_right_raises_nothing(function, changes):
    """So that the errors above come from the change alone."""
    out = jax.eval_shape(lambda: function({**VALID, **changes}))
    assert out.shape == ((2, 5, 2, 4) if function is choose else (2, 5, 4, 3))
