"""train.tokenizer and train.data: what is read, how it is split, and which token lands where in which batch."""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from train import data
from train.data import (
    Batch,
    Batches,
    Document,
    Packing,
    TokenStream,
    evaluation_batches,
    load_corpus,
    load_documents,
    prefetch,
    tokenize,
)
from train.tokenizer import BPETokenizer, ByteTokenizer, make_tokenizer, tokenizer_from_json

ROOT = Path(__file__).parents[1]


def no_texts() -> list[str]:
    raise AssertionError("only bpe:N reads the texts")


def stream_of(num_tokens: int, starts: tuple[int, ...] = (0,)) -> TokenStream:
    """Token i is i, so that tokens are positions."""
    return TokenStream(np.arange(num_tokens, dtype=np.uint16), np.array(starts, np.int64), num_tokens)


def text_of(documents: tuple[Document, ...]) -> str:
    return "".join(document.text for document in documents)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------

NON_ASCII = "naïve – “日本語” 🎉\r\n\t\0"


def test_bytes() -> None:
    tokenizer = make_tokenizer("bytes", no_texts)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    ids = tokenizer.encode(NON_ASCII)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(NON_ASCII.encode("utf-8"))
    assert tokenizer.decode(ids) == NON_ASCII
    assert isinstance(tokenizer_from_json(tokenizer.to_json()), ByteTokenizer)
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode([]) == ""


def test_bytes_decode_leaves_out_what_is_no_text() -> None:
    assert ByteTokenizer().decode([104, 256, -1, 300, 105]) == "hi"
    assert ByteTokenizer().decode([0xC3, 104]) == "\ufffdh"


@pytest.mark.parametrize("ids", [[[104, 105]], [1.5], 7], ids=["batch", "floats", "scalar"])
def test_decode_refuses(ids: object) -> None:
    with pytest.raises(ValueError, match=r"whole numbers of shape \[tokens\]"):
        ByteTokenizer().decode(ids)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def novel() -> str:
    return load_corpus("austen").test[0].text


@pytest.fixture(scope="module")
def bpe(novel: str) -> BPETokenizer:
    pytest.importorskip("tokenizers", reason='byte-pair encodings need pip install "nsa-jax[train]"')
    tokenizer = make_tokenizer("bpe:512", lambda: [novel[:100_000]])
    assert isinstance(tokenizer, BPETokenizer)
    return tokenizer


def test_bpe(bpe: BPETokenizer, novel: str) -> None:
    assert bpe.vocab_size == 512
    assert bpe.end_of_document == 0
    ids = bpe.encode(novel)
    assert ids.dtype == np.int32
    assert ids.min() > 0 and ids.max() == 511
    assert bpe.decode(ids) == novel
    assert 1.8 < len(novel) / len(ids) < 2.5
    assert bpe.decode(bpe.encode(NON_ASCII)) == NON_ASCII  # of which the training text has next to nothing
    assert bpe.encode("").shape == (0,)
    assert bpe.decode([*bpe.encode("sense").tolist(), 0, -1, 512]) == "sense"


