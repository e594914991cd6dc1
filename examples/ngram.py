"""Interpolated 3-gram model of bytes, as a baseline for language models.

The alphabet is the 256 bytes and an end symbol, which precedes and follows each document. Beyond counting,
all work is done on the distinct trigrams of a text, so a corpus of tens of megabytes takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from resolvent.errors import DataError

END = 256
NUM_SYMBOLS = 257

_EM_ROUNDS = 100
_NUM_BUCKETS = 16  # contexts by the logarithm of their count; the last one holds all from 2^15 on

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]


class InterpolatedTrigram:
    """Mixture of the uniform distribution and the relative frequencies after 0, 1 and 2 symbols of context.

    The weights depend on the count of the two-symbol context (Jelinek-Mercer smoothing): frequencies of common contexts
    have larger weights.

    Args:
        counts: (257, 257, 257) integers, how often each symbol (last axis) followed each pair of symbols.
        weights: (16, 4) floats, a row for each bucket `min(floor(log2(count of the context + 1)), 15)`, over
            the orders uniform, no context, one symbol, two symbols. Rows sum to one, the first column is positive.
    """

    def __init__(self, counts: Codes, weights: Floats) -> None:
        if counts.shape != (NUM_SYMBOLS,) * 3 or not counts.any():
            raise ValueError(f"counts must be a non-zero (257, 257, 257) array, got shape {counts.shape}")
        if weights.shape != (_NUM_BUCKETS, 4) or not (weights[:, 0] > 0).all():
            raise ValueError(f"weights must be ({_NUM_BUCKETS}, 4) with a positive first column, got {weights}")
        self.weights = weights
        self.counts = counts
        self._bigrams = counts.sum(axis=0)
        self._unigrams = self._bigrams.sum(axis=0)
        self._pair_contexts = counts.sum(axis=2)
        self._single_contexts = self._bigrams.sum(axis=1)

    @classmethod
    def fit(cls, documents: Sequence[str]) -> InterpolatedTrigram:
        """Count the documents' trigrams, and fit the weights by EM on a part held out of the counts.

        Args:
            documents: texts to learn from. Every tenth stretch of them decides the weights, given the counts
                of the rest; the counts of the model returned are those of all the documents.

        Raises:
            DataError: there is no text in the documents.
        """
        codes = _trigram_codes(documents)
        held_out = _every_tenth_stretch(len(codes))
        counts, held_out_counts = _count(codes[~held_out]), _count(codes[held_out])
        equal = np.full((_NUM_BUCKETS, 4), 0.25)
        seen = np.flatnonzero(held_out_counts)
        components, buckets = cls(counts, equal)._components(seen)
        weights = _fit_weights(components, buckets, held_out_counts.ravel()[seen])
        return cls(counts + held_out_counts, weights)

    def probabilities(self, context: bytes = b"") -> Floats:
        """Return the distribution of the symbol after the first bytes of a document.

        Args:
            context: the document so far; its last two bytes matter.

        Returns:
            (257,) probabilities of the bytes 0 to 255 and, last, of the document's end.
        """
        first, second = [END, END, *context][-2:]
        return self._mixture((first * NUM_SYMBOLS + second) * NUM_SYMBOLS + np.arange(NUM_SYMBOLS))

    def bits_per_byte(self, documents: Sequence[str]) -> float:
        """Return the bits to code the documents, including their end symbols, per byte of UTF-8.

        Raises:
            DataError: there is no text in the documents.
        """
        codes = _trigram_codes(documents)
        counts = _count(codes).ravel()
        seen = np.flatnonzero(counts)
        bits = -(counts[seen] * np.log2(self._mixture(seen))).sum()
        return float(bits / (len(codes) - len(documents)))

    def _mixture(self, codes: Codes) -> Floats:
        components, buckets = self._components(codes)
        return (components * self.weights[buckets]).sum(axis=1)

    def _components(self, codes: Codes) -> tuple[Floats, Codes]:
        """Return the probability (n, 4) of the last symbol of trigrams (n,) by order, and their rows of the weights."""
        pairs, last = np.divmod(codes, NUM_SYMBOLS)
        first, second = np.divmod(pairs, NUM_SYMBOLS)
        uniform = np.full(len(codes), 1 / NUM_SYMBOLS)
        unigram = self._unigrams[last] / self._unigrams.sum()
        bigram = _ratio(self._bigrams[second, last], self._single_contexts[second], otherwise=unigram)
        contexts = self._pair_contexts[first, second]
        trigram = _ratio(self.counts[first, second, last], contexts, otherwise=bigram)
        buckets = np.minimum(np.log2(contexts + 1).astype(np.int64), _NUM_BUCKETS - 1)
        return np.stack([uniform, unigram, bigram, trigram], axis=1), buckets


def _trigram_codes(documents: Sequence[str]) -> Codes:
    """Return codes of each byte and each end with the two symbols before it, `(a * 257 + b) * 257 + c`."""
    codes = []
    for document in documents:
        text = np.frombuffer(document.encode(), np.uint8)
        symbols = np.concatenate([[END, END], text, [END]], dtype=np.int64)
        codes.append((symbols[:-2] * NUM_SYMBOLS + symbols[1:-1]) * NUM_SYMBOLS + symbols[2:])
    if sum(map(len, codes)) == len(codes):
        raise DataError(f"{len(codes)} documents without any text; the 3-gram model needs at least one byte")
    return np.concatenate(codes)


def _every_tenth_stretch(length: int) -> NDArray[np.bool_]:
    """Return a mask that spreads the held-out tenth over the whole text, whose style may change."""
    stretch = min(max(length // 10, 1), 1000)
    return np.arange(length) // stretch % 10 == 9


def _count(codes: Codes) -> Codes:
    return np.bincount(codes, minlength=NUM_SYMBOLS**3).reshape((NUM_SYMBOLS,) * 3)


def _ratio(numerators: Codes, denominators: Codes, otherwise: Floats) -> Floats:
    return np.divide(numerators, denominators, out=otherwise.copy(), where=denominators > 0)


def _fit_weights(components: Floats, buckets: Codes, frequencies: Codes) -> Floats:
    """Return the weights (16, 4) of maximum likelihood on the held-out trigrams.

    The weights of all buckets together are the start and the prior of each bucket, so that a bucket without held-out
    trigrams has sensible weights, too.
    """
    together = _maximize_likelihood(components, np.zeros_like(buckets), frequencies, prior=np.ones((1, 4)))
    return _maximize_likelihood(components, buckets, frequencies, prior=together.repeat(_NUM_BUCKETS, axis=0))


def _maximize_likelihood(components: Floats, buckets: Codes, frequencies: Codes, prior: Floats) -> Floats:
    """Fit the weights (rows, 4) of a mixture by EM, one row per bucket.

    Args:
        components: (n, 4) probabilities of n trigrams under each order.
        buckets: (n,) the row of the weights that mixes each trigram.
        frequencies: (n,) how often each trigram occurs.
        prior: (rows, 4) positive imagined counts of each order, which keep every weight positive.
    """
    weights = prior / prior.sum(axis=1, keepdims=True)
    for _ in range(_EM_ROUNDS):
        shares = components * weights[buckets]
        shares *= (frequencies / shares.sum(axis=1))[:, None]
        expected = prior.copy()
        np.add.at(expected, buckets, shares)
        weights = expected / expected.sum(axis=1, keepdims=True)
    return weights
