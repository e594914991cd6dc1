"""Generation on CUDA, one token a sequence at a time, without waiting for Python: the step is captured as a graph."""

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.precision import at_least_float32

WARM_UP = 2
"""Steps that run before the capture, so that kernels are compiled and libraries have set themselves up."""

CAPTURING = threading.Lock()
"""Held while a step is captured: one capture at a time, and no draw from the device's own generator meanwhile."""


class CapturedStep:
    """A model's one-token step as a CUDA graph: what is launched a kernel at a time is replayed as one.

    The graph reads its token from, and keeps its state in, memory of its own. It holds the model's weights by their
    addresses: change them in place or capture again.

    Args:
        model: a model on CUDA, in evaluation mode.
        state: what the sequences have read; it is copied.
    """

    def __init__(self, model: Any, state: Any) -> None:
        device = state.device
        self._token = torch.zeros(len(state), dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        stream = _capture_stream(device)
        # Weights that autocast keeps do not live as long as the graph that would read them.
        precision = dict(enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"))
        with CAPTURING, torch.autocast("cuda", **precision, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                trial = token_step(model, state)  # whose state is spent: the graph sets out with one of its own
                for _ in range(WARM_UP):
                    trial(self._token)
            torch.cuda.current_stream(device).wait_stream(stream)
            self._step = token_step(model, state)
            # Other threads go on: what they allocate meanwhile does not break the capture.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._logits = self._step(self._token)

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,): logits of the next, (B, vocabulary), which the next call
        overwrites."""
        self._token.copy_(token)
        self._graph.replay()
        return self._logits


@functools.lru_cache(maxsize=8)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which steps are captured: cuBLAS keeps a workspace for every stream that it ever saw."""
    return torch.cuda.Stream(device)


def token_step(model: Any, state: Any) -> Callable[[Tensor], Tensor]:
    """What reads one token of every sequence, int64 (B,), and returns logits (B, vocabulary), time after time.

    It keeps a state of its own, which Python never reads: it can be captured. Where the model has kernels for this, it
    takes those.
    """
    state = state.map(lambda x: x.clone(memory_format=torch.contiguous_format)).with_position_on(state.device)
    return model.fused_step(state) or _plain_step(model, state)


def _plain_step(model: Any, state: Any) -> Callable[[Tensor], Tensor]:
    """The model's forward, whose new state takes the place of the old."""

    def step(token: Tensor) -> Tensor:
        logits, new = read_token(model, token, state)
        torch._foreach_copy_(state.tensors(), new.tensors())
        return logits

    return step


def read_token(model: Any, token: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Logits (B, vocabulary) after a token of every sequence, int64 (B,), and the state."""
    hidden, state = model.hidden_states(token.unsqueeze(1), state=state)
    return at_least_float32(model.logits(hidden[:, -1])), state
