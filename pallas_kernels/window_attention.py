"""The sliding window: query t reads the tokens t-w+1 .. t (section 3.3.3 of arXiv 2502.11089).

A range of keys for each query; the kernels are those of `range_attention.py`.
"""

from jaxtyping import Array, Float

from pallas_kernels import range_attention
from pallas_kernels.flash import Launch, Ranges
from pallas_kernels.range_attention import Grouped, QuerySide, RowValues


def window_forward(
    query: Grouped,
    key: Float[Array, "B W K H"],
    value: Float[Array, "B W K V"],
    ranges: Ranges,
    *,
    scale: float,
    launch: Launch,
) -> tuple[Float[Array, "B T K G V"], RowValues]:
    """Output and log-sum-exp (base 2) of the window branch; `ranges` as `positions.window_ranges` gives them."""
    return range_attention.forward(
        query, key, value, ranges, scale=scale, holes=False, launch=launch, name="nsa_window_forward"
    )


def window_key_value_gradients(
    rows: QuerySide,
    key: Float[Array, "B W K H"],
    value: Float[Array, "B W K V"],
    ranges: Ranges,
    *,
    scale: float,
    launch: Launch,
) -> tuple[Float[Array, "B W K H"], Float[Array, "B W K V"]]:
    """dk and dv of the window branch."""
    return range_attention.key_value_gradients(
        rows, key, value, ranges, scale=scale, slices=1, launch=launch, name="nsa_window_dkv"
    )
