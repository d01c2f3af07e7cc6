"""The letters of this library's shapes, and the array types made from them.

    B  sequences in the batch               H  head size of queries and keys
    T  query tokens                         V  head size of values
    S  key tokens                           C  compressed tokens
    N  query heads                          M  selection blocks
    K  key/value heads                      A  selected blocks per query
    G  query heads per key/value head, N / K; query head n reads key/value head n // G

The layout is always `[B, T, N, H]`, as in `jax.nn.dot_product_attention`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int32, Integer

Query = Float[Array, "B T N H"]
Key = Float[Array, "B S K H"]
Value = Float[Array, "B S K V"]
CompressedKey = Float[Array, "B C K H"]
Gates = Float[Array, "B T N 3"]  # compressed, selected, window
Out = Float[Array, "B T N V"]
Blocks = Int32[Array, "B T K A"]
SegmentIds = Int32[Array, "B S"]

# A position in tokens: one for the batch (a Python int or a traced scalar) or one per sequence.
Position = int | Int32[Array, ""] | Int32[Array, "B"]

# How many tokens of each sequence are real, as users give it.
Lengths = Int32[Array, "B"] | Integer[np.ndarray, "B"] | Sequence[int | Array]


class KeyValue(NamedTuple):
    """The keys and values of one branch, or of a part of it: `[B, length, K, H]` and `[B, length, K, V]`."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
