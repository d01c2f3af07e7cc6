"""The reference against loops in float64, and against worked examples: one for each rule of the design (numbered below)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import KeyValue, NSAConfig, mean_compress, nsa_attention, select_blocks
from nsa_jax.testing import CASES, make_inputs
from tests import oracle

TOLERANCE = 2e-5  # of the largest magnitude: float32 against float64

# Small enough to write every mask by hand. Compressed token i ends at 2i + 3, block j holds 4j .. 4j + 3.
TINY = NSAConfig(
    compress_block=4, compress_stride=2, select_block=4, num_selected=3, num_initial=1, num_local=1, window=3
)
BRANCHES = ("compressed", "selected", "window")


@functools.cache
def jitted(function, static):
    return jax.jit(functools.partial(function, implementation="xla"), static_argnames=("config", "scale", *static))


def attend(query, **arguments):
    """`nsa_attention`, compiled; a start given as a Python int stays one."""
    starts = tuple(name for name in ("query_start", "window_start") if isinstance(arguments.get(name), int))
    return jitted(nsa_attention, starts)(query, **arguments)


def choose(query, compressed_key, **arguments):
    """`select_blocks`, compiled once for all values of `query_start`."""
    return jitted(select_blocks, ("num_keys",))(query, compressed_key, **arguments)


# Every case against the oracle.


def options(inputs):
    """The arguments of `nsa_attention` that are neither tensors of the branches nor the config."""
    return {
        "query_start": inputs.query_start,
        "window_start": inputs.window_start,
        "segment_ids": inputs.segment_ids,
    }


def block_options(case, inputs):
    return {
        "config": case.config,
        "num_keys": case.keys,
        "query_start": inputs.query_start,
        "segment_ids": inputs.segment_ids,
    }


def tensors(inputs):
    return inputs[:5]


def positions(case):
    """Where every query stands, [B, T]."""
    return np.broadcast_to(np.asarray(case.query_start), (case.batch,))[:, None] + np.arange(case.queries)


def specified(case):
    """Queries at positions up to the last key, [B, T]: past it, outputs need only be finite."""
    return positions(case) < case.keys


@functools.cache
def case_inputs(name):
    return make_inputs(CASES[name], seed=0, dtype=jnp.float32)


@functools.cache
def compiled(name):
    """A function of the tensors and a cotangent: blocks, outputs and the gradients of the tensors."""
    case, inputs = CASES[name], case_inputs(name)

    def run(tensors, cotangent):
        def forward(query, compressed, selected, window, gates):
            return nsa_attention(
                query,
                compressed=compressed,
                selected=selected,
                window=window,
                gates=gates,
                config=case.config,
                implementation="xla",
                **options(inputs),
            )

        blocks = select_blocks(tensors[0], tensors[1].key, implementation="xla", **block_options(case, inputs))
        out, backward = jax.vjp(forward, *tensors)
        return blocks, out, backward(cotangent)

    return jax.jit(run)


def draw_cotangent(case, rows):
    """Gaussian where `rows` [B, T], zero elsewhere."""
    shape = (case.batch, case.queries, case.heads, case.value_head_dim)
    draw = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return draw * rows[..., None, None]


@functools.cache
def results(name):
    case = CASES[name]
    return compiled(name)(tensors(case_inputs(name)), draw_cotangent(case, specified(case)))


def assert_close(actual, expected, name):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, name
    error = np.max(np.abs(actual - expected), initial=0)
    largest = np.max(np.abs(expected), initial=0)
    assert error <= TOLERANCE * largest, f"{name}: off by {error:.1e} where the largest magnitude is {largest:.1e}"


def assert_same_choice(actual, expected, scores):
    """The same blocks in the same slots; where they differ, by blocks whose scores are closer than 1e-6."""
    assert actual.dtype == np.int32 and actual.shape == expected.shape
    for at in np.argwhere(np.any(actual != expected, axis=-1)):
        row, expected_row, score = actual[tuple(at)].tolist(), expected[tuple(at)].tolist(), scores[tuple(at)]
        chosen = [j for j in row if j >= 0]
        assert row == sorted(set(chosen)) + [-1] * (len(row) - len(chosen)), (
            f"{at}: {row} is not ascending with -1 last"
        )
        gained, lost = set(row) - set(expected_row), set(expected_row) - set(row)
        gap = [abs(score[i] - score[j]) for i in gained for j in lost]
        assert len(gained) == len(lost) and max(gap) < 1e-6, f"{at}: {row}, not {expected_row}"


@pytest.mark.parametrize("name", CASES)
def test_blocks_equal_the_oracle(name):
    case, inputs = CASES[name], case_inputs(name)
    arguments = block_options(case, inputs)
    rows = specified(case)
    assert_same_choice(
        np.asarray(results(name)[0])[rows],
        oracle.select_blocks(inputs.query, inputs.compressed.key, **arguments)[rows],
        oracle.importance(inputs.query, inputs.compressed.key, **arguments)[rows],
    )


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_oracle(name):
    case, inputs = CASES[name], case_inputs(name)
    rows = specified(case)
    blocks, out, grads = results(name)
    arguments = {"config": case.config, "selected_blocks": blocks, **options(inputs)}

    expected = oracle.attention(*tensors(inputs), **arguments)
    assert_close(np.asarray(out)[rows], expected[rows], "out")

    expected = oracle.gradients(*tensors(inputs), draw_cotangent(case, rows), **arguments)
    assert_close(grads[0], expected.query, "query")
    for branch, actual_pair, expected_pair in zip(BRANCHES, grads[1:4], expected[1:4], strict=True):
        assert_close(actual_pair.key, expected_pair.key, f"{branch} key")
        assert_close(actual_pair.value, expected_pair.value, f"{branch} value")
    assert_close(grads[4], expected.gates, "gates")


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_finite(name):
    """Also where a query stands past the last key, and where it sees nothing."""
    case = CASES[name]
    everywhere = np.ones((case.batch, case.queries), bool)
    _, out, grads = compiled(name)(tensors(case_inputs(name)), draw_cotangent(case, everywhere))
    for array in jax.tree.leaves((out, grads)):
        assert np.all(np.isfinite(array))


@pytest.mark.parametrize("name", CASES)
def test_same_inputs_same_bits(name):
    case = CASES[name]
    again = compiled(name)(tensors(case_inputs(name)), draw_cotangent(case, specified(case)))
    assert_same_bits(again, results(name))


def assert_same_bits(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", CASES)
def test_future_changes_nothing(name):
    """With all later tokens replaced, and compressed tokens that end later, earlier rows keep their bits."""
    case, inputs = CASES[name], case_inputs(name)
    at = positions(case)
    now = np.minimum((at[:, 0] + at[:, -1]) // 2, case.keys - 1)  # [B]: the last position that is kept
    past = at <= now[:, None]
    cotangent = draw_cotangent(case, past)

    token = np.arange(case.keys)
    last = np.arange(inputs.compressed.key.shape[1]) * case.config.compress_stride + case.config.compress_block - 1
    window_start = np.broadcast_to(np.asarray(inputs.window_start), (case.batch,))[:, None]
    window_token = window_start + np.arange(inputs.window.key.shape[1])
    kept = (
        past,
        KeyValue(*[last <= now[:, None]] * 2),
        KeyValue(*[token <= now[:, None]] * 2),
        KeyValue(*[window_token <= now[:, None]] * 2),
        past,
    )
    noise = np.random.default_rng(2)

    def replace(array, keep):
        return jnp.where(keep[..., None, None], array, noise.normal(size=array.shape).astype(np.float32))

    blocks, out, grads = compiled(name)(tensors(inputs), cotangent)
    new_blocks, new_out, new_grads = compiled(name)(jax.tree.map(replace, tensors(inputs), kept), cotangent)

    np.testing.assert_array_equal(np.asarray(new_blocks)[past], np.asarray(blocks)[past])
    np.testing.assert_array_equal(np.asarray(new_out)[past], np.asarray(out)[past])
    for new_grad, grad, keep in zip(*map(jax.tree.leaves, (new_grads, grads, kept)), strict=True):
        np.testing.assert_array_equal(np.asarray(new_grad)[keep], np.asarray(grad)[keep])
        assert not np.any(np.asarray(new_grad)[~keep])


def test_oracle_gradients_by_finite_differences():
    inputs, cotangent = random_inputs(queries=7, keys=11, seed=3), np.random.default_rng(4).normal(size=(2, 7, 4, 3))
    arguments = {
        "config": TINY,
        "query_start": [4, 2],
        "segment_ids": [[0] * 6 + [1] * 5, [0] * 11],
        "selected_blocks": np.tile(np.array([0, 1, 2], np.int32), (2, 7, 2, 1)),
    }
    leaves, treedef = jax.tree.flatten(inputs)
    names = [str(i) for i in range(len(leaves))]

    def forward(**arrays):
        return oracle.attention(*jax.tree.unflatten(treedef, [arrays[name] for name in names]), **arguments)

    grads = jax.tree.leaves(tuple(oracle.gradients(*inputs, cotangent, **arguments)))
    draw = np.random.default_rng(5)
    for name, leaf, grad in zip(names, leaves, grads, strict=True):
        for _ in range(3):
            index = tuple(draw.integers(size) for size in leaf.shape)
            numeric = oracle.finite_difference(
                forward, dict(zip(names, leaves, strict=True)), cotangent, name=name, index=index
            )
            np.testing.assert_allclose(grad[index], numeric, rtol=1e-6, atol=1e-8)


# What a query reads, as a matrix: with keys of zero and values of the identity, the output is 1 / count where it reads.


def mask(text):
    """One line a query, one character a key: "1" is read, "." is not."""
    return np.array([[character == "1" for character in line] for line in text.split()])


def reads(branch, *, queries, keys=16, config=TINY, window_keys=None, batch=1, **arguments):
    """Which tokens (of `branch`) each query reads, [B, T, length]; asserts that all that it reads weigh the same."""
    lengths = {"compressed": config.num_compressed(keys), "selected": keys, "window": window_keys or keys}
    branches = {
        name: KeyValue(jnp.zeros((batch, length, 1, 2)), tile(jnp.eye(length, max(lengths.values())), batch))
        for name, length in lengths.items()
    }
    gates = jnp.zeros((batch, queries, 1, 3)).at[..., BRANCHES.index(branch)].set(1)
    out = attend(jnp.zeros((batch, queries, 1, 2)), gates=gates, config=config, **branches, **arguments)
    weights = np.asarray(out)[:, :, 0, : lengths[branch]]
    read = weights > 0
    np.testing.assert_allclose(weights, read / np.maximum(read.sum(-1, keepdims=True), 1), rtol=1e-6)
    return read


def tile(matrix, batch):
    return jnp.tile(matrix[None, :, None, :], (batch, 1, 1, 1))


def random_inputs(*, queries, keys, config=TINY, batch=2, heads=4, kv_heads=2, seed=0, dtype=np.float32):
    """Query, compressed, selected, window and gates, Gaussian; H = 2 and V = 3."""
    draw = np.random.default_rng(seed)

    def gaussian(*shape):
        return jnp.asarray(draw.normal(size=shape), dtype)

    def pair(length):
        return KeyValue(gaussian(batch, length, kv_heads, 2), gaussian(batch, length, kv_heads, 3))

    return (
        gaussian(batch, queries, heads, 2),
        pair(config.num_compressed(keys)),
        pair(keys),
        pair(keys),
        jax.nn.sigmoid(gaussian(batch, queries, heads, 3)),
    )


def apply(inputs, *, config=TINY, attend=attend, **arguments):
    query, compressed, selected, window, gates = inputs
    return attend(
        query, compressed=compressed, selected=selected, window=window, gates=gates, config=config, **arguments
    )


def constant_values(values, *, queries=4, keys=4, heads=1):
    """Inputs whose three branches hold one value each, per key/value head: [3, K] -> (query, branches, gates of zero)."""
    values = jnp.asarray(values, jnp.float32)
    kv_heads = values.shape[1]
    branches = [
        KeyValue(jnp.zeros((1, length, kv_heads, 2)), jnp.tile(value[None, None, :, None], (1, length, 1, 1)))
        for length, value in zip((TINY.num_compressed(keys), keys, keys), values, strict=True)
    ]
    return jnp.zeros((1, queries, heads, 2)), *branches, jnp.zeros((1, queries, heads, 3))


# Rule 1.


def test_output_is_the_gated_sum_of_the_branches():
    *rest, gates = constant_values([[1], [10], [100]])
    gates = gates + jnp.array([0.5, 0.25, 1.0])
    out = apply((*rest, gates))[0, :, 0, 0]
    # The first compressed token ends at 3, so that queries 0 to 2 see none. The gates do not sum to 1, and need not.
    np.testing.assert_allclose(out, [102.5, 102.5, 102.5, 103], rtol=1e-6)


def test_query_head_reads_the_head_of_its_group():
    *rest, gates = constant_values([[0, 0], [5, 7], [0, 0]], heads=6)
    out = apply((*rest, gates.at[..., 1].set(1)))[0, 3, :, 0]
    np.testing.assert_allclose(out, [5, 5, 5, 7, 7, 7], rtol=1e-6)


# Rule 2.


@pytest.mark.parametrize(
    ("keys", "means"),
    [(3, []), (4, [1.5]), (5, [1.5]), (6, [1.5, 3.5]), (9, [1.5, 3.5, 5.5]), (10, [1.5, 3.5, 5.5, 7.5])],
)
def test_compressed_token_stands_for_its_block(keys, means):
    """Token i is the mean of 2i .. 2i + 3; an incomplete block does not exist."""
    key = jnp.arange(keys, dtype=jnp.float32).reshape(1, keys, 1, 1) * jnp.array([[1.0, -2.0]]).T
    compressed = mean_compress(key, config=TINY)
    assert compressed.shape == (1, len(means), 2, 1)
    np.testing.assert_array_equal(compressed[0, :, 0, 0], means)
    np.testing.assert_array_equal(compressed[0, :, 1, 0], [-2 * mean for mean in means])


@pytest.mark.parametrize("name", CASES)
def test_mean_compress_equals_the_oracle(name):
    key = case_inputs(name).selected.key
    assert_close(mean_compress(key, config=CASES[name].config), oracle.mean_compress(key, CASES[name].config), name)


# Rule 3.

SEES_COMPRESSED = mask("""
    .......
    .......
    .......
    1......
    1......
    11.....
    11.....
    111....
    111....
    1111...
    1111...
    11111..
    11111..
    111111.
    111111.
    1111111
