"""Largest weights of an attention layer.

Shapes: N tokens, D model width, H heads, T weights kept per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from resolvent.layers import LocalAttentionLayer

_BLOCK = 256
"""Queries of a block: no matrix of N x N weights is made."""
_KEPT = 4
"""Weights per token; fewer where the text has fewer tokens."""


@torch.no_grad()
def largest_weights(layer: LocalAttentionLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest weights of every token, largest first, and the tokens that they belong to.

    Args:
        layer: the layer.
        x: inputs of the layer from the start of a text on, (N, D).

    Returns:
        Weights and indices of tokens, both (H, N, T). Where a token sees fewer than T tokens, the last weights are 0.
    """
    length = len(x)
    count, window = min(_KEPT, length), layer.window or length
    heads = layer.heads(layer.qkv_proj(x[None]), None, None)
    positions = torch.arange(length, device=x.device)
    q, k = layer.rotated(heads, positions[None])
    q_HNK = q[0].transpose(0, 1)
    k_HNK = k[0].repeat_interleave(layer.num_heads // layer.num_kv_heads, dim=1).transpose(0, 1)
    found = []
    for rows in positions.split(_BLOCK):
        columns = torch.arange(max(0, int(rows[0]) - window + 1), int(rows[-1]) + 1, device=x.device)
        back = rows[:, None] - columns
        seen = (back >= 0) & (back < window)
        scores = (q_HNK[:, rows] @ k_HNK[:, columns].mT).float() * torch.as_tensor(layer.temperature).reshape(-1, 1, 1)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        best = weights.topk(min(count, len(columns)), dim=-1)
        missing = count - best.values.shape[-1]
        found.append([F.pad(kept, (0, missing)) for kept in (best.values, columns[best.indices])])
    weights, indices = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return weights, indices
