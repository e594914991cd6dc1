from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from resolvent.data import EOT, build_tokenizer, encode_documents, load_tokenizer
from resolvent.data.pieces import pieces
from resolvent.errors import DataError
from resolvent.memory import Memory

LINES = st.text(
    st.sampled_from("ablrevsBZ019.'_-!@[`{~ \n\r\t\u00a0\u2028\u3000。é字\U0001f600\x1f\x7f\x85"), max_size=60
)
CORPUS = ["the cat's mat\n\n  and 12 hats.\n" * 10]


@pytest.fixture(scope="module")
def tokenizers():
    return {spec: build_tokenizer(spec, CORPUS, vocab_size=280) for spec in ("bytes", "bpe", "gpt2")}


@pytest.fixture
def small_pieces(monkeypatch):
    """Documents cut after every few characters and encoded a few at a time."""
    monkeypatch.setattr("resolvent.data.stream.pieces", lambda text: pieces(text, size=3))
    monkeypatch.setattr("resolvent.data.stream._BATCH_CHARACTERS", 8)


def expected_stream(documents, tokenizer):
    separator = tokenizer.token_to_id(EOT)
    ids = [[separator, *tokenizer.encode(text, add_special_tokens=False).ids] for text in documents]
    starts = np.cumsum([0, *map(len, ids)])[:-1]
    return [*chain(*ids), separator], list(starts)


@pytest.mark.parametrize("spec", ["bytes", "bpe", "gpt2"])
def test_stream_is_separator_document_separator(tokenizers, small_pieces, spec):
    documents = ["One.\nTwo\n", "", f"é {EOT} e\n", "x" * 50, "1\n" * 20]
    stream = encode_documents(documents, tokenizers[spec])
    tokens, starts = expected_stream(documents, tokenizers[spec])
    assert stream.tokens.tolist() == tokens
    assert stream.starts.tolist() == starts
    assert stream.byte_lengths.tolist() == [len(text.encode()) for text in documents]
    assert (stream.tokens.dtype, stream.starts.dtype, stream.byte_lengths.dtype) == (np.uint16, np.int64, np.int64)
    assert np.flatnonzero(stream.tokens == tokenizers[spec].token_to_id(EOT)).tolist() == [*starts, len(tokens) - 1]
    assert stream.num_documents == 5
    assert stream.num_bytes == sum(len(text.encode()) for text in documents)
    assert stream.num_predictions == len(tokens) - 1


@given(text=LINES, size=st.integers(1, 9))
@example(text="ab\n\n\nb", size=3)  # a cut between line ends would change their tokens
def test_pieces_are_the_text_and_tokenize_alike(tokenizers, text, size):
    parts = list(pieces(text, size))
    assert "".join(parts) == text
    assert all(len(part) >= size for part in parts[:-1])
    for spec in ("bpe", "gpt2"):
        ids = [id for part in parts for id in tokenizers[spec].encode(part).ids]
        assert ids == tokenizers[spec].encode(text).ids


@pytest.mark.parametrize("unit", ["line\n", "word ", "a1", "base64+", '{"n":12}'])
def test_long_documents_are_cut(unit):
    assert max(map(len, pieces(unit * 50_000))) < 70_000


@pytest.mark.parametrize("unit", ["x", "字", "9", "é!"])
def test_long_documents_without_a_boundary_stay_whole(unit):
    text = unit * 100_000
    assert list(pieces(text)) == [text]


def test_long_words_are_encoded_as_one(tokenizers):
    """Whatever their length, as the library itself does."""
    text = "ab" * 1000 + "1" * 1000 + "the" * 100_000
    for spec in ("bpe", "gpt2"):
        ids = tokenizers[spec].encode(text).ids
        assert encode_documents([text], tokenizers[spec]).tokens.tolist()[1:-1] == ids


def test_word_that_takes_more_than_the_memory_is_refused(tokenizers, monkeypatch):
    monkeypatch.setattr("resolvent.data.encoding.machine_memory", lambda: Memory(10_000, 10_000))
    monkeypatch.setattr("resolvent.data.encoding._FEW_CHARACTERS", 50)
    with pytest.raises(DataError, match=r"51 characters from 'xxxxxxxxxxxxxxxxxxxx' on must be encoded at once.*lines"):
        encode_documents(["short", "x" * 51], tokenizers["gpt2"])
    assert encode_documents(["x" * 50], tokenizers["gpt2"]).num_bytes == 50
    assert encode_documents(["x" * 51], tokenizers["bytes"]).num_bytes == 51


def test_tokens_that_take_more_than_the_memory_are_refused(tokenizers, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("resolvent.data.stream._batches", fail)
    with pytest.raises(DataError, match=r"the tokens of 2 documents with 7 characters do not fit into memory"):
        encode_documents(["one", "four"], tokenizers["bytes"])


def metaspace(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()


def prefixed(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def unsplit(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def normalized(tokenizer):
    tokenizer.normalizer = normalizers.Replace("a\n", "b")


def with_a_token_across_lines(tokenizer):
    tokenizer.add_tokens(["a\nb"])


@pytest.mark.parametrize("change", [metaspace, prefixed, unsplit, normalized, with_a_token_across_lines])
def test_foreign_tokenizers_see_documents_whole(tokenizers, small_pieces, tmp_path, change):
    letters = {letter: number for number, letter in enumerate([*pre_tokenizers.ByteLevel.alphabet(), "aĊ", "▁", "\n"])}
    tokenizer = Tokenizer(models.BPE(letters, [("a", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([EOT])
    change(tokenizer)
    tokenizer.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    documents = ["aaaa\nbbbb\n", "aaaa\nbbbb\naaaa\nb"]
    assert encode_documents(documents, tokenizer).tokens.tolist() == expected_stream(documents, tokenizer)[0]


def test_large_vocabularies_need_more_bits(tmp_path):
    vocabulary = {"?": 0, EOT: 1} | {str(number): number for number in range(2, 65537)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.save(str(tmp_path / "t.json"))
    stream = encode_documents(["65536"], load_tokenizer(tmp_path / "t.json"))
    assert stream.tokens.dtype == np.uint32
    assert stream.tokens.tolist() == [1, 65536, 1]


def test_progress_goes_to_stderr_only_when_asked_for(tokenizers, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    quiet = encode_documents(CORPUS, tokenizers["bpe"])
    assert capfd.readouterr() == ("", "")
    shown = encode_documents(CORPUS, tokenizers["bpe"], progress=True)
    output = capfd.readouterr()
    assert output.out == ""
    assert "Encoding" in output.err
    assert np.array_equal(quiet.tokens, shown.tokens)


def test_no_documents(tokenizers):
    with pytest.raises(DataError, match="no documents to encode"):
        encode_documents([], tokenizers["bytes"])


@pytest.mark.parametrize("special_tokens", [[], [EOT]])
def test_tokenizer_that_would_inject_the_separator(special_tokens):
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.add_special_tokens(special_tokens)
    with pytest.raises(DataError, match=r"does not keep <\|endoftext\|> apart from text"):
        encode_documents(["text"], tokenizer)