""")


def test_compressed_token_is_seen_once_its_last_token_is():
    np.testing.assert_array_equal(reads("compressed", queries=16)[0], SEES_COMPRESSED)


@pytest.mark.parametrize("keys", [16, 3])
def test_query_that_sees_no_compressed_token_gets_zero(keys):
    """Queries 0 to 2 see none; with 3 keys there are none. Their gradients are finite, and zero through that branch."""
    query, compressed, selected, window, gates = random_inputs(queries=3, keys=keys)
    gates = jnp.zeros_like(gates).at[..., 0].set(1)

    def loss(query, compressed, gates):
        out = apply((query, compressed, selected, window, gates))
        return jnp.sum(out), out

    grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, compressed, gates)
    assert not np.any(out)
    assert not np.any(grads[0]) and not np.any(grads[1].key) and not np.any(grads[1].value)
    assert not np.any(grads[2][..., 0]) and np.all(np.isfinite(grads[2]))


# Rule 4. One free slot shows which of two blocks scores higher; with one head of size 1, keys are log-probabilities.


def log_probabilities(length, masses):
    """Compressed keys [1, C, 1, 1] whose softmax is in proportion to `masses`, and next to nothing elsewhere."""
    key = np.full(length, -30.0, np.float32)
    for i, mass in masses.items():
        key[i] = np.log(mass)
    return key.reshape(1, length, 1, 1)


@pytest.mark.parametrize(
    ("offset", "rival", "best"),
    [
        (-2, 0.10, 6),  # token 10 is in block 2 alone: nothing for block 3
        (-1, 0.45, 3),  # half of 1 ...
        (-1, 0.55, 6),
        (0, 0.90, 3),  # ... and half of 2
        (0, 1.10, 6),
        (1, 0.90, 3),
        (1, 1.10, 6),
        (2, 0.90, 3),
        (2, 1.10, 6),
        (3, 0.45, 3),
        (3, 0.55, 6),
        (4, 0.10, 4),  # token 16 is in block 4 alone
    ],
)
def test_importance_weighs_1_2_2_2_1(offset, rival, best):
    """Block j scores p[4j-1] + 2 p[4j] + 2 p[4j+1] + 2 p[4j+2] + p[4j+3], with the paper's 32, 16 and 64."""
    # Blocks 0, 1, 2 and 8 are forced. Token 12 + offset has mass 1, and token 25, of weight 2 in block 6, rivals it.
    config = NSAConfig(num_selected=5, num_initial=3, num_local=1)
    key = jnp.asarray(log_probabilities(config.num_compressed(576), {4 * 3 + offset: 1.0, 4 * 6 + 1: rival}))
    blocks = choose(jnp.ones((1, 1, 1, 1)), key, config=config, num_keys=576, scale=1.0, query_start=575)
    assert blocks.tolist() == [[[[0, 1, 2, best, 8]]]]


