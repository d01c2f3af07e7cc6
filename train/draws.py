"""Random numbers of synthetic examples, from raw bits: the same under every version of NumPy."""

import numpy as np
import numpy.typing as npt


class Draws:
    """Draws in sequence from PCG64, whose raw bits NumPy promises never to change (of `Generator` it promises no such thing).

    Args:
        seed: whole numbers, not negative, that name the sequence, such as (seed of the run, index of the example). Of
            up to four, zeros at the end do not count: (1, 2) and (1, 2, 0) are one sequence.
    """

    def __init__(self, *seed: int):
        self._bits = np.random.PCG64(seed)

    def raw(self, *shape: int) -> npt.NDArray[np.uint64]:
        """64 random bits each."""
        return np.asarray(self._bits.random_raw(int(np.prod(shape, dtype=np.int64))), np.uint64).reshape(shape)

    def below(self, bound: int, *shape: int) -> npt.NDArray[np.int64]:
        """Whole numbers in 0 .. bound - 1, all as likely (to within 2 ** -64 * bound)."""
        return (self.raw(*shape) % np.uint64(bound)).astype(np.int64)

    def one_below(self, bound: int) -> int:
        return int(self.below(bound, 1)[0])

    def distinct(self, bound: int, rows: int, count: int) -> npt.NDArray[np.int64]:
        """`[rows, count]` whole numbers in 0 .. bound - 1, those of a row distinct and in random order."""
        return np.argsort(self.raw(rows, bound), axis=1, kind="stable")[:, :count]

    def distinct_weighted(self, weights: npt.NDArray[np.float64], rows: int, count: int) -> npt.NDArray[np.int64]:
        """As `distinct` with bound `len(weights)`, drawn one after the other in proportion to the weights of what is left.

        The order of exponential variables with these rates is the order of such draws.
        """
        uniform = ((self.raw(rows, len(weights)) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return np.argsort(-np.log(uniform) / weights, axis=1, kind="stable")[:, :count]
