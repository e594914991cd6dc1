"""Documents as one stream of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from resolvent.data.encoding import Encoder, batched
from resolvent.data.pieces import pieces
from resolvent.errors import DataError
from resolvent.ops import IGNORED
from resolvent.wording import counted

SIGNED = np.dtype(np.int32)
"""Type of the tokens of a signed stream."""
_BATCH_CHARACTERS = 1 << 21
_COUNTED_TOKENS = 1 << 20


class TokenArray(Protocol):
    """Tokens in memory or in files, (T,), of which slices are arrays."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """Documents end to end, a separator before each and after the last: EOT d1 EOT d2 ... EOT dD EOT.

    A signed stream holds conversations, of which some tokens are predicted (the answers) and all are read. The
    complement `~id` stands for a token that is read only. Separators before conversations are left to their template:
    d1 d2 ... dD EOT.

    Attributes:
        tokens: (T,) uint16, or uint32 where the vocabulary needs it; int32 of a signed stream; in memory or in files.
        starts: (D,) int64, the positions where documents begin, with their separator; the first is 0.
        byte_lengths: (D,) int64, the bytes of each document's text, or of its answers, as UTF-8.
    """

    tokens: TokenArray
    starts: np.ndarray
    byte_lengths: np.ndarray

    @property
    def num_documents(self) -> int:
        """D."""
        return len(self.starts)

    @property
    def num_predictions(self) -> int:
        """T - 1: every token but the first is predicted, including the separators at the ends of documents."""
        return len(self.tokens) - 1

    @property
    def signed(self) -> bool:
        """True if some tokens are read only."""
        return self.tokens.dtype == SIGNED

    def count_targets(self) -> int:
        """Return the number of tokens that are predicted; reads a signed stream for that."""
        if not self.signed:
            return self.num_predictions
        starts = range(1, len(self.tokens), _COUNTED_TOKENS)
        return sum(int((self.tokens[start : start + _COUNTED_TOKENS] >= 0).sum()) for start in starts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the text, the denominator of bits per byte."""
        return int(self.byte_lengths.sum())


def encode_documents(documents: list[str], tokenizer: Tokenizer, *, progress: bool = False) -> TokenStream:
    """Encode documents as one stream of tokens in memory.

    Args:
        documents: at least one; the text `<|endoftext|>` in them is encoded as text.
        tokenizer: as `build_tokenizer` and `load_tokenizer` make it.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no documents, a tokenizer from elsewhere, or one without tokens for the text.
    """
    if not documents:
        raise DataError("there are no documents to encode; give at least one")
    return _encoded(documents, Encoder(tokenizer), progress)


def encode_prompt(text: str, encoder: Encoder) -> np.ndarray:
    """Return the tokens of the beginning of a document, (N,) int64: the separator, then those of the text.

    Args:
        text: the text, which may be empty.
        encoder: of the tokenizer; making one reads the whole vocabulary.

    Raises:
        DataError: the tokenizer has no tokens for the text.
    """
    return _encoded([text], encoder, progress=False).tokens[:-1].astype(np.int64)


def _encoded(documents: list[str], encoder: Encoder, progress: bool) -> TokenStream:
    try:
        return _stream(documents, encoder, progress)
    except MemoryError as error:
        raise DataError(
            f"the tokens of {counted(len(documents), 'document')} with {sum(map(len, documents)):,} characters do not "
            "fit into memory: give less text, or use a machine with more memory"
        ) from error


def _stream(documents: list[str], encoder: Encoder, progress: bool) -> TokenStream:
    tokens, starts = bytearray(), []  # which grows in its place: there are never two copies of the tokens
    opening = encoder.dtype.type(encoder.separator).tobytes()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("Encoding", total=sum(map(len, documents)))
        for numbers, ids in encoder.encode(_batches(documents, encoder.cuts_anywhere)):
            for (document, characters), part in zip(numbers, ids, strict=True):
                if document == len(starts):
                    starts.append(len(tokens) // encoder.dtype.itemsize)
                    tokens += opening
                tokens += part.astype(encoder.dtype).data
                bar.advance(task, characters)
    tokens += opening
    return TokenStream(
        tokens=np.frombuffer(tokens, encoder.dtype),
        starts=np.array(starts, np.int64),
        byte_lengths=np.array([byte_length(text) for text in documents], np.int64),
    )


def token_ids(tokens: np.ndarray) -> np.ndarray:
    """Return the ids of a stream's tokens as int64, those that are read only among them."""
    tokens = tokens.astype(np.int64)
    return np.maximum(tokens, ~tokens)


def inputs_and_labels(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs and labels of consecutive tokens of a stream.

    Args:
        tokens: (N + 1,), of a signed stream or not.

    Returns:
        (N,) int64 ids, and (N,) int64, the token after each of them, or -100 for one that is read only.
    """
    labels = tokens[1:].astype(np.int64)
    labels[labels < 0] = IGNORED
    return token_ids(tokens[:-1]), labels


def byte_length(text: str) -> int:
    """Return the bytes of a text as UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _batches(documents: list[str], cut: bool) -> Iterator[tuple[list[tuple[int, int]], list[str]]]:
    """Yield batches of pieces: of each, the number of its document and its characters; and their texts."""
    parts = ((number, piece) for number, text in enumerate(documents) for piece in (pieces(text) if cut else (text,)))
    for batch in batched(parts, lambda part: len(part[1]), _BATCH_CHARACTERS):
        yield [(number, len(piece)) for number, piece in batch], [piece for _, piece in batch]
