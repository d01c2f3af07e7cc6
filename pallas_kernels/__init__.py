"""Speed: Native Sparse Attention in Pallas kernels for NVIDIA GPUs. Imports jax and jaxtyping, never `nsa_jax`.

attention.py             the three branches, their gated sum and its gradient: the one `custom_vjp`
positions.py             visibility: which keys each query may read, as arrays
range_attention.py       kernels of branches in which a query reads one range of keys:
  window_attention.py      the last w tokens
  compressed_attention.py  the compressed tokens that are complete
block_selection.py       importance of blocks and the choice of n
selected_attention.py    kernels that read the chosen blocks, by query
selected_by_block.py     the same by block, for small groups; dk and dv
decode_attention.py      one query a sequence against a cache
inverse_lists.py         the queries that chose each block
flash.py                 what the kernels share
tiles.py                 speed knobs; tiles.json: what was found fastest
support.py               what the kernels take
"""

from pallas_kernels.attention import attend, select_blocks
from pallas_kernels.decode_attention import decode_step
from pallas_kernels.support import default_device, why_not, why_not_here
from pallas_kernels.tiles import why_no_room

__all__ = ["attend", "decode_step", "default_device", "select_blocks", "why_no_room", "why_not", "why_not_here"]
