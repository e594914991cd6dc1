"""Arithmetic of a training step, and how fast a device could do it."""

import torch

from resolvent.models import IntegratedModel
from resolvent.models.phase2 import Phase2Config

_PER_PARAMETER = 6
"""A product and a sum per token, in the forward pass and twice in the backward pass."""
_PER_GRADIENT = 2
"""Those for the gradient of the parameter, which a frozen one has not."""
_PER_CELL = 12
"""The same for `k vᵀ`, which is written, and for `q S`, which is read; and for `q kᵀ` and the sum of v in attention."""

_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Dense bfloat16 FLOPs per second, from data sheets, by a part of the device's name; the first match counts."""


def flops_per_token(model: IntegratedModel) -> int:
    """Return the FLOPs that the model needs to train on a token, activation checkpointing not counted.

    6 per parameter that a token is multiplied by, which leaves out the embedding, and 4 where it is frozen; per head,
    12 K V for a memory, and 12 K per attended token for attention.
    """
    multiplied = model.num_parameters() - embedding_parameters(model)
    if model.tied:  # the table is the head's, too
        multiplied += model.lm_head.weight.numel()
    tables = set(model.token_embedding.parameters()) - {model.lm_head.weight}
    frozen = sum(x.numel() for x in model.parameters() if not x.requires_grad and x not in tables)
    config = model.config
    cells = _cells(config) if isinstance(config, Phase2Config) else 0
    return _PER_PARAMETER * multiplied - _PER_GRADIENT * frozen + _PER_CELL * cells


def _cells(config: Phase2Config) -> int:
    """Return the numbers of memories and of keys that a token reads, on average over a window of `n_seq` tokens."""
    windows, n_seq = config.windows.values(), config.n_seq
    bound = (min(n_seq, window or n_seq) for window in windows)
    attended = sum(window - window * (window - 1) // (2 * n_seq) for window in bound)
    rows = (config.n_layers - len(windows)) * config.head_dim + attended
    return config.num_heads * config.head_dim * rows


def embedding_parameters(model: IntegratedModel) -> int:
    """Return the parameters of the token embedding."""
    return sum(x.numel() for x in model.token_embedding.parameters())


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the FLOPs per second that a device can reach in bfloat16; None if that or the precision is unknown.

    Args:
        device: the device.
        precision: `bf16`, or another one, for which there is no table.
    """
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)
