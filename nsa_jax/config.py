"""What is computed: `NSAConfig`, and `check_inputs`, which raises every input error of `nsa_attention` and `select_blocks`.

Imports neither jax nor flax: command lines read the config before they pay for jax.
"""

import dataclasses
from typing import Any

FLOATS = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class NSAConfig:
    """Sizes of Native Sparse Attention, in tokens unless the name ends otherwise; the defaults are the paper's.

    Args:
        compress_block: tokens that one compressed token stands for (the paper's l); a multiple of `compress_stride`.
        compress_stride: tokens between the starts of two compressed tokens (d).
        select_block: tokens in one selection block (l'); a multiple of `compress_stride`, at least `compress_block`.
        num_selected: blocks that a query reads, the forced ones included (n).
        num_initial: blocks at the sequence's start that every query reads.
        num_local: blocks that every query reads at its own position: its own block and those just before.
        window: tokens that the sliding window holds, the query's own included (w). `window=3`: query 5 sees 3, 4, 5.

    Raises:
        ValueError: a field breaks its rule.
    """

    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("num_initial", "num_local") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field.name}={value!r} must be an integer of at least {least}")
        l, d, select_block = self.compress_block, self.compress_stride, self.select_block
        if l % d:
            raise ValueError(
                f"compress_block={l} must be a multiple of compress_stride={d}: try compress_block={_next_multiple(l, d)}"
            )
        if select_block % d:
            raise ValueError(
                f"{select_block=} must be a multiple of compress_stride={d}: "
                f"try select_block={_next_multiple(max(select_block, l), d)}"
            )
        if select_block < l:
            raise ValueError(f"{select_block=} must be at least compress_block={l}")
        forced = self.num_initial + self.num_local
        if self.num_selected < forced:
            raise ValueError(
                f"num_selected={self.num_selected} must be at least num_initial + num_local = {forced}: "
                "the forced blocks are counted inside it"
            )

    def num_compressed(self, num_keys: int) -> int:
        """C, the compressed tokens of `num_keys` tokens: an incomplete block does not exist (eq. 7)."""
        return max(0, (num_keys - self.compress_block) // self.compress_stride + 1)

    def num_blocks(self, num_keys: int) -> int:
        """M, the selection blocks of `num_keys` tokens, the last one possibly shorter."""
        return -(-num_keys // self.select_block)


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of


def check_inputs(
    query: Any,
    *,
    config: NSAConfig,
    num_keys: int,
    compressed_key: Any,
    scale: Any,
    query_start: Any,
    segment_ids: Any,
) -> None:
    """Raise `ValueError` for what `select_blocks` and `nsa_attention` have in common; see `nsa_attention` for the rules."""
    if not isinstance(config, NSAConfig):
        raise ValueError(f"config must be an NSAConfig, not {type(config).__name__}")
    if len(query.shape) != 4:
        raise ValueError(f"query must be [B, T, N, H], but its shape is {tuple(query.shape)}")
    if 0 in query.shape:
        raise ValueError(f"query must have at least one number, but its shape is {tuple(query.shape)}")
    _check_float("query", query)
    batch, _, num_heads, head_dim = query.shape
    if not isinstance(num_keys, int) or num_keys < 1:
        raise ValueError(f"{num_keys=} must be a positive integer: the number of keys of the selected branch")
    if len(compressed_key.shape) != 4:
        raise ValueError(f"the compressed keys must be [B, C, K, H], but their shape is {tuple(compressed_key.shape)}")
    kv_heads = compressed_key.shape[2]
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(
            f"the query's {num_heads} heads must be a multiple of the {kv_heads} key/value heads "
            "(query head n reads key/value head n // G)"
        )
    num_compressed = config.num_compressed(num_keys)
    _check_shape("compressed keys", "[B, C, K, H]", compressed_key, (batch, num_compressed, kv_heads, head_dim))
    _check_dtype("compressed keys", compressed_key, query)
    if scale is not None and not isinstance(scale, int | float):
        raise ValueError(f"scale must be a Python number or None (H ** -0.5), not {type(scale).__name__}")
    _check_position("query_start", query_start, batch, least=0)
    if segment_ids is not None:
        check_segment_ids(segment_ids, (batch, num_keys))


def check_segment_ids(segment_ids: Any, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` for segment ids that are not int32 `[B, S]`, `shape`; their order is checked in `ops.py`."""
    _check_shape("segment_ids", "[B, S]", segment_ids, shape)
    _check_int32("segment_ids", segment_ids)


def check_attention_inputs(
    query: Any,
    *,
    compressed: Any,
    selected: Any,
    window: Any,
    gates: Any,
    config: NSAConfig,
    scale: Any,
    query_start: Any,
    window_start: Any,
    segment_ids: Any,
    selected_blocks: Any,
) -> None:
    """Raise `ValueError` for any input that `nsa_attention` does not take."""
    branches = {"compressed": compressed, "selected": selected, "window": window}
    for name, branch in branches.items():
        if getattr(branch, "_fields", None) != ("key", "value"):
            raise ValueError(f"{name} must be KeyValue(key, value), not {type(branch).__name__}")
        for part, array in zip(("key", "value"), branch, strict=True):
            if len(array.shape) != 4:
                raise ValueError(f"{name}.{part} must have 4 axes, but its shape is {tuple(array.shape)}")
    check_inputs(
        query,
        config=config,
        num_keys=selected[0].shape[1],
        compressed_key=compressed[0],
        scale=scale,
        query_start=query_start,
        segment_ids=segment_ids,
    )
    batch, num_queries, num_heads, head_dim = query.shape
    kv_heads, value_dim = selected[1].shape[2:]
    for name, (key, value) in branches.items():
        length = key.shape[1]
        _check_shape(f"{name}.key", "[B, length, K, H]", key, (batch, length, compressed[0].shape[2], head_dim))
        _check_shape(f"{name}.value", "[B, length, K, V]", value, (batch, length, kv_heads, value_dim))
        _check_dtype(f"{name}.key", key, query)
        _check_dtype(f"{name}.value", value, query)
    _check_shape("gates", "[B, T, N, 3]", gates, (batch, num_queries, num_heads, 3))
    if str(gates.dtype) not in (str(query.dtype), "float32"):
        raise ValueError(f"gates have dtype {gates.dtype}; they must have the query's ({query.dtype}) or float32")
    _check_position("window_start", window_start, batch, least=None)
    _check_window_covers(query_start, window_start, num_queries, window[0].shape[1], selected[0].shape[1], config)
    if selected_blocks is not None:
        if len(selected_blocks.shape) != 4:
            raise ValueError(f"selected_blocks must be [B, T, K, A], but its shape is {tuple(selected_blocks.shape)}")
        chosen = (batch, num_queries, kv_heads, selected_blocks.shape[3])
        _check_shape("selected_blocks", "[B, T, K, A]", selected_blocks, chosen)
        _check_int32("selected_blocks", selected_blocks)


def check_decode_inputs(query: Any, *, window: Any, lengths: Any, config: NSAConfig, **others: Any) -> None:
    """Raise `ValueError` for any input that `decode_step` does not take."""
    if len(query.shape) == 4:
        if query.shape[1] != 1:
            raise ValueError(f"decode_step reads one query a sequence, but the query's shape is {tuple(query.shape)}")
        _check_shape("lengths", "[B]", lengths, (query.shape[0],))
        _check_int32("lengths", lengths)
    # Lengths are positions, the ends of sequences.
    where: dict[str, Any] = dict(query_start=lengths, window_start=lengths, segment_ids=None, selected_blocks=None)
    check_attention_inputs(query, window=window, config=config, **where, **others)
    if window[0].shape[1] != config.window:
        raise ValueError(
            f"the ring of the window branch has {window[0].shape[1]} rows; it must have window={config.window}, and the "
            "token at position p in row p % window"
        )


def _check_window_covers(
    query_start: Any, window_start: Any, num_queries: int, length: int, num_keys: int, config: NSAConfig
) -> None:
    # Where both positions are known, a window branch that lacks keys its queries would read is a mistake, not a wish.
    if not isinstance(query_start, int) or not isinstance(window_start, int):
        return
    first = max(0, query_start - config.window + 1)
    end = min(num_keys, query_start + num_queries)
    if first < end and not (window_start <= first and end <= window_start + length):
        raise ValueError(
            f"the window branch holds the {length} keys from position {window_start} on, but queries "
            f"{query_start}..{query_start + num_queries - 1} with window={config.window} read positions {first}..{end - 1}"
        )


def _check_float(name: str, array: Any) -> None:
    if str(array.dtype) not in FLOATS:
        raise ValueError(f"{name} has dtype {array.dtype}; it must be one of {', '.join(FLOATS)}")


def _check_dtype(name: str, array: Any, query: Any) -> None:
    if array.dtype != query.dtype:
        raise ValueError(f"{name} has dtype {array.dtype}, but the query has {query.dtype}; they must be the same")


def _check_int32(name: str, array: Any) -> None:
    if str(array.dtype) != "int32":
        raise ValueError(f"{name} has dtype {array.dtype}; it must be int32")


def _check_shape(name: str, letters: str, array: Any, expected: tuple[int, ...]) -> None:
    if tuple(array.shape) != expected:
        raise ValueError(f"{name} must be {letters} = {expected}, but its shape is {tuple(array.shape)}")


def _check_position(name: str, position: Any, batch: int, *, least: int | None) -> None:
    if isinstance(position, int) and not isinstance(position, bool):
        if least is not None and position < least:
            raise ValueError(f"{name}={position} must be at least {least}")
        return
    if not hasattr(position, "shape") or tuple(position.shape) not in ((), (batch,)) or str(position.dtype) != "int32":
        raise ValueError(f"{name} must be an int, an int32 scalar or int32 [B] = ({batch},), not {position!r}")
