"""Named problem cases, seeded inputs and the tolerance rule: one set for tests and benchmarks, for every implementation."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from nsa_jax.config import NSAConfig
from nsa_jax.reference import importance, probabilities, visible_compressed
from nsa_jax.shapes import CompressedKey, Gates, KeyValue, Position, Query, SegmentIds

# Scores are tied if they differ by less, beside the best of a query: by a few roundings of float32 sums.
TIE = 32 * float(jnp.finfo(jnp.float32).eps)

SMALL = NSAConfig(
    compress_block=8, compress_stride=4, select_block=16, num_selected=4, num_initial=1, num_local=2, window=20
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: sizes by name, in tokens or counts.

    `query_start` and `window_start` are an int or one per sequence; `segments` gives the lengths of each sequence's packed
    documents.
    """

    config: NSAConfig = SMALL
    batch: int = 1
    queries: int = 70  # T
    keys: int = 70  # S
    heads: int = 4  # N
    kv_heads: int = 2  # K
    head_dim: int = 16  # H
    value_head_dim: int = 16  # V
    query_start: int | tuple[int, ...] = 0
    window_start: int | tuple[int, ...] = 0
    window_keys: int | None = None  # W; S if None
    segments: tuple[tuple[int, ...], ...] | None = None


CASES: dict[str, Case] = {
    "plain": Case(batch=2),
    "one_token": Case(queries=1, keys=1),
    "shorter_than_compress_block": Case(queries=7, keys=7),
    "exactly_compress_block": Case(queries=8, keys=8),
    "one_past_select_block": Case(queries=17, keys=17),
    "odd_length": Case(queries=83, keys=83, heads=6, kv_heads=2, head_dim=40, value_head_dim=20),
    "more_slots_than_blocks": Case(
        config=dataclasses.replace(SMALL, num_selected=64), queries=61, keys=61, heads=2, kv_heads=1
    ),
    "group_1": Case(heads=3, kv_heads=3, queries=65, keys=65),
    "group_5": Case(config=NSAConfig(8, 4, 12, 4, 1, 2, 20), heads=5, kv_heads=1, queries=59, keys=59, head_dim=12),
    "group_16": Case(heads=16, kv_heads=1, queries=50, keys=50),
    "head_sizes_differ": Case(head_dim=24, value_head_dim=8),
    "no_overlap": Case(config=NSAConfig(16, 16, 16, 3, 1, 1, 9), queries=75, keys=75),
    "deep_overlap": Case(config=NSAConfig(12, 3, 24, 3, 1, 1, 30), queries=97, keys=97),
    "long_block": Case(config=NSAConfig(32, 16, 256, 2, 0, 1, 40), queries=35, keys=530, query_start=490, heads=2),
    "nothing_forced": Case(config=dataclasses.replace(SMALL, num_initial=0, num_local=0, num_selected=2)),
    "first_forced": Case(config=dataclasses.replace(SMALL, num_initial=1, num_local=0, num_selected=1), heads=6),
    "many_forced": Case(
        config=dataclasses.replace(SMALL, num_initial=2, num_local=3, num_selected=6), queries=130, keys=130
    ),
    "many_slots_and_heads": Case(
        config=NSAConfig(2, 1, 2, 64, 1, 2, 5), queries=12, keys=300, query_start=288, heads=33, kv_heads=1
    ),
    "window_1": Case(config=dataclasses.replace(SMALL, window=1)),
    "window_longer_than_text": Case(config=dataclasses.replace(SMALL, window=200)),
    "query_start": Case(queries=29, keys=90, query_start=61),
    "query_start_per_sequence": Case(batch=3, queries=21, keys=80, query_start=(0, 37, 59)),
    "window_start": Case(
        batch=3, queries=21, keys=80, query_start=(0, 37, 59), window_start=(-7, 20, 40), window_keys=40
    ),
    "one_query_late": Case(batch=2, queries=1, keys=77, query_start=(76, 40)),
    "segments_aligned": Case(batch=2, queries=96, keys=96, segments=((32, 48, 16), (96,))),
    "segments_unaligned": Case(batch=2, queries=91, keys=91, segments=((5, 1, 40, 45), (30, 3, 58))),
    "segments_and_start": Case(batch=2, queries=30, keys=91, query_start=(61, 20), segments=((5, 41, 45), (30, 3, 58))),
}


PAPER = NSAConfig()

