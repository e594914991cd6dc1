"""Steps of generation: one token per sequence, on CUDA captured as a graph."""

import functools
import threading
from collections.abc import Callable
from typing import Generic, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.precision import at_least_float32
from .state import State

WARM_UP = 2
"""Steps that run before the capture, so that kernels are compiled and libraries have set themselves up."""

CAPTURING = threading.Lock()
"""Held while a step is captured: one capture at a time, and no draw from the device's own generator meanwhile."""


class StreamingModel(Protocol[State]):
    """Interface of a model that reads token by token."""

    def hidden_states(
        self, input_ids: Tensor, *, state: State | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, State]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    @property
    def state_grows(self) -> bool: ...

    def fused_step(self, state: State) -> Callable[[Tensor], Tensor] | None: ...


class CapturedStep:
    """One-token step of a model as a CUDA graph, which replays all its kernels with one launch.

    Token and state are in memory of the graph. The graph holds the weights of the model by their addresses: change them
    in place or capture again.

    Args:
        model: a model on CUDA, in evaluation mode.
        state: state of the sequences; it is copied.
    """

    def __init__(self, model: StreamingModel[State], state: State) -> None:
        device = state.device
        self._token = torch.zeros(len(state), dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(device)
        # The graph would outlive the casted weights that autocast caches.
        precision = dict(enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"))
        with CAPTURING, torch.autocast("cuda", **precision, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                trial = token_step(model, state)  # it has used up its state: the graph starts with another copy
                for _ in range(WARM_UP):
                    trial(self._token)
            torch.cuda.current_stream(device).wait_stream(stream)
            self._step = token_step(model, state)
            # Allocations of other threads do not break the capture.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = self._step(self._token)

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,), and return the logits of the next, (B, V).

        The next call overwrites the logits.
        """
        self._token.copy_(token)
        self._graph.replay()
        return self._logits


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

    Attributes:
        state: state after the tokens read so far; the next call may overwrite it.
    """

    def __init__(self, model: StreamingModel[State], state: State) -> None:
        self._model, self.state = model, state
        self._step: Callable[[Tensor], Tensor] | None = None
        self._begun = False

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,), and return the logits of the next, (B, V)."""
        if not self._begun and self.state.device.type == "cpu":
            copy = self.state.clone()
            if (step := self._model.fused_step(copy.reusable())) is not None:
                self._step, self.state = step, copy
        self._begun = True
        if self._step is not None:
            return self._step(token)
        logits, self.state = read_token(self._model, token, self.state)
        return logits


def token_step(model: StreamingModel[State], state: State) -> Callable[[Tensor], Tensor]:
    """Return a function that reads one token of every sequence, int64 (B,), and returns logits (B, V), call after call.

    It keeps a copy of the state, which Python never reads, so it can be captured. It uses the kernels for one token
    where the model has them.

    Raises:
        ConfigError: the state of the model grows, so that it cannot stay where it is.
    """
    if model.state_grows:
        raise ConfigError(
            "a model that attends to all tokens (attention_window=None) has no step with a state of fixed size: "
            "set attention_window, or read token by token with forward"
        )
    state = state.clone().with_position_on(state.device).reusable()
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
