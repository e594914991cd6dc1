"""Text of a run: reading, split, encoding, and a fingerprint."""

import hashlib
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from resolvent.data import TokenStream, build_tokenizer, encode_documents, load_documents, split_documents
from resolvent.errors import DataError
from resolvent.training.config import TrainingConfig


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text as tokens."""

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream

    @property
    def fingerprint(self) -> str:
        """Return a hash of all tokens, including those that separate documents."""
        digest = hashlib.sha256()
        for stream in (self.train, self.validation):
            digest.update(f"{stream.tokens.dtype.str}{stream.tokens.shape}".encode())
            digest.update(np.ascontiguousarray(stream.tokens).data)
        return digest.hexdigest()


def load_corpus(config: TrainingConfig, tokenizer: Tokenizer | None = None, *, progress: bool = False) -> Corpus:
    """Read the text that a configuration names.

    Args:
        config: names the text, how to split it and the tokenizer.
        tokenizer: replaces that of the configuration (the tokenizer of a resumed run).
        progress: show a progress bar while encoding.

    Raises:
        DataError: text or tokenizer that cannot be used.
    """
    train, validation = split_corpus(config)
    if tokenizer is None:
        tokenizer = build_tokenizer(config.tokenizer, train, vocab_size=config.vocab_size)
    return Corpus(
        tokenizer,
        encode_documents(train, tokenizer, progress=progress),
        encode_documents(validation, tokenizer, progress=progress),
    )


def split_corpus(config: TrainingConfig) -> tuple[list[str], list[str]]:
    """Return training and held-out documents. Runs are comparable: the split does not depend on the seed of the run."""
    documents = load_documents(config.data, text_field=config.text_field)
    if config.validation_data is not None:
        return documents, load_documents(config.validation_data, text_field=config.text_field)
    try:
        return split_documents(documents, config.validation_fraction)
    except DataError as error:
        raise DataError(f"{text_name(config.data)}: {error}") from error


def text_name(data: str | list[str] | None) -> str:
    """Return the name of a text for messages: its path or paths."""
    return "the default corpus" if data is None else data if isinstance(data, str) else ", ".join(data)
