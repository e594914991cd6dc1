import itertools
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from resolvent.data import MixedBatches, TokenStream, build_tokenizer
from resolvent.data.cache import TokenCache, tokenize
from resolvent.data.shards import TRAIN
from resolvent.data.text import Text
from resolvent.errors import ConfigError, DataError
from resolvent.training import TrainingInterrupted, resume, train
from resolvent.training.config import weighted_paths
from resolvent.training.corpus import cache_folder, load_corpus, split_corpus, text_name

from .runs import after_step, assert_same_run


def test_the_fingerprint_sees_every_change(small_config, tmp_path: Path):
    """A letter, the order of documents, their number, their bounds, the split, and the two sides."""
    path, fingerprints = tmp_path / "text.jsonl", set()
    for texts in (
        ["one", "two", "three"],
        ["onE", "two", "three"],
        ["two", "one", "three"],
        ["one", "two"],
        ["onetwo"],
    ):
        path.write_text("".join(f'{{"text": "{text * 9}"}}\n' for text in texts))
        fingerprints.add(load_corpus(small_config(data=str(path), validation_data=None)).fingerprint)
        fingerprints.add(load_corpus(small_config(data=str(path), validation_fraction=0.4)).fingerprint)
    (tmp_path / "other.txt").write_text("a text of its own")
    pair = str(path), str(tmp_path / "other.txt")
    for data, held_out in (pair, pair[::-1]):
        fingerprints.add(load_corpus(small_config(data=data, validation_data=held_out)).fingerprint)
    assert len(fingerprints) >= 10
    again = load_corpus(small_config(data=pair[0], validation_data=pair[1], seed=7)).fingerprint
    assert again in fingerprints


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


# --- the cache of a run ----------------------------------------------------------------------------------------------


