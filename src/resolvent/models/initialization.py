"""Fresh weights, drawn on the CPU: the same seed gives the same weights on every device."""

from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..layers import (
    AdaptiveRankSemiseparableLayer,
    DissipativeBKLayer,
    DissipativeHebbianLayer,
    LocalAttentionLayer,
    MemoryResonanceLayer,
    NonHermitianPotential,
    SNRMemoryFilter,
    TensorTrainEmbedding,
    ZetaEmbedding,
    ZetaInitializer,
)

_WITH_A_FIXED_START = (
    ZetaEmbedding,
    NonHermitianPotential,
    DissipativeBKLayer,
    DissipativeHebbianLayer,
    LocalAttentionLayer,
    SNRMemoryFilter,
    MemoryResonanceLayer,
    AdaptiveRankSemiseparableLayer,
)

_TO_THE_STREAM = (".hebbian.out_proj", ".attention.out_proj", ".ffn.out_proj", ".ffn.2", ".ffn.2.up")


class Parts(Protocol):
    """The parts of a model whose weights are drawn."""

    token_embedding: nn.Module
    blocks: nn.ModuleList
    lm_head: nn.Linear

    @property
    def n_seq(self) -> int: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...


@torch.no_grad()
def init_weights(model: Parts, generator: torch.Generator | None, zeta_potential: bool = False) -> None:
    """Draw the weights of a model of either phase.

    Matrices inside the blocks are drawn from N(0, std²) with the standard deviation ``1 / sqrt(fan_in)``; with
    ``zeta_potential`` those of the potential get the zeta spectrum at the same norm. The outputs of memory,
    attention and feed-forward network are scaled by ``1 / sqrt(2 L)`` for L blocks, so that all blocks together add
    about as much as one (Radford et al., 2019). The outputs of BK-Core and AR-SSM start at zero, the angles of a
    rotating memory between no turn and half a turn. The input of AR-SSM's sum over all past tokens is scaled so
    that the sum is of about unit size after ``n_seq`` tokens.

    Args:
        model: the model; its weights are changed in place.
        generator: the global CPU generator if None.
        zeta_potential: draw the potential with the zeta spectrum.
    """
    zeta = ZetaInitializer(generator)
    inner = [(name, x) for name, x in model.named_modules() if isinstance(x, nn.Linear) and x is not model.lm_head]
    for name, linear in inner:
        std = linear.in_features**-0.5
        if zeta_potential and ".potential." in name:
            zeta(linear.weight, std)
        else:
            _normal(linear.weight, std * _scale(model, name), generator)
        if linear.bias is not None:
            linear.bias.zero_()
    if isinstance(model.token_embedding, TensorTrainEmbedding):
        model.token_embedding.reset_parameters(0.02, generator)
    else:
        _normal(cast(nn.Embedding, model.token_embedding).weight, 0.02, generator)
    _normal(model.lm_head.weight, 0.02, generator)
    for module in model.modules():
        if isinstance(module, _WITH_A_FIXED_START):
            module.reset_parameters()
    for name, parameter in model.blocks.named_parameters():
        if name.endswith("bk_proj.weight"):
            parameter.zero_()


def _scale(model: Parts, name: str) -> float:
    """Return the standard deviation of a matrix of this name, in units of ``1 / sqrt(fan_in)``."""
    if name.endswith(_TO_THE_STREAM):
        return (2 * len(model.blocks)) ** -0.5
    if name.endswith(".rotation_proj"):
        return 0.5
    return model.n_seq**-0.5 if name.endswith(".ar_ssm.u_proj") else 1.0


def _normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill a weight from N(0, std²), drawn on the CPU."""
    if not weight.is_meta:
        weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)
