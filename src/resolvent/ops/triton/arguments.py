"""Groups of arguments that the kernels of the memory share.

Triton takes a NamedTuple as it takes its fields one by one; a field that is None is known when a kernel is compiled.

Shapes: T tokens, H heads, K key width, V value width, S sequences, G segments, M chunks, C tokens of a chunk.
"""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..consolidation import Consolidation, snr_slopes
from ..memory_state import CHUNK

if TYPE_CHECKING:
    constexpr = Any  # type checkers know no fields of what a NamedTuple becomes
else:
    constexpr = tl.constexpr


class Tokens(NamedTuple):
    """Queries and keys (T, H, K) and values (T, H, V), or their gradients; neighbours in the last axis."""

    q: Tensor
    k: Tensor
    v: Tensor


class Strides(NamedTuple):
    """Strides of ``Tokens``, from token to token and from head to head."""

    q_token: int
    q_head: int
    k_token: int
    k_head: int
    v_token: int
    v_head: int


class Decays(NamedTuple):
    """Decays of every chunk, as ``sum_decays`` adds them up.

    Attributes:
        cumulative: the running sum L of Γ dt, in bits, (M, H, C).
        rest: the part of L that float32 does not hold, (M, H, C).
        total: the sum of Γ dt, in nats, (M, H).
    """

    cumulative: Tensor
    rest: Tensor
    total: Tensor


class State(NamedTuple):
    """Memory (S, H, K, V) and Γ̄ (S, H), or their gradients; None where there are none.

    In a kernel: those of one head, as pointers or as values.
    """

    memory: Tensor | None = None
    forgetting: Tensor | None = None


class Met(NamedTuple):
    """States that met the boundaries, as the gradient needs them; None where nothing is saved.

    In a kernel: those of one head, as pointers or as values.

    Attributes:
        unit: memories in units of their rms, (boundaries, H, K, V), float16 where products are of half precision.
        rms: (boundaries, H).
        forgetting: Γ̄, (boundaries, H).
    """

    unit: Tensor | None = None
    rms: Tensor | None = None
    forgetting: Tensor | None = None


class Filters(NamedTuple):
    """Strength (H,) of the SNR filter, basis (K, K), sharpness (H,) and bias (H,) of the resonance, or their gradients.

    None where there are none. In a kernel: those of one head, as pointers or as values.
    """

    strength: Tensor | None = None
    basis: Tensor | None = None
    sharpness: Tensor | None = None
    bias: Tensor | None = None


class Gradients(NamedTuple):
    """Gradients of a state at the start of sequences or segments, and those of the filters, a row each."""

    state: State
    filters: Filters = Filters()


class Rule(NamedTuple):
    """Numbers of a consolidation, as operators take them.

    Attributes:
        interval: tokens between two boundaries, 0 without consolidation.
        snr: threshold, temperature, and a and b of ``m = s (a - b p)`` of the SNR filter; empty without one.
        energy_threshold: energy above which a mode resonates.
    """

    interval: int
    snr: list[float]
    energy_threshold: float


class Constants(NamedTuple):
    """Numbers of a consolidation, as kernels take them."""

    threshold: float
    temperature: float
    damping: float
    span: float
    energy_threshold: float
    interval: int


class Variant(NamedTuple):
    """Numbers that a kernel is compiled for.

    Attributes:
        K, V: widths of keys and values.
        BK, BV: the widths padded to what products take.
        C: tokens of a chunk.
        HALF: products of half precision.
        SNR, RESONANCE: mechanisms that act at boundaries.
    """

    K: int
    V: int
    BK: int
    BV: int
    C: int
    HALF: bool
    SNR: bool
    RESONANCE: bool


def parts_of(consolidation: Consolidation | None) -> tuple[Filters, Rule]:
    """Return the tensors and the numbers of a consolidation."""
    snr = consolidation.snr if consolidation else None
    resonance = consolidation.resonance if consolidation else None
    modes = (resonance.basis, resonance.sharpness, resonance.bias) if resonance else (None, None, None)
    return Filters(snr.strength if snr else None, *modes), Rule(
        consolidation.interval if consolidation and (snr or resonance) else 0,
        [snr.threshold, snr.temperature, *snr_slopes(snr)] if snr else [],
        resonance.threshold if resonance else 0.0,
    )


def constants_of(rule: Rule) -> Constants:
    """Return the numbers as kernels take them."""
    threshold, temperature, damping, span = rule.snr or (0.0, 1.0, 0.0, 0.0)
    return Constants(threshold, temperature, damping, span, rule.energy_threshold, rule.interval)


def variant_of(tokens: Tokens, filters: Filters, rule: Rule) -> Variant:
    """Return the numbers that kernels for these tensors are compiled for."""
    half = product_dtype(tokens) != torch.float32
    return make_variant(tokens.q.shape[-1], tokens.v.shape[-1], half, len(rule.snr) > 0, filters.basis is not None)


@functools.lru_cache(maxsize=256)
def make_variant(key: int, value: int, half: bool, snr: bool, resonance: bool) -> Variant:
    """Return a variant for heads of these widths; arguments as in ``Variant``."""
    padded_key, padded_value = (max(16, triton.next_power_of_2(width)) for width in (key, value))
    return Variant(key, value, padded_key, padded_value, CHUNK, half, snr, resonance)


def product_dtype(tokens: Tokens) -> torch.dtype:
    """Return the dtype of the products of q, k and v."""
    return torch.promote_types(torch.promote_types(tokens.q.dtype, tokens.k.dtype), tokens.v.dtype)
