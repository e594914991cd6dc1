"""Reading a text slowly: what every layer does at every token of it.

Shapes: N tokens, P places at which the memory is looked at, D model width, H heads, K = V head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resolvent.evaluation.reading import read
from resolvent.layers import DissipativeBKLayer, DissipativeHebbianLayer, LyapunovStabilityMonitor, StaticBKLayer
from resolvent.models import IntegratedModel
from resolvent.models.generation import evaluating
from resolvent.models.phase1 import Phase1Block
from resolvent.models.phase2 import Phase2Block


@dataclass(frozen=True)
class MemoryTrace:
    """What a layer's memory went through.

    Attributes:
        energy: ``||S||²`` after the tokens at ``Trace.places``, (P, H).
        bound: what that cannot exceed, given the tokens so far, (P, H).
        last: S after the last token, (H, K, V).
    """

    energy: Tensor
    bound: Tensor
    last: Tensor


@dataclass(frozen=True)
class LayerTrace:
    """What a layer did.

    Attributes:
        resolvent: g of every token, complex (N, H).
        resolvent_bound: what ``|g|`` cannot exceed, ``1 / (κΓ + ζ)``, (N, H).
        gamma: Γ of every token, (N, H); None where nothing dissipates.
        memory: None without one.
    """

    resolvent: Tensor
    resolvent_bound: Tensor
    gamma: Tensor | None
    memory: MemoryTrace | None


@dataclass(frozen=True)
class Trace:
    """What a model did with a text.

    Attributes:
        hidden: final hidden states, (N, D).
        places: number of tokens read, less one, at each look at the memories, (P,).
        layers: what the layers did.
    """

    hidden: Tensor
    places: list[int]
    layers: list[LayerTrace]


def trace(model: IntegratedModel, tokens: Tensor, *, stride: int = 4) -> Trace:
    """Read a text a few tokens at a time, which changes nothing for the model, and look at it after each time.

    Args:
        model: the model; it is read in evaluation mode.
        tokens: int64 (N,).
        stride: tokens between two looks at the memories.
    """
    pieces = tokens[None].split(stride, dim=1)
    hidden, states, state = [], [], None
    with evaluating(model), torch.no_grad(), _listening(model) as heard:
        for piece in pieces:
            final, state = read(model, piece, state)
            hidden.append(final[0])
            states.append(state)
    ends = torch.tensor([piece.shape[1] for piece in pieces]).cumsum(0) - 1
    layers = [_layer(block, heard, [s.layers[i] for s in states], ends) for i, block in enumerate(model.blocks)]
    return Trace(torch.cat(hidden), ends.tolist(), layers)


@contextmanager
def _listening(model: IntegratedModel) -> Iterator[dict[nn.Module, list[Any]]]:
    """Everything that the resolvents and memory layers return, by module."""
    heard: dict[nn.Module, list[Any]] = {}

    def note(module: nn.Module, _arguments: Any, output: Any) -> None:
        heard.setdefault(module, []).append(output)

    kinds = (DissipativeBKLayer, StaticBKLayer, DissipativeHebbianLayer)
    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, kinds)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _layer(block: nn.Module, heard: dict[nn.Module, list[Any]], states: list[Any], ends: Tensor) -> LayerTrace:
    if isinstance(block, Phase1Block):
        g = _resolvent(heard[block.bk])
        return LayerTrace(g, torch.full_like(g.real, 1 / StaticBKLayer.ZETA), None, None)
    assert isinstance(block, Phase2Block)
    bk, hebbian = block.dissipative_bk, block.hebbian
    gamma = torch.cat([output[1][0] for output in heard[bk]])
    bound = 1 / (bk.kappa.detach().abs() * gamma + bk.log_zeta.detach().exp())
    values = torch.cat([output.values[0] for output in heard[hebbian]])
    memories = torch.cat([state.memory.memory for state in states])
    most = LyapunovStabilityMonitor.bound(
        torch.zeros_like(gamma),
        (values.norm(dim=-1) * hebbian.eta.detach()).cummax(dim=0).values,
        (gamma * hebbian.dt).cummin(dim=0).values,
        block.write_gain,
    )
    energy = memories.square().sum(dim=(-2, -1))
    return LayerTrace(
        _resolvent(heard[bk]), bound, gamma, MemoryTrace(energy, most[ends.to(most.device)], memories[-1])
    )


def _resolvent(outputs: list[Any]) -> Tensor:
    """g (N, H) of the features (1, n, 2H) that come first in a layer's outputs."""
    return torch.complex(*torch.cat([output[0][0] for output in outputs]).chunk(2, dim=-1))
