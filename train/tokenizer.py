"""Text to token ids and back: bytes, a byte-pair encoding trained here, or any Hugging Face tokenizer.json.

`make_tokenizer` reads the user's choice; `to_json` and `tokenizer_from_json` carry a tokenizer inside a checkpoint, so that
a run is opened again without its texts. The package `tokenizers` is imported only when a byte-pair encoding is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tokenizers

# The names under which published tokenizers keep the token that ends a document, the most telling first.
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

# 256 bytes and the end of a document; at most what 16 bits hold, as larger vocabularies than that do not fit small models.
SMALLEST_BPE, LARGEST_BPE = 257, 65536

_BYTES_JSON = json.dumps({"nsa_jax_tokenizer": "bytes"})


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of `train` knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Ids are in 0 .. vocab_size - 1."""

    @property
    def end_of_document(self) -> int | None:
        """Id of the token after a document's last; None where the tokenizer has none."""

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of `text`, int32 `[tokens]`. Adds no special token, and finds none: "</s>" in a text is text."""

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of `ids`, `[tokens]`. Ids that stand for no text are left out, see `_text_ids`."""

    def to_json(self) -> str:
        """What `tokenizer_from_json` makes the same tokenizer from."""


class ByteTokenizer:
    """One token a byte of UTF-8: ids 0 .. 255 are the bytes, 256 ends a document.

    >>> ByteTokenizer().encode("né").tolist()
    [110, 195, 169]
    """

    vocab_size: int = 257
    end_of_document: int | None = 256

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of `ids`; a byte sequence that is not UTF-8, as a model may well write it, reads as U+FFFD."""
        kept = _text_ids(ids, vocab_size=self.vocab_size, end_of_document=self.end_of_document)
        return kept.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> str:
        return _BYTES_JSON


class BPETokenizer:
    """A Hugging Face tokenizer (byte-pair encoding or any other kind), given as the text of its tokenizer.json.

    Its truncation, padding and added special tokens are switched off: here a text is encoded whole, and as it stands.
    Special tokens are left out of decoded text.

    Args:
        tokenizer_json: text of a tokenizer.json.

    Raises:
        ImportError: the package `tokenizers` is not installed.
        ValueError: the text is no tokenizer.json.
    """

    vocab_size: int
    end_of_document: int | None

    def __init__(self, tokenizer_json: str) -> None:
        library = _import_tokenizers()
        try:
            self._tokenizer: tokenizers.Tokenizer = library.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the package raises plain Exception
            raise ValueError(
                f"the text that begins {tokenizer_json[:40]!r} is not a tokenizer.json ({error}): give a file that the "
                "tokenizers package wrote"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Else a text that quotes "<|endoftext|>" would end a document in its middle.
        self._tokenizer.encode_special_tokens = True

        # Added tokens may leave gaps, so the largest id counts and not the number of tokens.
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size == 0:
            raise ValueError("the tokenizer.json has an empty vocabulary: give one that was trained")
        self.end_of_document = next((vocabulary[name] for name in END_OF_DOCUMENT_NAMES if name in vocabulary), None)

    def encode(self, text: str) -> npt.NDArray[np.int32]:
        pieces = [
            np.asarray(encoding.ids, np.int32)
            for piece in _pieces(text)
            # The "fast" variant, which exists for batches alone, does not keep track of each token's characters.
            for encoding in self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)
        ]
        return np.concatenate([np.zeros(0, np.int32), *pieces])

    def decode(self, ids: npt.ArrayLike) -> str:
        kept = _text_ids(ids, vocab_size=self.vocab_size, end_of_document=self.end_of_document)
        return str(self._tokenizer.decode(kept.tolist(), skip_special_tokens=True))

    def to_json(self) -> str:
        return str(self._tokenizer.to_str())


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer whose `to_json` is `text`; the text of any Hugging Face tokenizer.json will do.

    Raises:
        ImportError: it needs the package `tokenizers`, which is not installed.
        ValueError: `text` is neither.
    """
    return ByteTokenizer() if text.strip() == _BYTES_JSON else BPETokenizer(text)


def make_tokenizer(spec: str, train_texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that the user asked for.

    Args:
        spec: "bytes"; "bpe:N", a byte-level byte-pair encoding of N tokens (256 bytes, the end of a document and N - 257
            merges), trained on the spot and the same each time for the same texts; or the path of a tokenizer.json.
        train_texts: gives the texts to train on. Called for "bpe:N" only.

    Raises:
        ImportError: all but "bytes" need the package `tokenizers`, which is not installed.
        ValueError: an unknown spec, an N out of range or more than the texts yield, a file that is missing or no
            tokenizer.json.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        return _train_bpe(_bpe_size(spec), train_texts())

    path = Path(spec).expanduser()
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "there is no such file"
        raise ValueError(
            f'tokenizer={spec!r} must be "bytes", "bpe:N" (as in "bpe:4096") or the path of a tokenizer.json: {found}'
        )
    try:
        return BPETokenizer(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(
            f"tokenizer={spec!r} is not a tokenizer file ({error}): give the tokenizer.json of a Hugging Face model"
        ) from error


def _bpe_size(spec: str) -> int:
    size = spec.removeprefix("bpe:")
    # isascii, because int() also reads other scripts' digits.
    if not (size.isascii() and size.isdigit() and SMALLEST_BPE <= int(size) <= LARGEST_BPE):
        raise ValueError(
            f"tokenizer={spec!r}: the N of bpe:N must be a whole number from {SMALLEST_BPE} (the bytes and the end of a "
            f"document) to {LARGEST_BPE}, as in bpe:4096"
        )
    return int(size)


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> BPETokenizer:
    library = _import_tokenizers()
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = library.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT_NAMES[0]],
        # All 256, so that a byte which the training text lacks can be encoded too.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"bpe:{vocab_size} asks for {vocab_size} tokens, but the training text yields only "
            f"{tokenizer.get_vocab_size()}: ask for at most bpe:{tokenizer.get_vocab_size()}, or give more text"
        )
    return BPETokenizer(tokenizer.to_str())


def _pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cuts `text` into pieces of about `size` characters, before a space between two words or else at a line's end.

    The package needs some 150 bytes of memory a character of the text that it is given, and its time grows faster than the
    text's length. GPT-2's rule for words, which byte-level encodings use, never joins characters across such a place, so the
    tokens are those of the whole text. Other tokenizers may differ at a cut, by one token or so.
    """
    start = 0
    while len(text) - start > size:
        place = _BETWEEN_WORDS.search(text, start + size)
        if place is None:
            break
        yield text[start : place.start()]
        start = place.start()
    if start < len(text):
        yield text[start:]


_BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


def _text_ids(ids: npt.ArrayLike, *, vocab_size: int, end_of_document: int | None) -> npt.NDArray[np.int64]:
    """`ids` without those that stand for no text: the end of a document, and all outside of 0 .. vocab_size - 1.

    A model's embedding table is often padded beyond the vocabulary, and -1 often pads ids; neither is worth an exception
    in the middle of generating text.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size > 0 and array.dtype.kind not in "iu"):
        raise ValueError(
            f"decode takes whole numbers of shape [tokens], not {array.dtype} of shape {list(array.shape)}: decode a batch "
            "row by row"
        )
    array = array.astype(np.int64)
    kept = (array >= 0) & (array < vocab_size)
    if end_of_document is not None:
        kept &= array != end_of_document
    return array[kept]


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            'a byte-pair encoding needs the package "tokenizers": pip install "nsa-jax[train]", or use the tokenizer '
            '"bytes", which needs nothing'
        ) from error
    return tokenizers
