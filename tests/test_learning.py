"""The branches held to account: copying needs a look far back at one exact place, which only the selected branch can give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nsa_jax import NSAConfig
from nsa_jax.module import NativeSparseAttention
from train.config import ModelConfig
from train.model import Network

SYMBOLS, LENGTH, BATCH, STEPS = 32, 64, 32, 200

MODEL = ModelConfig(
    num_layers=2,
    model_dim=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    value_head_dim=32,
    mlp_dim=128,
    normalize_qk=False,
    dtype="float32",
    remat="attention",
    nsa=NSAConfig(
        compress_block=8, compress_stride=4, select_block=8, num_selected=6, num_initial=1, num_local=2, window=16
    ),
)


def copy_loss(model: ModelConfig) -> float:
    """Mean loss of the last 10 of 200 steps, in nats, on the second half of random symbols written twice."""
    network = Network(model, SYMBOLS)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, STEPS), b2=0.95)

    @jax.jit
    def step(params, opt_state, key):
        symbols = jax.random.randint(key, (BATCH, LENGTH), 0, SYMBOLS, jnp.int32)
        text = jnp.concatenate([symbols, symbols], axis=1)

        def loss(params):
            losses = network.model(params).losses(text[:, :-1], text[:, 1:])
            return losses[:, LENGTH - 1 :].mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = network.init(0)
    opt_state = optimizer.init(params)
    losses = []
    for key in jax.random.split(jax.random.key(1), STEPS):
        params, opt_state, value = step(params, opt_state, key)
        losses.append(value)
    return float(np.mean(losses[-10:]))


def test_nsa_learns_to_copy():
    assert copy_loss(MODEL) < 0.1


def test_the_window_alone_does_not():
    assert copy_loss(dataclasses.replace(MODEL, attention="window")) > 3.3


def test_nor_does_nsa_without_its_selected_branch(monkeypatch: pytest.MonkeyPatch):
    project = NativeSparseAttention.project

    def without_selected(self, *args, **kwargs):
        projections = project(self, *args, **kwargs)
        return projections._replace(gates=projections.gates.at[..., 1].set(0.0))

    monkeypatch.setattr(NativeSparseAttention, "project", without_selected)
    assert copy_loss(MODEL) > 1
