"""Speed knobs of the kernels: how much a program holds. None of them changes what is computed."""

import dataclasses

from pallas_kernels.flash import Tile


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A tile for each kernel."""

    window_forward: Tile = Tile(128, 64, 8, 3)
    window_dq: Tile = Tile(64, 64, 4, 2)
    window_dkv: Tile = Tile(64, 64, 4, 2)
    compressed_forward: Tile = Tile(128, 128, 8, 3)
    compressed_dq: Tile = Tile(64, 64, 4, 2)
    compressed_dkv: Tile = Tile(64, 64, 4, 2)
    scores: Tile = Tile(128, 32, 8, 3)
    choice: Tile = Tile(2, 0, 1, 1)
    selected_forward: Tile = Tile(0, 0, 2, 2)
    selected_dq: Tile = Tile(0, 0, 2, 2)
    selected_dkv: Tile = Tile(64, 0, 4, 2)
    selected_sum: Tile = Tile(0, 0, 4, 2)
