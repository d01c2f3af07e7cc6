"""Examples of recall and of needles, and the batches that mix them with text."""

import dataclasses
import re
import typing

import numpy as np
import pytest

from tests.tiny import MODEL, make_config, write_text
from train import niah
from train.config import DataConfig, NeedleTask, from_dict, to_dict
from train.data import Batches, Document, load_corpus, tokenize
from train.draws import Draws
from train.mixture import Mixture, allowed_lengths
from train.mqar import make_recall
from train.niah import LONGEST_SENTENCE, RECIPES, NeedleMaker, make_haystack, split_sentences
from train.tokenizer import ByteTokenizer

STORY = "".join(f" Sentence {i} says nothing new; but it says so {i % 7} times." for i in range(60))


# ---------------------------------------------------------------------------------------------------------------------
# Draws
# ---------------------------------------------------------------------------------------------------------------------


def test_draws_are_the_bits_of_pcg64():
    assert Draws(1, 2).raw(2).tolist() == [8271799387826207682, 7948369750201702571]
    np.testing.assert_array_equal(Draws(1, 2).below(10, 3, 2), (Draws(1, 2).raw(3, 2) % np.uint64(10)).astype(np.int64))


def test_distinct_draws_have_all_as_likely():
    drawn = Draws(0).distinct(5, 6000, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(drawn.T), 1)
    np.testing.assert_allclose(counts[~np.eye(5, dtype=bool)] / 6000, 1 / 20, atol=0.01)


def test_weighted_draws_are_one_after_the_other():
    weights = np.array([4.0, 2.0, 1.0])
    drawn = Draws(0).distinct_weighted(weights, 20000, 2)
    for first in range(3):
        for second in set(range(3)) - {first}:
            expected = weights[first] / 7 * weights[second] / (7 - weights[first])
            assert np.mean((drawn == (first, second)).all(axis=1)) == pytest.approx(expected, abs=0.012)


# ---------------------------------------------------------------------------------------------------------------------
# Multi-query associative recall
# ---------------------------------------------------------------------------------------------------------------------


def test_recall_is_zoologys():
    vocab_size, length, pairs = 41, 24, 5
    recall = make_recall(Draws(3), num_examples=50, length=length, pairs=pairs, vocab_size=vocab_size)
    assert recall.tokens.shape == (50, length) and recall.tokens.min() >= 0 and recall.tokens.max() < vocab_size
    keys, values = recall.tokens[:, 0 : 2 * pairs : 2], recall.tokens[:, 1 : 2 * pairs : 2]
    assert keys.min() >= 1 and keys.max() < 20 and values.min() >= 20
    for row in range(50):
        assert len(set(keys[row])) == len(set(values[row])) == pairs
        assert (recall.positions[row] % 2 == 0).all() and recall.positions[row].min() >= 2 * pairs
        asked = recall.tokens[row, recall.positions[row]]
        assert sorted(asked) == sorted(keys[row]) and (np.diff(recall.positions[row]) > 0).all()
        value_of = dict(zip(keys[row], values[row], strict=True))
        assert [value_of[key] for key in asked] == recall.answers[row].tolist()


def test_recall_asks_early_by_the_power_law():
    recall = make_recall(Draws(0), num_examples=20000, length=12, pairs=1, vocab_size=20)
    weights = np.arange(1, 6) ** -0.99
    for slot, weight in enumerate(weights / weights.sum()):
        assert np.mean(recall.positions[:, 0] == 2 + 2 * slot) == pytest.approx(weight, abs=0.012)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(length=15), "length=15 must be even"),
        (dict(pairs=5), "length=16 must be at least 4 \\* pairs=5 = 20"),
        (dict(vocab_size=16), "vocab_size=16 of the tokenizer must be larger than length=16"),
        (dict(pairs=0), "pairs=0 must be at least 1"),
    ],
)
def test_recall_refuses_what_zoology_does(fields, message):
    with pytest.raises(ValueError, match=message):
        make_recall(Draws(0), num_examples=1, **(dict(length=16, pairs=2, vocab_size=32) | fields))


# ---------------------------------------------------------------------------------------------------------------------
# Needles
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker():
    return NeedleMaker(ByteTokenizer(), make_haystack([Document("story", STORY)], ByteTokenizer()))


def read(needles):
    """The text, the prompt and the answer."""
    text = ByteTokenizer().decode(needles.tokens)
    return text, text[: needles.answer_start], text[needles.answer_start :]