def test_importance_is_softmax_per_head_then_summed_over_the_group():
    """Head 0 prefers block 1, head 1 block 3, and both together block 2. Head 1's larger scores weigh no more."""
    key = np.full((1, 11, 1, 2), -30.0, np.float32)
    # Token 2j lies in block j alone; the keys of dimension n are the scores of head n.
    key[0, [2, 4], 0, 0] = np.log([0.6, 0.4])
    key[0, [6, 4], 0, 1] = np.log([0.6, 0.4]) + 20
    query = jnp.eye(2)[None, None]
    arguments = {"config": TINY, "num_keys": 24, "scale": 1.0, "query_start": 23}
    key = jnp.asarray(key)
    assert choose(query, key, **arguments).tolist() == [[[[0, 2, 5]]]]
    assert choose(query[:, :, :1], key, **arguments).tolist() == [[[[0, 1, 5]]]]
    assert choose(query[:, :, 1:], key, **arguments).tolist() == [[[[0, 3, 5]]]]


# Rule 5.


def chosen(position, masses, *, keys=32, **changes):
    """The blocks of one query at `position`, whose compressed tokens hold `masses`; TINY with `changes`."""
    config = NSAConfig(**{**TINY.__dict__, **changes})
    key = jnp.asarray(log_probabilities(config.num_compressed(keys), masses))
    blocks = choose(jnp.ones((1, 1, 1, 1)), key, config=config, num_keys=keys, scale=1.0, query_start=position)
    assert blocks.dtype == jnp.int32
    return blocks[0, 0, 0].tolist()


