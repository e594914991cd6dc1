"""Steps of generation: one token per sequence, on CUDA captured as a graph."""

import functools
import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.precision import at_least_float32
from .state import State

WARM_UP = 2
"""Calls that run before a capture, so that kernels are compiled and libraries have set themselves up."""

Result = TypeVar("Result")

CAPTURING = threading.Lock()
"""Held during a capture: one capture at a time, and no draw from the device's own generator meanwhile."""


class StreamingModel(Protocol[State]):
    """Interface of a model that reads token by token."""

    d_model: int

    def hidden_states(
        self, input_ids: Tensor, *, state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    @property
    def state_grows(self) -> bool: ...

    def fused_step(self, state: State) -> Callable[[Tensor], Tensor] | None: ...


class CapturedStep:
    """One-token step of a model as a CUDA graph, which replays all its kernels with one launch.

    The graph holds token, state and weights by their addresses: change them in place or capture again.

    Args:
        model: a model on CUDA, in evaluation mode.
        state: state of the sequences, with the position on its device; every call updates its tensors.
        token: tokens that a call reads, one of every sequence, int64 (B,).
    """

    def __init__(self, model: StreamingModel[State], state: State, token: Tensor) -> None:
        trial, self._step = token_step(model, state), step_in_place(model, state)  # the trial has a copy
        self._graph, self._logits = captured(state.device, lambda: self._step(token), lambda: trial(token))

    def __call__(self) -> Tensor:
        """Read the tokens, and return the logits of the next, (B, V), which the next call overwrites."""
        self._graph.replay()
        return self._logits


def captured(
    device: torch.device, run: Callable[[], Result], trial: Callable[[], Any] | None = None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture a call as a CUDA graph.

    The graph holds the tensors that the call reads and writes by their addresses.

    Args:
        device: the device.
        run: the call. It launches kernels only, and Python reads none of their results.
        trial: call that runs before the capture, twice; ``run`` if None.

    Returns:
        the graph, and the result of ``run``: tensors that every replay overwrites.
    """
    graph, stream, trial = torch.cuda.CUDAGraph(), _capture_stream(device), trial or run
    # The graph would outlive the casted weights that autocast caches.
    precision = dict(enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"))
    with CAPTURING, torch.autocast("cuda", **precision, cache_enabled=False):
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                trial()
        torch.cuda.current_stream(device).wait_stream(stream)
        # Allocations of other threads do not break the capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return graph, result


@functools.lru_cache(maxsize=8)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which steps are captured: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)


class TokenReader(Generic[State]):
    """Reads one token of every sequence per call, on the CPU with the step of its own that a model has for it.

    Args:
        model: a model in evaluation mode.
        state: state of the sequences. A step of its own works on a copy; otherwise a state that is ``reusable`` is
            overwritten.
    """

    def __init__(self, model: StreamingModel[State], state: State) -> None:
        self._model, self._state = model, state
        self._step: Callable[[Tensor], Tensor] | None = None
        self._begun = False

    @property
    def state(self) -> State:
        """State after the tokens read so far; the next call of this reader, and no other, may overwrite it."""
        return self._state.map(lambda x: x)

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,), and return the logits of the next, (B, V)."""
        if not self._begun and self._state.device.type == "cpu":
            copy = self._state.clone().reusable()
            if (step := self._model.fused_step(copy)) is not None:
                self._step, self._state = step, copy
        self._begun = True
        if self._step is not None:
            return self._step(token)
        logits, self._state = read_token(self._model, token, self._state)
        return logits


def token_step(model: StreamingModel[State], state: State) -> Callable[[Tensor], Tensor]:
    """Return ``step_in_place`` of a copy of the state, with the position on its device.

    Raises:
        ConfigError: the state of the model grows, so that it cannot stay where it is.
    """
    return step_in_place(model, state.clone().with_position_on(state.device))


def step_in_place(model: StreamingModel[State], state: State, *, has_room: bool = False) -> Callable[[Tensor], Tensor]:
    """Return a function that reads one token of every sequence, int64 (B,), and returns logits (B, V), call after call.

    Each call updates the tensors of the state, whose position is on its device. Python never reads them, so the call
    can be captured. It uses the kernels for one token where the model has them.

    Args:
        model: a model in evaluation mode.
        state: the state.
        has_room: a state that grows has slots for the tokens of all calls (``with_room``).

    Raises:
        ConfigError: the state of the model grows and has no room, so that it cannot stay where it is.
    """
    if model.state_grows and not has_room:
        raise ConfigError(
            "a model that attends to all tokens (attention_window=None) has no step with a state of fixed size: "
            "set attention_window, or read token by token with forward"
        )
    state = state.in_place()
    return model.fused_step(state) or _plain_step(model, state)


def _plain_step(model: StreamingModel[State], state: State) -> Callable[[Tensor], Tensor]:
    """Return the step of a forward pass, whose new state overwrites the old where the pass has not done so."""

    def step(token: Tensor) -> Tensor:
        logits, new = read_token(model, token, state)
        pairs = [(a, b) for a, b in zip(state.tensors(), new.tensors(), strict=True) if a is not b]
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])
        return logits

    return step


def read_token(model: StreamingModel[State], token: Tensor, state: State) -> tuple[Tensor, State]:
    """Return logits (B, V) after a token of every sequence, int64 (B,), and the next state."""
    hidden, state = model.hidden_states(token.unsqueeze(1), state=state)
    return at_least_float32(model.logits(hidden[:, -1])), state
