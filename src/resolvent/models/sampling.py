"""Sampling: from the logits of B sequences to a token of each, by options and random numbers of its own.

Every step works row by row in float64: a sequence in a batch draws the token that it would draw alone, as far as its
logits are the same.

Shapes: B sequences, V vocabulary, K likeliest tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from ..errors import ResolventError
from ..ops import likeliest
from ..ops.precision import at_least_float32
from ..ops.prefix_sum import prefix_sum
from .decoding import CAPTURING

_MOST_PENALTY = 2.0
"""Largest presence and frequency penalty, and the negative of the smallest."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of one sequence, in the order in which they apply.

    Attributes:
        repetition_penalty: divisor of the positive logits, and factor of the negative ones, of all tokens in prompt
            and answer; 1 changes nothing.
        presence_penalty: subtracted from the logits of all tokens in the answer, from -2 to 2.
        frequency_penalty: subtracted from the logit of a token once for every time it is in the answer, from -2 to 2.
        temperature: 0 takes the likeliest token, 1 samples from the model's distribution.
        top_k: sample from the k likeliest tokens only, and from those that are as likely as the k-th.
        top_p: sample from the smallest set of tokens that has this probability, at least one.
        min_p: sample from tokens that have at least this fraction of the likeliest token's probability.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError if an option is out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be >= 0 and finite, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer >= 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be > 0 and finite, got {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -_MOST_PENALTY <= (value := getattr(self, name)) <= _MOST_PENALTY:
                raise ValueError(f"{name} must be from {-_MOST_PENALTY:g} to {_MOST_PENALTY:g}, got {value}")

    @property
    def penalises(self) -> bool:
        """True if a penalty changes logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class Draw(NamedTuple):
    """Tokens drawn for B sequences.

    Attributes:
        token: int64 (B,).
        logprob: log probability of each token in the model's distribution, before penalties and temperature, float32
            (B,); None where not asked for.
        top_tokens: the K likeliest tokens in that distribution, the likeliest first, int64 (B, K); None where not asked
            for.
        top_logprobs: their log probabilities, float32 (B, K).
    """

    token: Tensor
    logprob: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None


class RowGenerators:
    """Sources of randomness of B sequences: the numbers of a sequence depend on its seed alone."""

    def __init__(self, generators: Sequence[np.random.Generator]) -> None:
        self._generators = list(generators)

    @classmethod
    def of_seeds(cls, seeds: Sequence[int]) -> Self:
        """Return one generator per seed, each an integer from 0 to 2**63 - 1."""
        return cls([np.random.Generator(np.random.PCG64(seed)) for seed in seeds])

    def __call__(self) -> Tensor:
        """Return the next number of every sequence, float64 (B,) in [0, 1) on the CPU."""
        return torch.tensor([generator.random() for generator in self._generators], dtype=torch.float64)

    def __getitem__(self, rows: Sequence[int]) -> Self:
        """Return the generators of some sequences."""
        return type(self)([self._generators[row] for row in rows])

    @classmethod
    def cat(cls, parts: Sequence["RowGenerators"]) -> Self:
        """Join the generators of several batches, in order."""
        return cls([generator for part in parts for generator in part._generators])


class _PenaltyRows(NamedTuple):
    """Tensors of the penalties, a row per sequence.

    Attributes:
        repetition, presence, frequency: penalties, float64 (B, 1).
        in_prompt: tokens that are in the prompt, bool (B, V).
        counts: how often each token was drawn, int32 (B, V).
    """

    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    in_prompt: Tensor
    counts: Tensor


class Penalties:
    """Penalties of B sequences, with the tokens that they depend on.

    Args:
        options: options of each sequence.
        prompts: tokens before the answer that the repetition penalty sees, int64 (N,) per sequence.
        vocab_size: number of tokens V.
        device: device of the logits.
    """

    def __init__(
        self, options: Sequence[SamplingOptions], prompts: Sequence[Tensor], vocab_size: int, device: torch.device
    ) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)[:, None]

        in_prompt = torch.zeros(len(options), vocab_size, dtype=torch.bool, device=device)
        for seen, prompt in zip(in_prompt, prompts, strict=True):
            seen[prompt.to(device)] = True
        self._rows = _PenaltyRows(
            repetition=column([o.repetition_penalty for o in options]),
            presence=column([o.presence_penalty for o in options]),
            frequency=column([o.frequency_penalty for o in options]),
            in_prompt=in_prompt,
            counts=torch.zeros(len(options), vocab_size, dtype=torch.int32, device=device),
        )

    @classmethod
    def _of(cls, rows: _PenaltyRows) -> Self:
        penalties = object.__new__(cls)
        penalties._rows = rows
        return penalties

    def __getitem__(self, rows: Sequence[int]) -> Self:
        """Return the penalties of some sequences."""
        return self._of(_PenaltyRows(*(x[list(rows)] for x in self._rows)))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join the penalties of several batches, in order."""
        columns = zip(*(part._rows for part in parts), strict=True)
        return cls._of(_PenaltyRows(*map(torch.cat, columns)))

    def apply(self, logits: Tensor) -> Tensor:
        """Return logits (B, V) with the penalties of what was drawn so far."""
        rows = self._rows
        drawn = rows.counts > 0
        scaled = torch.where(logits > 0, logits / rows.repetition, logits * rows.repetition)
        logits = torch.where(drawn | rows.in_prompt, scaled, logits)
        return logits - rows.presence * drawn - rows.frequency * rows.counts

    def tensors(self) -> list[Tensor]:
        """Return the tensors that ``count`` changes in place."""
        return [self._rows.counts]

    def count(self, token: Tensor) -> None:
        """Count a drawn token of every sequence, int64 (B,)."""
        self._rows.counts.scatter_add_(1, token[:, None], torch.ones_like(token[:, None], dtype=torch.int32))