def test_forced_blocks_are_counted_inside_num_selected():
    # The best block is 3 (token 6 is its own), but the forced ones leave no slot, or one.
    assert chosen(31, {6: 1.0}, num_initial=1, num_local=2) == [0, 6, 7]
    assert chosen(31, {6: 1.0}, num_initial=2, num_local=1) == [0, 1, 7]
    assert chosen(31, {6: 1.0}, num_initial=1, num_local=1) == [0, 3, 7]
    assert chosen(31, {6: 1.0}, num_initial=1, num_local=2, num_selected=4) == [0, 3, 6, 7]
    # Also when a forced block is itself the best: it takes one slot.
    assert chosen(31, {14: 0.5, 6: 0.3, 4: 0.2}, num_selected=4) == [0, 2, 3, 7]


def test_last_candidate_is_the_block_of_the_query():
    # Position 15 is the last of block 3, position 16 the first of block 4.
    assert chosen(15, {0: 1.0}, num_initial=1, num_local=2) == [0, 2, 3]
    assert chosen(16, {0: 1.0}, num_initial=1, num_local=2) == [0, 3, 4]


def test_fewer_candidates_than_slots_are_all_taken_once():
    assert chosen(0, {}, num_selected=4) == [0, -1, -1, -1]
    assert chosen(7, {}, num_selected=4, num_initial=2, num_local=2) == [0, 1, -1, -1]
    assert chosen(11, {}, num_selected=4, num_initial=2, num_local=2) == [0, 1, 2, -1]
    assert chosen(15, {}, num_selected=4, num_initial=2, num_local=2) == [0, 1, 2, 3]


def test_there_are_num_selected_columns_when_there_are_fewer_blocks():
    assert chosen(7, {}, keys=8, num_selected=5) == [0, 1, -1, -1, -1]
    assert chosen(2, {}, keys=3, num_selected=5) == [0, -1, -1, -1, -1]  # nor any compressed token


def test_no_block_is_forced_where_the_config_forces_none():
    assert chosen(31, {6: 0.6, 2: 0.3, 10: 0.1}, num_initial=0, num_local=0) == [1, 3, 5]


def test_ties_go_to_the_lower_index():
    # Query 19 sees compressed tokens 0 to 8, query 33 tokens 0 to 15: 16 equal probabilities, exact in binary.
    config = NSAConfig(4, 2, 4, num_selected=5, num_initial=1, num_local=1, window=3)
    blocks = choose(jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, 17, 1, 1)), config=config, num_keys=36, query_start=33)
    assert blocks.tolist() == [[[[0, 1, 2, 3, 8]]]]
    # All of the mass on block 5, none at all elsewhere: the other slots are tied at zero.
    key = jnp.full((1, 17, 1, 1), -1000.0).at[0, 10].set(0)
    blocks = choose(jnp.ones((1, 1, 1, 1)), key, config=config, num_keys=36, scale=1.0, query_start=33)
    assert blocks.tolist() == [[[[0, 1, 2, 5, 8]]]]


