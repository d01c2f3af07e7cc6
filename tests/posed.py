"""Cases posed as problems with their solutions: what the loops of `oracle.py` make of them, in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nsa_jax import KeyValue
from nsa_jax.testing import Case, Inputs, assert_as_accurate, assert_best_blocks, make_inputs
from tests import oracle

ROUNDING = 1e-5  # of float32, in sums of products of a few numbers of size 1


class Solution(NamedTuple):
    out: Any
    gradients: tuple  # of query, the three branches' keys and values, gates
    blocks: Any  # its own choice


class Problem(NamedTuple):
    """A case in a dtype, and what the oracle makes of it."""

    case: Case
    inputs: Inputs
    cotangent: jax.Array
    exact: Solution

    @property
    def arguments(self):
        return self.inputs, self.exact.blocks, self.cotangent

    @property
    def choice(self):
        """Arguments of the choice of blocks."""
        where = dict(query_start=self.inputs.query_start, segment_ids=self.inputs.segment_ids)
        return dict(config=self.case.config, num_keys=self.case.keys, **where)


def pose(case: Case, dtype: str = "float32") -> Problem:
    inputs = make_inputs(case, dtype=dtype)
    if dtype == "bfloat16":
        # Gates may be wider than the rest.
        inputs = inputs._replace(gates=inputs.gates.astype(jnp.float32))
    shape = (case.batch, case.queries, case.heads, case.value_head_dim)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)
    problem = Problem(case, inputs, cotangent, Solution(None, None, None))
    blocks = oracle.select_blocks(inputs.query, inputs.compressed.key, **problem.choice)
    where = dict(query_start=inputs.query_start, window_start=inputs.window_start, segment_ids=inputs.segment_ids)
    where.update(config=case.config, selected_blocks=blocks)
    gradients = oracle.gradients(*inputs[:5], cotangent, **where)
    return problem._replace(exact=Solution(oracle.attention(*inputs[:5], **where), tuple(gradients), blocks))


def assert_solves(actual: Solution, problem: Problem, reference: Solution | None = None) -> None:
    """As accurate as `reference`, or where there is none, exact but for rounding."""
    leaves = jax.tree_util.tree_flatten_with_path((actual.out, actual.gradients))[0]
    exact = jax.tree.leaves((problem.exact.out, problem.exact.gradients if actual.gradients else ()))
    if reference is None:
        others = [jnp.asarray(x, jnp.float32) for x in exact]
    else:
        others = jax.tree.leaves((reference.out, reference.gradients))
    for (path, got), want, ideal in zip(leaves, others, exact, strict=True):
        # Wider gates have a gradient as wide, but it comes of outputs that are kept in the values' dtype.
        got, want = got.astype(problem.cotangent.dtype), want.astype(problem.cotangent.dtype)
        assert_result(got, want, ideal, name=jax.tree_util.keystr(path))
    scores = oracle.importance(problem.inputs.query, problem.inputs.compressed.key, **problem.choice)
    assert_best_blocks(actual.blocks, problem.exact.blocks, scores)


def assert_result(actual: jax.Array, reference: jax.Array, exact: Any, **more: Any) -> None:
    """`assert_as_accurate`, but of a result that is 0 (a softmax over one key has no gradient) only that it is rounding."""
    if actual.dtype == jnp.float32 and np.abs(exact).max(initial=0) < ROUNDING:
        assert np.abs(actual).max(initial=0) < ROUNDING, more
    else:
        assert_as_accurate(actual, reference, exact, **more)


def read_keys(problem: Problem) -> list[np.ndarray]:
    """Of each branch, which keys any query reads, [B, length, K]."""
    case, inputs = problem.case, problem.inputs
    where = inputs.query_start, inputs.window_start, inputs.segment_ids
    posed = oracle.Problem(*inputs[:5], case.config, None, *where, problem.exact.blocks)
    read = [np.zeros(pair.key.shape[:3], bool) for pair in posed.pairs]
    for b, r, k in np.ndindex(case.batch, case.queries, case.kv_heads):
        for branch, mask in enumerate(read):
            mask[b, posed.seen(branch, b, r, k * posed.group), k] = True
    return read


def with_nan(inputs: Inputs, masks: list[np.ndarray]) -> Inputs:
    pairs = [
        KeyValue(*(jnp.where(mask[..., None], jnp.nan, array) for array in pair))
        for pair, mask in zip(inputs[1:4], masks, strict=True)
    ]
    return Inputs(inputs.query, *pairs, *inputs[4:])


def ring_of(window: KeyValue, lengths: Any, size: int, *, unwritten: float = np.nan) -> KeyValue:
    """The last `size` tokens of each sequence as the cache keeps them: the token at position p in row p % size."""
    rings = []
    for array in window:
        ring = np.full((array.shape[0], size, *array.shape[2:]), unwritten, np.float32)
        for b, length in enumerate(np.asarray(lengths).tolist()):
            for p in range(max(0, length - size), length):
                ring[b, p % size] = np.asarray(array[b, p], np.float32)
        rings.append(jnp.asarray(ring, array.dtype))
    return KeyValue(*rings)