def test_bpe_is_deterministic(bpe: BPETokenizer, novel: str) -> None:
    assert make_tokenizer("bpe:512", lambda: [novel[:100_000]]).to_json() == bpe.to_json()
    # Another process, another seed of Python's hashes, another number of threads.
    program = (
        "import hashlib; from train.data import load_corpus; from train.tokenizer import make_tokenizer\n"
        "text = load_corpus('austen').test[0].text[:100_000]\n"
        "print(hashlib.sha256(make_tokenizer('bpe:512', lambda: [text]).to_json().encode()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == hashlib.sha256(bpe.to_json().encode()).hexdigest()


def test_bpe_round_trips_through_json(bpe: BPETokenizer, novel: str) -> None:
    again = tokenizer_from_json(bpe.to_json())
    assert again.to_json() == bpe.to_json()
    assert (again.vocab_size, again.end_of_document) == (bpe.vocab_size, bpe.end_of_document)
    np.testing.assert_array_equal(again.encode(novel[:1000]), bpe.encode(novel[:1000]))


def test_bpe_reads_special_tokens_in_a_text_as_text(bpe: BPETokenizer) -> None:
    text = "the token <|endoftext|> ends a document"
    for tokenizer in (bpe, tokenizer_from_json(bpe.to_json())):
        ids = tokenizer.encode(text)
        assert 0 not in ids
        assert tokenizer.decode(ids) == text


def test_long_texts_are_encoded_in_pieces_without_a_trace(bpe: BPETokenizer, novel: str) -> None:
    assert len(novel) > 4 * (1 << 16)
    whole = bpe._tokenizer.encode(novel, add_special_tokens=False).ids
    assert bpe.encode(novel).tolist() == whole


def test_users_tokenizer_json(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason='tokenizer.json needs pip install "nsa-jax[train]"')
    words = {"<s>": 0, "</s>": 9, "sense": 1, "and": 2, "sensibility": 3}  # with a gap
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    theirs.add_special_tokens(["<s>", "</s>"])
    theirs.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    theirs.enable_truncation(2)
    theirs.enable_padding(length=7)
    path = tmp_path / "tokenizer.json"
    theirs.save(str(path))
    assert theirs.encode("sense and sensibility").ids != [1, 2, 3]

    tokenizer = make_tokenizer(str(path), no_texts)
    assert tokenizer.vocab_size == 10
    assert tokenizer.end_of_document == 9
    assert tokenizer.encode("sense and sensibility").tolist() == [1, 2, 3]
    assert tokenizer.decode([0, 1, 2, 3, 9]) == "sense and sensibility"
    stream = tokenize([Document("a", "sense and"), Document("b", "sensibility")], tokenizer)
    assert stream.tokens.tolist() == [1, 2, 9, 3, 9]
    assert stream.tokens.dtype == np.uint8

    no_end = json.loads(path.read_text())
    no_end["added_tokens"] = []
    no_end["model"]["vocab"] = {"<s>": 0, "sense": 1, "and": 2}
    tokenizer = tokenizer_from_json(json.dumps(no_end))
    assert tokenizer.end_of_document is None
    stream = tokenize([Document("a", "sense"), Document("b", " "), Document("c", "and sense")], tokenizer)
    assert stream.tokens.tolist() == [1, 2, 1]
    assert stream.starts.tolist() == [0, 1]


@pytest.mark.parametrize("size", ["", "0", "256", "65537", "-512", "4k", "٥١٢"])
def test_bpe_sizes_out_of_range(size: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number from 257 .* to 65536"):
        make_tokenizer(f"bpe:{size}", no_texts)


def test_bpe_needs_enough_text() -> None:
    pytest.importorskip("tokenizers", reason='byte-pair encodings need pip install "nsa-jax[train]"')
    with pytest.raises(ValueError, match="bpe:300 asks for 300 tokens.*at most bpe:2"):
        make_tokenizer("bpe:300", lambda: ["so little text"])


def test_unknown_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'tokenizer=\'words\' must be "bytes", "bpe:N".*no such file'):
        make_tokenizer("words", no_texts)
    with pytest.raises(ValueError, match=r"tokenizer\.json: there is no such file"):
        make_tokenizer(str(tmp_path / "tokenizer.json"), no_texts)
    with pytest.raises(ValueError, match=r"tokenizer\.json: is a folder"):
        make_tokenizer(str(tmp_path), no_texts)


@pytest.mark.parametrize(
    "raw", [b'{"a": 1}', b"not json", b"\xff\xfe\x00", b""], ids=["other", "text", "binary", "empty"]
)
def test_files_that_are_no_tokenizer(tmp_path: Path, raw: bytes) -> None:
    pytest.importorskip("tokenizers", reason='tokenizer.json needs pip install "nsa-jax[train]"')
    path = tmp_path / "tokenizer.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="is not a tokenizer file .*give the tokenizer.json of"):
        make_tokenizer(str(path), no_texts)


def test_missing_tokenizers_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "nsa-jax\[train\]"'):
        make_tokenizer("bpe:512", lambda: ["text"])
    with pytest.raises(ImportError, match=r'pip install "nsa-jax\[train\]"'):
        tokenizer_from_json("{}")
    assert make_tokenizer("bytes", no_texts).vocab_size == 257


def test_importing_needs_neither_jax_nor_tokenizers() -> None:
    program = "import sys, train.data, train.tokenizer; sys.exit(bool({'jax', 'tokenizers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def test_austen() -> None:
    corpus = load_corpus("austen")
    assert [document.name for document in corpus.validation] == ["persuasion"]
    assert [document.name for document in corpus.test] == ["northanger_abbey"]
    assert len(corpus.train) == 4
    assert corpus.train[2].text.split("\n\n")[0] == "PRIDE AND PREJUDICE"
    assert corpus.sha256 == "9325da11ecb64aaeda12460920af68ab778c709713ca711428d622ea95c2c0ad"
    assert corpus.description == (
        "austen: train 3,124,764 characters in 4 documents, validation 466,854 characters in 1 document, "
        "test 432,978 characters in 1 document; sha256 9325da11ecb6"
    )


def test_provenance_names_the_same_texts() -> None:
    table = (data.TEXTS / "PROVENANCE.md").read_text(encoding="utf-8")
    for name, (split, sha256) in data.AUSTEN.items():
        assert any(all(part in row for part in (f"| {name} |", f"| {split} |", sha256)) for row in table.splitlines())
    assert {path.name.removesuffix(".txt.xz") for path in data.TEXTS.glob("*.xz")} == set(data.AUSTEN)


def test_damaged_bundled_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (data.TEXTS / "emma.txt.xz").read_bytes()
    monkeypatch.setattr(data, "TEXTS", tmp_path)
    damaged = tmp_path / "emma.txt.xz"
    with pytest.raises(FileNotFoundError, match=r"emma\.txt\.xz is missing: .*git checkout"):
        load_corpus("austen")
    for raw, reason in ((good[:1000], "ended"), (b"junk" + good, "format"), (lzma.compress(b"Emma"), "its sha256 is")):
        damaged.write_bytes(raw)
        with pytest.raises(ValueError, match=rf"emma\.txt\.xz is damaged.*{reason}.*git checkout"):
            load_corpus("austen")


def test_stdlib() -> None:
    corpus = load_corpus("stdlib")
    names = [document.name for split in corpus[:3] for document in split]
    assert names == sorted(set(names))
    assert {"abc.py", "json/decoder.py"} <= set(names)
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in names)
    total = sum(len(text_of(split)) for split in corpus[:3])
    assert total > 5_000_000
    assert 0.89 <= len(text_of(corpus.train)) / total <= 0.91
    assert 0.03 <= len(text_of(corpus.validation)) / total <= 0.07
    assert corpus == load_corpus("stdlib")
    assert corpus.description.startswith("stdlib of Python 3.")


