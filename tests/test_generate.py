"""Text through the cache: what the uncached model would say, the same from the same seed, from one compiled program."""

import dataclasses
import functools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nsa_jax import NSAConfig
from tests.tiny import MODEL, random_params
from train.config import AttentionName
from train.generate import (
    LEAST_TEMPERATURE,
    Continuation,
    InOrder,
    Pieces,
    Sampling,
    advance,
    empty_state,
    generate,
    generate_batch,
    generate_tokens,
    prompt_tokens,
    read_prompts,
    sample,
    stop_tokens,
)
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


@pytest.fixture(scope="module")
def one_layer(tiny_run):
    """The tiny run without its second layer, which compiles in half the time and still writes letters."""
    network = Network(dataclasses.replace(tiny_run.config.model, num_layers=1), tiny_run.run.tokenizer.vocab_size)
    params = tiny_run.run.params | dict(layers=jax.tree.map(lambda x: x[:1], tiny_run.run.params["layers"]))
    return tiny_run.run._replace(network=network, params=params)


# For "nsa": test_chunks_of_unequal_prompts_are_read_as_the_uncached_model_reads_them.
@pytest.mark.parametrize("attention", sorted({*typing.get_args(AttentionName)} - {"nsa"}))
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


def test_one_compiled_program_draws_all_tokens(one_layer, monkeypatch):
    traced = []
    with_cache = LanguageModel.with_cache

    def counted(self, tokens, *args):
        traced.append(tokens.shape)
        return with_cache(self, tokens, *args)

    monkeypatch.setattr(LanguageModel, "with_cache", counted)
    programs = advance._cache_size()
    run = one_layer._replace(network=Network(one_layer.network.config, one_layer.network.vocab_size))
    texts = [
        generate(run, prompt, sampling=GREEDY, max_tokens=20, seed=seed)
        for prompt, seed in (("the ", 0), ("the ", 1), ("fox ", 0))
    ]
    assert advance._cache_size() == programs + 1
    # The prompt at once, and the loop's body (which JAX may trace twice) with one token.
    assert traced[0] == (1, 4)
    assert set(traced[1:]) == {(1, 1)} and len(traced) <= 3
    # The most likely text has no seed. The model has seen no other letters than these.
    assert texts[0] == texts[1]
    assert all(len(text) == 20 and set(text) <= set("abcdefghijklmnopqrstuvwxyz ") for text in texts)


def test_the_loop_copies_no_cache():
    """The state is written in place, from token to token as well: no temporary could hold one of its large arrays."""
    network = Network(dataclasses.replace(MODEL, num_layers=1, head_dim=32, value_head_dim=32, nsa=NSAConfig()), VOCAB)
    params = network.abstract_params()
    empty = functools.partial(empty_state, network, batch=2, max_length=16384, max_tokens=9)
    state, keys = jax.eval_shape(empty, params), jax.eval_shape(lambda: jax.random.split(jax.random.key(0)))
    limits = jax.ShapeDtypeStruct((2,), jnp.int32)
    program = advance.lower(
        network, params, state, keys, limits, 9, sampling=Sampling(0.9, 5, 0.9), stop=(1,)
    ).compile()
    found, (cache,) = program.memory_analysis(), state.caches
    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(state)]
    assert max(sizes) == cache.selected.key.size * 4 == 2 * 16384 * 32 * 4
    assert found.alias_size_in_bytes >= sum(sizes)
    assert found.temp_size_in_bytes < max(sizes) / 2


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


