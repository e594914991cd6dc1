"""Language modelling with the same tokens in the same order for every model."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import lzma
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from experiments.quality.models import Entry, Size
from experiments.quality.training import Clock, Mode, Schedule, Trainer
from experiments.quality.variants import mechanisms_of, shortened
from resolvent.data import EOT, build_tokenizer, load_documents, load_tokenizer, save_tokenizer, split_documents
from resolvent.data.shards import HELD_OUT, TRAIN, open_tokens
from resolvent.evaluation.scoring import score_tokens
from resolvent.evaluation.statistics import Estimate
from resolvent.models import save_model
from resolvent.models.inference import evaluating
from resolvent.models.phase2 import Phase2IntegratedModel
from resolvent.ops import IGNORED

T = TypeVar("T")

VALIDATION_PART = 0.05
CHARACTERS_VALIDATION_PART = 0.1
WHOLE_WINDOW_PART = 0.15
"""Last part of a training with a short window, in which none is short."""


# -------------------------------------------------------------------------------------------------------- the text


@dataclass(frozen=True)
class Text:
    """A corpus as tokens.

    Attributes:
        train: of all documents in a row, uint16 (T,), each document followed by a separator where there is one.
        validation: of each held-out document, uint16, what its first token is predicted from included.
        validation_bytes: of the held-out documents, in UTF-8.
        vocabulary: tokens.
        tokenizer: its JSON; empty for characters.
        parts: part of the corpus that each held-out document belongs to; empty where the corpus names none.
    """

    train: NDArray[np.uint16]
    validation: list[NDArray[np.uint16]]
    validation_bytes: int
    vocabulary: int
    tokenizer: str
    parts: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of_corpus(cls, corpus: Sequence[Path], tokenizer: str, vocab_size: int, part_field: str | None = None) -> Text:
        """Encode text files. Of each, 5 % of the bytes are held out, always the same ones.

        Args:
            corpus: files and folders, as ``resolvent train --data`` takes them.
            tokenizer: ``gpt2``, ``bytes`` or ``bpe``, which is trained on the training part.
            vocab_size: of ``bpe``.
            part_field: field of JSON Lines that names the part of the corpus; None for none.
        """
        splits = [split_documents(load_documents(path), VALIDATION_PART) for path in corpus]
        train, held_out = ([text for split in splits for text in split[side]] for side in (0, 1))
        built = build_tokenizer(tokenizer, train, vocab_size)
        text = cls.of_documents(train, held_out, built)
        return text if part_field is None else dataclasses.replace(text, parts=_parts(corpus, held_out, part_field))

    @classmethod
    def of_documents(cls, train: list[str], held_out: list[str], tokenizer: Tokenizer) -> Text:
        """Return the tokens of documents, with the tokenizer's separator between them."""
        separator = np.array([tokenizer.token_to_id(EOT)], dtype=np.uint16)
        learned, validated = (
            [np.array(code.ids, dtype=np.uint16) for code in tokenizer.encode_batch(texts)]
            for texts in (train, held_out)
        )
        return cls(
            np.concatenate([part for ids in learned for part in (ids, separator)]),
            [np.concatenate([separator, ids, separator]) for ids in validated],
            sum(len(text.encode()) for text in held_out),
            tokenizer.get_vocab_size(),
            tokenizer.to_str(),
        )

    @classmethod
    def of_shards(cls, folder: Path) -> Text:
        """Read a folder of shards, as ``resolvent tokenize`` writes it: two bytes per token in memory.

        Raises:
            ValueError: nothing is held out, or the vocabulary has more than 65,536 tokens.
        """
        tokenizer = load_tokenizer(folder)
        streams = open_tokens(folder, tokenizer).streams
        if HELD_OUT not in streams:
            raise ValueError(f"{folder} holds nothing out: tokenize it with --validation-fraction 0.05, say")
        train, held_out = streams[TRAIN], streams[HELD_OUT]
        if train.tokens.dtype != np.uint16:
            raise ValueError(f"{folder} has {tokenizer.get_vocab_size():,} different tokens; the harness takes 65,536")
        ends = [*held_out.starts[1:].tolist(), len(held_out.tokens) - 1]
        documents = [held_out.tokens[start : end + 1] for start, end in zip(held_out.starts, ends, strict=True)]
        sizes = tokenizer.get_vocab_size(), tokenizer.to_str()
        return cls(train.tokens[1:], documents, held_out.num_bytes, *sizes)

    @classmethod
    def of_characters(cls, corpus: Sequence[Path]) -> Text:
        """Read the characters of one text; its last tenth is held out."""
        text = "".join(document for path in corpus for document in load_documents(path))
        alphabet = {letter: i for i, letter in enumerate(sorted(set(text)))}
        ids = np.array([alphabet[letter] for letter in text], dtype=np.uint16)
        cut = int(len(text) * (1 - CHARACTERS_VALIDATION_PART))
        return cls(ids[:cut], [ids[cut:]], len(text[cut:].encode()), len(alphabet), "")

    def save(self, path: Path) -> None:
        """Write the tokens to a file."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            train=self.train,
            validation=np.concatenate(self.validation),
            lengths=np.array([len(ids) for ids in self.validation]),
            numbers=np.array([self.validation_bytes, self.vocabulary]),
            tokenizer=np.frombuffer(self.tokenizer.encode(), np.uint8),
            parts=np.array(self.parts, dtype=np.str_),
        )
        path.write_bytes(buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Text:
        """Read a file of ``save``, or a folder of shards."""
        if path.is_dir():
            return cls.of_shards(path)
        with np.load(path) as stored:
            ends = stored["lengths"].cumsum()[:-1]
            num_bytes, vocabulary = stored["numbers"].tolist()
            tokenizer = stored["tokenizer"].tobytes().decode()
            parts = stored["parts"].tolist()
            return cls(stored["train"], np.split(stored["validation"], ends), num_bytes, vocabulary, tokenizer, parts)

    @cached_property
    def digest(self) -> str:
        """First 16 digits of the SHA-256 of all tokens, to learn from and held out."""
        found = hashlib.sha256(self.train.tobytes())
        for ids in self.validation:
            found.update(ids.tobytes())
        return found.hexdigest()[:16]

    @property
    def predicted(self) -> int:
        """Tokens that validation predicts."""
        return sum(len(ids) - 1 for ids in self.validation)

    def windows(self, length: int) -> tuple[Tensor, Tensor]:
        """Cut the held-out documents into windows with a fresh state each: tokens and labels, int64 (W, N).

        Every token but a document's first is predicted once; the last window of a document is filled up.
        """
        ids, labels = [], []
        for document in self.validation:
            document = torch.from_numpy(document.astype(np.int64))
            missing = -(len(document) - 1) % length
            ids.append(F.pad(document[:-1], (0, missing)).view(-1, length))
            labels.append(F.pad(document[1:], (0, missing), value=IGNORED).view(-1, length))
        return torch.cat(ids), torch.cat(labels)

    def window_parts(self, length: int) -> list[str]:
        """Return the part of the corpus of each of the ``windows``; empty where the corpus names none."""
        counts = [-(-(len(document) - 1) // length) for document in self.validation]
        return (
            [part for part, count in zip(self.parts, counts, strict=True) for _ in range(count)] if self.parts else []
        )

    def stretches(self, length: int) -> tuple[Tensor, Tensor]:
        """Join the held-out documents and cut them into whole stretches: tokens and labels, int64 (W, N)."""
        row = torch.from_numpy(np.concatenate(self.validation).astype(np.int64))
        count = (len(row) - 1) // length
        return row[: count * length].view(count, length), row[1 : count * length + 1].view(count, length)


def _parts(corpus: Sequence[Path], held_out: Sequence[str], field: str) -> list[str]:
    """Return the part of each held-out document, which may be the end of a document of the corpus.

    Raises:
        ValueError: no record holds a document.
    """
    known = {}
    for path in corpus:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            known.update((row["text"], row[field]) for row in map(json.loads, file))
    found = []
    for text in held_out:
        part = known.get(text) or next((part for whole, part in known.items() if whole.endswith(text)), None)
        if part is None:
            raise ValueError(f"no record of the corpus holds the document {text[:60]!r}")
        found.append(part)
    return found


def book_stretches(books: Path, tokenizer: str, length: int, most: int) -> tuple[Tensor, Tensor]:
    """Return tokens and labels of the first whole stretches of every document of a file, int64 (W, N).

    Args:
        books: text that no model learns from.
        tokenizer: its JSON.
        length: N; a document that is shorter has no stretch.
        most: of one document.
    """
    rows = []
    for code in Tokenizer.from_str(tokenizer).encode_batch(load_documents(books)):
        ids = torch.tensor(code.ids)
        rows += [ids[i * length : (i + 1) * length + 1] for i in range(min(most, (len(ids) - 1) // length))]
    stacked = torch.stack(rows)
    return stacked[:, :-1], stacked[:, 1:]


def window_starts(tokens: int, length: int, batch: int, steps: int, seed: int) -> NDArray[np.int64]:
    """Return where the windows of every step start, (steps, B).

    Each pass over the tokens tiles them from a random offset, in random order.
    """
    order, passes = [], 0
    while sum(map(len, order)) < steps * batch:
        random = np.random.default_rng([seed, passes])
        starts = np.arange(random.integers(length), tokens - length, length)
        order.append(random.permutation(starts))
        passes += 1
    return np.concatenate(order)[: steps * batch].reshape(steps, batch)


# ---------------------------------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Plan:
    """Settings that all runs of a comparison share.

    Attributes:
        width, layers, parameters, length, dropout: see ``models.Size``.
        batch: windows of a step.
        steps: of a run.
        warmup: steps of warm-up.
        final: last learning rate over the peak.
        evaluations: validations in a run, evenly spread; the last is at its end.
        muon_ratio: learning rate of Muon over that of AdamW; None for AdamW alone.
        extrapolate: tokens of the stretches that are read whole at the end, from a fresh start; 0 for none.
    """

    width: int = 512
    layers: int = 6
    parameters: int = 30_000_000
    length: int = 1024
    dropout: float = 0.0
    batch: int = 16
    steps: int = 1200
    warmup: int = 100
    final: float = 0.1
    evaluations: int = 4
    extrapolate: int = 0
    muon_ratio: float | None = None

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.steps, self.warmup, self.final)

    def size(self, vocabulary: int) -> Size:
        return Size(vocabulary, self.width, self.layers, self.parameters, self.length, self.dropout)


PLANS = {
    "corpus": Plan(),
    "characters": Plan(width=384, parameters=10_600_000, length=256, dropout=0.2, batch=64, steps=5000, evaluations=20),
    "scale-10m": Plan(width=256, layers=6, parameters=10_000_000, muon_ratio=5.0),
    "scale-30m": Plan(width=512, layers=6, parameters=30_000_000, muon_ratio=5.0),
    "scale-71m": Plan(width=768, layers=8, parameters=71_000_000, muon_ratio=5.0),
    "tiny": Plan(width=128, layers=2, parameters=600_000, length=128, batch=4, steps=20, warmup=5, evaluations=2),
}
"""``characters`` is nanoGPT's experiment on tinyshakespeare: 5,000 steps of 64 windows, dropout 0.2. ``scale-...`` are
the points of a scaling line with a vocabulary of 16,384; --steps says how many tokens they read."""


class Experiment:
    """One entry on a text, prepared once for all seeds and learning rates.

    Args:
        entry: on the device.
        text: to learn from.
        plan: what to do.
        mode: how steps run.
        long: stretches to read at the end, tokens and labels (W, N); those of the held-out text if None.
        switching: whether to measure Phase 2 with each of its mechanisms off.
    """

    def __init__(
        self,
        entry: Entry,
        text: Text,
        plan: Plan,
        mode: Mode,
        long: tuple[Tensor, Tensor] | None = None,
        switching: bool = True,
    ) -> None:
        self.long, self.switching = long, switching
        self.entry, self.text, self.plan, self.mode = entry, text, plan, mode
        self.device = next(entry.model.parameters()).device
        self.stream = torch.from_numpy(text.train.astype(np.int32)).to(self.device)
        self.starts = torch.zeros(plan.steps, plan.batch, dtype=torch.int64, device=self.device)
        self.windows = tuple(x.to(self.device) for x in text.windows(plan.length))
        self.counted = (self.windows[1] != IGNORED).cpu()
        entry.reset(0)
        shape = dict(muon_ratio=plan.muon_ratio, rate_factors=entry.rate_factors)
        losses = [self._loss] if entry.short_window is None else [self._loss, self._short_loss]
        self.trainer = Trainer(entry.model, losses, plan.steps, mode, **shape)

    @cached_property
    def seconds(self) -> float:
        """Approximate duration of a run, with its validations."""
        training = self.trainer.seconds(self._kinds(0))
        ids, labels = (x[: self._rows] for x in self.windows)
        started = time.perf_counter()
        for _ in range(2):  # the first one includes one-time preparations
            started = time.perf_counter()
            self._nats(ids, labels, batch=self._rows)
        validation = (time.perf_counter() - started) * len(self.windows[0]) / len(ids)
        return training + (self.plan.evaluations + 3 * bool(self.plan.extrapolate)) * validation

    @property
    def _rows(self) -> int:
        """Windows in a forward pass of the validation."""
        return max(1, 4 * self.plan.batch)

    def run(self, learning_rate: float, seed: int, clock: Clock) -> dict[str, Any]:
        """Train and validate; return the results.

        Raises:
            OutOfTimeError: the run would not end in time.
        """
        clock.check(self.seconds)
        self.entry.reset(seed)
        torch.manual_seed(seed)
        plan = self.plan
        self._draw(seed)
        self.trainer.start(plan.schedule.rates(learning_rate))
        kinds = self._kinds(seed)
        curve, seconds, finite, nats = [], 0.0, True, torch.full((1, plan.length), math.nan)
        for end in evaluation_steps(plan.steps, plan.evaluations):
            started = time.perf_counter()
            finite = self.trainer.advance(kinds[curve[-1][0] if curve else 0 : end], clock)
            seconds += time.perf_counter() - started
            if not finite:
                break
            nats = self._validate()
            curve.append((end, nats[self.counted].mean().item()))
        taken = int(self.trainer.step)
        finite = finite and math.isfinite(curve[-1][1])
        return {
            "parameters": self.entry.parameters,
            "state_bytes": self.entry.state_bytes,
            "tokens": taken * plan.batch * plan.length,
            "finite": finite,
            "loss": curve[-1][1] if finite else None,
            "bits_per_byte": self._bits_per_byte(curve[-1][1]) if finite else None,
            "best_loss": min((loss for _, loss in curve if math.isfinite(loss)), default=None),
            "curve": [(step, loss if math.isfinite(loss) else None) for step, loss in curve],
            "train_loss": _mean(self.trainer.losses()[-50:]) if finite else None,
            "loss_by_position": by_position(nats) if finite else None,
            "loss_by_part": by_part(nats, self.text.window_parts(plan.length)) if finite else None,
            "long": self._long() if finite and plan.extrapolate else None,
            "switched_off": self._without_each(lambda: difference(self._validate(), nats)) if finite else None,
            "seconds": seconds,
            "tokens_per_second": taken * plan.batch * plan.length / seconds,
            "preparation_seconds": self.trainer.preparation_seconds,
            "compiled_error": self.trainer.compiled_error,
        }

    def save(self, folder: Path) -> None:
        """Write a Phase 2 model with its tokenizer, for `resolvent evaluate` and `resolvent generate`."""
        model = self.entry.model
        if isinstance(model, Phase2IntegratedModel) and self.text.tokenizer:
            save_model(model, folder)
            save_tokenizer(Tokenizer.from_str(self.text.tokenizer), folder)

    def _draw(self, seed: int) -> None:
        """Copy the inputs of all steps of a run to the device."""
        plan = self.plan
        starts = window_starts(len(self.stream), plan.length, plan.batch, plan.steps, seed)
        self.starts.copy_(torch.from_numpy(starts))

    def _window(self, step: Tensor) -> Tensor:
        """Return the tokens that a step reads and predicts, int64 (B, N + 1)."""
        starts = self.starts.index_select(0, step).view(-1, 1)
        return self.stream[starts + torch.arange(self.plan.length + 1, device=self.device)].long()

    def _loss(self, step: Tensor) -> Tensor:
        window = self._window(step)
        return self.entry.model(window[:, :-1].contiguous(), labels=window[:, 1:].contiguous())

    def _short_loss(self, step: Tensor) -> Tensor:
        assert self.entry.short_window is not None
        with shortened(self.entry.model, self.entry.short_window):
            return self._loss(step)

    def _kinds(self, seed: int) -> list[int]:
        """Return which loss each step of a run takes: the second one in half of those before the last ones."""
        drawn = np.zeros(self.plan.steps, np.int64)
        if self.entry.short_window is not None:
            mixed = round((1 - WHOLE_WINDOW_PART) * self.plan.steps)
            drawn[:mixed] = np.random.default_rng(seed).integers(2, size=mixed)
        return drawn.tolist()

    def _validate(self) -> Tensor:
        """Return the nats of every held-out token, float64 (W, N) on the CPU, NaN at padding."""
        ids, labels = self.windows
        return self._nats(ids, labels, batch=self._rows)

    def _long(self) -> dict[str, Any]:
        """Return the nats by position in long stretches, and those of the same tokens in windows of training."""
        stretches = self.text.stretches(self.plan.extrapolate) if self.long is None else self.long
        ids, labels = (x.to(self.device) for x in stretches)
        long = self._nats(ids, labels, batch=1)
        short = self._nats(*(x.reshape(-1, self.plan.length) for x in (ids, labels)), batch=self._rows)
        return {
            "stretches": len(ids),
            "by_position": by_position(long),
            "in_windows": by_position(short.view_as(long)),
            "all": long.mean().item(),
            "all_in_windows": short.mean().item(),
        }

    def _without_each(self, measure: Callable[[], T]) -> dict[str, T]:
        """Return a measurement of a Phase 2 model with each of its mechanisms off, by name; empty for a peer."""
        model, found = self.entry.model, {}
        if isinstance(model, Phase2IntegratedModel) and self.switching:
            for name, switch in mechanisms_of(self.entry.name).items():
                with switch.off(model):
                    found[name] = measure()
        return found

    def _nats(self, ids: Tensor, labels: Tensor, batch: int) -> Tensor:
        return token_nats(self.entry.model, ids, labels, batch, self.trainer.evaluating())

    def _bits_per_byte(self, loss: float) -> float:
        return loss * self.text.predicted / self.text.validation_bytes / math.log(2)


@torch.no_grad()
def token_nats(model: Any, ids: Tensor, labels: Tensor, batch: int, context: torch.autocast) -> Tensor:
    """Return the nats of every label (W, N), float64 on the CPU, NaN where there is none; nothing is compiled."""
    rows = []
    with evaluating(model), context, torch.compiler.set_stance("force_eager"):
        for inputs, wanted in zip(ids.split(batch), labels.split(batch), strict=True):
            hidden, _ = model.hidden_states(inputs)
            rows.append(score_tokens(model, hidden, wanted).nats)
    nats = torch.cat(rows).double()
    return nats.masked_fill_(labels == IGNORED, math.nan).cpu()


def difference(nats: Tensor, others: Tensor) -> tuple[float, float | None]:
    """Return the mean of ``nats - others`` (W, N), NaN where there is none, and its standard error over windows.

    Windows differ in how many tokens they have.
    """
    estimate = Estimate.of((nats - others).nansum(dim=1).tolist(), nats.isfinite().sum(dim=1).tolist())
    return estimate.mean, estimate.standard_error


def by_position(nats: Tensor) -> dict[str, float]:
    """Return the mean of nats (W, N) by position: below 64, then in buckets that double."""
    length, start, means = nats.shape[1], 0, {}
    while start < length:
        end = min(length, max(64, 2 * start))
        means[f"{start}-{end}"] = nats[:, start:end].nanmean().item()
        start = end
    return means


def by_part(nats: Tensor, parts: Sequence[str]) -> dict[str, float]:
    """Return the mean of nats (W, N), NaN where there is none, over the windows of each part; empty without parts."""
    chosen = {part: torch.tensor([other == part for other in parts]) for part in sorted(set(parts))}
    return {part: nats[rows].nanmean().item() for part, rows in chosen.items()}


def evaluation_steps(steps: int, count: int) -> list[int]:
    """Return the steps of the validations: evenly spread, including the end."""
    return sorted({round(steps * (i + 1) / count) for i in range(count)} - {0})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def settings(plan: Plan, text: Text) -> dict[str, Any]:
    """Return the settings that comparable runs share."""
    shared = dataclasses.asdict(plan)
    if plan.muon_ratio is None:
        del shared["muon_ratio"]  # records of AdamW have no such setting
    return {"task": "language", **shared, "vocabulary": text.vocabulary, "corpus": len(text.train)}