def test_one_file_is_cut_inside(tmp_path: Path) -> None:
    text = "".join(f"é{i:06}🎉\r\n" for i in range(100))
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode("utf-8"))
    corpus = load_corpus(str(path))
    assert corpus.train == (Document("book.txt[0:900]", text[:900]),)
    assert corpus.validation == (Document("book.txt[900:950]", text[900:950]),)
    assert corpus.test == (Document("book.txt[950:1000]", text[950:]),)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        # Boundaries at 895 and 960: each within 1% of 1000 characters.
        ((500, 395, 65, 40), (["0", "1"], ["2"], ["3"])),
        # Boundaries at 889 and 961, 11 away: too far.
        ((889, 72, 39), (["0", "1[0:11]"], ["1[11:61]"], ["1[61:72]", "2"])),
        # A hundred documents: never cut.
        (
            (10,) * 100,
            ([f"{i:02}" for i in range(90)], [str(i) for i in range(90, 95)], [str(i) for i in range(95, 100)]),
        ),
    ],
    ids=["near", "far", "many"],
)
def test_cuts_go_to_near_boundaries(
    tmp_path: Path, lengths: tuple[int, ...], expected: tuple[list[str], list[str], list[str]]
) -> None:
    width = len(str(len(lengths) - 1))
    for i, length in enumerate(lengths):
        (tmp_path / f"{i:0{width}}").write_text("x" * length)
    corpus = load_corpus(str(tmp_path))
    assert tuple([document.name for document in split] for split in corpus[:3]) == expected