def test_selection_has_no_gradient():
    query, compressed, selected, window, gates = random_inputs(queries=24, keys=24)
    gates = jnp.zeros_like(gates).at[..., 1].set(1)

    def loss(query, key, blocks):
        pair = KeyValue(key, compressed.value)
        return jnp.sum(apply((query, pair, selected, window, gates), selected_blocks=blocks) ** 2)

    blocks = choose(query, compressed.key, config=TINY, num_keys=24)
    own = jax.grad(loss, argnums=(0, 1))(query, compressed.key, None)
    given = jax.grad(loss, argnums=(0, 1))(query, compressed.key, blocks)
    assert not np.any(own[1])
    np.testing.assert_allclose(own[0], given[0], rtol=1e-6)


def test_blocks_given_by_the_caller():
    """In any order, of any number; a repeated one counts once; future and out-of-range ones read nothing."""
    blocks = [
        [0, 1, 2, 3, -1, -1],
        [2, -1, 0, 2, 0, -1],
        [1, 1, 1, 1, 1, 1],
        [3, 2, 7, 4, 99, -5],
        [0, 2**31 - 1, -(2**31), 0, 1, 2],
        [-1, -1, -1, -1, -1, -1],
    ]
    # The queries stand at 5 .. 10.
    expected = mask("""
        111111......
        1111........
        ....1111....
        ........1...
        1111111111..
        ............
    """)
    blocks = jnp.array(blocks, jnp.int32).reshape(1, 6, 1, 6)
    read = reads("selected", queries=6, keys=12, selected_blocks=blocks, query_start=5)
    np.testing.assert_array_equal(read[0], expected)


@pytest.mark.parametrize("columns", [1, 7])
def test_blocks_given_by_the_caller_equal_the_oracle(columns):
    inputs = random_inputs(queries=15, keys=19, seed=6)
    blocks = np.random.default_rng(7).integers(-2, 7, size=(2, 15, 2, columns)).astype(np.int32)
    arguments = {"selected_blocks": jnp.asarray(blocks), "query_start": 3}
    out, backward = jax.vjp(lambda *inputs: apply(inputs, **arguments), *inputs)
    cotangent = np.random.default_rng(8).normal(size=out.shape).astype(np.float32)
    assert_close(out, oracle.attention(*inputs, config=TINY, **arguments), "out")
    expected = oracle.gradients(*inputs, cotangent, config=TINY, **arguments)
    for actual, wanted in zip(jax.tree.leaves(backward(cotangent)), jax.tree.leaves(tuple(expected)), strict=True):
        assert_close(actual, wanted, "gradient")


# Rule 6.


def test_selected_tokens_share_one_softmax():
    """Query 9 reads 0 .. 3 and 8, 9; token s has weight s + 1, so that they sum to 1 + 2 + 3 + 4 + 9 + 10 = 29."""
    key = jnp.log(jnp.arange(1.0, 13)).reshape(1, 12, 1, 1)
    pair = KeyValue(key, tile(jnp.eye(12), 1))
    compressed = KeyValue(key[:, :5], pair.value[:, :5])
    out = attend(
        jnp.ones((1, 1, 1, 1)),
        compressed=compressed,
        selected=pair,
        window=pair,
        gates=jnp.array([0.0, 1, 0]).reshape(1, 1, 1, 3),
        config=TINY,
        query_start=9,
        selected_blocks=jnp.array([0, 2, -1], jnp.int32).reshape(1, 1, 1, 3),
    )
    expected = np.array([1, 2, 3, 4, 0, 0, 0, 0, 9, 10, 0, 0]) / 29
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("scale", "ratio"), [(None, 3.0), (0.5, 3.0), (1.0, 9.0)])
def test_scale_is_one_over_the_root_of_the_head_size(scale, ratio):
    """H = 4: a score of 2 log 3 is log 3 by default, and token 1 weighs 3 times as much as token 0, in every branch."""
    key = jnp.zeros((1, 6, 1, 4)).at[0, 1, 0, 0].set(jnp.log(3.0))
    pair = KeyValue(key, tile(jnp.eye(6), 1))
    compressed = KeyValue(key[:, :2], pair.value[:, :2])
    query = jnp.zeros((1, 1, 3, 4)).at[..., 0].set(2)
    blocks = jnp.zeros((1, 1, 1, 1), jnp.int32)
    for position, head in ((5, 0), (1, 1), (1, 2)):
        out = attend(
            query,
            compressed=compressed,
            selected=pair,
            window=pair,
            gates=jnp.eye(3)[None, None],
            config=TINY,
            scale=scale,
            query_start=position,
            selected_blocks=blocks,
        )
        np.testing.assert_allclose(out[0, 0, head, :2], [1 / (1 + ratio), ratio / (1 + ratio)], rtol=1e-6)


# Rule 7.

IN_WINDOW = mask("""
    1.......
    11......
    111.....
    .111....
    ..111...
    ...111..
    ....111.
    .....111
""")


def test_window_is_the_query_and_the_two_before():
    """window=3: query 5 sees 3, 4 and 5."""
    np.testing.assert_array_equal(reads("window", queries=8, keys=8)[0], IN_WINDOW)


@pytest.mark.parametrize("window", [1, 8, 100])
def test_window_of_other_sizes(window):
    config = NSAConfig(**{**TINY.__dict__, "window": window})
    expected = np.eye(8, dtype=bool) if window == 1 else np.tri(8, dtype=bool)
    np.testing.assert_array_equal(reads("window", queries=8, keys=8, config=config)[0], expected)


