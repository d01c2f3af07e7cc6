"""What a trained model's attention looks at, on one text.

Four things are measured: the blocks that its queries select; its gates; how much the choices of neighbouring queries overlap,
which decides how fast the selected kernel is; and how much of full attention's mass lies in the selected blocks. The last:
the selected branch's own queries and keys, under full causal attention, give each query a softmax over all tokens up to its
own; what of it lies in the query's blocks is covered.

A layer is a part of an inspection, see `train.evaluation`: its numbers are kept. A start that goes on runs the layers that are
done once more, for what they choose and for the input of the next, but does not measure them again.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from nsa_jax.config import NSAConfig
from nsa_jax.module import NativeSparseAttention
from nsa_jax.overlap import UNIONS, mean_unions
from train import page, plots
from train.evaluation import Parts, describe_run, write_json
from train.model import Layer, Network, Params
from train.runs import Run

# Equal parts of the text in which coverage is reported.
NUM_PARTS = 32
# Scores held at once while the mass of full attention is measured.
CHUNK_SCORES = 2**24


class Choices(NamedTuple):
    """The blocks that each query read, and each head's gates, in the mean over the text."""

    blocks: Int32[Array, "*layers T K A"]
    gates: Float[Array, "*layers N 3"]


class Mass(NamedTuple):
    """Shares of full attention's mass, for each query of each head: in the selected blocks, and in as many of the best.

    The best are those that hold most of the mass of the heads that share them, forced blocks or not: no selection covers more
    in the mean over these heads.
    """

    selected: Float[Array, "*layers N T"]
    best: Float[Array, "*layers N T"]


def look_at_layers(
    network: Network, params: Params, tokens: Int32[Array, "T"]
) -> Iterator[tuple[Choices, Callable[[], Mass]]]:
    """Run a model with NSA on one sequence, layer by layer: what each chose, and a function that measures the mass.

    Running a layer and measuring it are a program each, compiled once for all layers.
    """

    def take(params: Params, index: Array) -> tuple[Layer, NativeSparseAttention]:
        graph, stacked = nnx.split(network.model(params).layers)
        layer = nnx.merge(graph, jax.tree.map(lambda x: x[index], stacked))
        assert isinstance(layer.attention, NativeSparseAttention)
        return layer, layer.attention

    @jax.jit
    def choose(params: Params, index: Array, x: Array) -> tuple[Array, Choices]:
        layer, attention = take(params, index)
        normed = layer.attention_norm(x)
        choices = Choices(attention.select_blocks(normed)[0], attention.project(normed).gates[0].mean(axis=0))
        return layer(x, None), choices

    @jax.jit
    def measure(params: Params, index: Array, x: Array, blocks: Array) -> Mass:
        layer, attention = take(params, index)
        projections = attention.project(layer.attention_norm(x))
        query, key = projections.query[0], projections.selected.key[0]
        return covered_mass(query, key, blocks, select_block=attention.config.select_block)

    x = jax.jit(lambda params, tokens: network.model(params).embed(tokens[None]))(params, tokens)
    for layer in range(network.config.num_layers):
        index = jnp.int32(layer)
        out, choices = choose(params, index, x)
        yield choices, functools.partial(measure, params, index, x, choices.blocks)
        x = out


def look(network: Network, params: Params, tokens: Int32[Array, "T"]) -> Choices:
    """Run a model with NSA on one sequence and keep what its layers chose."""
    return _stack([choices for choices, _ in look_at_layers(network, params, tokens)])


def look_closely(network: Network, params: Params, tokens: Int32[Array, "T"]) -> tuple[Choices, Mass]:
    """`look`, and what full attention would see beside it."""
    return _stack([(choices, measure()) for choices, measure in look_at_layers(network, params, tokens)])


