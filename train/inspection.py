"""What a trained model's attention looks at, on one text.

Four things are measured: the blocks that its queries select; its gates; how much the choices of neighbouring queries overlap,
which decides how fast the selected kernel is; and how much of full attention's mass lies in the selected blocks. The last:
the selected branch's own queries and keys, under full causal attention, give each query a softmax over all tokens up to its
own; what of it lies in the query's blocks is covered.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from nsa_jax.config import NSAConfig
from nsa_jax.module import NativeSparseAttention
from nsa_jax.overlap import UNIONS, mean_unions
from train import page, plots
from train.model import Network, Params
from train.runs import Run

# Equal parts of the text in which coverage is reported.
NUM_PARTS = 32
# Scores held at once while the mass of full attention is measured.
CHUNK_SCORES = 2**24


class Choices(NamedTuple):
    """Of L layers: the blocks that each query read, and each head's gates, in the mean over the text."""

    blocks: Int32[Array, "L T K A"]
    gates: Float[Array, "L N 3"]


class Mass(NamedTuple):
    """Shares of full attention's mass, for each query of each head: in the selected blocks, and in as many of the best.

    The best are those that hold most of the mass of the heads that share them, forced blocks or not: no selection covers more
    in the mean over these heads.
    """

    selected: Float[Array, "*layers N T"]
    best: Float[Array, "*layers N T"]


def look(network: Network, params: Params, tokens: Int32[Array, "T"]) -> Choices:
    """Run a model with NSA on one sequence and keep what its layers chose."""

    def see(attention: NativeSparseAttention, x: Array) -> Choices:
        return Choices(attention.select_blocks(x)[0], attention.project(x).gates[0].mean(axis=0))

    return _see_layers(network, params, tokens, see)


def look_closely(network: Network, params: Params, tokens: Int32[Array, "T"]) -> tuple[Choices, Mass]:
    """`look`, and what full attention would see beside it."""

    def see(attention: NativeSparseAttention, x: Array) -> tuple[Choices, Mass]:
        projections, blocks = attention.project(x), attention.select_blocks(x)[0]
        mass = covered_mass(
            projections.query[0], projections.selected.key[0], blocks, select_block=attention.config.select_block
        )
        return Choices(blocks, projections.gates[0].mean(axis=0)), mass

    return _see_layers(network, params, tokens, see)


def _see_layers(network: Network, params: Params, tokens: Int32[Array, "T"], see: Callable[..., Any]) -> Any:
    """What `see(attention, its input)` gives, stacked over the layers."""

    def run(params: Params, tokens: Array) -> Any:
        model = network.model(params)
        x, seen = model.embed(tokens[None]), []
        for layer in model.unstacked_layers():
            assert isinstance(layer.attention, NativeSparseAttention)
            seen.append(see(layer.attention, layer.attention_norm(x)))
            x = layer(x, None)
        return jax.tree.map(lambda *x: jnp.stack(x), *seen)

    return jax.jit(run)(params, tokens)


