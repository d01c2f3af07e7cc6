"""One optimizer step: loss, gradients, AdamW; what is not finite is skipped and counted."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int32

from train.config import TrainConfig
from train.data import Batch
from train.model import Network, Params


class TrainState(NamedTuple):
    """All that training changes."""

    params: Params
    opt_state: optax.OptState
    step: Int32[Array, ""]  # steps done, skipped ones too
    skipped: Int32[Array, ""]  # steps whose loss or gradient was not finite
    bad_in_a_row: Int32[Array, ""]  # the last of them that follow each other


class Metrics(NamedTuple):
    """Of one step."""

    loss: Float[Array, ""]  # nats per token
    grad_norm: Float[Array, ""]  # global, before clipping
    learning_rate: Float[Array, ""]
    skipped: Int32[Array, ""]
    bad_in_a_row: Int32[Array, ""]


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """From zero to the peak over the warm-up, then down a cosine to `final_fraction` of it after the last step."""
    optimizer = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=config.steps,
        end_value=optimizer.final_fraction * optimizer.learning_rate,
    )


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, decaying matrices alone."""
    optimizer = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(optimizer.clip_norm),
        optax.adamw(
            learning_rate_schedule(config),
            b1=optimizer.beta1,
            b2=optimizer.beta2,
            weight_decay=optimizer.weight_decay,
            mask=decayed,
        ),
    )


def decayed(params: Params) -> Any:
    """Which parameters decay: kernels and token embeddings. By name, since stacked layers give a bias two axes or more."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "embedding"), params)


def init_state(network: Network, config: TrainConfig) -> TrainState:
    """The state before the first step."""

    def init() -> TrainState:
        params = network.init(config.seed)
        counts = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(params, make_optimizer(config).init(params), *counts)

    # Compiled, so that no two of its arrays share a buffer: all are donated to the first step.
    return jax.jit(init)()


def abstract_state(network: Network, config: TrainConfig) -> TrainState:
    """Shapes and dtypes of the state."""
    return jax.eval_shape(lambda: init_state(network, config))


def make_train_step(network: Network, config: TrainConfig) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled step; the state that it is given is donated."""
    optimizer, schedule = make_optimizer(config), learning_rate_schedule(config)
    parts = config.optimizer.accumulate

    def part_loss(params: Params, batch: Batch, total: Array) -> Array:
        losses = network.model(params).losses(batch.inputs, batch.targets, batch.segment_ids)
        return (losses * batch.weights).sum() / total

    def loss_and_gradient(params: Params, batch: Batch) -> tuple[Array, Params]:
        total = jnp.maximum(batch.weights.sum(), 1.0)
        if parts == 1:
            return jax.value_and_grad(part_loss)(params, batch, total)
        split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)

        def add(sums: tuple[Array, Params], part: Batch) -> tuple[tuple[Array, Params], None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(part_loss)(params, part, total)), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return lax.scan(add, zeros, split)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, gradient = loss_and_gradient(state.params, batch)
        grad_norm = optax.tree.norm(gradient)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        stepped = (optax.apply_updates(state.params, updates), opt_state)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), stepped, (state.params, state.opt_state)
        )
        bad = 1 - good.astype(jnp.int32)
        # The schedule counts the steps that were taken.
        learning_rate = schedule(state.step - state.skipped)
        state = TrainState(params, opt_state, state.step + 1, state.skipped + bad, (state.bad_in_a_row + bad) * bad)
        metrics = Metrics(loss, grad_norm, jnp.asarray(learning_rate), state.skipped, state.bad_in_a_row)
        return state, metrics

    return jax.jit(train_step, donate_argnums=0)
