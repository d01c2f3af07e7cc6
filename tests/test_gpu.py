"""What the CPU's tests cannot see: the same cases compiled for a GPU, against the same library on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import nsa_attention, select_blocks
from nsa_jax.testing import CASES, assert_as_accurate, make_inputs
from train.config import PRESETS
from train.model import Network

pytestmark = pytest.mark.gpu


@functools.partial(jax.jit, static_argnames=("config", "num_keys"))
def outputs_gradients_blocks(inputs, blocks, cotangent, *, config, num_keys):
    """Outputs and gradients with the blocks given, and the blocks that it would choose itself."""

    def attend(query, compressed, selected, window, gates):
        tensors = dict(compressed=compressed, selected=selected, window=window, gates=gates)
        places = dict(query_start=inputs.query_start, window_start=inputs.window_start, segment_ids=inputs.segment_ids)
        return nsa_attention(query, **tensors, **places, config=config, selected_blocks=blocks, implementation="xla")

    out, vjp = jax.vjp(attend, *inputs[:5])
    return out, vjp(cotangent.astype(out.dtype)), own_blocks(inputs, config=config, num_keys=num_keys)


def own_blocks(inputs, *, config, num_keys):
    return select_blocks(
        inputs.query,
        inputs.compressed.key,
        config=config,
        num_keys=num_keys,
        query_start=inputs.query_start,
        segment_ids=inputs.segment_ids,
        implementation="xla",
    )


CASES_16_BIT = ("plain", "head_sizes_differ", "group_16", "segments_unaligned", "query_start_per_sequence")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in CASES] + [(name, d) for name in CASES_16_BIT for d in ("bfloat16", "float16")],
)
def test_gpu_is_as_accurate_as_the_cpu(name: str, dtype: str):
    case = CASES[name]
    cpu, gpu = jax.devices("cpu")[0], jax.devices("gpu")[0]
    inputs = make_inputs(case, dtype=dtype)
    cotangent = jax.random.normal(jax.random.key(7), (case.batch, case.queries, case.heads, case.value_head_dim))
    sizes = dict(config=case.config, num_keys=case.keys)

    on_cpu = jax.device_put((inputs, cotangent), cpu)
    blocks = own_blocks(on_cpu[0], **sizes)
    reference = outputs_gradients_blocks(on_cpu[0], blocks, on_cpu[1], **sizes)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, on_cpu[0])
    exact = outputs_gradients_blocks(wide, blocks, on_cpu[1], **sizes)
    on_gpu = jax.device_put((inputs, blocks, cotangent), gpu)
    actual = outputs_gradients_blocks(*on_gpu, **sizes)

    assert jax.tree.leaves(actual)[0].devices() == {gpu}
    names = jax.tree_util.tree_flatten_with_path(actual[:2])[0]
    for (path, got), want, ideal in zip(names, *map(jax.tree.leaves, (reference[:2], exact[:2])), strict=True):
        assert_as_accurate(jax.device_put(got, cpu), want, ideal, name=jax.tree_util.keystr(path))
    # Gaussian scores are not tied, and float32 scores differ by rounding alone.
    if dtype == "float32":
        np.testing.assert_array_equal(actual[2], reference[2])
    again = outputs_gradients_blocks(*on_gpu, **sizes)
    np.testing.assert_array_equal(again[0], actual[0])


@pytest.mark.parametrize("attention", ["full", "window"])
def test_dense_attention_through_cudnn_is_dense_attention(attention: str):
    config = dataclasses.replace(PRESETS["tiny"][1].model, attention=attention, head_dim=64, value_head_dim=64)
    tokens = jax.random.randint(jax.random.key(0), (2, 256), 0, 256, jnp.int32)
    params = Network(config, 257).init(0)
    logits = {}
    for dtype in ("float32", "bfloat16"):
        network = Network(dataclasses.replace(config, dtype=dtype), 257)
        run = jax.jit(lambda params, network=network: network.model(params)(tokens))
        logits[dtype] = np.asarray(run(params))
        program = run.lower(params).as_text()
        assert ("cudnn" in program) == (dtype == "bfloat16")
    # Logits are of size 1, and pass through four layers in bfloat16.
    np.testing.assert_allclose(logits["bfloat16"], logits["float32"], atol=0.15)
