"""Weights of a model that generates on a CPU: their layout in memory, and their precision."""

from typing import Literal, TypeVar, get_args

import torch
from torch import nn

from ..errors import ConfigError
from ..layers.int8_linear import Int8Linear
from ..layers.linear import is_plain

Model = TypeVar("Model", bound=nn.Module)
Precision = Literal["full", "int8"]

_WIDE = 256
"""Rows and columns from which on a matrix is rounded: narrow ones, of rates and gates, cost nothing as they are."""


@torch.no_grad()
def prepare_weights(model: Model, precision: Precision = "full") -> Model:
    """Change the weights of a model in place, so that it generates faster on a CPU.

    ``full`` changes no number: matrices with more rows than columns are stored column by column, in which order the
    product with a single token reads them about twice as fast. On CUDA, this does nothing.

    ``int8`` rounds the matrices, each of their rows to 255 steps, and is for generation alone: such a model has no
    gradients, and its loss can only be computed from its logits.

    Args:
        model: a model that is not saved or trained any more.
        precision: ``full`` or ``int8``.

    Returns:
        The same model.

    Raises:
        ConfigError: the precision is unknown, or it is int8 and the model is on CUDA, or has no matrix of that size.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"the precision of weights must be full or int8, got {precision!r}")
    matrices = {name: layer for name, layer in model.named_modules() if is_plain(layer)}
    if precision == "full":
        tables = {layer.weight for layer in model.modules() if isinstance(layer, nn.Embedding)}
        for layer in matrices.values():
            if layer.weight.device.type == "cpu" and layer.weight not in tables:
                _store_by_columns(layer)
        return model
    wide = {name: layer for name, layer in matrices.items() if min(layer.weight.shape) >= _WIDE}
    if not wide:
        raise ConfigError(
            f"int8 weights need matrices of at least {_WIDE} rows and columns: take precision 'full' (--weights full)"
        )
    if (device := next(iter(wide.values())).weight.device.type) != "cpu":
        raise ConfigError(
            f"int8 weights are for the CPU, the model is on {device}: take precision 'full' (--weights full) or the CPU"
        )
    for name, layer in wide.items():
        model.set_submodule(name, Int8Linear.of(layer))
    return model


def _store_by_columns(layer: nn.Linear) -> None:
    rows, columns = layer.weight.shape
    if rows > columns:
        layer.weight.data = layer.weight.data.T.contiguous().T
