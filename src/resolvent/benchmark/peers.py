"""Transformer of the same size as a preset, as a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resolvent.models.phase2 import Phase2Config
from resolvent.ops import linear_cross_entropy
from resolvent.ops.precision import for_products


@dataclass
class KVCache:
    """Cache of the keys and values of all tokens read, allocated once.

    Attributes:
        keys: (layers, B, H, capacity, head_dim), filled up to `length`; `values` likewise.
        length: number of tokens read. A lower value drops the tokens after it.
    """

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values (B, H, N, head_dim) of N new tokens, and return those of all tokens."""
        end = self.length + keys.size(-2)
        if end > self.keys.size(-2):
            raise ValueError(f"the cache holds {self.keys.size(-2)} tokens, but {end} were given: make a larger one")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` new tokens, which every layer has stored."""
        self.length += count


@dataclass
class RingCache:
    """Ring buffer of the keys and values of the last tokens.

    All shapes are constant, and the number of tokens read is on the device, so that a CUDA graph can read a token. A
    query attends to all slots, so that the cache has to be full once its own token is stored.

    Attributes:
        keys: of every layer, (B, H, capacity, head_dim); `values` likewise.
        length: tokens read so far, int64 ().
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: Tensor

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's key and value (B, H, 1, head_dim) of one new token, and return those of all tokens."""
        all_keys, all_values = self.keys[layer], self.values[layer]
        slot = (self.length % all_keys.size(-2)).view(1)
        all_keys[:, :, slot] = keys
        all_values[:, :, slot] = values
        return all_keys, all_values

    def advance(self, count: int) -> None:
        """Count `count` new tokens, which every layer has stored."""
        self.length += count


Cache: TypeAlias = KVCache | RingCache


class GPT(nn.Module):
    """Decoder-only Transformer: pre-norm, rotary positions, GELU feed-forward, untied head, no biases.

    Args:
        vocab_size: number of tokens V.
        d_model: width D.
        n_layers: number of blocks.
        num_heads: attention heads H; D / H is their width, which must be even for the rotation.
        ffn_dim: hidden width of the feed-forward part, 4 D by default.
    """

    def __init__(
        self, vocab_size: int, d_model: int, n_layers: int, num_heads: int, ffn_dim: int | None = None
    ) -> None:
        super().__init__()
        if d_model % (2 * num_heads):
            raise ValueError(f"d_model must be a multiple of 2 * num_heads = {2 * num_heads}, got {d_model}")
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(layer, d_model, num_heads, ffn_dim or 4 * d_model) for layer in range(n_layers)
        )
        self.ln_f = nn.LayerNorm(d_model)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.num_heads, self.head_dim = num_heads, d_model // num_heads
        self._initialize()

    @classmethod
    def like(cls, config: Phase2Config) -> GPT:
        """Return the Transformer with the sizes of a configuration."""
        return cls(config.vocab_size, config.d_model, config.n_layers, config.num_heads, config.ffn_dim)

    def _initialize(self) -> None:
        """Initialise as GPT-2: outputs to the residual stream are scaled down with the depth."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("attention_out.weight", "ffn_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5 if into_stream else 0.02)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def new_ring(self, cache: KVCache) -> RingCache:
        """Return a ring buffer with the contents and the capacity of a cache."""
        keys, values = ([layer.clone() for layer in x] for x in (cache.keys, cache.values))
        return RingCache(keys, values, torch.tensor(cache.length, device=cache.keys.device))

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for `capacity` tokens per sequence."""
        weight = self.ln_f.weight
        shape = (len(self.blocks), batch_size, self.num_heads, capacity, self.head_dim)
        return KVCache(weight.new_zeros(shape), weight.new_zeros(shape))

    def forward(self, input_ids: Tensor, cache: Cache | None = None, *, labels: Tensor | None = None) -> Tensor:
        """Return the logits (B, N, V) of the tokens (B, N) int64 that follow those in the cache.

        The tokens are added to the cache. Given labels (B, N) int64, return their mean nats instead, computed as in our
        models.
        """
        N, device = input_ids.size(1), input_ids.device
        rotation = rotations(cache.length if cache else 0, N, self.head_dim, device)
        mask = None
        if isinstance(cache, KVCache) and cache.length and N > 1:
            mask = torch.ones(N, cache.length + N, dtype=torch.bool, device=device).tril(cache.length)
        x = for_products(self.token_embedding(input_ids))  # a half-precision stream, as in our models
        for block in self.blocks:
            x = block(x, rotation, mask, cache)
        if cache:
            cache.advance(N)
        x = self.ln_f(x)
        if labels is not None:
            return linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, labels.flatten())
        return self.lm_head(x)


class Block(nn.Module):
    """Attention and feed-forward, each with pre-norm and residual."""

    def __init__(self, layer: int, d_model: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.layer, self.num_heads = layer, num_heads
        self.ln1, self.ln2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.attention_out = nn.Linear(d_model, d_model, bias=False)
        self.ffn_in = nn.Linear(d_model, ffn_dim, bias=False)
        self.ffn_out = nn.Linear(ffn_dim, d_model, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + self.attention_out(self._attend(self.ln1(x), rotation, mask, cache))
        return x + self.ffn_out(F.gelu(self.ffn_in(self.ln2(x))))

    def _attend(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache:
            k, v = cache.append(self.layer, k, v)
        # Without a context, queries and keys have the same positions; a single query attends to every key.
        is_causal = q.size(-2) == k.size(-2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return y.transpose(1, 2).flatten(-2)


def rotations(start: int | Tensor, length: int, head_dim: int, device: torch.device) -> Tensor:
    """Return cosines and sines (2, length, head_dim / 2) of rotary position embedding."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(start + torch.arange(length, device=device), frequencies)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair (i, i + head_dim / 2) of x (B, H, N, head_dim) by the angles of its token."""
    cos, sin = rotation.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)
