"""Attention to compressed tokens: query t reads token i from its last token on, i*d + l - 1 <= t (eq. 7).

A range of keys for each query; the kernels are those of `range_attention.py`. The log-sum-exp is kept for the backward
pass, and for `block_selection.py`, whose importance is made of the same softmax.
"""

from jaxtyping import Array, Float

from pallas_kernels import range_attention
from pallas_kernels.flash import Launch, Ranges
from pallas_kernels.range_attention import Grouped, QuerySide, RowValues

# Few keys are read by very many queries: a tile of keys is shared by as many programs as fill a large GPU many times, of
# which those of slices before the tile have nothing to do.
PROGRAMS = 4096
MAX_SLICES = 64


def compressed_forward(
    query: Grouped,
    key: Float[Array, "B C K H"],
    value: Float[Array, "B C K V"],
    ranges: Ranges,
    *,
    scale: float,
    holes: bool,
    launch: Launch,
) -> tuple[Float[Array, "B T K G V"], RowValues]:
    """Output and log-sum-exp (base 2) of the compressed branch; `ranges` as `positions.compressed_ranges` gives them.

    With packed documents there are `holes`: a compressed token that lies in two documents is read by none.
    """
    return range_attention.forward(
        query, key, value, ranges, scale=scale, holes=holes, launch=launch, name="nsa_compressed_forward"
    )


def compressed_key_value_gradients(
    rows: QuerySide,
    key: Float[Array, "B C K H"],
    value: Float[Array, "B C K V"],
    ranges: Ranges,
    *,
    scale: float,
    launch: Launch,
) -> tuple[Float[Array, "B C K H"], Float[Array, "B C K V"]]:
    """dk and dv of the compressed branch."""
    batch, num_compressed, kv_heads, _ = key.shape
    _, length, _, group, _ = rows.query.shape
    programs = batch * kv_heads * -(-num_compressed // launch.tile.keys)
    tiles_of_rows = -(-length * group // launch.tile.rows)
    slices = max(1, min(MAX_SLICES, PROGRAMS // max(1, programs), tiles_of_rows))
    return range_attention.key_value_gradients(
        rows, key, value, ranges, scale=scale, slices=slices, launch=launch, name="nsa_compressed_dkv"
    )