# Rule 8.


@pytest.mark.parametrize("kind", ["int", "scalar", "rows"])
def test_query_row_stands_at_query_start_plus_row(kind):
    """Three queries at 4, 5, 6; with a start for each sequence, those of the second stand at 0, 1, 2."""
    start = {"int": 4, "scalar": jnp.int32(4), "rows": jnp.array([4, 0], jnp.int32)}[kind]
    at = np.array([[4, 5, 6], [0, 1, 2] if kind == "rows" else [4, 5, 6]])
    arguments = {"queries": 3, "keys": 8, "batch": 2, "query_start": start}
    np.testing.assert_array_equal(reads("window", **arguments), IN_WINDOW[at])
    np.testing.assert_array_equal(reads("compressed", **arguments), SEES_COMPRESSED[at, :3])
    np.testing.assert_array_equal(reads("selected", **arguments), np.tri(8, dtype=bool)[at])


@pytest.mark.parametrize("kind", ["int", "scalar", "rows"])
def test_window_start_is_the_position_of_the_first_window_key(kind):
    """Four queries at 0 .. 3, six window keys at -2 .. 3, of which the first two are never read."""
    start = {"int": -2, "scalar": jnp.int32(-2), "rows": jnp.array([-2, 0], jnp.int32)}[kind]
    negative = mask("""
        ..1...
        ..11..
        ..111.
        ...111
    """)
    zero = mask("""
        1.....
        11....
        111...
        .111..
    """)
    read = reads("window", queries=4, keys=8, window_keys=6, batch=2, window_start=start)
    np.testing.assert_array_equal(read, [negative, zero if kind == "rows" else negative])


def test_window_start_above_zero_and_segments_at_positions():
    """Queries at 5, 6, 7 and window keys at 3 .. 7; with a segment from 6 on, the key at 5 is another's to 6 and 7."""
    arguments = {"queries": 3, "keys": 8, "window_keys": 5, "query_start": 5, "window_start": 3}
    alone = mask("""
        111..
        .111.
        ..111
    """)
    packed = mask("""
        111..
        ...1.
        ...11
    """)
    segment_ids = jnp.array([[0] * 6 + [1] * 2], jnp.int32)
    np.testing.assert_array_equal(reads("window", **arguments)[0], alone)
    np.testing.assert_array_equal(reads("window", **arguments, segment_ids=segment_ids)[0], packed)


def test_negative_positions_are_never_read():
    """Window keys and values of NaN at -2 and -1 reach neither outputs nor gradients."""
    query, compressed, selected, window, gates = random_inputs(queries=4, keys=4)
    padded = jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (2, 0), (0, 0), (0, 0))), window)
    unread = jax.tree.map(lambda array: array.at[:, :2].set(jnp.nan), padded)

    @jax.jit
    def run(window):
        out, backward = jax.vjp(
            lambda *inputs: apply(inputs, window_start=-2), query, compressed, selected, window, gates
        )
        return out, backward(jnp.ones_like(out))

    out, grads = run(unread)
    assert_same_bits((out, grads), run(padded))
    assert np.all(np.isfinite(out))
    assert not np.any(grads[3].key[:, :2]) and not np.any(grads[3].value[:, :2])


def test_outputs_past_the_last_key_are_finite():
    """Five keys, queries at 3 .. 8: the last four stand where there is neither key nor block."""
    inputs = random_inputs(queries=6, keys=5)
    out, backward = jax.vjp(lambda *inputs: apply(inputs, query_start=3), *inputs)
    for array in jax.tree.leaves((out, backward(jnp.ones_like(out)))):
        assert np.all(np.isfinite(array))
    assert_close(out[:, :2], oracle.attention(*inputs, config=TINY, query_start=3)[:, :2], "out")


# Rule 9. Two documents of 6 and 10 tokens: the second begins in the middle of block 1 and of compressed token 2.

PACKED = jnp.array([[2] * 6 + [5] * 10], jnp.int32)


def test_packed_tokens_see_their_own_segment():
    window = mask("""
        1...............
        11..............
        111.............
        .111............
        ..111...........
        ...111..........
        ......1.........
        ......11........
        ......111.......
        .......111......
        ........111.....
        .........111....
        ..........111...
        ...........111..
        ............111.
        .............111
    """)
    # Token 2 (4 .. 7) has its first token in one document and its last in the other.
    compressed = mask("""
        .......
        .......
        .......
        1......
        1......
        11.....
        .......
        .......
        .......
        ...1...
        ...1...
        ...11..
        ...11..
        ...111.
        ...111.
        ...1111
    """)
    np.testing.assert_array_equal(reads("window", queries=16, segment_ids=PACKED)[0], window)
    np.testing.assert_array_equal(reads("compressed", queries=16, segment_ids=PACKED)[0], compressed)


def test_packed_candidates_start_at_the_block_of_the_first_token():
    """`num_initial` and `num_local` alone: blocks 0 and the own one, then 1 (where the document begins) and the own one."""
    config = NSAConfig(4, 2, 4, num_selected=2, num_initial=1, num_local=1, window=3)
    blocks = choose(jnp.zeros((1, 16, 1, 1)), jnp.zeros((1, 7, 1, 1)), config=config, num_keys=16, segment_ids=PACKED)
    expected = [[0, -1]] * 4 + [[0, 1]] * 2 + [[1, -1]] * 2 + [[1, 2]] * 4 + [[1, 3]] * 4
    assert blocks[0, :, 0].tolist() == expected
    selected = mask("""
        1...............
        11..............
        111.............
        1111............
        11111...........
        111111..........
        ......1.........
        ......11........
        ......111.......
        ......1111......
        ......11111.....
        ......111111....
        ......11....1...
        ......11....11..
        ......11....111.
        ......11....1111
    """)
    np.testing.assert_array_equal(reads("selected", queries=16, config=config, segment_ids=PACKED)[0], selected)