def covered_mass(
    query: Float[Array, "T N H"], key: Float[Array, "T K H"], blocks: Int32[Array, "T K A"], *, select_block: int
) -> Mass:
    """How much of full causal attention's softmax lies in each query's blocks.

    One key/value head and a chunk of queries at a time: no array grows as T x T.

    Args:
        query: `[T, N, H]`, at positions 0 .. T-1.
        key: `[T, K, H]`; query head n reads key/value head `n // (N // K)`.
        blocks: int32 `[T, K, A]`, each once; -1 is an unused slot.
        select_block: tokens in a block.
    """
    (length, num_heads, size), kv_heads, slots = query.shape, key.shape[1], blocks.shape[-1]
    group, num_blocks = num_heads // kv_heads, -(-length // select_block)
    chunk = max(1, min(length, CHUNK_SCORES // (group * length)))
    num_chunks = -(-length // chunk)
    token = jnp.arange(length, dtype=jnp.int32)

    def one_chunk(key: Array, query: Array, blocks: Array, positions: Array) -> Mass:
        # Never TF32.
        scores = jnp.einsum("qgh,sh->qgs", query, key, precision=lax.Precision.HIGHEST) * size**-0.5
        visible = token[None, None, :] <= positions[:, None, None]
        p = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        p = jnp.pad(p, ((0, 0), (0, 0), (0, num_blocks * select_block - length)))
        in_block = p.reshape(chunk, group, num_blocks, select_block).sum(axis=-1)
        read = jnp.take_along_axis(in_block, jnp.maximum(blocks, 0)[:, None, :], axis=-1)
        best = lax.top_k(in_block.sum(axis=1), min(slots, num_blocks))[1]
        return Mass(
            selected=jnp.where(blocks[:, None, :] >= 0, read, 0.0).sum(axis=-1),
            best=jnp.take_along_axis(in_block, best[:, None, :], axis=-1).sum(axis=-1),
        )

    def split(x: Array) -> Array:
        """`[T, ...]` in chunks; queries of padding stand at position 0."""
        x = jnp.pad(x, ((0, num_chunks * chunk - length), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_chunks, chunk, *x.shape[1:])

    def one_head(arrays: tuple[Array, Array, Array]) -> Mass:
        query, key, blocks = arrays
        mass = lax.map(lambda x: one_chunk(key, *x), (split(query), split(blocks), split(token)))
        return jax.tree.map(lambda x: x.reshape(num_chunks * chunk, group)[:length].T, mass)

    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    heads = (query.reshape(length, kv_heads, group, size), key, blocks)
    mass = lax.map(one_head, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), heads))
    return jax.tree.map(lambda x: x.reshape(num_heads, length), mass)


# ---------------------------------------------------------------------------------------------------------------- numbers


def share_read(blocks: Int32[np.ndarray, "L T K A"], select_block: int) -> Float[np.ndarray, "T"]:
    """Of the tokens up to each query, the share that its blocks hold, in the mean over layers and heads."""
    position = np.arange(blocks.shape[1])[:, None, None]
    tokens = np.clip(position - blocks * select_block + 1, 0, select_block)
    read = np.where(blocks >= 0, tokens, 0).sum(axis=-1)
    return (read / (position[..., 0] + 1)).mean(axis=(0, 2))


def numbers(choices: Choices, mass: Mass, config: NSAConfig) -> dict[str, Any]:
    """All that `inspect` reports, as JSON has it; what the text is too short for is None.

    `mean_blocks` is what a query reads, less than `num_selected` for the first ones. `covered`, `best` and `share_read` are
    means over the queries that had to choose: those with more candidate blocks than `num_selected`.
    """
    blocks = np.asarray(choices.blocks)
    length = blocks.shape[1]
    chooses = np.arange(length) // config.select_block >= config.num_selected
    # Means in float64, on the host.
    selected, best, read = (
        np.asarray(x, np.float64) for x in (mass.selected, mass.best, share_read(blocks, config.select_block))
    )

    def mean(x: np.ndarray, queries: Bool[np.ndarray, "T"]) -> Any:
        return x[..., queries].mean(axis=-1).tolist() if queries.any() else None

    edges = np.linspace(0, length, min(NUM_PARTS, length) + 1).astype(int).tolist()
    parts = list(itertools.pairwise(edges))

    def by_position(x: Float[np.ndarray, "T"]) -> list[float]:
        return [float(x[start:end].mean()) for start, end in parts]

    layers = []
    for layer in range(len(blocks)):
        unions = {
            count: np.asarray(mean_unions(choices.blocks[layer][None], count), np.float64).tolist()
            for count in UNIONS
            if count <= length
        }
        gates = np.asarray(choices.gates[layer], np.float64)
        layers.append(
            dict(
                layer=layer,
                num_kv_heads=blocks.shape[2],
                gates={name: gates[:, branch].tolist() for branch, name in enumerate(plots.BRANCH_COLOURS)},
                mean_union={str(count): unions.get(count) for count in UNIONS},
                covered=mean(selected[layer], chooses),
                best=mean(best[layer], chooses),
                covered_by_position=by_position(selected[layer].mean(axis=0)),
                best_by_position=by_position(best[layer].mean(axis=0)),
            )
        )
    return dict(
        tokens=length,
        queries_that_choose=int(chooses.sum()),
        first_that_chooses=config.num_selected * config.select_block,
        share_read=mean(read, chooses),
        mean_blocks=float((blocks >= 0).sum(axis=-1).mean()),
        positions=[dict(start=start, end=end) for start, end in parts],
        share_read_by_position=by_position(read),
        layers=layers,
    )


# --------------------------------------------------------------------------------------------------------------- pictures


def draw_choices(run: Run, text: str, folder: Path) -> list[Path]:
    """Write `selected_blocks.png` and `gates.png` for the beginning of a text, at most a context of it.

    Raises:
        ValueError: the run's attention is not "nsa", or the text is empty.
    """
    tokens = _beginning(run, text, length=None, beyond_context=False)
    return _draw_choices(run, look(run.network, run.params, tokens), folder)


def _draw_choices(run: Run, choices: Choices, folder: Path) -> list[Path]:
    blocks, size = np.asarray(choices.blocks), run.config.model.nsa.select_block
    return [
        plots.selected_blocks(
            blocks, folder / "selected_blocks.png", select_block=size, num_keys=blocks.shape[1]
        ),
        plots.gates(np.asarray(choices.gates), folder / "gates.png"),
    ]  # fmt: skip


def inspect_text(
    run: Run, text: str, folder: Path, *, source: str, length: int | None = None, beyond_context: bool = False
) -> list[Path]:
    """Measure and draw what a run's layers see in the beginning of a text.

    Writes into `folder`: `inspect.html`, a page with all of it that needs no network; `inspect.json`, the numbers; and the
    pictures, `selected_blocks.png`, `blocks_layer_00.png`, ..., `gates.png`, `unions.png`, `coverage.png`.

    Args:
        run: with attention "nsa".
        text: read from its beginning.
        folder: made if need be.
        source: what the text is called.
        length: tokens to read; the run's context, or as many as the text has, if None.
        beyond_context: whether `length` may be more than the context that the run was trained with.

    Returns:
        The files, the page first.

    Raises:
        ValueError: the run's attention is not "nsa", or the text or the context has fewer tokens than `length`.
    """
    tokens = _beginning(run, text, length=length, beyond_context=beyond_context)
    choices, mass = look_closely(run.network, run.params, tokens)
    config = run.config.model.nsa
    found = numbers(choices, mass, config)

    figures = _draw_choices(run, choices, folder)
    blocks = np.asarray(choices.blocks)
    per_layer = [
        plots.head_choices(
            each,
            folder / f"blocks_layer_{layer:02}.png",
            select_block=config.select_block,
            num_initial=config.num_initial,
            num_local=config.num_local,
            title=f"layer {layer}",
        )
        for layer, each in enumerate(blocks)
    ]
    unions = {
        count: [layer["mean_union"][str(count)] for layer in found["layers"]]
        for count in UNIONS
        if count <= len(tokens)
    }
    if unions:
        figures.append(plots.unions(unions, folder / "unions.png", mean_blocks=found["mean_blocks"]))
    figures.append(
        plots.coverage(
            np.asarray([layer["covered"] for layer in found["layers"]]) if found["queries_that_choose"] else None,
            folder / "coverage.png",
            positions=[(bucket["start"], bucket["end"]) for bucket in found["positions"]],
            covered_by_position=[layer["covered_by_position"] for layer in found["layers"]],
            best_by_position=np.mean([layer["best_by_position"] for layer in found["layers"]], axis=0).tolist(),
            share_read=found["share_read_by_position"],
        )
    )
    about = dict(
        run=str(run.folder), step=run.step, text=source, context=run.config.context, nsa=dataclasses.asdict(config)
    )
    written = folder / "inspect.json"
    written.write_text(json.dumps(about | found, indent=1) + "\n")
    html = page.write_inspection(folder / "inspect.html", about | found, figures, per_layer)
    return [html, written, *figures, *per_layer]


def _beginning(run: Run, text: str, *, length: int | None, beyond_context: bool) -> Int32[Array, "T"]:
    """The tokens to look at."""
    attention, context = run.config.model.attention, run.config.context
    if attention != "nsa":
        raise ValueError(f"{run.folder} was trained with attention={attention!r}: only 'nsa' selects blocks")
    if length is not None and length < 1:
        raise ValueError(f"{length=} must be at least 1 token")
    if length is not None and length > context and not beyond_context:
        raise ValueError(
            f"{length=} is more than the context={context} that {run.folder} was trained with: give at most that, or "
            "--beyond-context to look at what it does there"
        )
    tokens = run.tokenizer.encode(text)
    if not len(tokens):
        raise ValueError("the text is empty: there is nothing to look at")
    if length is not None and length > len(tokens):
        raise ValueError(
            f"{length=} is more than the {len(tokens)} tokens of the text: give at most that, or more text"
        )
    return jnp.asarray(tokens[: length or context], jnp.int32)
