"""Holographic tensor-train embedding (HTT): a table of tokens in two small cores.

Token ``i`` is split into ``(i // v2, i % v2)`` and the width into ``d1 * d2``; the table, its axes regrouped to
``(v1 d1, v2 d2)``, is a matrix of rank ``r``. Shapes: V vocabulary, D width, r rank.
"""

import copy
import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError


class TensorTrainEmbedding(nn.Module):
    """Tensor train of two cores: ``E[i] = sum_k core1[i // v2, k] (x) cos(θ_k) core2[i % v2, k]``, cut to the width D.

    Args:
        vocab_size: tokens V.
        d_model: width D.
        rank: rank r.
        num_cores: 2; more cores are not implemented.
        phase_encoding: give every rank a trainable phase θ. ``cos(θ)`` scales the rank; it adds no expressive power.

    Raises:
        ConfigError: ``num_cores`` is not 2.
    """

    def __init__(self, vocab_size: int, d_model: int, rank: int, num_cores: int = 2, phase_encoding: bool = True):
        super().__init__()
        if num_cores != 2:
            raise ConfigError(f"htt_num_cores must be 2, the only tensor train there is, got {num_cores}")
        self.num_embeddings, self.embedding_dim, self.rank = vocab_size, d_model, rank
        (self.v1, self.v2), (self.d1, self.d2) = factor(vocab_size), factor(d_model)
        self.core1 = nn.Parameter(torch.empty(self.v1, 1, rank, self.d1))
        self.core2 = nn.Parameter(torch.empty(self.v2, rank, 1, self.d2))
        self.phase_shift = nn.Parameter(torch.empty(rank)) if phase_encoding else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Draw the cores on the CPU, so that the entries of the table have the standard deviation ``std``."""
        if self.core1.is_meta:
            return
        spread = math.sqrt(std / math.sqrt(self.rank))
        for core in (self.core1, self.core2):
            core.copy_(torch.randn(core.shape, generator=generator, device="cpu") * spread)
        self._reset_phases()

    @classmethod
    def from_table(cls, table: Tensor, rank: int, phase_encoding: bool = True) -> Self:
        """Return the embedding of this rank that is nearest to a table (V, D) in the sum of squares."""
        vocab_size, d_model = table.shape
        embedding = cls(vocab_size, d_model, rank, phase_encoding=phase_encoding)
        embedding.load_table(table)
        return embedding.to(table.device)

    @torch.no_grad()
    def load_table(self, table: Tensor) -> None:
        """Approximate a table (V, D) by TT-SVD.

        By Eckart and Young, the truncated singular value decomposition of the regrouped table is the nearest of its
        rank. It runs on the CPU in float64, so all devices agree. Tokens and channels that only fill up the grid are
        zero.

        Raises:
            ValueError: the table has another shape.
        """
        if table.shape != (self.num_embeddings, self.embedding_dim):
            expected, got = (self.num_embeddings, self.embedding_dim), tuple(table.shape)
            raise ValueError(f"the table must have shape {expected}, got {got}")
        matrix = self._regroup(table.detach().to("cpu", torch.float64))
        left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = min(self.rank, len(singular))
        root = singular[:kept].sqrt()
        missing = (0, self.rank - kept)
        left = F.pad(left[:, :kept] * root, missing).view(self.v1, self.d1, self.rank)
        right = F.pad(right[:kept].T * root, missing).view(self.v2, self.d2, self.rank)
        self._reset_phases()
        self.core1.copy_(left.mT.unsqueeze(1))
        self.core2.copy_((right / self._phase_factor().detach().to("cpu", torch.float64)).mT.unsqueeze(2))

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the whole table, (V, D) on the CPU, equal to the bit to the vectors that the CPU looks up."""
        embedding = copy.deepcopy(self).cpu()
        return torch.cat([embedding(ids) for ids in torch.arange(self.num_embeddings).split(4096)])

    @property
    def compression_ratio(self) -> float:
        """Parameters over those of a table."""
        return sum(p.numel() for p in self.parameters()) / (self.num_embeddings * self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up tokens: integer (...) -> (..., D)."""
        core2 = self.core2 * self._phase_factor()[:, None, None]
        first = F.embedding(input_ids // self.v2, self.core1.flatten(1)).unflatten(-1, (self.rank, self.d1))
        second = F.embedding(input_ids % self.v2, core2.flatten(1)).unflatten(-1, (self.rank, self.d2))
        return (first.mT @ second).flatten(-2)[..., : self.embedding_dim]

    def _reset_phases(self) -> None:
        if self.phase_shift is not None:
            self.phase_shift.fill_(0.1)  # off zero, where the cosine has no slope

    def _phase_factor(self) -> Tensor:
        """Return cos(θ), (r,)."""
        return torch.cos(self.phase_shift) if self.phase_shift is not None else self.core1.new_ones(self.rank)

    def _regroup(self, table: Tensor) -> Tensor:
        """Regroup (V, D) -> (v1 d1, v2 d2), with zeros where the grid is larger than the table."""
        grid = F.pad(
            table, (0, self.d1 * self.d2 - self.embedding_dim, 0, self.v1 * self.v2 - self.num_embeddings)
        ).view(self.v1, self.v2, self.d1, self.d2)
        return grid.transpose(1, 2).reshape(self.v1 * self.d1, self.v2 * self.d2)


def factor(size: int) -> tuple[int, int]:
    """Return two nearly equal numbers with a product of at least ``size``."""
    first = math.isqrt(size - 1) + 1
    return first, -(-size // first)
