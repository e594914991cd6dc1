"""Engine: one thread that reads prompts and writes answers for many requests at once.

Sequences join the batch and leave it between two steps. Prompts are read in blocks between the steps of the others.

Shapes: B sequences in the batch, N tokens of a prompt, V vocabulary.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..models import IntegratedModel
from ..models.inference import inference_view
from ..models.sampling import Draw, Penalties, RowGenerators, RowSampler
from ..models.state import ModelState
from ..ops.precision import at_least_float32
from .prefix_cache import PrefixCache, block_keys
from .requests import DeadlineError, Failure, OverloadedError, Request, Ticket, TokenEvent
from .runner import Runner, make_runner
from .state_files import StateFiles

_log = logging.getLogger(__name__)

BLOCK = 512
"""Tokens per block of a prompt: what is read at once, and the grid of the prefix cache."""


@dataclass
class Counters:
    """Totals since the start of an engine.

    Attributes:
        read: tokens of prompts that were read.
        cached: tokens of prompts that came from the prefix cache.
        written: tokens of answers.
        steps: steps of the batch.
    """

    read: int = 0
    cached: int = 0
    written: int = 0
    steps: int = 0


@dataclass
class _Reading:
    """Prompt that is being read.

    Attributes:
        ticket: its request.
        keys: keys of its prefixes of whole blocks.
        blocks: number of blocks that are read.
        state: state after them; None before the first.
    """

    ticket: Ticket
    keys: list[bytes]
    blocks: int
    state: ModelState | None


@dataclass
class _Row:
    """Sequence in the batch: answer number ``answer`` of a request, of which ``count`` tokens are written."""

    ticket: Ticket
    answer: int
    count: int = 0

    @property
    def dropped(self) -> bool:
        """True if no more tokens are wanted."""
        return self.ticket.cancelled or self.answer in self.ticket.stopped


@dataclass
class _Batch:
    """Sequences that are written, of which the runner has the states after all tokens but the last.

    Attributes:
        rows: the sequences.
        token: last token of each sequence, int64 (B,).
        sampler: sampler of the sequences.
    """

    rows: list[_Row]
    token: Tensor
    sampler: RowSampler

    def keep(self, kept: list[int]) -> "_Batch | None":
        """Return the batch of some sequences; None if there are none."""
        if len(kept) == len(self.rows):
            return self
        if not kept:
            return None
        token = self.token[torch.tensor(kept, device=self.token.device)]
        return _Batch([self.rows[row] for row in kept], token, self.sampler[kept])

    def join(self, other: "_Batch") -> "_Batch":
        """Return the batch of the sequences of both."""
        sampler = RowSampler.cat([self.sampler, other.sampler])
        return _Batch([*self.rows, *other.rows], torch.cat([self.token, other.token]), sampler)


class Engine:
    """Batches the requests to one model.

    Args:
        model: the model; its mode does not change.
        max_sequences: largest number of answers that are read or written at once.
        max_queue: largest number of requests that wait for a place.
        cache_bytes: limit on the size of the prefix cache in memory.
        block: tokens per block of a prompt.
        files: the prefix cache on disk; None for none.

    Attributes:
        counters: totals since the start.
    """

    def __init__(
        self,
        model: IntegratedModel,
        *,
        max_sequences: int = 64,
        max_queue: int = 256,
        cache_bytes: int = 1 << 30,
        block: int = BLOCK,
        files: StateFiles | None = None,
    ) -> None:
        self._model = inference_view(model)
        self._device = model.lm_head.weight.device
        self._vocab_size = model.vocab_size
        self.max_sequences, self._max_queue, self._block = max_sequences, max_queue, block
        self._cache = PrefixCache(cache_bytes, files)
        self._queue: deque[Ticket] = deque()
        self._reading: deque[_Reading] = deque()
        self._batch: _Batch | None = None
        self._runner: Runner
        self._changed, self._closing = threading.Condition(), False
        self.counters = Counters()
        self._thread = threading.Thread(target=self._run, name="resolvent-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Fail what is not answered yet, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a place."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Number of answers whose prompt is being read or that are being written."""
        batch = self._batch
        return sum(len(reading.ticket.request.seeds) for reading in list(self._reading)) + len(
            batch.rows if batch else ()
        )

    @property
    def cache_bytes(self) -> int:
        """Size of the states in the prefix cache in memory."""
        return self._cache.nbytes

    def check_size(self, prompts: int, answers: int) -> None:
        """Check that the engine can ever take this number of prompts at once, each with a number of answers.

        Raises:
            ConfigError: it has not as many places.
        """
        if answers > self.max_sequences:
            raise ConfigError(
                f"{answers} answers to one prompt are more than the {self.max_sequences} places of the server"
            )
        if prompts > self._max_queue:
            raise ConfigError(
                f"{prompts} prompts are more than the {self._max_queue} that may wait: send them in several requests"
            )

    def submit(
        self, requests: Sequence[Request], deliver: Sequence[Callable[[TokenEvent | Failure], None]]
    ) -> list[Ticket]:
        """Queue requests, all of them or none.

        Args:
            requests: the requests.
            deliver: of each request, what takes its events.

        Raises:
            OverloadedError: there are too many requests in the queue, or the engine closes.
            ConfigError: as ``check_size`` does.
        """
        self.check_size(len(requests), max((len(request.seeds) for request in requests), default=0))
        now = time.monotonic()
        tickets = [
            Ticket(request, function, now + request.seconds if request.seconds is not None else float("inf"))
            for request, function in zip(requests, deliver, strict=True)
        ]
        with self._changed:
            if self._closing:
                raise OverloadedError("the server shuts down; send the request to another one")
            if len(self._queue) + len(tickets) > self._max_queue:
                raise OverloadedError(
                    f"{len(self._queue)} requests wait already, and {self._max_queue} may; try again later"
                )
            self._queue.extend(tickets)
            self._changed.notify()
        return tickets

    @torch.inference_mode()
    def _run(self) -> None:
        """Read and write until the engine closes."""
        try:
            self._runner = make_runner(self._model, self.max_sequences, self._block)
            while self._wait():
                self._drop()
                self._admit()
                self._read()
                self._step()
        finally:  # after an error, too, so that no reader waits for ever
            with self._changed:
                self._closing = True
            self._fail(self._tickets(), OverloadedError("the server shut down before the answer was complete"))
            self._cache.close()

    def _wait(self) -> bool:
        """Wait until there is something to do; return False once the engine closes."""
        with self._changed:
            while not (self._closing or self._queue or self._reading or self._batch):
                self._changed.wait()
            return not self._closing

    def _tickets(self) -> list[Ticket]:
        """Return the requests that are not answered completely."""
        rows = self._batch.rows if self._batch else []
        tickets = [*self._queue, *(reading.ticket for reading in self._reading), *(row.ticket for row in rows)]
        return list(dict.fromkeys(tickets))

    def _drop(self) -> None:
        """Remove the requests that were cancelled or have taken too long."""
        now = time.monotonic()
        late = [ticket for ticket in self._tickets() if not ticket.cancelled and ticket.deadline <= now]
        for ticket in late:
            self._fail([ticket], DeadlineError(f"the answer took longer than {ticket.request.seconds:g} s"))
        self._remove()

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        """End requests with an error."""
        for ticket in dict.fromkeys(tickets):
            ticket.cancelled = True
            ticket.deliver(Failure(error))

    def _remove(self) -> None:
        """Free the places of cancelled requests."""
        with self._changed:
            if any(ticket.cancelled for ticket in self._queue):
                self._queue = deque(ticket for ticket in self._queue if not ticket.cancelled)
        self._reading = deque(reading for reading in self._reading if not reading.ticket.cancelled)
        if self._batch is not None:
            self._keep([i for i, row in enumerate(self._batch.rows) if not row.dropped])

    def _keep(self, rows: list[int]) -> None:
        """Keep some sequences of the batch."""
        assert self._batch is not None
        if len(rows) < len(self._batch.rows):
            self._runner.keep(rows)
            self._batch = self._batch.keep(rows)

    def _admit(self) -> None:
        """Begin to read the prompts of waiting requests, in order, while there are places."""
        while self._queue and self.running + len(self._queue[0].request.seeds) <= self.max_sequences:
            with self._changed:
                ticket = self._queue.popleft()
            keys = block_keys(ticket.request.tokens, self._block)
            blocks, state = self._cache.find(keys)
            ticket.cached = blocks * self._block
            self.counters.cached += ticket.cached
            self._reading.append(_Reading(ticket, keys, blocks, state))

    def _read(self) -> None:
        """Read blocks of prompts in turn, as many tokens as a block has at most; complete prompts join the batch."""
        left = self._block
        while chosen := self._next_pieces(left):
            readings, pieces = zip(*chosen, strict=True)
            left -= sum(map(len, pieces))
            try:
                hidden, states = self._runner.read(pieces, [reading.state for reading in readings])
                for i, reading in enumerate(readings):
                    reading.state = states[i]
                    self._go_on(reading, len(pieces[i]), hidden[i : i + 1])
            except Exception as error:  # it concerns these requests alone
                _log.exception(
                    "prompts of %s tokens could not be read", [len(r.ticket.request.tokens) for r in readings]
                )
                self._fail([reading.ticket for reading in readings], error)

    def _next_pieces(self, left: int) -> list[tuple[_Reading, np.ndarray]]:
        """Take the next prompts to be read in one pass, each with its next block, of ``left`` tokens in all."""
        chosen: list[tuple[_Reading, np.ndarray]] = []
        while self._reading and len(chosen) < self._runner.most_prompts:
            reading = self._reading[0]
            start = reading.blocks * self._block
            piece = reading.ticket.request.tokens[start : start + self._block]
            if len(piece) > left:
                break
            left -= len(piece)
            chosen.append((self._reading.popleft(), piece))
        return chosen

    def _go_on(self, reading: _Reading, count: int, hidden: Tensor) -> None:
        """Begin the answers to a prompt of which ``count`` more tokens are read, or keep its state and read on."""
        assert reading.state is not None
        self.counters.read += count
        if reading.blocks == len(reading.keys):
            self._begin(reading, hidden)
            return
        self._cache.store(reading.keys[reading.blocks], reading.state)
        reading.blocks += 1
        self._reading.append(reading)

    def _begin(self, reading: _Reading, hidden: Tensor) -> None:
        """Write the first token of every answer to a prompt, and let the answers that go on join the batch."""
        request, state = reading.ticket.request, reading.state
        assert state is not None
        answers, sampler = len(request.seeds), self._sampler(request)
        logits = at_least_float32(self._model.logits(hidden)).expand(answers, -1)
        draw = sampler(logits, request.logprobs)
        rows = [_Row(reading.ticket, answer) for answer in range(answers)]
        started = _Batch(rows, draw.token, sampler).keep(self._deliver(rows, draw))
        if started is not None:
            # First what may fail: if the runner alone had the new sequences, those of the batch would get their logits.
            batch = started if self._batch is None else self._batch.join(started)
            self._runner.join(state.repeat(len(started.rows)))
            self._batch = batch

    def _sampler(self, request: Request) -> RowSampler:
        """Return the sampler of a request's answers."""
        options, penalties = [request.options] * len(request.seeds), None
        if request.options.penalises:
            prompts = [torch.from_numpy(request.tokens)] * len(options)
            penalties = Penalties(options, prompts, self._vocab_size, self._device)
        return RowSampler(options, RowGenerators.of_seeds(request.seeds), penalties)

    def _step(self) -> None:
        """Write a token of every answer in the batch."""
        if (batch := self._batch) is None:
            return
        try:
            logits = self._runner.step(batch.token)
            tops = [row.ticket.request.logprobs for row in batch.rows]
            draw = batch.sampler(logits, max((top for top in tops if top is not None), default=None))
            batch.token = draw.token
            self._keep(self._deliver(batch.rows, draw))
        except Exception as error:  # all answers in the batch share the step
            _log.exception("a step of %d sequences failed", len(batch.rows))
            self._keep([])
            self._fail([row.ticket for row in batch.rows], error)
        self.counters.steps += 1

    def _deliver(self, rows: Sequence[_Row], draw: Draw) -> list[int]:
        """Deliver a token of every row; return the indices of the rows that go on."""
        tokens = draw.token.tolist()
        logprobs = draw.logprob.tolist() if draw.logprob is not None else None
        tops = None
        if draw.top_tokens is not None and draw.top_logprobs is not None:
            tops = list(zip(draw.top_tokens.tolist(), draw.top_logprobs.tolist(), strict=True))
        kept = []
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            request = row.ticket.request
            row.count += 1
            finish = "stop" if token in request.ends else "length" if row.count == request.max_tokens else None
            if finish is None:
                kept.append(i)
            if row.dropped:
                continue
            self.counters.written += 1
            if request.logprobs is None or logprobs is None or tops is None:
                row.ticket.deliver(TokenEvent(row.answer, token, finish))
            else:
                likeliest = tuple(zip(*tops[i], strict=True))[: request.logprobs]
                row.ticket.deliver(TokenEvent(row.answer, token, finish, logprobs[i], likeliest))
        return kept