def test_the_cache_is_the_runs_the_environments_or_beside_the_run(small_config, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RESOLVENT_CACHE", raising=False)
    assert cache_folder(small_config()) == tmp_path / "token-cache"
    monkeypatch.setenv("RESOLVENT_CACHE", str(tmp_path / "shared"))
    assert cache_folder(small_config()) == tmp_path / "shared"
    assert cache_folder(small_config(cache="mine")) == Path("mine")


def test_a_resumed_run_finds_its_cache(small_config, tmp_path: Path, monkeypatch):
    config = small_config(cache=str(tmp_path / "mine"), steps=2, checkpoint_interval=1)
    train(config)
    monkeypatch.setattr("resolvent.data.cache.write_tokens", lambda *_: pytest.fail("the text is tokenized again"))
    resume(tmp_path / "run", steps=3)


def test_a_cache_that_only_a_run_folder_names_is_not_made(small_config, tmp_path: Path):
    config = small_config(cache=str(tmp_path / "mine"), steps=2, checkpoint_interval=1)
    train(config)
    (tmp_path / "mine").rename(tmp_path / "gone")
    resume(tmp_path / "run", steps=3)
    assert not (tmp_path / "mine").exists() and (tmp_path / "token-cache").exists()


# --- mixtures ---------------------------------------------------------------------------------------------------------


def texts_of(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("a river and a stone\n" * 100)
    paths[1].write_text("père et pierre\n" * 300)
    return [str(path) for path in paths]


def test_weights_are_told_from_names(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c:2").touch()
    paths = ["a.txt:0.7", "b:1e3", "c:2", "d:x", "e:-1", "f:", ":1", "g:inf", "plain"]
    weights = dict(weighted_paths(paths))
    assert weights == {"a.txt": 0.7, "b": 1000.0} | dict.fromkeys(paths[2:])


def test_texts_are_mixed_by_weight(small_config, tmp_path: Path):
    first, second = texts_of(tmp_path)
    config = small_config(data=[f"{first}:3", f"{second}:1"], validation_fraction=0.2)
    corpus = load_corpus(config)
    batches = corpus.batches(seq_len=16, batch_size=8, seed=0)
    assert isinstance(batches, MixedBatches)
    rows = torch.cat([batches[step].input_ids.view(8, 16) for step in range(512)])
    of_second = (rows == 0xC3).any(1) | (rows == ord("t")).any(1) & (rows == ord("p")).any(1)
    assert of_second.float().mean() == pytest.approx(0.25, abs=1e-3)
    assert corpus.validation.num_bytes == pytest.approx(0.2 * (2000 + 4800), rel=0.05), "of each text, the same share"
    plain = load_corpus(small_config(data=[first, second], validation_fraction=0.2))
    assert plain.fingerprint != corpus.fingerprint


def test_a_batch_of_a_mixture_depends_on_its_step_alone():
    streams = [
        TokenStream(np.arange(1 + size, dtype=np.uint32) + first, np.array([0]), np.array([size]))
        for first, size in ((0, 1000), (10_000, 300))
    ]
    mixed = MixedBatches([(streams[0], 0.7), (streams[1], 0.3)], seq_len=10, batch_size=3, seed=1)
    steps = [5000, 3, 1365, 1366, 0]
    found = [mixed[step] for step in steps]
    fresh = MixedBatches([(streams[0], 7), (streams[1], 3)], seq_len=10, batch_size=3, seed=1)
    for step, batch in zip(steps, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, fresh[step], strict=True))
    rows = itertools.chain.from_iterable(mixed[step].input_ids.view(3, 10).tolist() for step in range(100 // 3))
    epoch = Counter(tuple(row) for row in itertools.islice((row for row in rows if row[0] < 10_000), 50))
    assert max(epoch.values()) == 1, "a stream's windows are used once an epoch"


@pytest.mark.parametrize("weights", [("0.5", None), (None, "1")])
def test_weights_of_some_texts_only_are_refused(small_config, tmp_path: Path, weights):
    data = [
        path if weight is None else f"{path}:{weight}" for path, weight in zip(texts_of(tmp_path), weights, strict=True)
    ]
    with pytest.raises(ConfigError, match="every text needs a weight, or none does: got"):
        load_corpus(small_config(data=data))


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_that_are_not_above_zero_are_refused(small_config, tmp_path: Path, weight):
    first, second = texts_of(tmp_path)
    with pytest.raises(ConfigError, match=f"the weight of .* must be above 0 and finite, got {weight}"):
        load_corpus(small_config(data=[f"{first}:{weight}", f"{second}:1"]))


def test_a_weight_too_small_to_matter_is_refused(small_config, tmp_path: Path):
    first, second = texts_of(tmp_path)
    corpus = load_corpus(small_config(data=[f"{first}:1", f"{second}:1e-5"]))
    with pytest.raises(ConfigError, match="a weight must be at least 1/4096 of all weights"):
        corpus.batches(seq_len=16, batch_size=8, seed=0)


def test_a_run_on_a_mixture_resumes_bit_for_bit(small_config, tmp_path: Path, monkeypatch):
    data = [f"{path}:{weight}" for path, weight in zip(texts_of(tmp_path), (2, 1), strict=True)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(small_config(data=data, out=str(whole)))
    after_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(TrainingInterrupted):
        train(small_config(data=data, out=str(parts)))
    resume(parts)
    assert_same_run(whole, parts, steps=10)


# --- tokens in the place of text -------------------------------------------------------------------------------------


def test_a_folder_of_tokens_takes_the_place_of_its_text(small_config, text_file: Path, tmp_path: Path):
    tokenize(str(text_file), tmp_path / "tokens")
    assert (
        load_corpus(small_config(data=str(tmp_path / "tokens"))).fingerprint == load_corpus(small_config()).fingerprint
    )


def test_a_folder_of_tokens_must_be_split_as_the_run_asks(small_config, text_file: Path, tmp_path: Path):
    folder = str(tmp_path / "tokens")
    tokenize(str(text_file), folder, validation_fraction=None)
    with pytest.raises(DataError, match=r"tokens was tokenized with nothing held out, and the run needs 0.1 held out"):
        load_corpus(small_config(data=folder))
    with pytest.raises(DataError, match=r"tokens holds tokens already, from which no bpe can be trained.*--tokenizer"):
        load_corpus(small_config(data=folder, tokenizer="bpe"))
    corpus = load_corpus(small_config(data=folder, validation_data=str(text_file)))
    assert corpus.train.num_bytes == corpus.validation.num_bytes


def test_the_split_of_a_folder_of_tokens_is_that_of_its_text(small_config, text_file: Path, tmp_path: Path):
    tokenize(str(text_file), tmp_path / "tokens", tokenizer="gpt2")
    assert split_corpus(small_config(data=str(tmp_path / "tokens"))) == split_corpus(small_config())


def test_text_to_validate_on_takes_no_weights(small_config, tmp_path: Path):
    first, second = texts_of(tmp_path)
    with pytest.raises(ConfigError, match="validation_data is not mixed: leave out the weights of"):
        load_corpus(small_config(data=first, validation_data=[f"{first}:1", f"{second}:1"]))


def test_a_text_and_a_folder_of_tokens_follow_each_other(small_config, text_file: Path, tmp_path: Path):
    tokenize(str(text_file), tmp_path / "tokens")
    first, _ = texts_of(tmp_path)
    corpus = load_corpus(small_config(data=[first, str(tmp_path / "tokens")]))
    alone = load_corpus(small_config(data=first)), load_corpus(small_config())
    assert corpus.train.num_predictions == sum(part.train.num_predictions for part in alone)
    assert corpus.train.tokens[:].tolist() == [*alone[0].train.tokens[:-1], *alone[1].train.tokens[:]]
    assert corpus.train.num_documents == sum(part.train.num_documents for part in alone)


def test_the_cache_serves_what_the_text_was(tmp_path: Path, text_file: Path):
    cache, tokenizer = TokenCache(tmp_path / "cache"), build_tokenizer("bytes", [])
    folder = cache.tokens(Text([str(text_file)]), tokenizer, None)
    assert bytes(folder.streams[TRAIN].tokens[1:40].astype(np.uint8)) == text_file.read_bytes()[:39]
    assert os.listdir(folder.path)
