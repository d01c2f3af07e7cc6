"""What the attention kernels share: rows and parts of heads in and out of a program, and the steps of flash attention.

A program holds `rows`: one row for each pair of a query token and a head of its group, in that order, so that the G heads
that read the same keys fill one tile, whatever G is. Row r of all T * G is head `r % G` of token `r // G`.

Triton's tensors have power-of-two sizes. A head size that is none is held in at most two parts, 192 as 128 + 64, and what
sticks out of the last part is masked. Scores are kept in base 2, `scale * log2(e) * q.k`, for `exp2` is the hardware's.

    o = sum_j p_j v_j,  p_j = 2^(s_j - lse),  lse = log2 sum_j 2^s_j
    dv_j = sum_rows g p_j dout,  ds_j = g p_j (dout.v_j - delta),  delta = dout.o,  dq = scale sum_j ds_j k_j

with g the row's gate: `dout` is the gradient of the gated sum.
"""

import contextvars
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float32

LOG2E = math.log2(math.e)
# Stands for minus infinity in masked scores; finite, because (-inf) - (-inf) would be NaN in a row that sees nothing.
MASKED = -1e30
# Stands in unused slots of a list of blocks.
NO_BLOCK = -1


@runtime_checkable
class Config(Protocol):
    """The sizes of NSA, in tokens or counts; `nsa_jax.NSAConfig` is one."""

    @property
    def compress_block(self) -> int: ...
    @property
    def compress_stride(self) -> int: ...
    @property
    def select_block(self) -> int: ...
    @property
    def num_selected(self) -> int: ...
    @property
    def num_initial(self) -> int: ...
    @property
    def num_local(self) -> int: ...
    @property
    def window(self) -> int: ...


class Tile(NamedTuple):
    """How much one program of a kernel holds, and how Triton compiles it: a matter of speed alone."""

    rows: int  # of queries (token, head): a power of two
    keys: int  # a power of two
    warps: int
    stages: int


class Ranges(NamedTuple):
    """The keys `low .. high - 1` that each query reads, or may read; both never decrease along T. None if low >= high."""

    low: Array  # int32 [B, T]
    high: Array  # int32 [B, T]


class Part(NamedTuple):
    """Columns `start .. start + width - 1` of a head, those from `size` on masked."""

    start: int
    width: int
    size: int

    @property
    def masked(self) -> bool:
        return self.start + self.width > self.size


