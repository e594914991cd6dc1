import dataclasses
from pathlib import Path

import numpy as np
import pytest

from resolvent.data import build_tokenizer, encode_documents
from resolvent.evaluation.language import document_tokens
from resolvent.training.corpus import Corpus, load_corpus, sample_documents


@pytest.fixture
def corpus() -> Corpus:
    tokenizer = build_tokenizer("bytes", [])
    train, validation = ["one", "two", "three"], ["four", "five"]
    return Corpus(tokenizer, encode_documents(train, tokenizer), encode_documents(validation, tokenizer))


def test_the_fingerprint_sees_every_change(corpus: Corpus):
    fingerprints = {corpus.fingerprint}
    for train in (["onE", "two", "three"], ["two", "one", "three"], ["one", "two"], ["o", "netwo", "three"]):
        changed = dataclasses.replace(corpus, train=encode_documents(train, corpus.tokenizer))
        fingerprints.add(changed.fingerprint)
    swapped = dataclasses.replace(corpus, train=corpus.validation, validation=corpus.train)
    assert len(fingerprints | {swapped.fingerprint}) == 6
    assert dataclasses.replace(corpus).fingerprint == corpus.fingerprint


def test_the_split_does_not_depend_on_the_seed(small_config):
    first, second = load_corpus(small_config(seed=1)), load_corpus(small_config(seed=2))
    assert first.fingerprint == second.fingerprint


def test_validation_text_of_its_own(small_config, tmp_path: Path):
    path = tmp_path / "held_out.txt"
    path.write_text("A text of its own.")
    corpus = load_corpus(small_config(validation_data=str(path)))
    assert corpus.validation.num_documents == 1
    assert corpus.train.num_documents == 12


@pytest.mark.parametrize("max_tokens", [1, 20, 55, 100, 10_000, 0])
def test_a_sample_is_whole_documents_within_the_limit(max_tokens: int):
    tokenizer = build_tokenizer("bytes", [])
    texts = [f"{number} " * (number + 1) for number in range(12)]
    stream = encode_documents(texts, tokenizer)
    sample = sample_documents(stream, max_tokens)
    documents = [tokenizer.decode(tokens) for tokens in document_tokens(sample)]
    assert set(documents) <= set(texts)
    assert sample.num_documents == len(documents) == len(set(documents)) >= 1
    assert sample.num_bytes == sum(map(len, documents))
    assert np.array_equal(sample.tokens[sample.starts], [256] * len(documents))
    if max_tokens in (0, 10_000):
        assert documents == texts
    elif len(documents) > 1:
        assert sample.num_predictions <= max_tokens