def test_packed_importance_ignores_other_segments():
    """All of the mass on tokens of the first document and on the shared one is nothing to the second."""
    config = NSAConfig(4, 2, 4, num_selected=3, num_initial=1, num_local=1, window=3)
    segment_ids = jnp.array([[0] * 6 + [1] * 18], jnp.int32)
    # Token 8 (block 4) is the best of the second document; token 2 is shared between both.
    key = jnp.asarray(log_probabilities(11, {1: 1.0, 2: 1.0, 8: 1e-6}))
    blocks = choose(
        jnp.ones((1, 1, 1, 1)), key, config=config, num_keys=24, scale=1.0, query_start=23, segment_ids=segment_ids
    )
    assert blocks.tolist() == [[[[1, 4, 5]]]]


def test_packed_equals_separate():
    """Documents of 16 and 20 tokens, both starting on a multiple of 4, both with more candidates than slots."""
    lengths, keys = (16, 20), 36
    query, _, selected, window, gates = random_inputs(queries=keys, keys=keys, batch=1)
    segment_ids = jnp.asarray(np.repeat([0, 1], lengths)[None], jnp.int32)
    compressed = jax.tree.map(lambda array: mean_compress(array, config=TINY), selected)
    out = apply((query, compressed, selected, window, gates), segment_ids=segment_ids)
    blocks = choose(query, compressed.key, config=TINY, num_keys=keys, segment_ids=segment_ids)

    start = 0
    for length in lengths:
        part = jax.tree.map(lambda array: array[:, start : start + length], (query, selected, window, gates))  # noqa: B023
        own_compressed = jax.tree.map(lambda array: mean_compress(array, config=TINY), part[1])
        own_out = apply((part[0], own_compressed, *part[1:]))
        own_blocks = np.asarray(choose(part[0], own_compressed.key, config=TINY, num_keys=length))
        assert_close(out[:, start : start + length], own_out, f"document at {start}")
        own_blocks = np.where(own_blocks >= 0, own_blocks + start // TINY.select_block, -1)
        np.testing.assert_array_equal(blocks[:, start : start + length], own_blocks)
        start += length


# Rule 11.


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_rounds_the_weights_and_the_result_once(dtype):
    """Against float32 from the same inputs: each weight may be off by half a unit in the last place, and so may the sum."""
    query, *rest = random_inputs(queries=24, keys=24, dtype=dtype, seed=9)
    inputs = (4 * query, *rest)  # larger scores, which rounding would spoil
    wide = jax.tree.map(lambda array: array.astype(jnp.float32), inputs)
    blocks = choose(wide[0], wide[1].key, config=TINY, num_keys=24)

    @jax.jit
    def run(inputs):
        out, backward = jax.vjp(lambda *inputs: apply(inputs, selected_blocks=blocks), *inputs)
        return out, backward(jnp.ones_like(out))

    (out, grads), (wide_out, wide_grads) = run(inputs), run(wide)
    magnitudes = [KeyValue(key, jnp.abs(value)) for key, value in wide[1:4]]
    sum_of_magnitudes = apply((wide[0], *magnitudes, wide[4]), selected_blocks=blocks)
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    allowed = half_ulp * (sum_of_magnitudes + np.abs(wide_out)) + 2e-6
    assert out.dtype == dtype
    np.testing.assert_array_less(np.abs(out.astype(jnp.float32) - wide_out), allowed)
    for array, grad, wide_grad in zip(*map(jax.tree.leaves, (inputs, grads, wide_grads)), strict=True):
        assert grad.dtype == array.dtype
        largest = np.max(np.abs(wide_grad))
        assert np.max(np.abs(grad.astype(jnp.float32) - wide_grad)) <= 4 * half_ulp * largest
    # The scores of blocks are in float32 throughout.
    assert_same_choice(
        np.asarray(choose(inputs[0], inputs[1].key, config=TINY, num_keys=24)),
        np.asarray(blocks),
        oracle.importance(wide[0], wide[1].key, config=TINY, num_keys=24),
    )


def test_gates_may_be_float32():
    """Beside float16 inputs: 0.5 + 2**-12, which float16 would round to 0.5, is not rounded; the output is."""
    query, *branches, gates = constant_values([[0], [1024], [-1024]])
    half = jax.tree.map(lambda array: array.astype(jnp.float16), (query, *branches))
    out = apply((*half, gates + jnp.array([0, 0.5 + 2**-12, 0.5])))
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out[0, :2, 0, 0], [0.25, 0.25])  # of one token, and of two at half weight


