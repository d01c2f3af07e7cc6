"""A PyTorch NSA beside ours: `fla.ops.nsa` of flash-linear-attention, where torch and that package are installed.

It computes something else, on its own terms; `DIFFERS` goes into the output and the record.
"""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.problems import Shape
from benchmarks.timing import (
    LONG_SECONDS,
    MOST_CALLS,
    ROUND_SECONDS,
    ROUNDS,
    ROUNDS_OF_LONG_CALLS,
    Timing,
    attempt,
)
from nsa_jax import NSAConfig

DIFFERS = (
    "compressed tokens are means of whole selection blocks (block = stride = select block, no overlap: 1/4 as many as with "
    "32/16/64), made inside the timed call",
    "one set of keys and values for all branches",
    "the window branch is flash_attn's, and left out where that is not installed",
    "queries are random normal only",
)


def why_not(shape: Shape) -> str | None:
    """Why the peer cannot be timed here; None if it can."""
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("fla.ops.nsa.parallel")
    except Exception as error:
        return f"fla-core and torch are needed: {type(error).__name__}: {error}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    group = shape.heads // shape.kv_heads
    if group < 16 or group & (group - 1):
        return f"it takes groups of 16, 32, 64, ... query heads, not {group}"
    return None


def measure_peer(shape: Shape, *, length: int, config: NSAConfig) -> dict[str, Any]:
    """Entries `forward`, `backward` and `both` for the record, by the rule of `timing.py`."""
    torch = importlib.import_module("torch")
    parallel_nsa = importlib.import_module("fla.ops.nsa.parallel").parallel_nsa
    window = config.window if importlib.util.find_spec("flash_attn") else 0
    dtype = getattr(torch, shape.dtype)
    torch.manual_seed(0)

    def normal(heads: int, size: int) -> Any:
        return torch.randn(shape.batch, length, heads, size, device="cuda", dtype=dtype).requires_grad_()

    try:
        query, key = normal(shape.heads, shape.head_dim), normal(shape.kv_heads, shape.head_dim)
        value = normal(shape.kv_heads, shape.value_head_dim)
        gates = [torch.rand_like(query[..., 0]).requires_grad_() for _ in range(3)]
        wanted = [query, key, value, *(gates if window else gates[:2])]

        def forward() -> Any:
            return parallel_nsa(
                query,
                key,
                value,
                *gates,
                block_counts=config.num_selected,
                block_size=config.select_block,
                window_size=window,
            )

        with torch.no_grad():
            cotangent = torch.randn_like(forward())

        def forward_alone() -> None:
            with torch.no_grad():
                forward()

        def backward_alone() -> Timing:
            out = forward()
            return _measure(lambda: torch.autograd.grad(out, wanted, cotangent, retain_graph=True), torch)

        entries: dict[str, Any] = {
            "forward": attempt(lambda: _measure(forward_alone, torch)),
            "backward": attempt(backward_alone),
            "both": attempt(lambda: _measure(lambda: torch.autograd.grad(forward(), wanted, cotangent), torch)),
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    torch.cuda.empty_cache()
    return entries | {"window": window}


def _measure(call: Callable[[], Any], torch: Any) -> Timing:
    def seconds(calls: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(2)  # its autotuning, too
    one = seconds(1)
    calls = max(1, min(MOST_CALLS, int(ROUND_SECONDS / one)))
    rounds = tuple(seconds(calls) * 1e3 / calls for _ in range(ROUNDS if one < LONG_SECONDS else ROUNDS_OF_LONG_CALLS))
    return Timing(statistics.median(rounds), rounds, calls)