def _stack(layers: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


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


def share_read(blocks: Int32[np.ndarray, "T K A"], select_block: int) -> Float[np.ndarray, "T"]:
    """Of the tokens up to each query, the share that its blocks hold, in the mean over the heads."""
    position = np.arange(len(blocks))[:, None, None]
    tokens = np.clip(position - blocks * select_block + 1, 0, select_block)
    read = np.where(blocks >= 0, tokens, 0).sum(axis=-1)
    return (read / (position[..., 0] + 1)).mean(axis=1)


def layer_numbers(choices: Choices, mass: Mass, config: NSAConfig) -> dict[str, Any]:
    """All that `inspect` reports of one layer, as JSON has it; what the text is too short for is None.

    `mean_blocks` is what a query reads, less than `num_selected` for the first ones. `covered`, `best` and `share_read` are
    means over the queries that had to choose: those with more candidate blocks than `num_selected`.
    """
    blocks = np.asarray(choices.blocks)
    length, chooses = len(blocks), _that_choose(len(blocks), config)
    # Means in float64, on the host.
    gates, selected, best, read = (
        np.asarray(x, np.float64)
        for x in (choices.gates, mass.selected, mass.best, share_read(blocks, config.select_block))
    )

    def mean(x: np.ndarray) -> Any:
        return x[..., chooses].mean(axis=-1).tolist() if chooses.any() else None

    def by_position(x: Float[np.ndarray, "T"]) -> list[float]:
        return [float(x[start:end].mean()) for start, end in _positions(length)]

    def union(count: int) -> list[float] | None:
        return np.asarray(mean_unions(choices.blocks[None], count), np.float64).tolist() if count <= length else None

    return dict(
        num_kv_heads=blocks.shape[1],
        gates={name: gates[:, branch].tolist() for branch, name in enumerate(plots.BRANCH_COLOURS)},
        mean_blocks=float((blocks >= 0).sum(axis=-1).mean()),
        mean_union={str(count): union(count) for count in UNIONS},
        covered=mean(selected),
        best=mean(best),
        share_read=mean(read),
        covered_by_position=by_position(selected.mean(axis=0)),
        best_by_position=by_position(best.mean(axis=0)),
        share_read_by_position=by_position(read),
    )


def summarize(layers: Sequence[dict[str, Any]], length: int, config: NSAConfig) -> dict[str, Any]:
    """All that `inspect` reports of a text of `length` tokens, from the `layer_numbers` of each layer."""

    def mean(name: str) -> Any:
        return np.mean([layer[name] for layer in layers], axis=0).tolist()

    choosing = int(_that_choose(length, config).sum())
    return dict(
        tokens=length,
        queries_that_choose=choosing,
        first_that_chooses=config.num_selected * config.select_block,
        share_read=mean("share_read") if choosing else None,
        mean_blocks=mean("mean_blocks"),
        positions=[dict(start=start, end=end) for start, end in _positions(length)],
        share_read_by_position=mean("share_read_by_position"),
        layers=[dict(layer=index) | layer for index, layer in enumerate(layers)],
    )


def _that_choose(length: int, config: NSAConfig) -> Bool[np.ndarray, "T"]:
    return np.arange(length) // config.select_block >= config.num_selected


def _positions(length: int) -> list[tuple[int, int]]:
    """Starts and ends of the parts of the text."""
    return list(itertools.pairwise(np.linspace(0, length, min(NUM_PARTS, length) + 1).astype(int).tolist()))


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
    pictures, `selected_blocks.png`, `blocks_layer_00.png`, ..., `gates.png`, `unions.png`, `coverage.png`. What is done is
    kept in `inspect.parts.jsonl`.

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
        Interrupted: by Ctrl-C, after the layers that were measured are kept.
    """
    tokens = _beginning(run, text, length=length, beyond_context=beyond_context)
    config = run.config.model.nsa
    settings = dict(
        run=describe_run(run),
        tokens_sha256=hashlib.sha256(np.asarray(tokens).tobytes()).hexdigest(),
    )

    def measure_layer(choices: Choices, measure: Callable[[], Mass]) -> dict[str, Any]:
        return layer_numbers(choices, measure(), config)

    seen, layers = [], []
    with Parts(folder, "inspect", settings, total=run.config.model.num_layers) as parts:
        for layer, (choices, measure) in enumerate(look_at_layers(run.network, run.params, tokens)):
            seen.append(choices)
            layers.append(parts(f"layer {layer}", measure_layer, choices, measure))
    found = summarize(layers, len(tokens), config)

    choices = _stack(seen)
    figures = _draw_choices(run, choices, folder)
    per_layer = [
        plots.head_choices(
            each,
            folder / f"blocks_layer_{layer:02}.png",
            select_block=config.select_block,
            num_initial=config.num_initial,
            num_local=config.num_local,
            title=f"layer {layer}",
        )
        for layer, each in enumerate(np.asarray(choices.blocks))
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
    written = write_json(folder / "inspect.json", about | found)
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
