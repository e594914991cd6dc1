"""Generation on CUDA, one token a sequence at a time, without waiting for Python: the step is captured as a graph."""

from typing import Any

import torch
from torch import Tensor

WARM_UP = 2
"""Steps that run before the capture, so that kernels are compiled and libraries have set themselves up."""


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
        self._state = state.map(torch.clone).with_position_on(device)
        self._token = torch.zeros(len(state), 1, dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        # Weights that autocast keeps do not live as long as the graph that would read them.
        precision = dict(enabled=torch.is_autocast_enabled("cuda"), dtype=torch.get_autocast_dtype("cuda"))
        with torch.autocast("cuda", **precision, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    model.hidden_states(self._token, state=self._state)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(self._graph):
                hidden, new = model.hidden_states(self._token, state=self._state)
                torch._foreach_copy_(self._state.tensors(), new.tensors())
                self._hidden = hidden[:, -1]

    def __call__(self, token: Tensor) -> Tensor:
        """Read a token of every sequence, int64 (B,): its hidden states (B, D), which the next call overwrites."""
        self._token.copy_(token.unsqueeze(1))
        self._graph.replay()
        return self._hidden
