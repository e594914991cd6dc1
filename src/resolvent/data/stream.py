"""Documents as one stream of tokens."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, pre_tokenizers

from resolvent.data.corpus import EOT
from resolvent.data.tokenization import PIECE_CHARACTERS, bytes_tokenizer, pieces
from resolvent.errors import DataError
from resolvent.memory import machine_memory
from resolvent.native import LibraryPanic, call

_BATCH_CHARACTERS = 1 << 21
_BYTES_PER_CHARACTER = 200
"""Upper bound of the memory that the tokenizers library takes to encode."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenStream:
    """Documents end to end, a separator before each and after the last: EOT d1 EOT d2 ... EOT dD EOT.

    Attributes:
        tokens: (T,) uint16, or uint32 where the vocabulary needs it.
        starts: (D,) int64, the positions of the separators that open a document; the first is 0.
        byte_lengths: (D,) int64, the bytes of each document's text as UTF-8.
    """

    tokens: np.ndarray
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
    def num_bytes(self) -> int:
        """Bytes of the text, the denominator of bits per byte."""
        return int(self.byte_lengths.sum())


def encode_documents(documents: list[str], tokenizer: Tokenizer, *, progress: bool = False) -> TokenStream:
    """Encode documents as one stream of tokens.

    Args:
        documents: at least one; the text `<|endoftext|>` in them is encoded as text.
        tokenizer: as `build_tokenizer` and `load_tokenizer` make it.
        progress: show a progress bar on stderr.

    Raises:
        DataError: no documents, a tokenizer from elsewhere, or one without tokens for the text.
    """
    if not documents:
        raise DataError("there are no documents to encode; give at least one")
    separator = tokenizer.token_to_id(EOT)
    if separator is None or not tokenizer.encode_special_tokens:
        raise DataError(f"the tokenizer does not keep {EOT} apart from text; make it with build_tokenizer")
    try:
        return _stream(documents, tokenizer, separator, progress)
    except MemoryError as error:
        raise DataError(
            f"the tokens of {len(documents):,} document(s) with {sum(map(len, documents)):,} characters do not fit "
            "into memory: give less text, or use a machine with more memory"
        ) from error


def _stream(documents: list[str], tokenizer: Tokenizer, separator: int, progress: bool) -> TokenStream:
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    tokens, starts = bytearray(), []  # grows without a second copy of the tokens
    opening = dtype.type(separator).tobytes()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("Encoding", total=sum(map(len, documents)))
        for document, piece, ids in _encoded_pieces(documents, tokenizer):
            if document == len(starts):
                starts.append(len(tokens) // dtype.itemsize)
                tokens += opening
            tokens += ids.astype(dtype).data
            bar.advance(task, len(piece))
    tokens += opening
    return TokenStream(
        tokens=np.frombuffer(tokens, dtype),
        starts=np.array(starts, np.int64),
        byte_lengths=np.array([_byte_length(text) for text in documents], np.int64),
    )


def _byte_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _encoded_pieces(documents: list[str], tokenizer: Tokenizer) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield the index of a document, a piece of its text and the ids of the piece; at least one piece per document."""
    if tokenizer.to_str() == bytes_tokenizer().to_str():  # its ids are at hand
        for number, text in enumerate(documents):
            for start in range(0, len(text) or 1, PIECE_CHARACTERS):
                piece = text[start : start + PIECE_CHARACTERS]
                yield number, piece, np.frombuffer(piece.encode(), np.uint8)
        return
    cut = pieces if _pieces_are_exact(tokenizer) else lambda text: (text,)
    numbered = ((number, piece) for number, text in enumerate(documents) for piece in cut(text))
    for batch in _batches(numbered):
        texts = [piece for _, piece in batch]
        _refuse_too_long(max(texts, key=len))
        try:
            encodings = call(lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False))  # noqa: B023
        except LibraryPanic:
            raise
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"the tokenizer cannot encode the text: {error}; train one on it (bpe)") from error
        for (number, piece), encoding in zip(batch, encodings, strict=True):
            yield number, piece, np.array(encoding.ids, np.uint32)


def _refuse_too_long(text: str) -> None:
    """Refuse a piece that takes more memory to encode than is free."""
    if len(text) > _BATCH_CHARACTERS and (needed := len(text) * _BYTES_PER_CHARACTER) > machine_memory().available:
        raise DataError(
            f"{len(text):,} characters from {text[:20]!r} on must be encoded at once, as there is no boundary to cut "
            f"them, which takes about {needed:,} bytes of memory, more than is free: break the text into lines, or "
            "take the tokenizer bytes"
        )


def _pieces_are_exact(tokenizer: Tokenizer) -> bool:
    """Return True if neither the normalizer nor the pre-tokenizer looks across the end of a line."""
    splitter = tokenizer.pre_tokenizer
    return (
        isinstance(splitter, pre_tokenizers.ByteLevel)
        and splitter.use_regex
        and not splitter.add_prefix_space
        and tokenizer.normalizer is None
        and [token.content for token in tokenizer.get_added_tokens_decoder().values()] == [EOT]
    )


def _batches(numbered: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    characters = 0
    for number, piece in numbered:
        batch.append((number, piece))
        characters += len(piece)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
