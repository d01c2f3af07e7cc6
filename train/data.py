"""From text to batches: load_corpus -> tokenize -> Batches (to train on) or evaluation_batches -> prefetch.

A document is one text, a corpus is documents in three splits, and a split's *running text* is its documents' tokens one
after another, each document followed by the token that ends it. Windows of `context + 1` tokens are read from it, the inputs
being all but the last and the targets all but the first; neighbouring windows share that one token, so that each token is a
target once.

`Batches.at(step)` is a function of the seed and the step alone. A run that resumes therefore needs no state but its step,
and any step can be looked at again.
"""

from __future__ import annotations

import glob
import hashlib
import lzma
import os
import platform
import sysconfig
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from train.tokenizer import Tokenizer

Array: TypeAlias = Any  # np.ndarray, and jax.Array once it is on the device
Packing: TypeAlias = Literal["running", "documents"]

# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


class Document(NamedTuple):
    """One text, and a name that says where it is from."""

    name: str
    text: str


class Corpus(NamedTuple):
    """Text in three splits, none of them empty, that have no document in common."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    sha256: str  # of splits, names and texts: the same text split in the same way has the same
    description: str  # one line, for the log


TEXTS = Path(__file__).parent / "texts"

# The bundled novels (texts/PROVENANCE.md): name -> split, sha256 of the text.
AUSTEN = {
    "emma": ("train", "7c67b5985c6d0de1efaeb5d342d52cb82c38083c40e2295129e30e87ee690ebe"),
    "mansfield_park": ("train", "fbff1b2fb09dbd4a5f0f1f804b1defcd45cad558aa63f360e51389e91bd1ff49"),
    "northanger_abbey": ("test", "6f53a33627d6e48c9658313b23f8d39c04b918fd0330b31b0c202a2d04d6e9c1"),
    "persuasion": ("validation", "8061549557aebd2fd6e353d18d9197cb707029112bd52d4d8b174583a925848a"),
    "pride_and_prejudice": ("train", "dfc684d4f857fa938268f9ab9c5567b64bd0691251eca959644adeabe6287a4d"),
    "sense_and_sensibility": ("train", "105e1651fe93bed7130078578efd31e0c557d68667ba672ddc876f735b30fe09"),
}

# Folders of the standard library that hold tests or other people's code.
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


def load_corpus(source: str) -> Corpus:
    """Reads the text of `source` and splits it.

    "austen" is split by novel. All else is put in the order of its names and cut at 90% and at 95% of its characters, into
    text to train on, to validate with and to test with. Each cut moves to the nearest boundary between two documents if there
    is one within 1% of the characters; if not, it goes through a document, whose parts are then named by their characters:
    "book.txt[0:900]", "book.txt[900:950]", "book.txt[950:1000]".

    Args:
        source: one of
            - "austen": Jane Austen's six novels, which come with the project;
            - "stdlib": the Python sources of the running Python's standard library, without its tests (another Python version
              is another text: compare no losses across);
            - a file of UTF-8 text: one document;
            - a folder, or a pattern as in "books/**/*.txt": all the text files below it or that match, a document each. Files
              that are not text are left out, and so are hidden ones and empty ones; the description counts them.
            A folder of one's own that is called austen is written ./austen.

    Raises:
        FileNotFoundError: nothing is there or matches.
        ValueError: a file given by name is empty or not UTF-8 text; there is no text at all, or too little to split; a bundled
            text is damaged.
    """
    if source == "austen":
        return _load_austen()
    documents, description = _read_documents(source)
    return _corpus(description, *_split(documents, source))


def load_documents(source: str) -> tuple[Document, ...]:
    """All documents of `source`, whole and not split, however short; source and errors as in `load_corpus`."""
    if source == "austen":
        corpus = _load_austen()
        return (*corpus.train, *corpus.validation, *corpus.test)
    return tuple(_read_documents(source)[0])


def _read_documents(source: str) -> tuple[list[Document], str]:
    """The documents of any source but "austen", in the order of their names, and a description of it."""
    if source == "stdlib":
        return _read_stdlib()
    base, paths, is_named = _find_files(source)
    documents, skipped = [], []
    for path in paths:
        name = path.relative_to(base).as_posix()
        try:
            documents.append(Document(name, _read_text(path)))
        except ValueError:
            if is_named:
                raise
            skipped.append(name)
    if not documents:
        raise ValueError(
            f"{source!r} has no text: all its {len(skipped)} files are empty or not UTF-8, {skipped[0]!r} for one: "
            "name files of UTF-8 text"
        )
    note = f" (skipped {len(skipped)} files that are empty or not UTF-8 text, first {skipped[0]!r})" if skipped else ""
    return documents, source + note


def _load_austen() -> Corpus:
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for name, (split, sha256) in AUSTEN.items():
        path = TEXTS / f"{name}.txt.xz"
        remedy = "fetch the project's train/texts anew (as in: git checkout -- train/texts)"
        try:
            raw = lzma.decompress(path.read_bytes())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"the bundled text {path} is missing: {remedy}") from error
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"the bundled text {path} is damaged ({error}): {remedy}") from error
        found = hashlib.sha256(raw).hexdigest()
        if found != sha256:
            raise ValueError(f"the bundled text {path} is damaged: its sha256 is {found}, not {sha256}: {remedy}")
        splits[split].append(Document(name, raw.decode("utf-8")))
    return _corpus("austen", splits["train"], splits["validation"], splits["test"])


def _read_stdlib() -> tuple[list[Document], str]:
    folder = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in _files_below(folder, leave_out=_NOT_STDLIB):
        if path.suffix == ".py":
            try:
                documents.append(Document(path.relative_to(folder).as_posix(), _read_text(path)))
            except ValueError:  # the library has a few empty files, and a few in other encodings
                continue
    if not documents:
        raise ValueError(f"this Python has no sources of its standard library in {folder}: give another source")
    return documents, f"stdlib of Python {platform.python_version()}"


def _find_files(source: str) -> tuple[Path, list[Path], bool]:
    """The folder that names are relative to, the files in the order of their names, and whether the user named the file."""
    if not source:
        raise ValueError('text="" names nothing: give "austen", "stdlib", or a file, folder or pattern')
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, [path], True
    if path.is_dir():
        base, paths = path, _files_below(path)
    else:
        # The part before the first wildcard. Names relative to it do not change when a whole folder moves.
        plain = [not glob.has_magic(part) for part in path.parts]
        base = Path(*path.parts[: plain.index(False)]) if False in plain else path.parent
        # Patterns such as **/** give a file more than once.
        found = set(glob.glob(str(path), recursive=True)) if False in plain else set()
        paths = _in_order_of_names((Path(name) for name in found if os.path.isfile(name)), base)
    if not paths:
        raise FileNotFoundError(
            f'{source!r} matches no file: give "austen", "stdlib", or a file, folder or pattern (as in '
            f'"books/**/*.txt") of UTF-8 text; relative paths start at {Path.cwd()}'
        )
    return base, paths, False


def _files_below(folder: Path, leave_out: frozenset[str] = frozenset()) -> list[Path]:
    """All files below `folder` in the order of their names, without hidden ones and without folders named in `leave_out`."""
    paths = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out]
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    # isfile, because a pipe would be waited for and a dangling link cannot be read.
    return _in_order_of_names((path for path in paths if os.path.isfile(path)), folder)


def _in_order_of_names(paths: Iterator[Path], base: Path) -> list[Path]:
    return sorted(paths, key=lambda path: path.relative_to(base).as_posix())


def _read_text(path: Path) -> str:
    """The text of a file, its line ends as they are; ValueError if it has none or is not UTF-8."""
    raw = path.read_bytes()
    remedy = "give UTF-8 text, converted if need be (iconv -f LATIN1 -t UTF-8)"
    if b"\0" in raw:
        raise ValueError(f"{path} is not text: byte {raw.index(0)} is NUL: {remedy}")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}: {remedy}") from error
    text = text.removeprefix("\ufeff")  # the byte order mark that some editors write
    if not text.strip():
        raise ValueError(f"{path} is empty: give a file that has text")
    return text


def _split(documents: Sequence[Document], source: str) -> tuple[list[Document], list[Document], list[Document]]:
    """Cuts the running text at 90% and 95% of its characters, see `load_corpus`."""
    boundaries = np.cumsum([0] + [len(document.text) for document in documents])
    total = int(boundaries[-1])
    if total < 20:
        raise ValueError(f"{source!r} has only {total} characters of text: three splits need at least 20")

    def cut_at(percent: int) -> int:
        cut = total * percent // 100
        nearest = int(boundaries[np.argmin(np.abs(boundaries - cut))])
        return nearest if 100 * abs(nearest - cut) <= total else cut

    first, second = cut_at(90), cut_at(95)  # at least 3% apart, as each moves by at most 1%
    splits: tuple[list[Document], list[Document], list[Document]] = ([], [], [])
    for split, begin, end in zip(splits, (0, first, second), (first, second, total), strict=True):
        for document, start in zip(documents, boundaries[:-1].tolist(), strict=True):
            low, high = max(begin - start, 0), min(end - start, len(document.text))
            if low < high:
                whole = high - low == len(document.text)
                split.append(document if whole else Document(f"{document.name}[{low}:{high}]", document.text[low:high]))
    return splits


def _corpus(source: str, train: Sequence[Document], validation: Sequence[Document], test: Sequence[Document]) -> Corpus:
    splits = {"train": train, "validation": validation, "test": test}
    digest = hashlib.sha256()
    for split, documents in splits.items():
        for document in documents:
            for field in (split, document.name, document.text):
                raw = field.encode("utf-8", errors="surrogateescape")  # a file's name need not be UTF-8
                digest.update(len(raw).to_bytes(8, "big"))  # else "ab" + "c" would be "a" + "bc"
                digest.update(raw)
    sha256 = digest.hexdigest()
    sizes = ", ".join(
        f"{split} {sum(len(document.text) for document in documents):,} characters in {len(documents)} "
        f"document{'s' * (len(documents) != 1)}"
        for split, documents in splits.items()
    )
    return Corpus(tuple(train), tuple(validation), tuple(test), sha256, f"{source}: {sizes}; sha256 {sha256[:12]}")


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


class TokenStream(NamedTuple):
    """The running text of some documents, as tokens."""

    tokens: npt.NDArray[np.unsignedinteger]  # [N], in the smallest dtype that holds the vocabulary
    starts: npt.NDArray[np.int64]  # [documents], ascending: where each begins, the first at 0
    num_bytes: int  # of the documents' text in UTF-8

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token. A loss in nats a token, over this and over ln 2, is bits a byte: what two tokenizers share."""
        return self.num_bytes / len(self.tokens)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStream:
    """Each document's tokens and, if the tokenizer has one, the token that ends a document.

    A document without any token is left out.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    end = np.asarray([] if tokenizer.end_of_document is None else [tokenizer.end_of_document], np.int32)
    pieces = [np.append(tokenizer.encode(document.text), end).astype(dtype) for document in documents]
    pieces = [piece for piece in pieces if len(piece) > 0]
    ends = np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64)
    return TokenStream(
        tokens=np.concatenate([np.zeros(0, dtype), *pieces]),
        starts=ends[:-1],
        num_bytes=sum(len(document.text.encode("utf-8")) for document in documents),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """B windows of T tokens. NumPy arrays, and JAX arrays once `prefetch` has put them on the device."""

    inputs: Array  # [B, T] int32
    targets: Array  # [B, T] int32: the token after each input
    weights: Array  # [B, T] float32: 1, and 0 where a target must not count
    segment_ids: Array | None  # [B, T] int32, non-decreasing from 0 in each row; None with packing "running"


class Batches:
    """Batches to train on: `at(step)` is a pure function of the seed and the step.

    The running text is read as a ring, from an offset that is drawn anew for each epoch, in `N // T` windows that each read
    the T + 1 tokens from a multiple of T on. So an epoch has always the same number of windows, has no token as a target
    twice and leaves out fewer than T, others in each epoch. The windows of an epoch come in an order drawn for it, each
    exactly once. Window number w of the whole run is in row `w % B` of step `w // B`: a batch may take its first rows from one
    epoch and its last from the next.

    Both draws come from the raw bits of PCG64 seeded with (seed, epoch), which NumPy promises never to change (it makes no
    such promise for `Generator.permutation`): a run resumes exactly under another version of NumPy as well.

    With N = 10 tokens and T = 4, an offset of 7 gives two windows:

        text     a b c d e f g h i j        windows  h i j a b,  b c d e f        targets  i j a b c d e f

    Args:
        stream: the running text, of N tokens.
        context: T, tokens that the model sees at a time.
        batch_size: B, windows in a batch.
        seed: not negative.
        packing: how documents that share a window are kept apart. "running": not at all, the text runs on. "documents": by
            segment ids, which go up where a document starts; and since nothing that the model sees tells what a next document
            begins with, that target has weight 0.

    Raises:
        ValueError: an argument out of range, or fewer than T + 1 tokens.
    """

    def __init__(self, stream: TokenStream, *, context: int, batch_size: int, seed: int, packing: Packing) -> None:
        _check_batches(context=context, batch_size=batch_size, packing=packing)
        if seed < 0:
            raise ValueError(f"{seed=} must not be negative")
        if len(stream.tokens) < context + 1:
            raise ValueError(
                f"{context=} needs at least {context + 1} tokens of text, but the whole text has {len(stream.tokens)}: "
                f"give more text, or a context of at most {len(stream.tokens) - 1}"
            )
        self.windows_per_epoch = len(stream.tokens) // context
        self._stream, self._context, self._batch_size = stream, context, batch_size
        self._seed, self._packing = seed, packing
        self._last_epoch: tuple[int, npt.NDArray[np.int64]] = (0, self._draw_epoch(0))

    def at(self, step: int) -> Batch:
        """The batch of a step (0, 1, ...), whatever was asked for before."""
        if step < 0:
            raise ValueError(f"{step=} must not be negative")
        return self.read(step * self._batch_size + np.arange(self._batch_size))

    def read(self, windows: npt.NDArray[np.int64]) -> Batch:
        """Windows by their numbers in the whole run, `[B]`, ascending."""
        epochs, places = np.divmod(windows, self.windows_per_epoch)
        starts = [self._epoch(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs).tolist()]
        return _read_windows(self._stream, np.concatenate(starts), context=self._context, packing=self._packing)

    def _epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        # Read once and replaced whole: `at` may run in two threads.
        last, starts = self._last_epoch
        if last != epoch:
            starts = self._draw_epoch(epoch)
            self._last_epoch = (epoch, starts)
        return starts

    def _draw_epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """Where the windows of an epoch start, in the order in which they are read, `[windows_per_epoch]`."""
        bits = np.random.PCG64([self._seed, epoch]).random_raw(1 + self.windows_per_epoch)
        offset = int(bits[0] % len(self._stream.tokens))
        order = np.argsort(bits[1:], kind="stable").astype(np.int64)
        return (offset + order * self._context) % len(self._stream.tokens)


def evaluation_batches(stream: TokenStream, *, context: int, batch_size: int, packing: Packing) -> Iterator[Batch]:
    """The whole text once and in order, with every token but the first as a target.

    Window w reads T + 1 tokens from `w * T` on. All batches have one shape: the last window is padded to T, and the last batch
    to B windows, with weight 0. Padding is a segment of its own. With packing "documents", the first token of each document
    has weight 0 too, see `Batches`.

    Args:
        stream: the text; it may be shorter than T.
        context: T, tokens that the model sees at a time.
        batch_size: B, windows in a batch.
        packing: "running" or "documents".

    Raises:
        ValueError: at once, and not with the first batch: an argument out of range, or fewer than 2 tokens.
    """
    _check_batches(context=context, batch_size=batch_size, packing=packing)
    num_tokens = len(stream.tokens)
    if num_tokens < 2:
        raise ValueError(f"a text of {num_tokens} tokens has no next token to evaluate: give at least 2 tokens")
    num_windows = -(-(num_tokens - 1) // context)
    # The padding is a document of its own behind the text, long enough for the last batch.
    num_padded = -(-num_windows // batch_size) * batch_size * context + 1
    padded = TokenStream(
        tokens=np.pad(stream.tokens, (0, num_padded - num_tokens)),
        starts=np.append(stream.starts, num_tokens) if num_padded > num_tokens else stream.starts,
        num_bytes=stream.num_bytes,
    )

    def batches() -> Iterator[Batch]:
        for first in range(0, num_windows, batch_size):
            starts = (first + np.arange(batch_size, dtype=np.int64)) * context
            batch = _read_windows(padded, starts, context=context, packing=packing)
            is_text = starts[:, None] + 1 + np.arange(context) < num_tokens  # [B, T], of the targets
            yield batch._replace(weights=batch.weights * is_text.astype(np.float32))

    return batches()


def _check_batches(*, context: int, batch_size: int, packing: str) -> None:
    if context < 1:
        raise ValueError(f"{context=} must be at least 1")
    if batch_size < 1:
        raise ValueError(f"{batch_size=} must be at least 1")
    if packing not in get_args(Packing):
        raise ValueError(f"{packing=} must be one of {', '.join(map(repr, get_args(Packing)))}")


def _read_windows(stream: TokenStream, starts: npt.NDArray[np.int64], *, context: int, packing: Packing) -> Batch:
    """The windows that start at `starts`, `[B]`, in the ring of the text."""
    num_tokens = len(stream.tokens)
    laps, positions = np.divmod(starts[:, None] + np.arange(context + 1), num_tokens)  # [B, T + 1]
    tokens = stream.tokens[positions].astype(np.int32)
    inputs, targets = np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])
    if packing == "running":
        return Batch(inputs, targets, np.ones(inputs.shape, np.float32), None)
    # Where the ring closes, the first document comes after the last, even when they are one.
    documents = np.searchsorted(stream.starts, positions, side="right") + laps * len(stream.starts)
    weights = (documents[:, 1:] == documents[:, :-1]).astype(np.float32)
    segment_ids = (documents[:, :-1] - documents[:, :1]).astype(np.int32)
    return Batch(inputs, targets, weights, segment_ids)


def prefetch(
    batches_at: Callable[[int], Batch], first_step: int, end_step: int, depth: int = 2
) -> Generator[tuple[int, Batch]]:
    """Makes batches ahead in a thread, and puts them on JAX's default device.

    The thread starts with the first batch that is asked for, and has ended when the iterator is exhausted, raises or is
    closed; a `for` loop that is left early closes it as soon as nothing else holds it, `contextlib.closing` for certain.

    >>> for step, batch in prefetch(batches.at, 0, 100):  # doctest: +SKIP
    ...     state = train_step(state, batch)

    Args:
        batches_at: makes the batch of a step; runs in the thread.
        first_step: the first step.
        end_step: the step after the last, as in `range`.
        depth: batches that are ready or being made beside the one that the caller holds.

    Returns:
        A generator of (step, batch), in order.

    Raises:
        ValueError: depth is less than 1.
        Exception: whatever `batches_at` raises, when its step's turn comes.
    """
    if depth < 1:
        raise ValueError(f"{depth=} must be at least 1")
    return _prefetch(batches_at, range(first_step, end_step), depth)


def _prefetch(batches_at: Callable[[int], Batch], steps: range, depth: int) -> Generator[tuple[int, Batch]]:
    import jax

    def make(step: int) -> Batch:
        batch: Batch = jax.device_put(batches_at(step))
        return batch

    # Left early, by close() too, it waits for the batches that are under way.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as thread:
        ahead = deque(thread.submit(make, step) for step in steps[:depth])
        for i, step in enumerate(steps):
            batch = ahead.popleft().result()
            ahead.extend(thread.submit(make, later) for later in steps[i + depth : i + depth + 1])
            yield step, batch