def test_generate_stops_where_the_model_ends_the_document(one_layer, monkeypatch):
    calls = []

    def draw(network, params, *, state, limits, until, sampling, stop, **_):
        if until:
            calls.append((limits.tolist(), until, state.tokens.shape, sampling, stop))
            tokens = state.tokens.at[0, :2].set(jnp.asarray([104, 105]))
            return state._replace(tokens=tokens, drawn=jnp.int32(3), done=jnp.asarray([True]))
        return state

    monkeypatch.setattr("train.generate.advance", draw)
    monkeypatch.setattr("train.generate.read", lambda network, params, state, *chunk: state)
    sampling = Sampling(0.5, top_k=3)
    made = generate_batch(one_layer, ["né"], sampling=sampling, seed=7)
    assert made.continuations == (Continuation("hi", tokens=2, finish="stop", prompt_tokens=3, seed=7),)
    # All that is left of the context of 32, up to 200.
    assert calls == [([29], 29, (1, 29), sampling, (ByteTokenizer.end_of_document,))]
    run = one_layer._replace(config=dataclasses.replace(one_layer.config, context=1000))
    assert generate(run, "né", sampling=sampling, max_tokens=None, seed=0) == "hi"
    assert calls[1][:3] == ([200], 200, (1, 200))


# Of unlike lengths, one below a compressed token's and one that is read in three chunks; the context is 32.
TEXTS = ["the quick brown fox", "ov", "jumps over a"]


def test_each_prompt_of_a_batch_gets_what_it_gets_alone(one_layer):
    options = dict(sampling=Sampling(0.9, top_k=20, top_p=0.95), max_tokens=12, stop="o", prefill_chunk=7)
    batch = generate_batch(one_layer, TEXTS, seed=5, **options).continuations
    assert [(each.prompt_tokens, each.seed) for each in batch] == [(len(text), 5 + i) for i, text in enumerate(TEXTS)]
    # In one chunk: neither the others' lengths nor the chunks matter.
    alone = generate_batch(one_layer, TEXTS[2:], seed=7, **options | dict(prefill_chunk=99)).continuations
    assert alone == batch[2:]
    again = generate_batch(one_layer, TEXTS[:1] * 3, seed=5, **options).continuations
    assert again[0] == batch[0]
    assert len({each.text for each in again}) == 3


def test_chunks_of_unequal_prompts_are_read_as_the_uncached_model_reads_them():
    network = Network(dataclasses.replace(MODEL, num_layers=1), VOCAB)
    params = random_params(network)
    prompts = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (3, 11)), jnp.int32)
    lengths = [11, 3, 8]
    drawn = generate_tokens(
        network,
        params,
        prompts,
        jax.random.key(0),
        max_tokens=6,
        sampling=GREEDY,
        lengths=jnp.asarray(lengths, jnp.int32),
        prefill_chunk=4,
    )
    uncached = jax.jit(lambda tokens: network.model(params)(tokens))
    for prompt, length, row in zip(prompts, lengths, drawn, strict=True):
        text = jnp.zeros((1, 17), jnp.int32).at[0, :length].set(prompt[:length]).at[0, length : length + 6].set(row)
        np.testing.assert_array_equal(row, uncached(text)[0, length - 1 : length + 5].argmax(axis=-1))


def test_a_stop_text_ends_a_continuation(one_layer):
    """And each prompt's own number of tokens does."""
    with jax.debug_nans(True):  # a row that is done reads no more, and does not overflow its cache
        free = generate_batch(one_layer, TEXTS, sampling=GREEDY).continuations
    assert [each.finish for each in free] == ["length"] * 3
    assert [each.tokens for each in free] == [32 - len(text) for text in TEXTS]
    ended = generate_batch(one_layer, TEXTS, sampling=GREEDY, stop=" ").continuations
    for before, after in zip(free, ended, strict=True):
        assert after.text == before.text.split(" ")[0]
        assert after.finish == ("stop" if " " in before.text else "length")
    assert "stop" in [each.finish for each in ended]
    for stop, tokens in (("ab", "2: [97, 98]"), ("é", "2: [195, 169]"), ("", "0: []")):
        with pytest.raises(
            ValueError, match=re.escape(f"stop={stop!r} must be one token of the run's tokenizer, but")
        ) as e:
            generate_batch(one_layer, TEXTS, sampling=GREEDY, stop=stop)
        assert tokens in str(e.value)
    assert stop_tokens(ByteTokenizer(), "a") == (256, 97)
    assert stop_tokens(ByteTokenizer(), None) == (256,)


