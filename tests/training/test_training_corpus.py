import dataclasses
from pathlib import Path

import pytest

from resolvent.data import build_tokenizer, encode_documents
from resolvent.training.corpus import Corpus, load_corpus, split_corpus, text_name


@pytest.fixture
def corpus() -> Corpus:
    tokenizer = build_tokenizer("bytes", [])
    train, validation = ["one", "two", "three"], ["four", "five"]
    return Corpus(tokenizer, encode_documents(train, tokenizer), encode_documents(validation, tokenizer))


def test_fingerprint_depends_on_every_token(corpus: Corpus):
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


def test_separate_validation_text(small_config, tmp_path: Path):
    path = tmp_path / "held_out.txt"
    path.write_text("A text of its own.")
    corpus = load_corpus(small_config(validation_data=str(path)))
    assert corpus.validation.num_documents == 1
    assert corpus.train.num_documents == 12


def test_the_share_of_held_out_text_is_that_of_the_configuration(small_config):
    """The verses are of about equal length: six of twelve, and, by default, one."""
    half, tenth = load_corpus(small_config(validation_fraction=0.5)), load_corpus(small_config())
    assert (half.train.num_documents, half.validation.num_documents) == (6, 6)
    assert (tenth.train.num_documents, tenth.validation.num_documents) == (11, 1)


def test_a_file_and_a_folder_of_it_are_split_alike(small_config, text_file: Path, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for number, document in enumerate(text_file.read_text(encoding="utf-8").split("<|endoftext|>\n")):
        (tmp_path / "folder" / f"{number:02d}.txt").write_text(document, encoding="utf-8")
    one, several = load_corpus(small_config()), load_corpus(small_config(data=str(tmp_path / "folder")))
    assert one.fingerprint == several.fingerprint


def test_several_texts_follow_each_other(small_config, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "Verse a."}\n{"body": "Verse b."}\n')
    (tmp_path / "b.txt").write_text("Verse c.")
    paths = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")]
    config = small_config(data=paths, validation_data=paths[::-1], text_field="body")
    assert split_corpus(config) == (["Verse a.", "Verse b.", "Verse c."], ["Verse c.", "Verse a.", "Verse b."])
    assert text_name(config.data) == ", ".join(paths)
