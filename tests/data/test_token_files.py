"""Tokens that Megatron and nanoGPT have written."""

import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from resolvent.data import EOT, build_tokenizer, encode_documents
from resolvent.data.cache import TokenCache
from resolvent.data.shards import HELD_OUT, TRAIN
from resolvent.data.token_files import TokenText, is_token_file
from resolvent.errors import DataError

DOCUMENTS = [f"Document {number} says père and № {number}.\n" * (1 + number % 4) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer("bpe", DOCUMENTS, vocab_size=300)


@pytest.fixture(params=["nanoGPT", "Megatron", "Megatron without separators"])
def path(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """The documents as nanoGPT writes them, a separator after each, and as Megatron does."""
    separator = [] if "without" in request.param else [tokenizer.token_to_id(EOT)]
    ids = [tokenizer.encode(text).ids + separator for text in DOCUMENTS]
    tokens, file = np.concatenate(ids), tmp_path / "corpus.bin"
    if request.param == "nanoGPT":
        tokens.astype(np.uint16).tofile(file)
        return file
    tokens.astype(np.int32).tofile(file)
    lengths = np.array([len(part) for part in ids], np.int32)
    with open(file.with_suffix(".idx"), "wb") as index:
        index.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(ids), len(ids) + 1))
        index.write(lengths.tobytes() + (4 * np.cumsum(lengths, dtype=np.int64) - 4 * lengths).tobytes())
        index.write(np.arange(len(ids) + 1, dtype=np.int64).tobytes())
    return file.with_suffix(".idx")


def test_the_tokens_are_those_of_the_text(path: Path, tmp_path: Path, tokenizer: Tokenizer):
    assert is_token_file(path)
    found = TokenCache(tmp_path / "cache").tokens(TokenText(path, tokenizer), tokenizer, None).streams[TRAIN]
    expected = encode_documents(DOCUMENTS, tokenizer)
    assert np.array_equal(found.tokens[:], expected.tokens)
    assert np.array_equal(found.starts, expected.starts)
    assert np.array_equal(found.byte_lengths, expected.byte_lengths)


def test_a_tenth_of_the_bytes_is_held_out(path: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch):
    """Also where pieces are short and one document is so large that it is cut."""
    monkeypatch.setattr("resolvent.data.token_files._PIECE_TOKENS", 7)
    text = TokenText(path, tokenizer)
    for fraction in (0.1, 0.004):
        folder = TokenCache(tmp_path / "cache").tokens(text, tokenizer, fraction)
        train, held_out = folder.streams[TRAIN], folder.streams[HELD_OUT]
        size = sum(len(document.encode()) for document in DOCUMENTS)
        assert train.num_bytes + held_out.num_bytes == size
        assert held_out.num_bytes == pytest.approx(fraction * size, rel=0.21)
        for stream in (train, held_out):
            decoded = tokenizer.decode(stream.tokens[:].tolist(), skip_special_tokens=False).split(EOT)[1:-1]
            assert [len(document.encode()) for document in decoded] == stream.byte_lengths.tolist()


def test_tokens_of_another_tokenizer_are_named(path: Path, tmp_path: Path):
    text = TokenText(path, build_tokenizer("bytes", []))
    with pytest.raises(DataError, match=r"corpus.bin holds the token \d+, and the tokenizer has 257.*--tokenizer"):
        TokenCache(tmp_path / "cache").tokens(text, build_tokenizer("bytes", []), None)
    with pytest.raises(DataError, match="whose bytes only a byte-level tokenizer tells"):
        TokenText(path, Tokenizer(models.WordLevel({EOT: 0}, unk_token=EOT)))


@pytest.mark.parametrize("length", [0, 5, 20, 40, 60, 85])
def test_a_damaged_index_is_named(tmp_path: Path, tokenizer: Tokenizer, length: int):
    (np.arange(300, dtype=np.int32) % 7).tofile(tmp_path / "corpus.bin")
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 3, 4) + np.full(3, 100, np.int32).tobytes() + bytes(24)
    index += np.arange(4).tobytes()
    (tmp_path / "corpus.idx").write_bytes(index)
    assert TokenText(tmp_path / "corpus.bin", tokenizer).survey.num_bytes > 0
    (tmp_path / "corpus.idx").write_bytes(index[:length])
    with pytest.raises(DataError, match=r"cannot read the tokens in .*corpus.bin: .*write the file again"):
        TokenText(tmp_path / "corpus.bin", tokenizer)
