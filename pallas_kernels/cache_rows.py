"""Rows of a cache written where they lie: a step of decoding adds one to each of its arrays, and copies none.

Grid (1, key/value head, sequence). A program writes the rows of all arrays, which are the kernel's results as well as its
inputs, and reads none of them: one launch, where a scatter is one for each array.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from pallas_kernels import flash
from pallas_kernels.flash import Launch, Tile


def write_rows(
    arrays: tuple[Array, ...],
    new: tuple[Array, ...],
    places: tuple[Int32[Array, "B 1"], ...],
    *,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """`arrays` `[B, L, K, D]`, each of its own L and D, with `new` `[B, 1, K, D]` in the rows `places`.

    A row that is not there is not written.
    """
    # Arrays have no axis of length 0 for a kernel to write.
    held = [i for i, array in enumerate(arrays) if array.shape[1] > 0]
    written = _write([arrays[i] for i in held], [new[i] for i in held], [places[i] for i in held], interpret=interpret)
    return tuple(written[held.index(i)] if i in held else array for i, array in enumerate(arrays))


def _write(arrays: list[Array], new: list[Array], places: list[Array], *, interpret: bool) -> tuple[Array, ...]:
    batch, _, kv_heads, _ = arrays[0].shape
    inputs = (jnp.concatenate(places, axis=1), *new, *arrays)
    outs = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
    launch = Launch(Tile(1, 0, 1, 1), interpret)
    return launch(
        functools.partial(_kernel, count=len(arrays)),
        "nsa_write_rows",
        grid=(1, kv_heads, batch),
        in_specs=flash.specs(inputs),
        out_specs=flash.specs(outs),
        out_shape=outs,
        input_output_aliases={1 + len(new) + i: i for i in range(len(arrays))},
    )(*inputs)


def _kernel(places_ref: Any, *refs: Any, count: int) -> None:
    for i, (new_ref, ref) in enumerate(zip(refs[:count], refs[-count:], strict=True)):
        parts = flash.head_parts(ref.shape[-1])
        row = places_ref[i] + lax.iota(jnp.int32, 1)
        new = flash.load_parts(new_ref, (jnp.zeros_like(row),), parts)
        flash.store_parts(ref, (jnp.maximum(row, 0),), parts, new, (row >= 0) & (row < ref.shape[0]))