def test_splits_are_disjoint_and_complete() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, rng.choice([10, 1000, 10_000]), size=rng.integers(1, 40))
        text = "".join(rng.choice(list("abcdefgh"), size=lengths.sum()))
        if len(text) < 20:
            continue
        ends = np.cumsum(lengths).tolist()
        documents = [
            Document(str(i), text[end - length : end])
            for i, (length, end) in enumerate(zip(lengths, ends, strict=True))
        ]
        splits = data._split(documents, "random")
        assert all(splits)
        assert "".join(document.text for split in splits for document in split) == text
        sizes = [sum(len(document.text) for document in split) for split in splits]
        assert abs(sizes[0] - 0.9 * len(text)) <= 0.01 * len(text) + 1
        assert abs(sizes[2] - 0.05 * len(text)) <= 0.01 * len(text) + 1


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Three texts, and much that is none."""
    for name in ("b/two.txt", "a/one.txt", "c/deep/three.md"):
        path = tmp_path / "library" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} of forty characters".ljust(40, "."))
    (tmp_path / "library/a/picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "library/a/latin1.txt").write_bytes("naïve".encode("latin1"))
    (tmp_path / "library/a/empty.txt").write_bytes(b"")
    (tmp_path / "library/.git").mkdir()
    (tmp_path / "library/.git/config").write_text("hidden")
    (tmp_path / "library/dangling").symlink_to("nowhere")
    return tmp_path / "library"


def test_folder(library: Path) -> None:
    corpus = load_corpus(str(library))
    assert [document.name for document in corpus.train] == ["a/one.txt", "b/two.txt", "c/deep/three.md[0:28]"]
    assert [document.name for document in corpus.validation + corpus.test] == [
        "c/deep/three.md[28:34]",
        "c/deep/three.md[34:40]",
    ]
    assert "skipped 3 files that are empty or not UTF-8 text, first 'a/empty.txt'" in corpus.description


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/*.txt", {"a/one.txt", "b/two.txt"}),
        ("**/**", {"a/one.txt", "b/two.txt", "c/deep/three.md"}),  # files more than once, and folders
        ("[ab]/*", {"a/one.txt", "b/two.txt"}),
        ("c/*/*", {"deep/three.md"}),
    ],
)
def test_patterns(library: Path, pattern: str, names: set[str]) -> None:
    corpus = load_corpus(str(library / pattern))
    assert {document.name.partition("[")[0] for split in corpus[:3] for document in split} == names
    assert sum(len(text_of(split)) for split in corpus[:3]) == 40 * len(names)


def test_relative_pattern(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = load_corpus(str(library / "**/*.txt"))
    monkeypatch.chdir(library)
    assert load_corpus("**/*.txt").sha256 == absolute.sha256
    (library / "austen").mkdir()
    with pytest.raises(FileNotFoundError, match="'./austen' matches no file"):
        load_corpus("./austen")


def test_sha256_is_of_names_and_texts(library: Path, tmp_path: Path) -> None:
    before = load_corpus(str(library)).sha256
    moved = library.rename(tmp_path / "elsewhere")
    assert load_corpus(str(moved)).sha256 == before
    (moved / "b/two.txt").write_text("another text of forty characters".ljust(40))
    changed = load_corpus(str(moved)).sha256
    (moved / "b/two.txt").rename(moved / "b/renamed.txt")
    assert len({before, changed, load_corpus(str(moved)).sha256}) == 3


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * 100)
    assert load_corpus(str(tmp_path / "book.txt")).train[0].text == "x" * 90


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.txt", "jane_austen"])
def test_nothing_matches(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=r'matches no file: give "austen", "stdlib", or a file'):
        load_corpus(source)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty: give a file that has text"),
        (b" \n\n", "is empty: give a file that has text"),
        (b"abc\0def", "is not text: byte 3 is NUL: give UTF-8 text"),
        ("na\xefve".encode("latin1"), "is not UTF-8: byte 2 is 0xef: give UTF-8 text.*iconv"),
        (b"too short", "has only 9 characters of text: three splits need at least 20"),
    ],
    ids=["empty", "blank", "NUL", "latin1", "short"],
)
def test_files_that_cannot_be_used(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"book\.txt'? {message}"):
        load_corpus(str(path))


def test_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\0")
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has no text: all its 2 files are empty or not UTF-8, 'a\.png' for one"):
        load_corpus(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and batches
# ---------------------------------------------------------------------------------------------------------------------


def test_tokenize() -> None:
    stream = tokenize([Document("a", "né"), Document("b", ""), Document("c", "x")], ByteTokenizer())
    assert stream.tokens.tolist() == [110, 195, 169, 256, 256, 120, 256]
    assert stream.tokens.dtype == np.uint16
    assert stream.starts.tolist() == [0, 4, 5]
    assert stream.starts.dtype == np.int64
    assert stream.num_bytes == 4
    assert stream.bytes_per_token == 4 / 7


def starts_of(batch: Batch) -> list[int]:
    return [int(row[0]) for row in batch.inputs]


def test_scheme_is_pinned() -> None:
    """Were this to change, no run of an earlier version would resume exactly."""
    batches = Batches(stream_of(50), context=4, batch_size=5, seed=7, packing="running")
    assert batches.windows_per_epoch == 12
    found = [starts_of(batches.at(step)) for step in (0, 1, 2, 1000)]
    assert found == [[13, 1, 37, 33, 5], [29, 25, 47, 21, 17], [9, 43, 47, 7, 15], [28, 20, 8, 42, 16]]


def test_at_is_pure() -> None:
    steps = [0, 1, 2, 3, 4, 1000, 3, 0, 2]
    make = functools.partial(Batches, stream_of(50), context=4, batch_size=5, packing="documents")
    batches = make(seed=7)
    for step in steps:
        for one, other in zip(batches.at(step), make(seed=7).at(step), strict=True):
            np.testing.assert_array_equal(one, other)
    assert starts_of(make(seed=8).at(0)) != starts_of(batches.at(0))


@pytest.mark.parametrize(
    ("num_tokens", "context", "batch_size"), [(50, 4, 5), (50, 4, 12), (50, 4, 30), (9, 8, 2), (2, 1, 3)]
)
def test_each_epoch_reads_every_window_once(num_tokens: int, context: int, batch_size: int) -> None:
    """Batches straddle epochs here, and the fourth and fifth case have batches of several epochs."""
    stream = stream_of(num_tokens)
    batches = Batches(stream, context=context, batch_size=batch_size, seed=3, packing="running")
    per_epoch = num_tokens // context
    assert batches.windows_per_epoch == per_epoch
    num_epochs = 7
    num_steps = -(-num_epochs * per_epoch // batch_size)
    read = [batches.at(step) for step in range(num_steps)]
    inputs, targets = (
        np.concatenate([batch.inputs for batch in read]),
        np.concatenate([batch.targets for batch in read]),
    )
    np.testing.assert_array_equal((inputs + 1) % num_tokens, targets)
    np.testing.assert_array_equal((inputs[:, :1] + np.arange(context)) % num_tokens, inputs)
    offsets, orders = [], []
    for epoch in range(num_epochs):
        rows = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert len(np.unique(targets[rows])) == per_epoch * context  # no token twice
        order = inputs[rows, 0].tolist()
        # The offset is the start from which all others are multiples of the context.
        orders.append(order)
        offsets.append(
            next(o for o in order if {(o + i * context) % num_tokens for i in range(per_epoch)} == set(order))
        )
    if per_epoch > 4:
        assert len(set(offsets)) > 3
        assert (
            len({tuple((start - o) % num_tokens for start in order) for order, o in zip(orders, offsets, strict=True)})
            == 7
        )


def test_offsets_reach_every_token() -> None:
    batches = Batches(stream_of(10), context=4, batch_size=2, seed=0, packing="running")
    counts = np.bincount(np.concatenate([batches.at(step).targets.ravel() for step in range(1000)]), minlength=10)
    np.testing.assert_allclose(counts / 800, 1, atol=0.1)


def test_shapes_and_dtypes() -> None:
    for packing in ("running", "documents"):
        batches = Batches(stream_of(50, (0, 20)), context=6, batch_size=3, seed=0, packing=packing)
        evaluation = evaluation_batches(stream_of(50, (0, 20)), context=6, batch_size=3, packing=packing)
        for batch in (batches.at(5), *evaluation):
            assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (3, 6)
            assert batch.inputs.dtype == batch.targets.dtype == np.int32
            assert batch.weights.dtype == np.float32
            if packing == "running":
                assert batch.segment_ids is None
            else:
                assert batch.segment_ids is not None
                assert batch.segment_ids.shape == (3, 6) and batch.segment_ids.dtype == np.int32


def test_documents_by_hand() -> None:
    """Documents 0 1 2 | 3 | 4 5 6 7 8 | 9: windows from 1, 7 (over the ring's seam) and 3."""
    stream = stream_of(10, (0, 3, 4, 9))
    batch = data._read_windows(stream, np.array([1, 7, 3]), context=5, packing="documents")
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 1], [3, 4, 5, 6, 7]]
    assert batch.targets.tolist() == [[2, 3, 4, 5, 6], [8, 9, 0, 1, 2], [4, 5, 6, 7, 8]]
    assert batch.segment_ids is not None
    assert batch.segment_ids.tolist() == [[0, 0, 1, 2, 2], [0, 0, 1, 2, 2], [0, 1, 1, 1, 1]]
    assert batch.weights.tolist() == [[1, 0, 0, 1, 1], [1, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    running = data._read_windows(stream, np.array([1, 7, 3]), context=5, packing="running")
    assert running.inputs.tolist() == batch.inputs.tolist()
    assert np.all(running.weights == 1)


def test_one_document_starts_anew_at_the_seam() -> None:
    batch = data._read_windows(stream_of(6), np.array([4]), context=4, packing="documents")
    assert batch.inputs.tolist() == [[4, 5, 0, 1]]
    assert batch.segment_ids is not None
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1]]
    assert batch.weights.tolist() == [[1, 0, 1, 1]]


