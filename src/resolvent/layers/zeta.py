"""Zeros of the Riemann zeta function, and positions, weights and a basis that are made from them.

The first zeros come from a table that ``scripts/make_zeta_zeros.py`` computed; beyond it the smooth part of the
counting function (Riemann-von Mangoldt), ``N(t) = t / 2π log(t / 2πe) + 7/8``, is inverted. The only randomness is that
of the caller's generator, and every decomposition runs on the CPU, so all devices agree.
"""

import functools
import math
from collections.abc import Callable
from importlib import resources
from typing import Self

import torch
from torch import Tensor, nn

from ..ops.precision import at_least_float32, wide_dtype


def zeta_zeros(count: int) -> Tensor:
    """Return the imaginary parts of the first ``count`` non-trivial zeros, float64 (count,)."""
    table = _table()
    if count <= len(table):
        return table[:count].clone()
    beyond = torch.arange(len(table) + 1, count + 1, dtype=torch.float64, device="cpu")
    return torch.cat([table, _invert_counting_function(beyond - 0.5)])


def _wave_frequencies(count: int) -> Tensor:
    """Return the inverses of the first ``count`` zeros, float64 (count,)."""
    return 1 / zeta_zeros(count)


def counting_function(t: Tensor) -> Tensor:
    """Return the smooth number of zeros with imaginary part up to ``t`` (the Riemann-von Mangoldt formula)."""
    turns = t / (2 * math.pi)
    return turns * torch.log(turns / math.e) + 7 / 8


@functools.cache
def _table() -> Tensor:
    text = resources.files("resolvent.layers").joinpath("zeta_zeros.txt").read_text()
    return torch.tensor([float(line) for line in text.split()], dtype=torch.float64, device="cpu")


def _invert_counting_function(count: Tensor) -> Tensor:
    """Return the t with ``counting_function(t) = count``, by Newton's method from above; count >= 10."""
    t = 2 * math.pi * count
    for _ in range(30):
        t = t - (counting_function(t) - count) * 2 * math.pi / torch.log(t / (2 * math.pi))
    return t


class ExactConstant(nn.Module):
    """A float64 tensor that moves with its module but keeps its precision when the module is cast, and is not saved.

    Args:
        make: computes it, on the CPU; a function of a module, or a ``partial`` of one, so that models can be pickled.
    """

    value: Tensor

    def __init__(self, make: Callable[[], Tensor]):
        super().__init__()
        self.make = make
        self.register_buffer("value", make(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.value.dtype != torch.float64:
            self.value = self.make().to(self.value.device)
        return self


class ZetaEmbedding(nn.Module):
    """Positions as waves of the zeros: ``PE(p, 2i) = sin(p / γ_i)``, ``PE(p, 2i + 1) = cos(p / γ_i)``.

    There is no table: any position has its embedding. Phases are reduced to one turn in float64, so that a position of
    a million is as exact as the first. The amplitude is ``tanh(gain) * scale``. ``gain`` is trained and starts at zero:
    a fresh model reads no position. The amplitude is bounded, because beyond the training length the phases are ones
    that training never showed: models with loud waves lost there what they had remembered.

    Args:
        d_model: width D of the embedding.
        trainable: let training move the frequencies ``1 / γ_i`` as well.
        scale: largest amplitude; the default matches the spread of the token embedding.
    """

    def __init__(self, d_model: int, trainable: bool = False, scale: float = 0.02):
        super().__init__()
        self.d_model, self.trainable, self.scale = d_model, trainable, scale
        self.initial_frequency = ExactConstant(functools.partial(_wave_frequencies, (d_model + 1) // 2))
        self.frequency = nn.Parameter(torch.empty((d_model + 1) // 2)) if trainable else None
        self.gain = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.frequency is not None:
            self.frequency.copy_(self.initial_frequency.value)
        self.gain.zero_()

    @property
    def amplitude(self) -> Tensor:
        """Amplitude of the waves, (), at least float32."""
        return self.scale * torch.tanh(at_least_float32(self.gain))

    @property
    def pace(self) -> Tensor:
        """Turns of every wave per token, float64 (D / 2,)."""
        frequency = self.initial_frequency.value if self.frequency is None else self.frequency.to(torch.float64)
        return frequency / (2 * math.pi)

    def forward(self, position: Tensor) -> Tensor:
        """Embed positions: integer (...) -> (..., D), at least float32."""
        turns = position.to(torch.float64).unsqueeze(-1) * self.pace
        # Only the phases need float64: on a GPU its sines and cosines take longer than a block.
        phase = ((turns - turns.round()) * (2 * math.pi)).to(wide_dtype(self.gain))
        waves = torch.stack([torch.sin(phase), torch.cos(phase)], dim=-1).flatten(-2)[..., : self.d_model]
        return self.amplitude * waves


class ZetaInitializer:
    """Initialiser of weights ``W = U diag(s) Vᵀ`` with ``s_i ∝ 1 / γ_i`` and random orthogonal U, V.

    The Frobenius norm is that of the usual N(0, std²) initialisation, so the signal keeps its size; only the shape of
    the spectrum is that of the zeros. U and V come from QR decompositions on the CPU of Gaussian matrices that
    ``generator`` draws (the global CPU generator if None): the same seed gives the same weights on every device.
    """

    def __init__(self, generator: torch.Generator | None = None):
        self.generator = generator

    @torch.no_grad()
    def __call__(self, weight: Tensor, std: float = 0.02) -> None:
        """Fill a matrix (out, in) in place.

        Raises:
            ValueError: the weight has other than two dimensions.
        """
        if weight.dim() != 2:
            raise ValueError(f"zeta initialisation is for matrices, got shape {tuple(weight.shape)}")
        if weight.is_meta:
            return
        rows, columns = weight.shape
        rank = min(rows, columns)
        spectrum = 1 / zeta_zeros(rank)
        norm = std * math.sqrt(rows * columns)
        spectrum = (spectrum * norm / spectrum.norm()).to(torch.float32)
        left, right = self._orthonormal(rows, rank), self._orthonormal(columns, rank)
        weight.copy_((left * spectrum) @ right.T)

    def _orthonormal(self, rows: int, columns: int) -> Tensor:
        """Draw Haar-distributed orthonormal columns, (rows, columns)."""
        q, r = torch.linalg.qr(torch.randn(rows, columns, generator=self.generator, device="cpu"))
        return q * torch.sign(r.diagonal())


def resonance_basis(width: int) -> Tensor:
    """Return the real orthonormal basis (K, K) of waves with the unfolded zeros as frequencies, float64.

    Unfolding, ``u_j = N(γ_j)``, gives the zeros mean spacing one; ``u_j / K`` cycles an index for j <= K / 2 then cover
    the resolvable frequencies without aliasing, and the polar factor of the cosine and sine columns is the closest
    orthonormal basis to them.
    """
    return _polar_factor(_resonance_waves(width))


def _resonance_waves(width: int) -> Tensor:
    """Return the unit cosine and sine columns before orthonormalisation, (K, K) float64."""
    frequency = counting_function(zeta_zeros((width + 1) // 2)) / width
    phase = 2 * math.pi * torch.arange(width, dtype=torch.float64, device="cpu")[:, None] * frequency
    waves = torch.stack([torch.cos(phase), torch.sin(phase)], dim=-1).flatten(-2)[:, :width]
    return waves / waves.norm(dim=0)


def _polar_factor(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