# For a GPU: texts that take several tiles, pieces and chunks, at the sizes of models. Where few blocks are selected, the
# reference gathers them.
LONG_CASES: dict[str, Case] = {
    "long_head_32": Case(PAPER, queries=1500, keys=1500, heads=16, kv_heads=1, head_dim=32, value_head_dim=32),
    "long_head_256": Case(PAPER, queries=1300, keys=1300, heads=16, kv_heads=1, head_dim=256, value_head_dim=256),
    "long_paper": Case(PAPER, queries=4000, keys=4000, heads=16, kv_heads=1, head_dim=128, value_head_dim=128),
    "long_gathered": Case(
        dataclasses.replace(PAPER, num_selected=6),
        queries=4096,
        keys=4096,
        heads=8,
        kv_heads=2,
        head_dim=64,
        value_head_dim=64,
    ),
    "long_head_192": Case(PAPER, queries=2050, keys=2050, heads=32, kv_heads=2, head_dim=192, value_head_dim=128),
    "long_group_1": Case(PAPER, batch=2, queries=2047, keys=2047, heads=2, kv_heads=2, head_dim=64, value_head_dim=64),
    "long_group_8": Case(PAPER, queries=2048, keys=2048, heads=8, kv_heads=1, head_dim=96, value_head_dim=128),
    "long_group_64": Case(PAPER, queries=1100, keys=1100, heads=64, kv_heads=1, head_dim=256, value_head_dim=256),
    "long_segments": Case(
        PAPER,
        batch=2,
        queries=2500,
        keys=2500,
        heads=16,
        kv_heads=1,
        head_dim=128,
        value_head_dim=128,
        segments=((1000, 5, 40, 1455), (2500,)),
    ),
    "long_query_start": Case(
        PAPER,
        batch=2,
        queries=300,
        keys=6000,
        heads=8,
        kv_heads=2,
        head_dim=128,
        value_head_dim=128,
        query_start=(5700, 1234),
    ),
}


class Inputs(NamedTuple):
    """Arguments of `nsa_attention` for a case."""

    query: Query
    compressed: KeyValue
    selected: KeyValue
    window: KeyValue
    gates: Gates
    query_start: Position
    window_start: Position
    segment_ids: SegmentIds | None

    def keywords(self) -> dict[str, Any]:
        """All but the query, by name."""
        return {name: value for name, value in self._asdict().items() if name != "query"}