class _Rows(NamedTuple):
    """Rows of a batch that have an option: their indices, int64 (b,), and its values, (b, 1)."""

    index: Tensor
    values: Tensor


class Filters:
    """Temperature, top_k, top_p and min_p of B sequences.

    Args:
        options: options of each sequence, whose temperature is not 0.
        vocab_size: number of tokens V.
        device: device of the logits.
    """

    def __init__(self, options: Sequence[SamplingOptions], vocab_size: int, device: torch.device) -> None:
        def rows(values: Sequence[float | int | None], dtype: torch.dtype = torch.float64) -> _Rows | None:
            """Return the rows whose value is not None; None if there are none."""
            index = [row for row, value in enumerate(values) if value is not None]
            chosen = torch.tensor([values[row] for row in index], dtype=dtype, device=device)
            return _Rows(torch.tensor(index, device=device), chosen[:, None]) if index else None

        # The temperature stays within the normal numbers of the dtype: 0 / 0 and -inf / inf are no logits.
        limits = torch.finfo(torch.float64)
        temperatures = [min(max(o.temperature, limits.tiny), limits.max) for o in options]
        self._temperature = torch.tensor(temperatures, dtype=torch.float64, device=device)[:, None]
        top_ks = [o.top_k if o.top_k is not None and o.top_k < vocab_size else None for o in options]
        self._most, self._top_k = max([k for k in top_ks if k is not None], default=0), rows(top_ks, torch.int64)
        self._top_p = rows([o.top_p if o.top_p is not None and o.top_p < 1 else None for o in options])
        self._least = rows([math.log(o.min_p) if o.min_p else None for o in options])

    def __call__(self, logits: Tensor) -> Tensor:
        """Return logits, float64 (B, V), that are -inf for tokens that are no choice."""
        logits = (logits - logits.amax(-1, keepdim=True)) / self._temperature
        if self._top_k is not None:
            logits = _replaced(logits, self._top_k, self._within_top_k)
        if self._top_p is not None:
            logits = _replaced(logits, self._top_p, _within_top_p)
        if self._least is not None:
            logits = _replaced(logits, self._least, lambda x, least: x.masked_fill(x < least, -torch.inf))
        return logits

    def _within_top_k(self, logits: Tensor, top_k: Tensor) -> Tensor:
        """Exclude tokens less likely than number ``top_k``, (B, 1)."""
        least = logits.topk(self._most).values.gather(-1, top_k - 1)
        return logits.masked_fill(logits < least, -torch.inf)


