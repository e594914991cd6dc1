"""A training step that runs as it is, or compiled and captured whole as a CUDA graph: Python then launches one graph.

All that a step reads lies on the device before a run starts: batches, learning rates and the number of the step. So the
same graph serves every seed and learning rate; weights and the optimiser's state are set anew in place.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from resolvent.training.optimizer import build_muon, build_optimizer
from resolvent.training.schedule import learning_rate_factor

Loss = Callable[[Tensor], Tensor]
"""The mean nats of a step's batch, given the step's number, int64 (1,)."""

CHECK_EVERY = 50
"""Steps between two checks of the clock and the loss, which synchronise with the device."""
_WARM_UPS = 3
_LEAST_ERROR = 1e-3
"""Error of a compiled gradient that is always accepted; a larger one may be twice that of the eager gradient."""


def relative_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the relative error of all tensors together."""
    wrong = sum((a - b).square().sum().item() for a, b in zip(found, exact, strict=True))
    return math.sqrt(wrong / sum(b.square().sum().item() for b in exact))


@contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Collect garbage before the block and not within: old objects could unload kernels while a graph is recorded."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class OutOfTimeError(Exception):
    """A run would not end before the budget does."""


@dataclass(frozen=True)
class Clock:
    """A budget of time.

    Attributes:
        deadline: the ``time.monotonic()`` at which it ends.
    """

    deadline: float

    @classmethod
    def of(cls, seconds: float) -> Clock:
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Return the seconds left."""
        return self.deadline - time.monotonic()

    def check(self, seconds: float = 0.0) -> None:
        """Raise an ``OutOfTimeError`` unless so many seconds are left."""
        if self.left() < seconds:
            raise OutOfTimeError


@dataclass(frozen=True)
class Mode:
    """Mode of the steps.

    Attributes:
        compiled: whether each block is compiled, as one graph.
        captured: whether a step is replayed from a CUDA graph.
        autocast: whether products are in bfloat16.
    """

    compiled: bool
    captured: bool
    autocast: bool


@dataclass(frozen=True)
class Schedule:
    """Learning rates of a run: linear warm-up, then a cosine down to a part of the peak."""

    steps: int
    warmup: int
    final: float

    def rates(self, peak: float) -> Tensor:
        """Return the learning rates of all steps, float32 (steps,)."""
        shape = dict(steps=self.steps, warmup=self.warmup, schedule="cosine", min_ratio=self.final)
        return torch.tensor([peak * learning_rate_factor(step, **shape) for step in range(self.steps)])


class Trainer:
    """A model in training, with Muon or AdamW (0.9, 0.95) and decay on matrices.

    Args:
        model: on its device, with a list of ``blocks``.
        losses: one for every kind of batch.
        steps: of a run.
        mode: how steps run.
        clip: largest norm of a gradient; None for no end.
        weight_decay: of matrices.
        muon_ratio: learning rate of Muon over that of AdamW; None for AdamW alone.
        rate_factors: factors of the learning rate of AdamW, by the endings of the names of parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Sequence[Loss],
        steps: int,
        mode: Mode,
        clip: float | None = 1.0,
        weight_decay: float = 0.1,
        muon_ratio: float | None = None,
        rate_factors: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.mode, self.steps, self.clip = model, mode, steps, clip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.cuda = device.type == "cuda"
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.rate = torch.zeros((), device=device)
        self.rates, self.history = torch.zeros(steps, device=device), torch.zeros(steps, device=device)
        shape = dict(learning_rate=0.0, weight_decay=weight_decay, betas=(0.9, 0.95))
        if muon_ratio is None:
            self.optimizer = build_optimizer(model, **shape)
        else:
            self.optimizer = build_muon(model, muon_learning_rate=0.0, **shape)
        self.muon_rate, self.muon_ratio = torch.zeros((), device=device), muon_ratio or 1.0
        for group in self.optimizer.param_groups:
            group.update(lr=self.muon_rate if group.get("parts") else self.rate, capturable=self.cuda)
        self.scaled_rates = [self._scale_rate(*item) for item in (rate_factors or {}).items()]
        started = time.perf_counter()
        model.train()
        self.compiled_error = self._compile(losses[0]) if mode.compiled else None
        self._advances = [self._prepared(loss) for loss in losses]
        self.preparation_seconds = time.perf_counter() - started

    def _scale_rate(self, ending: str, factor: float) -> tuple[Tensor, float]:
        """Move the parameters whose names end so to groups of their own; return the learning rate of those groups.

        Raises:
            ValueError: Muon moves one of them, or there is none.
        """
        chosen = {p for name, p in self.model.named_parameters() if name.endswith(ending) and p.requires_grad}
        rate, moved = torch.zeros_like(self.rate), 0
        for group in list(self.optimizer.param_groups):
            taken = [p for p in group["params"] if p in chosen]
            if taken and group.get("parts"):
                raise ValueError(f"Muon moves {ending}: only learning rates of AdamW can be multiplied")
            if taken:
                moved += len(taken)
                group["params"] = [p for p in group["params"] if p not in chosen]
                self.optimizer.add_param_group(group | {"params": taken, "lr": rate})
        if not moved:
            raise ValueError(f"no trained parameter's name ends with {ending}")
        return rate, factor

    def seconds(self, kinds: Sequence[int]) -> float:
        """Estimate the seconds of steps of these kinds of batches. They change the weights: start anew afterwards."""
        cost = {}
        for kind in set(kinds):
            self.step.zero_()
            self._wait()
            started = time.perf_counter()
            for _ in range(_WARM_UPS):
                self._advances[kind]()
                self.step.zero_()
            self._wait()
            cost[kind] = (time.perf_counter() - started) / _WARM_UPS
        return sum(cost[kind] for kind in kinds)

    def start(self, rates: Tensor) -> None:
        """Reset the optimiser, and set the learning rates; the caller resets the weights."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.step.zero_()
        self.history.zero_()
        self.rates.copy_(rates)
        self.model.train()

    def advance(self, kinds: Sequence[int], clock: Clock) -> bool:
        """Take a step for each of these kinds of batches; False as soon as a loss is not finite.

        Raises:
            OutOfTimeError: the time is over.
        """
        for i, kind in enumerate(kinds):
            self._advances[kind]()
            if (i + 1) % CHECK_EVERY == 0 or i + 1 == len(kinds):
                clock.check()
                if not bool(self.history.isfinite().all()):
                    return False
        return True

    def losses(self) -> list[float]:
        """Return the losses of the steps taken."""
        return self.history[: int(self.step)].tolist()

    def evaluating(self) -> torch.autocast:
        """Return the context in which the model predicts as in training."""
        return torch.autocast(self.step.device.type, torch.bfloat16, enabled=self.mode.autocast)

    def _compile(self, loss: Loss) -> float | None:
        """Compile the blocks; the relative error of the gradient that they give, where no dropout hides it."""
        random = any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules())
        exact, plain = ([], []) if random else (self._gradient(loss, exact=True), self._gradient(loss))
        torch._dynamo.config.recompile_limit = 64
        for block in self.model.blocks:
            block.compile(fullgraph=True, dynamic=False)
        found = self._gradient(loss)
        self.optimizer.zero_grad()
        if random:
            return None
        error, allowed = relative_error(found, exact), 2 * relative_error(plain, exact) + _LEAST_ERROR
        if not error <= allowed:
            raise ArithmeticError(f"the compiled gradient is off by {error:.1e}, allowed is {allowed:.1e}")
        return error

    def _gradient(self, loss: Loss, exact: bool = False) -> list[Tensor]:
        """Return the gradient of the first batch, on the CPU; ``exact`` without half precision."""
        torch.manual_seed(0)
        self.step.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.step.device.type, enabled=False) if exact else self.evaluating():
            nats = loss(self.step)
        nats.backward()
        return [torch.zeros(()) if p.grad is None else p.grad.float().cpu() for p in self.parameters]

    def _prepared(self, loss: Loss) -> Callable[[], None]:
        def advance() -> None:
            self._advance(loss)

        if not self.mode.captured:
            return advance
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.step.zero_()
                advance()
        torch.cuda.current_stream().wait_stream(stream)
        self.step.zero_()
        graph = torch.cuda.CUDAGraph()
        with collecting_no_garbage(), torch.cuda.graph(graph, stream=stream):
            advance()
        return graph.replay

    def _advance(self, loss: Loss) -> None:
        nats = self._backward(loss)
        if self.clip is not None:
            clip_grad_norm_(self.parameters, self.clip)
        self.rate.copy_(self.rates.index_select(0, self.step).squeeze(0))
        self.muon_rate.copy_(self.rate * self.muon_ratio)
        for rate, factor in self.scaled_rates:
            rate.copy_(self.rate * factor)
        self.optimizer.step()
        self.history.index_copy_(0, self.step, nats.float().unsqueeze(0))
        self.step += 1

    def _backward(self, loss: Loss) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self.evaluating():
            nats = loss(self.step)
        nats.backward()
        return nats.detach()

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