def test_sentences_are_the_text_in_pieces():
    assert split_sentences('He came. "Well?" said she.\n\nNo') == ["He came.", ' "Well?"', " said she.", "\n\nNo"]
    long = "word " * 300 + "x" * 900
    assert "".join(split_sentences(long)) == long
    assert max(map(len, split_sentences(long))) <= LONGEST_SENTENCE


@pytest.mark.parametrize("task", typing.get_args(NeedleTask))
def test_an_example_holds_its_answer(maker, task):
    recipe = RECIPES[task]
    for seed, depth in enumerate((0, 37, 100)):
        needles = maker.make(Draws(seed), task, length=1000, depth=depth)
        text, prompt, answer = read(needles)
        assert len(needles.tokens) == 1000 and len(needles.value) == len(answer)
        values = answer.strip().split(", ")
        assert len(values) == recipe.num_values * recipe.num_queries
        for rank, value in enumerate(values):
            assert prompt.count(f" {value}.") == 1
            where = needles.source[needles.value == rank]
            assert "".join(text[i] for i in where) == value
            assert where[0] == prompt.index(f" {value}.") + 1
        # Commas, and the spaces before values.
        assert (needles.source[needles.value < 0] == -1).all() and sum(needles.value < 0) == 2 * len(values) - 1
        if recipe.num_values > 1:
            assert sorted(values, key=prompt.index) == values
        if recipe.keys != "none":
            for value, key in zip(values, keys_of(prompt) * recipe.num_values, strict=False):
                assert f"for {key} is: {value}." in prompt


def keys_of(prompt):
    """The keys that the question asks for."""
    asked = prompt[prompt.rindex(" for ") + 5 : prompt.rindex(" ")]
    return asked.replace(" and ", " ").split(", ")


def test_the_depth_is_the_share_of_sentences_before_the_needle(maker):
    def before(depth):
        _, prompt, _ = read(maker.make(Draws(5), "single_2", length=1500, depth=depth))
        return prompt[: prompt.index(" One of the special")].count("times."), prompt.count("times.")

    assert before(0)[0] == 0
    count, total = before(50)
    assert abs(count - total / 2) <= 1
    count, total = before(100)
    assert count == total


@pytest.mark.parametrize("task", ["multikey_1", "multiquery", "multivalue"])
def test_the_depth_is_that_of_a_needle_that_is_asked_for(maker, task):
    """Of the first key; of a key's several values, of any."""
    for seed in range(5):
        for depth in (0, 40, 100):
            _, prompt, _ = read(maker.make(Draws(seed), task, length=2400, depth=depth))
            text = prompt[: prompt.rindex("\nWhat")]
            found = [match.start() for match in re.finditer(f"for {keys_of(prompt)[0]} is:", text)]
            shares = [text[:start].count("times.") / text.count("times.") for start in found]
            assert min(abs(share - depth / 100) for share in shares) < 0.06


def test_a_haystack_begins_at_any_sentence(maker):
    texts = [read(maker.make(Draws(seed), "single_2", length=900, depth=100))[1] for seed in range(30)]
    assert len({re.search(r"Sentence (\d+)", text)[1] for text in texts}) > 15


def test_what_is_asked_for_is_once_in_a_haystack_of_needles(maker, monkeypatch):
    """Of four keys that there are."""
    monkeypatch.setattr(niah, "ADJECTIVES", ("red", "green"))
    monkeypatch.setattr(niah, "NOUNS", ("door", "key"))
    for seed in range(5):
        _, prompt, _ = read(maker.make(Draws(seed), "multikey_2", length=900, depth=50))
        assert prompt.count(f"for {keys_of(prompt)[0]} is: ") == 1


class Joined(ByteTokenizer):
    """A digit behind a space is one token with it."""

    def encode(self, text):
        tokens = re.findall(r" \d|.", text, flags=re.DOTALL)
        return np.asarray([ord(x) if len(x) == 1 else 300 + int(x) for x in tokens], np.int32)

    def decode(self, ids):
        return "".join(f" {i - 300}" if i >= 300 else chr(i) for i in map(int, ids))