def _replaced(logits: Tensor, rows: _Rows, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return logits (B, V) with a function of some rows and their values in the place of these rows."""
    return logits.index_copy(0, rows.index, function(logits[rows.index], rows.values))


class _Tables(NamedTuple):
    """Rows whose temperature is > 0 and rows that are penalised, int64 on the device, and the filters of the former."""

    drawing: Tensor
    penalised: Tensor
    filters: Filters | None


class Sampler:
    """Sampler of B sequences.

    Args:
        options: options of each sequence.
        uniform: returns a random number in [0, 1) for every sequence, float64 (B,), call after call.
        penalties: penalties of the sequences whose options penalise, in order; None where there are none.
    """

    def __init__(
        self, options: Sequence[SamplingOptions], uniform: Callable[[], Tensor], penalties: Penalties | None
    ) -> None:
        self._options, self._uniform, self._penalties = list(options), uniform, penalties
        self._drawing = [row for row, o in enumerate(options) if o.temperature > 0]
        self._penalised = [row for row, o in enumerate(options) if o.penalises]
        self._tables: _Tables | None = None  # made with the first logits, on their device

    @property
    def random(self) -> bool:
        """True if a sequence has a temperature above 0, so that a draw needs random numbers."""
        return bool(self._drawing)

    @property
    def greedy(self) -> bool:
        """True if every draw is the likeliest token."""
        return not self._drawing and self._penalties is None

    def numbers(self) -> Tensor:
        """Return the next random number of every sequence, float64 (B,) in [0, 1), on any device."""
        return self._uniform()

    def __call__(self, logits: Tensor, top: int | None = None) -> Draw:
        """Draw a token of every sequence.

        Args:
            logits: float (B, V); -inf for tokens that are excluded.
            top: number of likeliest tokens whose log probabilities are returned, beside that of the drawn token; None
                returns none.

        Raises:
            ResolventError: the largest logit of a sequence is not finite. On CUDA, this is not checked where all
                temperatures are 0.
        """
        numbers = self.numbers().to(logits.device) if self.random else None
        draw, largest = self.draw(logits, numbers, top)
        if not (logits.is_cuda and not self.random):
            check_finite(largest)
        return draw

    def draw(self, logits: Tensor, numbers: Tensor | None, top: int | None = None) -> tuple[Draw, Tensor]:
        """Draw a token of every sequence without reading a number from the device, as a captured graph has to.

        Tables of the options are made in the first call.

        Args:
            logits: float (B, V); -inf for tokens that are excluded.
            numbers: random numbers of the sequences on the device of the logits, float64 (B,); None if none is random.
            top: as in a call.

        Returns:
            the draw, and the largest logit of every sequence, (B,). Where that is not finite, the token has no meaning.
        """
        logits = at_least_float32(logits)
        if self._tables is None:
            self._tables = self._make_tables(logits)
        tables, token, largest = self._tables, None, None
        if self.greedy:
            token, largest = likeliest(logits)
        else:
            largest, adjusted = logits.amax(-1), logits
            if self._penalties is not None:
                penalised = self._penalties.apply(logits[tables.penalised].double())
                adjusted = logits.double().index_copy(0, tables.penalised, penalised)
            token = self._choose(adjusted, numbers, tables)
        if self._penalties is not None:
            self._penalties.count(token[tables.penalised])
        return Draw(token) if top is None else with_logprobs(logits, token, top), largest

    def tensors(self) -> list[Tensor]:
        """Return the tensors that a draw changes in place."""
        return [] if self._penalties is None else self._penalties.tensors()

    def _make_tables(self, logits: Tensor) -> _Tables:
        def on_device(rows: list[int]) -> Tensor:
            return torch.tensor(rows, dtype=torch.int64, device=logits.device)

        options = [self._options[row] for row in self._drawing]
        filters = Filters(options, logits.shape[-1], logits.device) if options else None
        return _Tables(on_device(self._drawing), on_device(self._penalised), filters)

    def _choose(self, logits: Tensor, numbers: Tensor | None, tables: _Tables) -> Tensor:
        """Return tokens (B,): drawn where the temperature is > 0, the likeliest elsewhere."""
        if numbers is None or tables.filters is None:
            return logits.argmax(-1)
        if len(self._drawing) == len(self._options):
            return _inverse(tables.filters(logits.double()), numbers)
        drawn = _inverse(tables.filters(logits[tables.drawing].double()), numbers[tables.drawing])
        return logits.argmax(-1).index_copy(0, tables.drawing, drawn)


class RowSampler(Sampler):
    """Sampler of B sequences with a source of randomness each, which join and leave a batch between two draws.

    Args:
        options: options of each sequence.
        generators: sources of randomness of the sequences.
        penalties: penalties of the sequences whose options penalise, in order; None where there are none.
    """

    def __init__(
        self, options: Sequence[SamplingOptions], generators: RowGenerators, penalties: Penalties | None
    ) -> None:
        super().__init__(options, generators, penalties)
        self._generators = generators

    def __getitem__(self, rows: Sequence[int]) -> Self:
        """Return the sampler of some sequences, in the order asked for."""
        kept = [self._penalised.index(row) for row in rows if row in self._penalised]
        penalties = None if self._penalties is None or not kept else self._penalties[kept]
        return type(self)([self._options[row] for row in rows], self._generators[rows], penalties)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join the sequences of several samplers into one sampler, in order."""
        penalties = [part._penalties for part in parts if part._penalties is not None]
        return cls(
            [option for part in parts for option in part._options],
            RowGenerators.cat([part._generators for part in parts]),
            Penalties.cat(penalties) if penalties else None,
        )


def device_uniform(sequences: int, device: torch.device, generator: torch.Generator | None) -> Callable[[], Tensor]:
    """Return a source of random numbers for all sequences together, from one generator.

    Args:
        sequences: number of sequences B.
        device: device of the logits, whose global generator is the default.
        generator: the generator, on any device.
    """

    def uniform() -> Tensor:
        if generator is not None:
            return torch.rand(sequences, dtype=torch.float64, generator=generator, device=generator.device)
        if device.type != "cuda":
            return torch.rand(sequences, dtype=torch.float64, device=device)
        with CAPTURING:  # a capture in another thread uses the generator of the device
            return torch.rand(sequences, dtype=torch.float64, device=device)

    return uniform


def with_logprobs(logits: Tensor, token: Tensor, top: int) -> Draw:
    """Return tokens (B,) with their log probabilities, and the ``top`` likeliest tokens with theirs."""
    logprobs = at_least_float32(logits).log_softmax(-1)
    likeliest = logprobs.topk(min(top, logprobs.shape[-1]))
    return Draw(token, logprobs.gather(-1, token[:, None])[:, 0], likeliest.indices, likeliest.values)


def check_finite(largest: Tensor) -> None:
    """Raise a ResolventError unless the largest logit of every row, (B,), is finite."""
    if not (finite := largest.isfinite()).all():
        row = int((~finite).nonzero()[0])
        raise ResolventError(
            f"the largest logit of row {row} is {largest[row]}: the weights or the state are not finite, or "
            "every token is excluded; load weights from before a divergence"
        )


def _within_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Exclude tokens outside the smallest set with probability ``top_p``, (B, 1), from logits (B, V)."""
    ordered, index = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    beyond = prefix_sum(probability) - probability >= top_p
    beyond[:, 0] = False
    return logits.masked_fill(beyond.scatter(-1, index, beyond), -torch.inf)


def _inverse(logits: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of logits (B, V) at numbers in [0, 1), (B,): the token of each row (B,)."""
    cumulative = prefix_sum((logits - logits.amax(-1, keepdim=True)).exp())
    total = cumulative[:, -1:]
    # The product may round up to the total, which no sum exceeds.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)  # where a logit is not a number