def test_streamed_text_is_the_text(one_layer):
    pieces = []
    programs = advance._cache_size()
    options = dict(sampling=Sampling(0.9), seed=3, stop=" ")
    streamed = generate_batch(one_layer, TEXTS, on_text=lambda *piece: pieces.append(piece), **options)
    whole = generate_batch(one_layer, TEXTS, **options)
    assert advance._cache_size() == programs + 1  # the same loop for both
    assert streamed.continuations == whole.continuations
    assert (streamed.speed.decode_tokens, streamed.speed.prefill_tokens) == (whole.speed.decode_tokens, 33)
    for row, each in enumerate(whole.continuations):
        ended = [ended for number, _, ended in pieces if number == row]
        assert "".join(text for number, text, _ in pieces if number == row) == each.text
        assert ended == [False] * (len(ended) - 1) + [True]
    assert min(whole.speed.prefill_seconds, whole.speed.decode_seconds) > 0
    assert whole.speed.decode_steps > max(each.tokens for each in whole.continuations) - 1


def test_pieces_of_text_end_between_characters():
    data = "né — \U0001d11e!".encode() + b"\xe2\x82"  # the last character lacks a byte
    for size in (1, 2, 3):
        pieces = Pieces(ByteTokenizer())
        cuts = range(0, len(data), size)
        texts = [pieces.add(list(data[cut : cut + size]), last=cut == cuts[-1]) for cut in cuts]
        assert "".join(texts) == pieces.text == "né — \U0001d11e!\ufffd"
        assert not any("\ufffd" in text for text in texts[:-1])
    # What is no character stays in its place once more has come.
    pieces = Pieces(ByteTokenizer())
    assert [pieces.add(list(part), last=False) for part in (b"a\xff", b"b", b"\xe2\x82", b"\xac")] == [
        "a", "\ufffdb", "", "\N{EURO SIGN}",
    ]  # fmt: skip


def test_streamed_texts_are_shown_one_after_the_other():
    written = []
    show = InOrder(["A", "B", "C"], written.append)
    for row, text, ended in [(1, "b1", False), (0, "a1", False), (2, "c", True), (1, "b2", True), (0, "a2", True)]:
        show(row, text, ended)
        if (row, text) == (0, "a1"):
            assert "".join(written) == "--- 1 of 3\nAa1"
    assert "".join(written) == "--- 1 of 3\nAa1a2\n--- 2 of 3\nBb1b2\n--- 3 of 3\nCc\n"


