"""What the kernels take: a case that they do not take is refused with the reason, never computed as something else."""

import math
from typing import Any

import jax

from pallas_kernels.block_selection import MAX_BLOCKS, MAX_SELECTED
from pallas_kernels.flash import Config

MIN_CAPABILITY = 8.0
MAX_HEAD = 256
MAX_GROUP = 64


def default_device() -> Any:
    """Where JAX computes what is not placed: the first device, or that of `jax.default_device`."""
    config: Any = jax.config  # whose options have no types
    chosen = config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


def capability_of(device: Any) -> str:
    """Its compute capability, as "9.0"; "none" of what is no NVIDIA GPU."""
    return str(getattr(device, "compute_capability", "") or "none")


def why_not_here() -> str | None:
    """Why the kernels cannot run on the default device; None if they can."""
    device = default_device()
    if device.platform != "gpu":
        return f"the kernels run on NVIDIA GPUs, and this device is {device.device_kind} ({device.platform})"
    capability = capability_of(device)
    try:
        enough = float(capability) >= MIN_CAPABILITY
    except ValueError:
        enough = False
    if enough:
        return None
    return (
        f"the kernels need an NVIDIA GPU of compute capability {MIN_CAPABILITY} or more, "
        f"and {device.device_kind} has {capability}"
    )


def why_not(
    query: Any, *, kv_heads: int, config: Config, num_slots: int, num_keys: int, value_size: int, scale: float
) -> str | None:
    """Why the kernels do not take a problem, on any device; None if they do.

    Args:
        query: `[B, T, N, H]`.
        num_slots: blocks that a query reads at most, A.
    """
    batch, length, num_heads, _ = query.shape
    if num_heads // kv_heads > MAX_GROUP:
        return f"the kernels take at most {MAX_GROUP} query heads for each key/value head, not {num_heads // kv_heads}"
    for name, size in (("head size", query.shape[3]), ("value head size", value_size)):
        if size > MAX_HEAD:
            return f"the kernels take a {name} of at most {MAX_HEAD}, not {size}"
    if not 0.0 < scale < math.inf:
        return f"the kernels take a positive, finite scale, not {scale}"
    if num_slots > MAX_SELECTED:
        return f"the kernels read at most {MAX_SELECTED} blocks a query, not {num_slots}"
    num_blocks = -(-num_keys // config.select_block)
    if num_blocks > MAX_BLOCKS:
        return f"the kernels choose from at most {MAX_BLOCKS} blocks, and {num_keys} keys have {num_blocks}"
    chosen = batch * length * kv_heads * num_slots
    if chosen >= 2**31:
        return f"the kernels count to 2 ** 31 chosen blocks, and these queries choose {chosen}"
    return None
