"""Text through the cache: what the uncached model would say, the same from the same seed, from one compiled program."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import MODEL, random_params
from train.config import AttentionName
from train.generate import Sampling, generate, generate_tokens, prompt_tokens, sample
from train.model import LanguageModel, Network
from train.tokenizer import ByteTokenizer

pytest_plugins = ["tests.tiny_fixtures"]
pytestmark = pytest.mark.usefixtures("quick_compilation")

GREEDY = Sampling(temperature=0)
VOCAB = 50
PROMPTS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 7)), jnp.int32)


@pytest.fixture(scope="module")
def window():
    """The network that compiles fastest, and its parameters."""
    network = Network(dataclasses.replace(MODEL, attention="window", num_layers=1), VOCAB)
    return network, random_params(network)


@pytest.mark.parametrize("attention", typing.get_args(AttentionName))
def test_greedy_text_is_the_argmax_of_the_uncached_model(attention):
    network = Network(dataclasses.replace(MODEL, attention=attention, tie_embeddings=False), VOCAB)
    params = random_params(network)
    drawn = generate_tokens(network, params, PROMPTS, jax.random.key(0), max_tokens=12, sampling=GREEDY)
    assert drawn.shape == (2, 12)
    text = jnp.concatenate([PROMPTS, drawn], axis=1)
    logits = jax.jit(lambda params, text: network.model(params)(text))(params, text)
    np.testing.assert_array_equal(drawn, logits[:, 6:-1].argmax(axis=-1))
    assert len(set(drawn.ravel().tolist())) > 4  # and not one token again and again


def test_text_is_a_function_of_the_seed(tiny_run):
    """With the sampling of the training's last act, whose program is compiled already."""

    def draw(seed: int) -> str:
        return generate(tiny_run.run, tiny_run.config.prompt, sampling=Sampling(0.7), max_tokens=None, seed=seed)

    assert tiny_run.config.prompt + draw(0) + "\n" == (tiny_run.folder / "sample.txt").read_text()
    assert len({draw(seed) for seed in range(4)}) == 4


def test_one_compiled_program_draws_all_tokens(tiny_run, monkeypatch):
    traced = []
    with_cache = LanguageModel.with_cache

    def counted(self, tokens, *args):
        traced.append(tokens.shape)
        return with_cache(self, tokens, *args)

    monkeypatch.setattr(LanguageModel, "with_cache", counted)
    programs = generate_tokens._cache_size()
    run = tiny_run.run._replace(network=Network(tiny_run.config.model, tiny_run.run.tokenizer.vocab_size))
    texts = [
        generate(run, prompt, sampling=GREEDY, max_tokens=20, seed=seed)
        for prompt, seed in (("the ", 0), ("the ", 1), ("fox ", 0))
    ]
    assert generate_tokens._cache_size() == programs + 1
    # The prompt at once, and the loop's body (which JAX may trace twice) with one token.
    assert traced[0] == (1, 4)
    assert set(traced[1:]) == {(1, 1)} and len(traced) <= 3
    # The most likely text has no seed. The model has seen no other letters than these.
    assert texts[0] == texts[1]
    assert all(len(text) == 20 and set(text) <= set("abcdefghijklmnopqrstuvwxyz ") for text in texts)


def test_a_stop_token_ends_a_row(window):
    """Each at its own place; the token that ends it, and all after it, are -1."""
    network, params = window
    key, sampling = jax.random.key(0), Sampling(0.5)
    free = np.asarray(generate_tokens(network, params, PROMPTS, key, max_tokens=20, sampling=sampling))
    stop = int(free[0, 6])
    ends = [row.tolist().index(stop) if stop in row else 20 for row in free]
    assert 0 < ends[0] <= 6 and ends[0] != ends[1]
    drawn = generate_tokens(network, params, PROMPTS, key, max_tokens=20, sampling=sampling, stop=stop)
    for row, expected, end in zip(np.asarray(drawn), free, ends, strict=True):
        np.testing.assert_array_equal(row, np.where(np.arange(20) < end, expected, -1))