def head_parts(size: int) -> tuple[Part, ...]:
    """A head of `size` numbers in one or two parts of power-of-two width, as tight as that allows.

    >>> [part[:2] for part in head_parts(192)], [part[:2] for part in head_parts(200)]
    ([(0, 128), (128, 64)], [(0, 256)])
    """
    # Triton's dot wants 16 numbers at least.
    whole = max(16, next_power_of_2(size))
    rest = max(16, next_power_of_2(size - whole // 2)) if size > whole // 2 else whole
    if whole // 2 + rest < whole:
        return Part(0, whole // 2, size), Part(whole // 2, rest, size)
    return (Part(0, whole, size),)


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


# -------------------------------------------------------------------------------------------------- in and out of memory


class Rows(NamedTuple):
    """Of each row that a program holds: its token, its head in the group, and whether it exists."""

    token: Array
    head: Array
    live: Array


def rows_from(start: Any, count: int, group: int, num_tokens: int) -> Rows:
    row = start + lax.iota(jnp.int32, count)
    return Rows(*divide(row, group), row < num_tokens * group)


def load_parts(
    ref: Any, index: tuple[Array, ...], parts: tuple[Part, ...], live: Array | None = None
) -> tuple[Array, ...]:
    """`ref[*index, columns]` for each part, `[rows, width]`; rows that are not `live` and columns past the head are 0."""
    return tuple(_load_part(ref, index, part, live) for part in parts)


def _load_part(ref: Any, index: tuple[Array, ...], part: Part, live: Array | None) -> Array:
    where, mask = _address(index, part, live)
    if mask is None:
        return pltriton.load(ref.at[where])
    return pltriton.load(ref.at[where], mask=mask, other=0.0)


def store_parts(
    ref: Any, index: tuple[Array, ...], parts: tuple[Part, ...], values: tuple[Array, ...], live: Array | None = None
) -> None:
    for part, value in zip(parts, values, strict=True):
        where, mask = _address(index, part, live)
        pltriton.store(ref.at[where], value.astype(ref.dtype), mask=mask)


def _address(index: tuple[Array, ...], part: Part, live: Array | None) -> tuple[tuple[Array, ...], Array | None]:
    column = part.start + lax.iota(jnp.int32, part.width)
    shape = (index[0].shape[0], part.width)
    where = (*(jnp.broadcast_to(i[:, None], shape) for i in index), jnp.broadcast_to(column[None, :], shape))
    masks = []
    if live is not None:
        masks.append(jnp.broadcast_to(live[:, None], shape))
    if part.masked:
        masks.append(jnp.broadcast_to((column < part.size)[None, :], shape))
    return where, functools.reduce(jnp.logical_and, masks) if masks else None


def load_rows(ref: Any, index: tuple[Array, ...], live: Array | None = None) -> Array:
    """`ref[*index]`, one number a row, 0 where not `live`."""
    if live is None:
        return pltriton.load(ref.at[index])
    return pltriton.load(ref.at[index], mask=live, other=0)


def store_rows(ref: Any, index: tuple[Array, ...], values: Array, live: Array | None = None) -> None:
    pltriton.store(ref.at[index], values.astype(ref.dtype), mask=live)


# ----------------------------------------------------------------------------------------------------------- arithmetic


def exp2(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """2^x, and 0 where that is no normal number: one instruction, where that of CUDA's library is four."""
    if _INTERPRETED.get():
        return jnp.exp2(x)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    more: dict[str, Any] = dict(constraints="=f,f", pack=1, result_shape_dtypes=[out])
    [result] = pltriton.elementwise_inline_asm("ex2.approx.ftz.f32 $0, $1;", args=[x], **more)
    return result


def dot(a: Array, b: Array) -> Array:
    """`a @ b` in float32; float32 operands are never rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def dot_parts(a: tuple[Array, ...], b: tuple[Array, ...]) -> Array:
    """`a @ b.T` summed over the parts of a head."""
    return functools.reduce(jnp.add, [dot(x, y.T) for x, y in zip(a, b, strict=True)])


class Softmax(NamedTuple):
    """A softmax-weighted sum of values, as far as its keys have been read."""

    highest: Array  # [rows]: of the products q.k, not scaled
    total: Array  # [rows]
    sums: tuple[Array, ...]  # [rows, width] for each part


def softmax_start(rows: int, parts: tuple[Part, ...]) -> Softmax:
    return Softmax(
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        tuple(jnp.zeros((rows, part.width), jnp.float32) for part in parts),
    )


def softmax_resume(outs: tuple[Array, ...], lse: Array, scale: float) -> Softmax:
    """From what `softmax_end` gave, of rows that saw a key."""
    return Softmax(lse / (scale * LOG2E), jnp.ones_like(lse), tuple(part.astype(jnp.float32) for part in outs))


def softmax_step(
    state: Softmax,
    products: Array,
    scale: float,
    values: tuple[Array, ...],
    visible: Array | None,
    reads: Array | None = None,
) -> Softmax:
    """Read a tile of keys: `products` q.k `[rows, keys]`, `values` `[keys, width]` for each part.

    Args:
        visible: `[rows, keys]`, which row reads which key; None if each reads all.
        reads: `[rows]`, which rows read the tile at all.
    """
    return weighted_step(state, products, scale, values, visible, reads)[0]


def weighted_step(
    state: Softmax,
    products: Array,
    scale: float,
    values: tuple[Array, ...],
    visible: Array | None,
    reads: Array | None = None,
) -> tuple[Softmax, Array]:
    """`softmax_step`, and the weights `[rows, keys]` of the tile, 2^(s - highest)."""
    # The products are scaled where the highest is subtracted: one multiply-add a score.
    scale *= LOG2E
    if visible is not None:
        products = jnp.where(visible, products, MASKED)
    best = jnp.max(products, axis=1)
    highest = jnp.maximum(state.highest, best if reads is None else jnp.where(reads, best, MASKED))
    weights = exp2(products * scale - only_if(reads, highest * scale)[:, None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    shrink = exp2((state.highest - highest) * scale)
    sums = tuple(
        total * shrink[:, None] + dot(weights.astype(value.dtype), value)
        for total, value in zip(state.sums, values, strict=True)
    )
    return Softmax(highest, state.total * shrink + jnp.sum(weights, axis=1), sums), weights


def only_if(reads: Array | None, subtracted: Array) -> Array:
    """What a row subtracts from its scores: so much that no weight is left, if it does not read them."""
    return subtracted if reads is None else jnp.where(reads, subtracted, -MASKED)


def softmax_end(state: Softmax, scale: float) -> tuple[tuple[Array, ...], Array]:
    """The output of each part, and the log-sum-exp in base 2; both 0 in a row that saw no key."""
    none = state.total == 0.0
    total = jnp.where(none, 1.0, state.total)
    outs = tuple(part / total[:, None] for part in state.sums)
    return outs, jnp.where(none, 0.0, state.highest * (scale * LOG2E) + jnp.log2(total))


class GradientRows(NamedTuple):
    """What the gradient of the queries wants of each row."""

    query: tuple[Array, ...]  # parts, [rows, width]
    dout: tuple[Array, ...]
    lse: Array  # [rows]
    slope: Array  # [rows]: gate * scale
    shift: Array  # [rows]: gate * scale * delta


def gradient_rows(
    query: tuple[Array, ...], dout: tuple[Array, ...], gate: Array, lse: Array, delta: Array, scale: float
) -> GradientRows:
    # Scaled before the rounding of dscores: float16 has little room for gradients that are scaled up.
    slope = gate * scale
    return GradientRows(query, dout, lse, slope, slope * delta)


def dq_step(
    sums: tuple[Array, ...],
    rows: GradientRows,
    key: tuple[Array, ...],
    value: tuple[Array, ...],
    scale: float,
    visible: Array | None,
    reads: Array | None = None,
) -> tuple[Array, ...]:
    """Add a tile of keys to dq; `visible` and `reads` as in `softmax_step`."""
    weights = exp2(dot_parts(rows.query, key) * (scale * LOG2E) - only_if(reads, rows.lse)[:, None])
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    dscores = weights * (dot_parts(rows.dout, value) * rows.slope[:, None] - rows.shift[:, None])
    return tuple(total + dot(dscores.astype(part.dtype), part) for total, part in zip(sums, key, strict=True))


def gated_sum(
    gates_ref: Any,
    index: tuple[Array, ...],
    parts: tuple[Part, ...],
    other_refs: tuple[Any, Any],
    out_slc: tuple[Array, ...],
    live: Array | None,
) -> tuple[Array, ...]:
    """`sum_branches` of gates `[..., 3]` and of o_cmp and o_win, which are `other_refs`."""
    gates = load_gates(gates_ref, index, live)
    out_cmp, out_win = (load_parts(ref, index, parts, live) for ref in other_refs)
    return sum_branches(gates, out_cmp, out_slc, out_win)


def load_gates(ref: Any, index: tuple[Array, ...], live: Array | None) -> tuple[Array, ...]:
    """Of the three branches, `[rows, 1]` each, from gates `[..., 3]`."""
    return tuple(
        load_rows(ref, (*index, jnp.full_like(index[0], branch)), live).astype(jnp.float32)[:, None]
        for branch in range(3)
    )


def sum_branches(
    gates: tuple[Array, ...], out_cmp: tuple[Array, ...], out_slc: tuple[Array, ...], out_win: tuple[Array, ...]
) -> tuple[Array, ...]:
    """`g_cmp o_cmp + g_slc o_slc + g_win o_win` (eq. 5)."""
    g_cmp, g_slc, g_win = gates
    return tuple(
        g_cmp * c.astype(jnp.float32) + g_slc * s + g_win * w.astype(jnp.float32)
        for c, s, w in zip(out_cmp, out_slc, out_win, strict=True)
    )


def over_tiles(first: Any, inner: Any, outer: Any, last: Any, step: Callable[..., Any], state: Any) -> Any:
    """`step(tile, state, masked)` for tiles `first .. last - 1`, those of `inner .. outer - 1` without masks."""
    # Triton's lowering types a Python number by its value.
    first, inner, last = (jnp.asarray(bound, jnp.int32) for bound in (first, inner, last))
    inner = jnp.minimum(jnp.maximum(inner, first), last)
    state = lax.fori_loop(first, inner, functools.partial(_swap, step, True), state)
    return over_whole_tiles(inner, outer, last, step, state)


def over_whole_tiles(first: Any, whole: Any, last: Any, step: Callable[..., Any], state: Any) -> Any:
    """`step(tile, state, masked)` for tiles `first .. last - 1`, those before `whole` without masks."""
    first, whole, last = (jnp.asarray(bound, jnp.int32) for bound in (first, whole, last))
    whole = jnp.minimum(jnp.maximum(whole, first), last)
    state = lax.fori_loop(first, whole, functools.partial(_swap, step, False), state)
    return lax.fori_loop(whole, last, functools.partial(_swap, step, True), state)


def _swap(step: Callable[..., Any], masked: bool, tile: Any, state: Any) -> Any:
    return step(tile, state, masked)


def arrive(count_ref: Any) -> Array:
    """How many programs had arrived here before this one; what those had stored, this one may load.

    `count_ref` `[1]` is 0 before the first.
    """
    if not _INTERPRETED.get():
        # The atomic addition publishes what its own thread has seen: that must be what all of the program have stored.
        pltriton.debug_barrier()
    return pltriton.atomic_add(count_ref, (jnp.int32(0),), jnp.int32(1))


def divide(value: Any, by: int) -> tuple[Any, Any]:
    """Quotient, rounded down, and remainder."""
    # Triton's lowering takes the constant 1 for a truth value.
    return (value, jnp.zeros_like(value)) if by == 1 else (value // by, value % by)


def count(true: Array, axis: int | None = None) -> Array:
    """How many are true; int32, even where JAX's 64-bit numbers are on."""
    return jnp.sum(true.astype(jnp.int32), axis=axis, dtype=jnp.int32)


def ceil_div(value: Any, by: int) -> Any:
    return (value + by - 1) // by


def search(ascending: Array, values: Array, *, side: str) -> Array:
    """`jnp.searchsorted` as one kernel; its default is a loop of many."""
    return jnp.searchsorted(ascending, values, side=side, method="scan_unrolled").astype(jnp.int32)


# --------------------------------------------------------------------------------------------------------------- calls


# Whether the kernel that is being traced is to be interpreted, where there are no instructions of a GPU.
_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


@dataclasses.dataclass(frozen=True)
class Launch:
    """Triton's options of a call."""

    tile: Tile
    interpret: bool

    def __call__(self, kernel: Callable[..., None], name: str, **arguments: Any) -> Callable[..., Any]:
        # JAX announces at every lowering that it means to drop this backend. That concerns this package (its bound on jax),
        # not its users. The lowering comes after our functions have returned, so that only a filter for good can hold this
        # one message; set anew, for it is lost at the end of any `catch_warnings` that it was set in.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        # Without explicit Triton parameters, JAX 0.10 lowers to another backend.
        params = pltriton.CompilerParams(num_warps=self.tile.warps, num_stages=self.tile.stages)

        def traced(*refs: Any) -> None:
            token = _INTERPRETED.set(self.interpret)
            try:
                kernel(*refs)
            finally:
                _INTERPRETED.reset(token)

        return pl.pallas_call(traced, name=name, compiler_params=params, interpret=self.interpret, **arguments)


def specs(arrays: Any) -> Any:
    """Whole sequences; of arrays `[B, T, K, ...]`, one key/value head. Grid axes are (tile, head, sequence)."""
    return jax.tree.map(lambda array: whole(array, head_axis=2 if array.ndim > 2 else None), arrays)


def whole(array: jax.ShapeDtypeStruct | Array, *, head_axis: int | None) -> pl.BlockSpec:
    """All of a sequence, and of a key/value head if there is an axis of them, for `specs` where that is another."""
    shape: list[int | None] = [None, *array.shape[1:]]
    if head_axis is not None:
        shape[head_axis] = None

    def index(tile: Any, head: Any, sequence: Any) -> tuple[Any, ...]:
        places = [0] * len(shape)
        places[0] = sequence
        if head_axis is not None:
            places[head_axis] = head
        return tuple(places)

    return pl.BlockSpec(tuple(shape), index)