def test_a_token_that_holds_nothing_of_a_value_does_not_count():
    """A space of its own; one that holds a digit as well counts, and so does its source."""
    for tokenizer, spaces in ((ByteTokenizer(), 1), (Joined(), 0)):
        maker = NeedleMaker(tokenizer, make_haystack([Document("story", STORY)], tokenizer))
        needles = maker.make(Draws(0), "passkey", length=600, depth=50)
        answer = needles.tokens[needles.answer_start :]
        assert (needles.value < 0).tolist() == [True] * spaces + [False] * (len(answer) - spaces)
        counted = needles.value >= 0
        np.testing.assert_array_equal(needles.tokens[needles.source[counted]], answer[counted])
        assert len(tokenizer.decode(answer[counted]).strip()) == 5


def test_haystacks_are_what_the_task_says(maker):
    _, noise, _ = read(maker.make(Draws(0), "single_1", length=900, depth=50))
    assert noise.count("The grass is green.") > 5 and "Sentence" not in noise
    _, text, _ = read(maker.make(Draws(0), "single_2", length=900, depth=50))
    assert text.count("Sentence") > 5
    _, others, _ = read(maker.make(Draws(0), "multikey_2", length=900, depth=50))
    assert others.count("One of the special magic numbers for ") > 5 and "Sentence" not in others
    assert others.count(f"for {keys_of(others)[0]} is: ") == 1


def test_what_does_not_fit_is_said(maker):
    with pytest.raises(
        ValueError, match="length=200 is too short for 'single_3'.* take up to 3.. tokens.*give at least 3"
    ):
        maker.make(Draws(0), "single_3", length=200, depth=0)
    with pytest.raises(ValueError, match=f"the haystack has {len(STORY)} tokens .* give a longer text"):
        maker.make(Draws(0), "single_2", length=9000, depth=0)


@pytest.mark.parametrize("task", typing.get_args(NeedleTask))
def test_what_passes_the_check_can_be_made_from_any_draws(maker, task):
    """At the shortest length, which some needles are too long for."""
    with pytest.raises(ValueError, match="give at least") as refused:
        maker.check(task, length=1)
    least = int(re.search(r"give at least (\d+)", str(refused.value))[1])
    with pytest.raises(ValueError, match=f"length={least - 1} is too short"):
        maker.check(task, length=least - 1)
    maker.check(task, length=least)
    for seed in range(200):
        assert len(maker.make(Draws(seed), task, length=least, depth=50).tokens) == least


def test_a_tokenizer_that_loses_digits_is_refused():
    class NoDigits(ByteTokenizer):
        def decode(self, ids):
            return "".join("?" if character.isdigit() else character for character in super().decode(ids))

    with pytest.raises(ValueError, match="needles can't be written with it"):
        NeedleMaker(NoDigits(), make_haystack([Document("story", STORY)], NoDigits()))


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures
# ---------------------------------------------------------------------------------------------------------------------


def make_mixture(folder, *, batch_size=4, context=64, seed=0, **data):
    config = make_config(
        write_text(folder / "text.txt", num_words=600),
        context=context,
        batch_size=batch_size,
        seed=seed,
        data=DataConfig(text=str(folder / "text.txt"), **data),
    )
    corpus, tokenizer = load_corpus(config.data.text), ByteTokenizer()
    text = Batches(
        tokenize(corpus.train, tokenizer),
        context=context,
        batch_size=batch_size,
        seed=seed,
        packing=config.data.packing,
    )
    return Mixture(text, corpus.train, tokenizer, config), text


MQAR = dict(task="mqar", packing="documents", task_lengths=(16, 32), pairs=(2, 4, 8), task_share=0.4)
NIAH = dict(task="niah", packing="documents", needles=("single_2", "passkey"), task_lengths=(300, 450))


