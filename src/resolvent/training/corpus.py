"""The text of a run: read, split, tokenized, and recognised again."""

import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer

from resolvent.data import (
    MixedBatches,
    PackedBatches,
    TokenStream,
    build_tokenizer,
    load_documents,
    split_documents,
)
from resolvent.data.cache import FOLDER_NAME, VARIABLE, TokenCache, is_cache
from resolvent.data.chat_template import ChatTemplate
from resolvent.data.conversations import Conversations
from resolvent.data.hub import PREFIX, text_of
from resolvent.data.pieces import documents_of
from resolvent.data.shards import HELD_OUT, TRAIN, TokenFolder, is_token_folder, joined, open_tokens, stored_documents
from resolvent.data.token_files import TokenText, is_token_file
from resolvent.errors import CheckpointError, ConfigError, DataError
from resolvent.training.config import Texts, TrainingConfig, weighted_paths

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out text as tokens.

    Attributes:
        tokenizer: of the tokens.
        train: all text to learn from, end to end.
        validation: the held-out text.
        fingerprint: a hash of every token, those that separate documents included.
        mixture: where texts are mixed by weight, the parts of `train` with their weights.
        template: the chat template of conversations.
    """

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream
    fingerprint: str
    mixture: tuple[tuple[TokenStream, float], ...] = ()
    template: ChatTemplate | None = None

    def batches(self, *, seq_len: int, batch_size: int, seed: int) -> PackedBatches | MixedBatches:
        """Return the batches to learn from, by the number of the step.

        Raises:
            DataError: a text shorter than one window.
        """
        if self.mixture:
            return MixedBatches(self.mixture, seq_len, batch_size, seed)
        return PackedBatches(self.train, seq_len, batch_size, seed)

    @property
    def tokens_per_byte(self) -> float:
        """Tokens to predict over bytes of the text that is learnt from, in the proportions of the mixture."""
        if not self.mixture:
            return self.train.count_targets() / self.train.num_bytes
        num_bytes = sum(weight * stream.num_bytes / stream.count_targets() for stream, weight in self.mixture)
        return sum(weight for _, weight in self.mixture) / num_bytes


def load_corpus(
    config: TrainingConfig,
    tokenizer: Tokenizer | None = None,
    *,
    template_folder: Path | None = None,
    console: Console | None = None,
) -> Corpus:
    """Return the text that a configuration names, tokenized now or, if the cache holds it, before.

    Args:
        config: names the text, how to split it, the tokenizer and the cache.
        tokenizer: used in place of the configuration's (a resumed run's own).
        template_folder: the folder of a model whose chat template makes tokens of conversations; None for the default.
        console: where to say what takes long.

    Raises:
        ConfigError: some texts with weights and some without.
        DataError: text, tokenizer or cache that cannot be used.
    """
    cache = TokenCache(cache_folder(config), console)
    fraction = config.held_out_fraction
    groups, weights = _groups(config.data)
    if tokenizer is None:
        tokenizer = _tokenizer(config, cache, groups, fraction)
    template = None
    if config.format == "chat":
        template = ChatTemplate.load(template_folder, tokenizer) if template_folder else ChatTemplate.default(tokenizer)
    folders = [_open(config, group, cache, tokenizer, fraction, template) for group in groups]
    if config.validation_data is None:
        held_out, stream = folders, HELD_OUT
    else:
        groups = _validation_groups(config.validation_data)
        held_out, stream = [_open(config, group, cache, tokenizer, None, template) for group in groups], TRAIN
    opened = folders if held_out is folders else [*folders, *held_out]
    for warning in (warning for folder in opened for warning in folder.warnings):
        logger.warning(warning)
    train = [folder.streams[TRAIN] for folder in folders]
    return Corpus(
        tokenizer,
        joined(train),
        joined([folder.streams[stream] for folder in held_out]),
        _fingerprint(opened, weights),
        tuple(zip(train, weights, strict=True)) if weights else (),
        template,
    )


def cache_folder(config: TrainingConfig) -> Path:
    """Return the cache of a run: its own, that of the environment, or a folder beside the run folder.

    A run folder may come from elsewhere, so that a cache which only that names is used if it is a cache already.
    """
    if config.cache is not None:
        return Path(config.cache)
    return Path(os.environ.get(VARIABLE) or config.run_dir.absolute().parent / FOLDER_NAME)


def in_folder(config: TrainingConfig, run_dir: Path) -> TrainingConfig:
    """Return the configuration of a run in the folder where the run is now, with its cache if that still is one."""
    cache = config.cache if config.cache and is_cache(Path(config.cache)) else None
    return dataclasses.replace(config, out=str(run_dir), cache=cache)


def check_fingerprint(corpus: Corpus, expected: str, config: TrainingConfig, run_dir: Path, *, remedy: str) -> None:
    """Check that a text is the one that a run learned from.

    Raises:
        CheckpointError: its tokens are others.
    """
    if corpus.fingerprint != expected:
        raise CheckpointError(
            f"{text_name(config.data)} has changed since the run {run_dir} began (fingerprint "
            f"{corpus.fingerprint[:12]}, was {expected[:12]}): {remedy}"
        )


def _groups(data: Texts) -> tuple[list[list[str] | None], list[float]]:
    """Return the texts that are split and tokenized together, and their weights: none, or one for each.

    Files and folders of text without weights are one text. A text with a weight is one of its own, and so is a folder
    of tokens.

    Raises:
        ConfigError: some have weights and some have none.
    """
    if data is None:
        return [None], []
    paths = weighted_paths([data] if isinstance(data, str) else data)
    weights = [weight for _, weight in paths if weight is not None]
    if weights:
        if len(weights) < len(paths):
            raise ConfigError(f"every text needs a weight, or none does: got {data!r}; write PATH:WEIGHT for each")
        return [[path] for path, _ in paths], weights
    groups: list[list[str] | None] = []
    text: list[str] = []
    for path, _ in paths:
        if _holds_tokens(path) or path.startswith(PREFIX):
            groups.append([path])
        else:
            if not text:
                groups.append(text)
            text.append(path)
    return groups, []


def _validation_groups(data: Texts) -> list[list[str] | None]:
    groups, weights = _groups(data)
    if weights:
        raise ConfigError(f"validation_data is not mixed: leave out the weights of {text_name(data)}")
    return groups


def _holds_tokens(path: str) -> bool:
    return is_token_folder(Path(path)) or is_token_file(Path(path))


def _tokenizer(
    config: TrainingConfig, cache: TokenCache, groups: list[list[str] | None], fraction: float | None
) -> Tokenizer:
    if config.tokenizer != "bpe":
        return build_tokenizer(config.tokenizer, [])
    if tokens := [group[0] for group in groups if group is not None and _holds_tokens(group[0])]:
        remedy = f"--tokenizer {tokens[0]}" if is_token_folder(Path(tokens[0])) else "the --tokenizer of its tokens"
        raise DataError(f"{tokens[0]} holds tokens already, from which no bpe can be trained: train with {remedy}")
    return cache.tokenizer([text_of(group, config.text_field) for group in groups], fraction, config.vocab_size)


def _open(
    config: TrainingConfig,
    group: list[str] | None,
    cache: TokenCache,
    tokenizer: Tokenizer,
    fraction: float | None,
    template: ChatTemplate | None,
) -> TokenFolder:
    """Return the tokens of a text, or of a folder of tokens that is split as the run asks for.

    Raises:
        DataError: the folder is split in another way, or holds tokens where the run learns from conversations.
    """
    path = Path() if group is None else Path(group[0])
    if template is not None:
        if group is None or _holds_tokens(group[0]) or group[0].startswith(PREFIX):
            raise DataError(
                f"{text_name(group)} holds no records of messages: the format chat reads files and folders of JSON"
            )
        return cache.tokens(Conversations(group, template), tokenizer, fraction)
    if is_token_file(path):
        return cache.tokens(TokenText(path, tokenizer), tokenizer, fraction)
    if not is_token_folder(path):
        return cache.tokens(text_of(group, config.text_field), tokenizer, fraction)
    folder = open_tokens(path, tokenizer)
    if folder.fraction != fraction:
        held_out = "nothing" if folder.fraction is None else f"{folder.fraction:g} of its bytes"
        wanted = "all of it" if fraction is None else f"{fraction:g} held out"
        raise DataError(
            f"{path} was tokenized with {held_out} held out, and the run needs {wanted}: give the run "
            f"--validation-fraction {folder.fraction or 0:g}, or tokenize the text again with that of {fraction or 0:g}"
        )
    return folder


def _fingerprint(folders: list[TokenFolder], weights: list[float]) -> str:
    """Return the fingerprint of one folder, or a hash of those of several and of their weights."""
    if len(folders) == 1 and not weights:
        return folders[0].fingerprint
    return hashlib.sha256(json.dumps([[folder.fingerprint for folder in folders], weights]).encode()).hexdigest()


def split_corpus(config: TrainingConfig) -> tuple[list[str], list[str]]:
    """Return training and held-out documents, read into memory.

    The split does not depend on the run's seed, so that runs can be compared.

    Raises:
        DataError: text that cannot be used, or the run learnt from conversations.
    """
    if config.format == "chat":
        raise DataError(
            f"the run learnt from conversations, {text_name(config.data)}, which are no text: name a text with --data, "
            "without --held-out"
        )
    fraction = config.held_out_fraction
    parts = [_documents(group, config.text_field, fraction) for group in _groups(config.data)[0]]
    train, held_out = ([text for part in parts for text in part[side]] for side in (0, 1))
    if config.validation_data is not None:
        groups = _validation_groups(config.validation_data)
        held_out = [text for group in groups for text in _documents(group, config.text_field, None)[0]]
    return train, held_out


def _documents(group: list[str] | None, text_field: str, fraction: float | None) -> tuple[list[str], list[str]]:
    """Return the documents of a text, or of a folder of tokens, on both sides of the split."""
    if group is not None and is_token_folder(path := Path(group[0])):
        return stored_documents(path, TRAIN), [] if fraction is None else stored_documents(path, HELD_OUT)
    if group is not None and group[0].startswith(PREFIX):
        documents = list(documents_of(text_of(group, text_field).pieces()))
    else:
        documents = load_documents(group, text_field=text_field)
    if fraction is None:
        return documents, []
    try:
        return split_documents(documents, fraction)
    except DataError as error:
        raise DataError(f"{text_name(group)}: {error}") from error


def text_name(data: Texts) -> str:
    """Return the name of a text for messages: its path, or its paths."""
    return "the default corpus" if data is None else data if isinstance(data, str) else ", ".join(data)