def input_shapes(case: Case, *, dtype: Any = jnp.float32) -> Inputs:
    """Shapes and dtypes of `make_inputs`, of which nothing is drawn."""

    def array(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def branch(length: int) -> KeyValue:
        where = (case.batch, length, case.kv_heads)
        return KeyValue(array(*where, case.head_dim), array(*where, case.value_head_dim))

    def position(start: int | tuple[int, ...]) -> Any:
        return array(*(() if isinstance(start, int) else (case.batch,)), dtype=jnp.int32)

    return Inputs(
        query=array(case.batch, case.queries, case.heads, case.head_dim),
        compressed=branch(case.config.num_compressed(case.keys)),
        selected=branch(case.keys),
        window=branch(case.keys if case.window_keys is None else case.window_keys),
        gates=array(case.batch, case.queries, case.heads, 3),
        query_start=position(case.query_start),
        window_start=position(case.window_start),
        segment_ids=None if case.segments is None else array(case.batch, case.keys, dtype=jnp.int32),
    )


def make_inputs(case: Case, *, seed: int = 0, dtype: Any = jnp.float32) -> Inputs:
    """Seeded Gaussian inputs: drawn in float32, then rounded to `dtype`; gates uniform in [0, 1]."""
    # NumPy's draws need no compilation for each shape.
    random, shapes = np.random.default_rng(seed), input_shapes(case, dtype=dtype)

    def normal(x: Any) -> Array:
        return jnp.asarray(random.standard_normal(x.shape, np.float32), x.dtype)

    segment_ids = None
    if case.segments is not None:
        rows = [np.repeat(np.arange(len(lengths)), lengths) for lengths in case.segments]
        segment_ids = jnp.asarray(np.stack(rows), jnp.int32)

    def position(start: int | tuple[int, ...]) -> Position:
        return start if isinstance(start, int) else jnp.asarray(start, jnp.int32)

    query, compressed, selected, window = jax.tree.map(normal, shapes[:4])
    return Inputs(
        query=query,
        compressed=compressed,
        selected=selected,
        window=window,
        gates=jnp.asarray(random.random(shapes.gates.shape, np.float32), dtype),
        query_start=position(case.query_start),
        window_start=position(case.window_start),
        segment_ids=segment_ids,
    )


def assert_as_accurate(
    actual: Float[Array, "..."],
    reference: Float[Array, "..."],
    exact: Float[Array, "..."] | Float[np.ndarray, "..."],
    *,
    name: str = "result",
    terms: int = 1024,
) -> None:
    """The tolerance rule: an implementation errs at most twice as much as the reference does in the same dtype.

        max |actual - exact| <= 2 * max |reference - exact| + floor

    Args:
        actual: what is judged, in its dtype.
        reference: the xla implementation's result in that dtype.
        exact: the xla implementation's result in float32, or an oracle's in float64, from the same (rounded) inputs.
        name: for the message.
        terms: how many numbers are summed, in float32, for one of the result.

    The floor is the rounding of the largest result to the dtype, and for float32 that of a sum of so many terms.

    Raises:
        AssertionError: the error is larger, or something is not finite.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes({name: actual}, {name: reference})
    chex.assert_equal_shape([actual, exact], custom_message=name)
    chex.assert_tree_all_finite({name: actual})
    got, want, ideal = (np.asarray(x, np.float64) for x in (actual, reference, exact))
    if not got.size:
        return
    roundings = terms**0.5 if actual.dtype == jnp.float32 else 1
    floor = roundings * float(jnp.finfo(actual.dtype).eps) * np.abs(ideal).max()
    error, allowed = np.abs(got - ideal).max(), 2 * np.abs(want - ideal).max() + floor
    if error > allowed:
        where = np.unravel_index(np.abs(got - ideal).argmax(), got.shape)
        raise AssertionError(
            f"{name}: error {error:.3g} at {tuple(int(i) for i in where)} exceeds {allowed:.3g} "
            f"(twice the reference's {np.abs(want - ideal).max():.3g} plus {floor:.3g})"
        )


def block_scores(
    query: Query,
    compressed_key: CompressedKey,
    *,
    config: NSAConfig,
    num_keys: int,
    query_start: Position = 0,
    segment_ids: SegmentIds | None = None,
) -> Float[Array, "B T K M"]:
    """The importance of every block for every query (eq. 8-10), as the reference has it in float32."""
    batch, length, _, size = query.shape
    num_compressed, kv_heads = compressed_key.shape[1:3]
    start = jnp.broadcast_to(jnp.asarray(query_start, jnp.int32), (batch,))
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]

    def one_sequence(query: Array, key: Array, positions: Array, segment_ids: Array | None) -> Array:
        visible = visible_compressed(positions, num_compressed, segment_ids, config)

        def one_head(query: Array, key: Array) -> Array:
            p_cmp = probabilities(query, key, visible, size**-0.5).sum(axis=1)
            return importance(p_cmp, config.num_blocks(num_keys), config)

        return jax.vmap(one_head, in_axes=1, out_axes=1)(query, key)

    grouped = query.reshape(batch, length, kv_heads, -1, size)
    arrays = (grouped.astype(jnp.float32), compressed_key.astype(jnp.float32), positions, segment_ids)
    return jax.vmap(one_sequence)(*arrays)


def assert_best_blocks(actual: ArrayLike, expected: ArrayLike, scores: ArrayLike) -> int:
    """The same blocks, or, where they differ, blocks whose scores are as good: two scores may be tied but for rounding.

    Args:
        actual, expected: `[B, T, K, A]`.
        scores: `[B, T, K, M]`, of all blocks.

    Returns:
        The number of rows that differ.

    Raises:
        AssertionError: a block was chosen that scores less than one that was not, or blocks do not ascend, -1 last.
    """
    got, want = (np.asarray(x) for x in (actual, expected))
    assert got.shape == want.shape and got.dtype == want.dtype == np.int32
    differing = np.argwhere(np.any(got != want, axis=-1))
    scores = np.asarray(scores)
    for at in map(tuple, differing.tolist()):
        row, wanted = got[at].tolist(), want[at].tolist()
        chosen = sorted({j for j in row if j >= 0})
        assert row == chosen + [-1] * (len(row) - len(chosen)), f"blocks at {at} do not ascend: {row}"
        gained, lost = set(row) - set(wanted), set(wanted) - set(row)
        assert -1 not in gained | lost, f"blocks at {at}: {row}, not {wanted}"
        worst, best = min(scores[at][j] for j in gained), max(scores[at][j] for j in lost)
        floor = TIE * scores[at].max()
        assert worst >= best - floor, f"blocks at {at}: {row}, not {wanted}; score {worst} instead of {best}"
    return len(differing)