@pytest.mark.parametrize("data, context", [(MQAR, 64), (NIAH, 640)])
def test_a_batch_is_a_pure_function_of_the_step(tmp_path, data, context):
    mixture, _ = make_mixture(tmp_path, context=context, **data)
    forwards = [mixture.at(step) for step in range(6)]
    fresh, _ = make_mixture(tmp_path, context=context, **data)
    for step in (4, 1, 5):
        for ours, theirs in zip(fresh.at(step), forwards[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    other, _ = make_mixture(tmp_path, context=context, seed=1, **data)
    assert not np.array_equal(other.at(4).inputs, forwards[4].inputs)
    assert not np.array_equal(forwards[0].inputs, forwards[1].inputs)


def test_rows_are_shared_and_no_text_is_left_out(tmp_path):
    mixture, text = make_mixture(tmp_path, **MQAR)
    rows = [row for step in range(10) for row in zip(*mixture.at(step), strict=True)]
    # Of 5 rows 2 are the task's; a text row's targets count but for documents' first tokens.
    is_task = [weights.max() > 1 for _, _, weights, _ in rows]
    assert is_task == [False, False, True, False, True] * 8
    expected = text.read(np.arange(24))
    for field, whole in enumerate(expected):
        np.testing.assert_array_equal(np.stack([row[field] for row, task in zip(rows, is_task) if not task]), whole)


def test_a_row_of_recall(tmp_path):
    mixture, _ = make_mixture(tmp_path, **(MQAR | dict(task_share=1.0, task_weight=0.5)))
    seen = set()
    for step in range(9):
        batch = mixture.at(step)
        assert batch.weights.sum(axis=1) == pytest.approx(0.5 * 64)
        for inputs, targets, weights, segment_ids in zip(*batch, strict=True):
            length = 64 // (segment_ids[-1] + 1)
            assert segment_ids.tolist() == (np.arange(64) // length).tolist()
            for start in range(0, 64, length):
                example = slice(start, start + length)
                asked = np.flatnonzero(weights[example])
                seen.add((length, len(asked)))
                tokens = inputs[example].tolist()
                pairs = dict(zip(tokens[0 : 2 * len(asked) : 2], tokens[1 : 2 * len(asked) : 2], strict=True))
                assert [pairs[tokens[i]] for i in asked] == targets[example][asked].tolist()
    assert seen == {(16, 2), (16, 4), (32, 2), (32, 4), (32, 8)}


def test_a_row_of_needles_counts_at_the_values(tmp_path):
    mixture, _ = make_mixture(tmp_path, context=640, **(NIAH | dict(task_share=1.0, task_lengths=(320,))))
    batch = mixture.at(0)
    assert batch.segment_ids.tolist() == [[0] * 320 + [1] * 320] * len(batch.inputs)
    for inputs, targets, weights in zip(*batch[:3], strict=True):
        assert weights.sum() == pytest.approx(640)
        for start in (0, 320):
            counted = start + np.flatnonzero(weights[start : start + 320])
            assert counted[-1] == start + 318
            np.testing.assert_array_equal(targets[start : start + 319], inputs[start + 1 : start + 320])
            value = ByteTokenizer().decode(targets[counted])
            assert value.startswith(" ") and value.strip().isdigit()
            assert f"{value}." in ByteTokenizer().decode(inputs[start : counted[0]])


def test_the_curriculum_adds_lengths(tmp_path):
    data = DataConfig(task="mqar", task_lengths=(64, 16, 32, 8), curriculum_steps=100)
    assert [allowed_lengths(data, 4, step) for step in (0, 24, 25, 50, 74, 75, 500)] == [1, 1, 2, 3, 3, 4, 4]
    assert allowed_lengths(dataclasses.replace(data, curriculum_steps=0), 4, 0) == 4
    mixture, _ = make_mixture(tmp_path, **(MQAR | dict(task_share=1.0, curriculum_steps=8)))
    examples = [mixture.at(step).segment_ids[:, -1] + 1 for step in range(12)]
    assert np.unique(examples[:4]).tolist() == [4] and np.unique(examples[4:]).tolist() == [2, 4]


@pytest.mark.parametrize(
    "data, message",
    [
        (dict(task_share=0.0), "task_share=0.0 must be above 0"),
        (dict(task_weight=-1.0), "task_weight=-1.0 must be positive"),
        (dict(curriculum_steps=-1), "curriculum_steps=-1 must be at least 0"),
        (dict(task_lengths=(16, 128)), "task_lengths=\\(16, 128\\) must lie between 1 and context=64"),
        (dict(packing="running"), "packing must be 'documents'"),
        (dict(pairs=()), "pairs=\\(\\) must have one number"),
        (dict(pairs=(5, 8)), "length=16 must be at least 4 \\* pairs=5"),
        (dict(pairs=(2, 9)), "length=32 must be at least 4 \\* pairs=9"),
        (dict(task="niah", packing="running"), "task='niah' with .* must not see each other"),
        (dict(task="niah", needles=()), "needles=\\(\\) must be one or more of passkey, "),
        (dict(task="niah"), "length=16 is too short for 'single_2'"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        make_mixture(tmp_path, **(MQAR | data))


def test_a_mixture_survives_json():
    """One, too, that is refused in training (`running`): checkpoints of such runs can be opened."""
    data = DataConfig(text="text.txt", task="niah", packing="running", task_lengths=(16, 32))
    config = make_config("text.txt", model=MODEL, data=data)
    import json

    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
