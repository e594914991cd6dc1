"""Tokens are decoded in their place: behind a prompt, as they come, and as alternatives."""

import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from resolvent.data import EOT, build_tokenizer
from resolvent.data.detokenization import StopText, TextStream, added_texts, decode_stream

TEXT = "the nation a law of the people, a nation of laws. people 'n laws, naïve lawn " * 3
BYTES = build_tokenizer("bytes", [])


def trained(tokenizer: Tokenizer, trainer: Callable[..., trainers.Trainer], **options: object) -> Tokenizer:
    options = {"vocab_size": 90, "special_tokens": [EOT, "<unk>"], "show_progress": False, **options}
    tokenizer.train_from_iterator([TEXT], trainer(**options))
    tokenizer.encode_special_tokens = True
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, trainers.BpeTrainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, trainers.UnigramTrainer, vocab_size=50, unk_token="<unk>")


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer.normalizer = normalizers.Lowercase()
    return trained(tokenizer, trainers.WordPieceTrainer)


def suffixes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return trained(tokenizer, trainers.BpeTrainer, end_of_word_suffix="</w>")


def byte_fallback() -> Tokenizer:
    """As Llama's: spaces are visible letters, and characters without a token are bytes."""
    letters = [*map("<0x{:02X}>".format, range(256)), *dict.fromkeys("▁" + "".join(TEXT.split()))]
    vocabulary = {token: number for number, token in enumerate([EOT, "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


KINDS = [metaspace, unigram, wordpiece, suffixes, byte_fallback]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


def whole(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_continuation_equals_rest_of_whole_text(tokenizer: Tokenizer):
    ids = tokenizer.encode("the nation a law of naïve people, 'n laws", add_special_tokens=False).ids
    alone = [whole(tokenizer, [token]) for token in ids]
    assert "".join(alone) != whole(tokenizer, ids)
    for cut in range(len(ids) + 1):
        prompt, new = ids[:cut], ids[cut:]
        pieces = list(decode_stream(tokenizer, new, prompt))
        assert whole(tokenizer, prompt) + "".join(pieces) == whole(tokenizer, ids)
        assert all(pieces)


def test_pieces_of_arbitrary_tokens_equal_whole_text(tokenizer: Tokenizer):
    """But for bytes, with which a fallback decodes what comes before them otherwise."""
    usual = [number for token, number in tokenizer.get_vocab().items() if not token.startswith("<0x")]

    @given(st.lists(st.sampled_from(usual), max_size=30), st.integers(0, 30))
    def check(ids: list[int], cut: int) -> None:
        pieces = decode_stream(tokenizer, ids[cut:], ids[:cut])
        assert whole(tokenizer, ids[:cut]) + "".join(pieces) == whole(tokenizer, ids)

    check()


@given(st.lists(st.integers(0, 275), max_size=30))
def test_invalid_bytes_after_a_character_raise_nothing(ids: list[int]):
    tokenizer = byte_fallback()
    "".join(decode_stream(tokenizer, ids))


def test_added_text_equals_streamed_text(tokenizer: Tokenizer):
    ids = tokenizer.encode("the nation a law, people", add_special_tokens=False).ids
    stream = TextStream(tokenizer, ids[:1])
    for before, token in itertools.pairwise(ids):
        (text,) = added_texts(tokenizer, before, [token])
        assert text == stream.push(token)


def test_added_text_completes_a_character():
    first, second = "é".encode()
    assert added_texts(BYTES, first, [second, ord("a")]) == ["é", "\ufffda"]
    assert added_texts(BYTES, ord("x"), [first, ord("a")]) == ["\ufffd", "a"]


@given(st.binary(max_size=60))
def test_pieces_together_are_the_decoded_whole(data: bytes):
    assert "".join(decode_stream(BYTES, data)) == data.decode("utf-8", errors="replace")


@given(st.integers(0, 200), st.binary(max_size=6))
def test_long_invalid_runs_are_not_held_back(length: int, end: bytes):
    data = b"\xc3" * length + end
    seen = list(decode_stream(BYTES, data))
    assert "".join(seen) == data.decode("utf-8", errors="replace")
    assert len(seen) >= length // 17


@given(st.text(max_size=30))
def test_characters_are_never_cut(text: str):
    pieces = list(decode_stream(BYTES, text.encode()))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_characters_come_as_soon_as_they_are_whole():
    data, consumed = "aé日🙂".encode(), []

    def feed() -> Iterator[int]:
        for byte in data:
            consumed.append(byte)
            yield byte

    seen = [(piece, len(consumed)) for piece in decode_stream(BYTES, feed())]
    assert seen == [("a", 1), ("é", 3), ("日", 6), ("🙂", 10)]


@pytest.mark.parametrize(
    "stops", [["END"], ["\n\n", "N"], ["abab", "b"], ["xyz"], [], ["aa", "aab"], ["baab", "aa"]], ids=str
)
@pytest.mark.parametrize("text", ["", "a END b", "abaabab", "one\n\ntwo END", "EEENDEND", "aaab", "EN"])
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_text_ends_before_the_first_complete_stop_string(stops: list[str], text: str, size: int):
    stream, shown = StopText(stops), ""
    for start in range(0, len(text), size):
        shown += stream.push(text[start : start + size])
        assert text.startswith(shown)
    shown += stream.rest()
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert shown == text[: min(places, default=(0, len(text)))[1]]
    assert (stream.stopped is not None) == bool(places)


def test_only_the_beginning_of_a_stop_string_is_held_back():
    stream = StopText(["\n\nUser:"])
    assert stream.push("Yes.\n") == "Yes."
    assert stream.push("\nUs") == ""
    assert stream.push("e it") == "\n\nUse it"


def test_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="must not be empty"):
        StopText(["a", ""])