def test_evaluation_by_hand() -> None:
    """Eight tokens in windows of 3: the third window has one target, and the second batch a row of padding."""
    first, second = evaluation_batches(stream_of(8, (0, 5)), context=3, batch_size=2, packing="documents")
    assert first.inputs.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first.targets.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert first.weights.tolist() == [[1, 1, 1], [1, 0, 1]]
    assert first.segment_ids is not None and second.segment_ids is not None
    assert first.segment_ids.tolist() == [[0, 0, 0], [0, 0, 1]]
    assert second.inputs.tolist() == [[6, 7, 0], [0, 0, 0]]
    assert second.targets.tolist() == [[7, 0, 0], [0, 0, 0]]
    assert second.weights.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert second.segment_ids.tolist() == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("num_tokens", [2, 3, 12, 13, 14, 25, 40])
def test_evaluation_has_every_target_once(num_tokens: int) -> None:
    batches = list(evaluation_batches(stream_of(num_tokens), context=4, batch_size=3, packing="running"))
    counted = np.concatenate([batch.targets[batch.weights == 1] for batch in batches])
    assert counted.tolist() == list(range(1, num_tokens))
    inputs = np.concatenate([batch.inputs[batch.weights == 1] for batch in batches])
    assert inputs.tolist() == list(range(num_tokens - 1))
    assert len(batches) == -(-(num_tokens - 1) // 12)


@pytest.mark.usefixtures("unchecked_shapes")
def test_batches_refuse() -> None:
    def make(
        num_tokens: int = 9, context: int = 8, batch_size: int = 1, seed: int = 0, packing: str = "running"
    ) -> Batches:
        return Batches(
            stream_of(num_tokens),
            context=context,
            batch_size=batch_size,
            seed=seed,
            packing=packing,  # type: ignore[arg-type]
        )

    assert make().windows_per_epoch == 1
    with pytest.raises(
        ValueError, match="context=8 needs at least 9 tokens of text, but the whole text has 8: .* at most 7"
    ):
        make(num_tokens=8)
    with pytest.raises(ValueError, match="context=0 must be at least 1"):
        make(context=0)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        make(batch_size=0)
    with pytest.raises(ValueError, match="seed=-1 must not be negative"):
        make(seed=-1)
    with pytest.raises(ValueError, match="packing='best' must be one of 'running', 'documents'"):
        make(packing="best")
    with pytest.raises(ValueError, match="step=-1 must not be negative"):
        make().at(-1)


def test_evaluation_refuses_at_once() -> None:
    packing: Packing = "running"
    with pytest.raises(ValueError, match="a text of 1 tokens has no next token"):
        evaluation_batches(stream_of(1), context=4, batch_size=1, packing=packing)
    with pytest.raises(ValueError, match="context=0 must be at least 1"):
        evaluation_batches(stream_of(9), context=0, batch_size=1, packing=packing)


# ---------------------------------------------------------------------------------------------------------------------
# Prefetch
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches() -> Batches:
    return Batches(stream_of(50), context=4, batch_size=5, seed=7, packing="documents")


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_is_in_order_and_on_the_device(batches: Batches) -> None:
    import jax

    seen = []
    for step, batch in prefetch(batches.at, 3, 9):
        seen.append(step)
        assert isinstance(batch, Batch)
        assert isinstance(batch.inputs, jax.Array)
        for one, other in zip(batch, batches.at(step), strict=True):
            np.testing.assert_array_equal(one, other)
    assert seen == [3, 4, 5, 6, 7, 8]
    assert prefetch_threads() == []
    assert list(prefetch(batches.at, 5, 5)) == []


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_makes_only_so_many_ahead(batches: Batches, depth: int) -> None:
    made: list[int] = []

    def at(step: int) -> Batch:
        made.append(step)
        return batches.at(step)

    with closing(prefetch(at, 0, 100, depth=depth)) as iterator:
        for expected in range(4):
            assert next(iterator)[0] == expected
            deadline = time.monotonic() + 5
            while len(made) < expected + 1 + depth and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert made == list(range(expected + 1 + depth))


def test_prefetch_forwards_exceptions_at_their_step(batches: Batches) -> None:
    def at(step: int) -> Batch:
        if step == 2:
            raise RuntimeError("no batch for step 2")
        return batches.at(step)

    seen = []
    with pytest.raises(RuntimeError, match="no batch for step 2"):
        for step, _ in prefetch(at, 0, 10):
            seen.append(step)
    assert seen == [0, 1]
    assert prefetch_threads() == []


def test_prefetch_stops_with_its_consumer(batches: Batches) -> None:
    for _ in prefetch(batches.at, 0, 1000):
        assert len(prefetch_threads()) == 1
        break
    assert prefetch_threads() == []  # the loop held the only reference

    with closing(prefetch(batches.at, 0, 1000)) as iterator:
        next(iterator)
        assert len(prefetch_threads()) == 1
    assert prefetch_threads() == []

    prefetch(batches.at, 0, 1000)  # never asked
    assert prefetch_threads() == []


def test_program_that_fails_in_the_loop_ends() -> None:
    program = (
        "from train.data import *; import numpy as np\n"
        "stream = TokenStream(np.arange(50), np.array([0]), 50)\n"
        "batches = Batches(stream, context=4, batch_size=5, seed=7, packing='running')\n"
        "def train():\n"
        "    for step, batch in prefetch(batches.at, 0, 10**9):\n"
        "        assert step < 3, 'the loss is not finite'\n"
        "train()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], check=False, cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == "AssertionError: the loss is not finite"
    assert finished.stderr.count("Traceback") == 1 and "ignored" not in finished.stderr


def test_prefetch_depth() -> None:
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        prefetch(lambda step: pytest.fail(), 0, 1, depth=0)


def test_documents_are_read_whole(tmp_path: Path) -> None:
    """What `load_corpus` would cut into three is one document here, and too short a text to split is text."""
    (tmp_path / "a.txt").write_text("ten letters")
    assert load_documents(str(tmp_path / "a.txt")) == (Document("a.txt", "ten letters"),)
    assert len(load_documents("austen")) == 6
    assert {document.name for document in load_documents("stdlib")} >= {"argparse.py", "json/decoder.py"}
    with pytest.raises(FileNotFoundError):
        load_documents(str(tmp_path / "b.txt"))
