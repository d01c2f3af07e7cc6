"""nsa_jax/overlap.py by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import overlap


def test_union_sizes_by_hand():
    #             queries 0 and 1: {0 2 5} and {0 3 5}; 2 and 3: {1} and {1 2}; 4 has no neighbour
    head = [[0, 2, 5], [0, 3, 5], [1, -1, -1], [1, 2, -1], [7, 8, 9]]
    same = [[0, 1, 2]] * 5
    blocks = jnp.asarray([head, same], jnp.int32).swapaxes(0, 1)[None]
    assert overlap.mean_union(blocks, 1) == pytest.approx(((3 + 3 + 1 + 2 + 3) / 5 + 3) / 2)
    assert overlap.mean_union(blocks, 2) == pytest.approx(((4 + 2) / 2 + 3) / 2)
    assert overlap.mean_union(blocks, 4) == pytest.approx((5 + 3) / 2)  # 0 1 2 3 5
    np.testing.assert_allclose(overlap.mean_unions(blocks, 4), [5, 3])
    assert math.isnan(overlap.mean_union(blocks, 8))
    assert list(overlap.union_sizes(blocks)) == ["2", "4", "8", "16"]