def kept(probabilities: list[float], **sampling) -> set[int]:
    """The tokens that are drawn at all, of 400 draws."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32)), (400, len(probabilities)))
    return set(np.asarray(sample(logits, jax.random.split(jax.random.key(1), 400), Sampling(1.0, **sampling))).tolist())


def test_top_p_keeps_the_fewest_most_likely_tokens_that_suffice():
    mixed = [0.1, 0.5, 0.15, 0.25]
    assert kept(mixed, top_p=0.01) == kept(mixed, top_p=1e-50) == {1}
    assert kept(mixed, top_p=0.49) == {1}
    assert kept(mixed, top_p=0.51) == {1, 3}
    assert kept(mixed, top_p=0.74) == {1, 3}
    assert kept(mixed, top_p=0.76) == {1, 2, 3}
    assert kept(mixed, top_p=0.91) == kept(mixed, top_p=1.0) == {0, 1, 2, 3}
    # Ties, exact in float32: the lower ids first, and "at least" p, not more than it.
    even = [0.25] * 4
    assert kept(even, top_p=0.25) == {0}
    assert kept(even, top_p=0.5) == {0, 1}
    assert kept(even, top_p=0.51) == {0, 1, 2}
    assert kept(even, top_p=0.75) == {0, 1, 2}
    # After top_k: of 0.5 and 0.25, the first has two thirds; after the temperature: 0.5 ** 2 of 0.345 is 0.72.
    assert kept(mixed, top_k=2, top_p=0.66) == {1}
    assert kept(mixed, top_k=2, top_p=0.67) == {1, 3}
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(mixed, jnp.float32)), (400, 4))
    drawn = sample(logits, jax.random.split(jax.random.key(1), 400), Sampling(0.5, top_p=0.7))
    assert set(np.asarray(drawn).tolist()) == {1}


def test_top_p_cuts_each_row_by_its_own_probabilities():
    rows = jnp.log(jnp.asarray([[0.9, 0.05, 0.05], [0.1, 0.3, 0.6]], jnp.float32))
    keys = jax.random.split(jax.random.key(0), (300, 2))
    drawn = np.asarray(jax.vmap(lambda keys: sample(rows, keys, Sampling(1.0, top_p=0.8)))(keys))
    assert set(drawn[:, 0].tolist()) == {0} and set(drawn[:, 1].tolist()) == {1, 2}
    # With the probabilities of what is left.
    np.testing.assert_allclose((drawn[:, 1] == 2).mean(), 2 / 3, atol=0.12)


def test_prompts_are_read_from_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("She had been \r\n\n  né\n")
    assert read_prompts(path) == ["She had been ", "  né"]
    path = tmp_path / "prompts.jsonl"
    path.write_text('"two\\nlines"\n""\n')
    assert read_prompts(path) == ["two\nlines", ""]
    for name, content, problem in (
        ("a.jsonl", b'"a"\nb\n', "line 2 of .*a.jsonl is not JSON"),
        ("b.jsonl", b'{"text": "a"}', "line 1 of .*b.jsonl is JSON, but no string"),
        ("c.txt", b" \n\n", "c.txt has no prompt: write one in each line"),
        ("d.txt", b"\xff", "d.txt is not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            read_prompts(tmp_path / name)


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
        return np.bincount(
            sample(logits, jax.random.split(jax.random.key(0), len(logits)), sampling), minlength=4
        ) / len(logits)

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
    for temperature in (-0.5, float("nan"), float("inf"), 1e-39, 9e-7):
        problem = (
            f"temperature={temperature} must be 0, which takes the most likely token, or a finite number of at least"
        )
        with pytest.raises(ValueError, match=f"{problem} 1e-06"):
            draw("the", temperature=temperature)
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        draw("the", top_k=0)
    for top_p in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"top_p={top_p} must be above 0 and at most 1"):
            draw("the", top_p=top_p)
    for prompts, options, problem in (
        ([], {}, "there is no prompt"),
        (["a"], dict(prefill_chunk=0), "prefill_chunk=0 must be at least 1"),
        (["a"], dict(seed=-1), "seed=-1 must be in 0"),
        (["a", "b" * 32], {}, "prompt 2 of 2 has 32 tokens, but the model's context is 32"),
        (["a", "b" * 30], dict(max_tokens=3), "max_tokens=3 must lie between 1 and 2: prompt 2 of 2 has 30 of"),
    ):
        with pytest.raises(ValueError, match=problem):
            generate_batch(tiny_run.run, prompts, sampling=GREEDY, **options)


def test_the_least_temperature_overflows_nothing():
    """As large as logits of a model may be, the most likely is drawn; at a temperature as large as may be, any."""
    logits = jnp.broadcast_to(jnp.asarray([-1e30, 0.9e30, 1e30, -1e30], jnp.float32), (100, 4))
    keys = jax.random.split(jax.random.key(0), 100)
    for temperature, drawn in ((LEAST_TEMPERATURE, {2}), (1e300, {0, 1, 2, 3})):
        Sampling(temperature).check()
        assert set(np.asarray(sample(logits, keys, Sampling(temperature))).tolist()) == drawn


def test_an_empty_prompt_begins_a_document():
    np.testing.assert_array_equal(prompt_tokens(ByteTokenizer(), "", 8), [ByteTokenizer.end_of_document])

    class Endless(ByteTokenizer):
        end_of_document = None

    with pytest.raises(ValueError, match="the prompt is empty, and this tokenizer has no token to begin a document"):
        prompt_tokens(Endless(), "", 8)