def test_scores_of_float16_do_not_overflow():
    """Scores of 4 * 200 * 200 / 2 = 80000 are above the largest float16; the key of the query's sign takes all."""
    key = jnp.full((1, 4, 1, 4), -200, jnp.float16).at[0, 1].set(200)
    pair = KeyValue(key, tile(jnp.eye(4, dtype=jnp.float16), 1))
    compressed = KeyValue(key[:, 1:2], pair.value[:, 1:2])
    query = jnp.full((1, 1, 3, 4), 200, jnp.float16)
    out = attend(
        query,
        compressed=compressed,
        selected=pair,
        window=pair,
        gates=jnp.eye(3, dtype=jnp.float16)[None, None],
        config=TINY,
        query_start=3,
    )
    np.testing.assert_array_equal(out[0, 0], np.eye(4)[[1, 1, 1]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_mean_compress_keeps_the_dtype(dtype):
    key = jnp.asarray(np.random.default_rng(10).normal(size=(1, 12, 2, 3)), dtype)
    mean = mean_compress(key, config=TINY)
    expected = oracle.mean_compress(key.astype(jnp.float32), TINY)
    assert mean.dtype == dtype
    tolerance = float(jnp.finfo(dtype).eps) / 2 * np.abs(expected) + 1e-6
    np.testing.assert_array_less(np.abs(mean.astype(jnp.float32) - expected), tolerance)


def test_every_dot_of_float32_is_at_the_highest_precision():
    def loss(*inputs):
        return jnp.sum(apply(inputs, attend=functools.partial(nsa_attention, implementation="xla")))

    inputs = random_inputs(queries=24, keys=24)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(5))))(*inputs)
    dots = [equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(dots) >= 6 * 2
    for dot in dots:
        if dot.outvars[0].aval.dtype == jnp.float32:
            assert dot.params["precision"] in (jax.lax.Precision.HIGHEST, (jax.lax.Precision.HIGHEST,) * 2), dot


def equations(jaxpr):
    """All equations of a jaxpr, those of the jaxprs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# Composition: the same numbers inside jit, vmap, checkpoint and scan.


@functools.cache
def layers():
    """Three problems of one shape with the output's size that of the query (V = H = 2), stacked on a leading axis."""
    draws = [random_inputs(queries=12, keys=12, seed=seed) for seed in (11, 12, 13)]
    draws = [
        (query, *(KeyValue(pair.key, pair.value[..., :2]) for pair in pairs), gates) for query, *pairs, gates in draws
    ]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *draws)


def at(tree, index):
    return jax.tree.map(lambda array: array[index], tree)


def loss(inputs):
    out = apply(inputs)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


value_and_grad = jax.jit(jax.value_and_grad(loss))


def assert_trees_close(actual, expected):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(one, other, "leaf")


def test_jit_changes_nothing():
    inputs = at(layers(), 0)
    eager = apply(inputs, attend=functools.partial(nsa_attention, implementation="xla"))
    assert_close(eager, apply(inputs), "out")


def test_vmap_and_grad_of_vmap():
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(loss)))(layers())
    total, of_sum = jax.value_and_grad(lambda inputs: jnp.sum(jax.vmap(loss)(inputs)))(layers())
    expected = [value_and_grad(at(layers(), i)) for i in range(3)]
    assert_close(values, np.array([value for value, _ in expected]), "loss")
    assert_close(total, sum(value for value, _ in expected), "sum")
    for i in range(3):
        assert_trees_close(at(grads, i), expected[i][1])
    assert_trees_close(of_sum, grads)


def test_vmap_over_sequences_with_their_own_positions():
    """A batch with a start for each sequence is `vmap` of one sequence with a traced scalar start."""
    inputs = random_inputs(queries=5, keys=16, seed=14)
    start = jnp.array([11, 2], jnp.int32)
    segment_ids = jnp.array([[0] * 6 + [1] * 10, [0] * 16], jnp.int32)
    batched = {"query_start": start, "segment_ids": segment_ids, "window_start": jnp.zeros_like(start)}

    def one(inputs, query_start, segment_ids, window_start):
        inputs = jax.tree.map(lambda array: array[None], inputs)
        arguments = {"query_start": query_start, "segment_ids": segment_ids[None], "window_start": window_start}
        return apply(inputs, **arguments)[0]

    out = jax.vmap(one)(inputs, *batched.values())
    assert_close(out, apply(inputs, **batched), "out")


def test_checkpoint_gives_the_same_gradients():
    inputs = at(layers(), 0)
    assert_trees_close(jax.jit(jax.grad(jax.checkpoint(loss)))(inputs), value_and_grad(inputs)[1])


@pytest.mark.parametrize("wrap", [lambda layer: layer, jax.checkpoint], ids=["plain", "checkpoint"])
def test_scan_over_layers(wrap):
    """The output of a layer is the query of the next."""
    query, *rest = layers()

    def layer(query, rest):
        return apply((query, *rest)), None

    def scanned(query, rest):
        return jnp.sum(jax.lax.scan(wrap(layer), query, rest)[0] ** 2)

    def unrolled(query, rest):
        for i in range(3):
            query, _ = layer(query, at(rest, i))
        return jnp.sum(query**2)

    actual = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(query[0], tuple(rest))
    expected = jax.jit(jax.value_and_grad(unrolled, argnums=(0, 1)))(query[0], tuple(rest))
    assert_trees_close(actual, expected)


# Memory: compiled, never run.


def peak_memory(length):
    """Temporary bytes of a forward and a backward pass over `length` tokens with the paper's config."""
    config = NSAConfig()

    def array(length, heads, size=64):
        return jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32)

    def pair(length):
        return KeyValue(array(length, 2), array(length, 2))

    def loss(*inputs):
        return jnp.sum(apply(inputs, config=config) ** 2)

    inputs = (array(length, 8), pair(config.num_compressed(length)), pair(length), pair(length), array(length, 8, 3))
    analysis = jax.jit(jax.grad(loss, argnums=tuple(range(5)))).lower(*inputs).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def test_memory_grows_with_the_length_and_not_its_square():
    assert peak_memory(8192) <= 4.5 * peak_memory(2048)
    assert peak_memory(32768) < 2**30