def test_generate_stops_where_the_model_ends_the_document(tiny_run, monkeypatch):
    calls = []

    def draw(network, params, prompt, key, **options):
        calls.append((prompt.tolist(), options))
        return jnp.asarray([[104, 105, -1, -1]], jnp.int32)

    monkeypatch.setattr("train.generate.generate_tokens", draw)
    sampling = Sampling(0.5, top_k=3)
    assert generate(tiny_run.run, "né", sampling=sampling, max_tokens=None, seed=0) == "hi"
    # All that is left of the context of 32, up to 200.
    assert calls == [([[110, 195, 169]], dict(max_tokens=29, sampling=sampling, stop=ByteTokenizer.end_of_document))]
    run = tiny_run.run._replace(config=dataclasses.replace(tiny_run.config, context=1000))
    generate(run, "né", sampling=sampling, max_tokens=None, seed=0)
    assert calls[1][1]["max_tokens"] == 200


def test_no_token_beyond_the_vocabulary_is_drawn(window):
    """The matrices are padded to 64 rows, which at a high temperature would be drawn as often as others."""
    network, params = window
    assert params["embed"]["embedding"].shape[0] == 64 > VOCAB
    prompts = jnp.zeros((64, 1), jnp.int32)
    drawn = generate_tokens(network, params, prompts, jax.random.key(0), max_tokens=24, sampling=Sampling(100.0))
    assert set(np.asarray(drawn).ravel().tolist()) == set(range(VOCAB))


def test_tokens_are_drawn_with_the_probabilities_of_their_logits():
    probabilities = np.asarray([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (20_000, 4))

    def shares(sampling: Sampling) -> np.ndarray:
        return np.bincount(sample(logits, jax.random.split(jax.random.key(0), len(logits)), sampling), minlength=4) / len(logits)

    # Four standard deviations of the least precise of them are 0.014.
    np.testing.assert_allclose(shares(Sampling(1.0)), probabilities, atol=0.014)
    np.testing.assert_allclose(shares(Sampling(0.5)), probabilities**2 / (probabilities**2).sum(), atol=0.014)
    np.testing.assert_allclose(shares(Sampling(1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.014)
    np.testing.assert_allclose(shares(Sampling(1.0, top_k=99)), probabilities, atol=0.014)
    np.testing.assert_array_equal(shares(Sampling(1.0, top_k=1)), [1, 0, 0, 0])
    np.testing.assert_array_equal(shares(GREEDY), [1, 0, 0, 0])


def test_what_does_not_fit_is_refused(tiny_run):
    def draw(prompt: str, *, max_tokens: int | None = None, **sampling) -> str:
        return generate(tiny_run.run, prompt, sampling=Sampling(**sampling), max_tokens=max_tokens, seed=0)

    with pytest.raises(
        ValueError, match="the prompt has 32 tokens, but the model's context is 32: shorten it to at most 31"
    ):
        draw("x" * 32)
    for max_tokens in (0, -1, 23):
        with pytest.raises(
            ValueError, match=rf"max_tokens={max_tokens} must lie between 1 and 22: the prompt has 10 of"
        ):
            draw("the quick ", max_tokens=max_tokens)
    for temperature in (-0.5, float("nan")):
        with pytest.raises(ValueError, match=rf"temperature={temperature} must be at least 0"):
            draw("the", temperature=temperature)
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        draw("the", top_k=0)


def test_an_empty_prompt_begins_a_document():
    np.testing.assert_array_equal(prompt_tokens(ByteTokenizer(), "", 8), [ByteTokenizer.end_of_document])

    class Endless(ByteTokenizer):
        end_of_document = None

    with pytest.raises(ValueError, match="the prompt is empty, and this tokenizer has no token to begin a document"):
        prompt_tokens(Endless(), "", 8)
