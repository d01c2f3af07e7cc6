"""What a trained model's attention looks at: the blocks that its queries select, and its gates."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from nsa_jax.module import NativeSparseAttention
from train import plots
from train.model import Network, Params
from train.runs import Run


class Choices(NamedTuple):
    """Of L layers: the blocks that each query read, and each head's gates, in the mean over the text."""

    blocks: Int32[Array, "L T K A"]
    gates: Float[Array, "L N 3"]


def look(network: Network, params: Params, tokens: Int32[Array, "T"]) -> Choices:
    """Run a model with NSA on one sequence and keep what its layers chose."""

    def run(params: Params, tokens: Array) -> Choices:
        model = network.model(params)
        x, choices = model.embed(tokens[None]), []
        for layer in model.unstacked_layers():
            attention = layer.attention
            assert isinstance(attention, NativeSparseAttention)
            normed = layer.attention_norm(x)
            gates = attention.project(normed).gates[0].mean(axis=0)
            choices.append(Choices(attention.select_blocks(normed)[0], gates))
            x = layer(x, None)
        return jax.tree.map(lambda *x: jnp.stack(x), *choices)

    return jax.jit(run)(params, tokens)


def draw_choices(run: Run, text: str, folder: Path) -> list[Path]:
    """Write `selected_blocks.png` and `gates.png` for the beginning of a text, at most a context of it.

    Raises:
        ValueError: the run's attention is not "nsa", or the text is empty.
    """
    if run.config.model.attention != "nsa":
        raise ValueError(
            f"{run.folder} was trained with attention={run.config.model.attention!r}: only 'nsa' selects blocks"
        )
    tokens = run.tokenizer.encode(text)[: run.config.context]
    if not len(tokens):
        raise ValueError("the text is empty: there is nothing to look at")
    choices = look(run.network, run.params, jnp.asarray(tokens, jnp.int32))
    size = run.config.model.nsa.select_block
    blocks = plots.selected_blocks(
        np.asarray(choices.blocks), folder / "selected_blocks.png", select_block=size, num_keys=len(tokens)
    )
    return [blocks, plots.gates(np.asarray(choices.gates), folder / "gates.png")]
