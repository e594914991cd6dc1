"""Cost of removing parts of the memory, selected by decay rate, SNR filter or resonance.

Texts are read up to the boundary between two consolidations. There the memory is edited, and the next tokens are
predicted with the edited and with the original state (see ``state_editing``). A part that can be removed at no cost was
not used.

Shapes: B texts, N tokens of each, L layers, H heads, K = V head width, G groups of modes.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from experiments.ablation.state_editing import Cost, Reading, mean_gamma_at, read_texts
from experiments.ablation.token_classes import TOKEN_CLASSES, token_classes
from resolvent.data import TokenStream
from resolvent.errors import ConfigError, DataError
from resolvent.evaluation.positions import long_texts
from resolvent.evaluation.scoring import progress_bar
from resolvent.evaluation.statistics import Estimate, rank_correlation
from resolvent.evaluation.switches import switched_off
from resolvent.layers import MemoryResonanceLayer, SNRMemoryFilter
from resolvent.models import IntegratedModel
from resolvent.models.inference import inference_view
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel
from resolvent.ops.consolidation import modes, signal_to_noise
from resolvent.seeds import check_seed

DISTANCES = (4, 16, 64, 256)
"""Numbers of last tokens before the boundary whose writes slow and fast heads keep."""
MODE_GROUPS = 8
"""Number of groups of modes by energy."""


@dataclass(frozen=True)
class HeadDecay:
    """Half-life of a head, and cost of erasing its memory.

    Attributes:
        layer, head: counted from one.
        decay: mean Γ dt over all tokens.
        cost: nats per token of erasing its memory at the boundary.
    """

    layer: int
    head: int
    decay: float
    cost: Estimate

    @property
    def half_life(self) -> float:
        """Tokens after which half of a write is left."""
        return math.log(2) / self.decay


@dataclass(frozen=True)
class Recency:
    """Cost of erasing all writes of the slow, or of the fast heads before the last tokens.

    Attributes:
        kept: number of last tokens whose writes are kept.
        slow, fast: nats per token.
        difference: slow minus fast.
    """

    kept: int
    slow: Estimate
    fast: Estimate
    difference: Estimate


@dataclass(frozen=True)
class HalfLives:
    """Costs of old writes in slow and in fast heads.

    Heads of all layers are halved by their half-life; of an odd number the middle one belongs to neither half.

    Attributes:
        slow_from: least half-life of the slow heads, tokens.
        fast_to: largest half-life of the fast heads, tokens.
        rows: costs by the tokens that are kept.
    """

    slow_from: float
    fast_to: float
    rows: list[Recency]


@dataclass(frozen=True)
class ClassDecay:
    """Γ of a class of tokens, and the cost of replacing it.

    Attributes:
        name: of the class.
        tokens: number of tokens of the class.
        relative: Γ of these tokens in units of the head's mean, by layer and head.
        cost: nats per token, over the whole texts, with Γ of these tokens replaced by the head's mean.
        random: the same for as many random tokens of the text.
        difference: cost minus random.
    """

    name: str
    tokens: int
    relative: list[list[float]]
    cost: Estimate
    random: Estimate
    difference: Estimate


@dataclass(frozen=True)
class TokenDecay:
    """Γ by class of token.

    Attributes:
        everywhere: nats per token with Γ of all tokens replaced by the head's mean.
        rows: the classes that the texts have.
    """

    everywhere: Estimate
    rows: list[ClassDecay]


@dataclass(frozen=True)
class Removed:
    """Cost of removing a part of every memory.

    Attributes:
        name: of the part.
        share: of the components, or modes, that it has, on average over texts and heads.
        energy: its share of ``||S||²``, on average over texts and heads.
        cost: nats per token.
    """

    name: str
    share: float
    energy: float
    cost: Estimate

    @property
    def cost_per_energy(self) -> float | None:
        """Cost per share of the energy; None for a part without energy."""
        return self.cost.mean / self.energy if self.energy > 0 else None


@dataclass(frozen=True)
class Selection:
    """Cost of the components that the SNR filter keeps, against dropped and random ones.

    Attributes:
        strength: strength of the filter, by layer and head, from 0 to 1.
        off: nats per token, over the whole texts, without the filter.
        rows: kept and dropped components, random ones with the energy of either, and random ones as many as the kept.
        kept_over_random, dropped_over_random: cost of either minus that of random components with the same energy, in
            nats per token.
    """

    strength: list[list[float]]
    off: Estimate
    rows: list[Removed]
    kept_over_random: Estimate
    dropped_over_random: Estimate


@dataclass(frozen=True)
class Modes(Removed):
    """Cost of removing some modes of every memory.

    Attributes:
        gate: mean factor σ of these modes; None without modes.
    """

    gate: float | None


@dataclass(frozen=True)
class Occupancy:
    """Cost of the modes that the resonance keeps, against the others.

    Attributes:
        off: nats per token, over the whole texts, without the resonance.
        gated: the modes with a gate above, and up to, one half.
        groups: groups of equally many modes, from the least energy to the most.
        correlation: rank correlation of a group's energy with the mean cost of removing it.
        correlation_by_text: the same within every text.
    """

    off: Estimate
    gated: list[Modes]
    groups: list[Modes]
    correlation: float
    correlation_by_text: Estimate


@dataclass(frozen=True, repr=False)
class Mechanisms:
    """Costs of removing the mechanisms of a model; None for a mechanism that the model lacks.

    Attributes:
        length: tokens read before the boundary.
        horizon: tokens predicted after it, over which costs are taken unless noted otherwise.
        sequences: texts.
        loss: nats per token of the horizon.
        erased: nats per token of erasing every memory at the boundary.
        heads: by layer and head.
        correlation: rank correlation of half-life and cost over the heads.
        half_lives: costs of slow and fast heads; None for a single head.
        token_decay: Γ by class of token; None if Γ does not depend on the token.
        selection: the SNR filter.
        occupancy: the resonance.
    """

    length: int
    horizon: int
    sequences: int
    loss: Estimate
    erased: Estimate
    heads: list[HeadDecay]
    correlation: float
    half_lives: HalfLives | None
    token_decay: TokenDecay | None
    selection: Selection | None
    occupancy: Occupancy | None

    def __repr__(self) -> str:
        return (
            f"Mechanisms({self.sequences} texts, {self.length:,} tokens read, {self.horizon:,} predicted at a loss of "
            f"{self.loss.mean:.4f}, {len(self.heads)} heads)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        heads = [dataclasses.asdict(head) | {"half_life": head.half_life} for head in self.heads]
        return dataclasses.asdict(self) | {"heads": heads}


def evaluate_mechanisms(
    model: IntegratedModel,
    stream: TokenStream,
    tokenizer: Tokenizer,
    *,
    length: int = 1024,
    horizon: int | None = None,
    sequences: int = 16,
    joined: bool = False,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> Mechanisms:
    """Measure the cost of removing parts of the memory by decay rate, SNR filter and resonance.

    Args:
        model: a Phase 2 model; it keeps its mode and its parts, and dropout is off.
        stream: the text.
        tokenizer: its tokenizer, which decides the classes of tokens.
        length: tokens read before the boundary, a multiple of the consolidation interval.
        horizon: tokens predicted after it; None for one interval.
        sequences: most texts to read: documents that are long enough, each from its beginning.
        joined: join the documents.
        seed: seed of random components and random tokens.
        batch_tokens: most tokens in one call of the model.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: a Phase 1 model, a length that is no boundary, or a number below one.
        DataError: no text is long enough.
        ResolventError: the model's predictions are not finite.
    """
    if not isinstance(model, Phase2IntegratedModel):
        raise ConfigError(
            f"mechanisms are those of Phase 2, got a {type(model).__name__}, which has neither Γ nor a memory: "
            "`resolvent convert` makes a Phase 2 model of it, to be trained on"
        )
    check_seed(seed)
    interval = model.config.consolidation_interval
    horizon = interval if horizon is None else horizon
    texts = _texts(stream, length, horizon, interval, sequences, joined)
    classes = token_classes(tokenizer, texts[:, :-1]) if model.config.adaptive_decay else None
    distances = [distance for distance in DISTANCES if distance < length]
    total = _tokens_to_read(model.config, texts, horizon, distances, classes)
    random = np.random.default_rng(seed)
    with progress_bar("Reading", total, progress) as advance, torch.inference_mode():
        reading = read_texts(
            inference_view(model), texts, length, distances, batch_tokens=batch_tokens, advance=advance
        )
        heads = head_decays(reading)
        return Mechanisms(
            length=length,
            horizon=horizon,
            sequences=len(texts),
            loss=Estimate.of(reading.nats[:, length:].mean(dim=1).tolist()),
            erased=reading.cost_of_memories([torch.zeros_like(memory) for memory in reading.memories]).estimate,
            heads=heads,
            correlation=rank_correlation([head.half_life for head in heads], [head.cost.mean for head in heads]),
            half_lives=half_lives(reading) if len(heads) > 1 else None,
            token_decay=None if classes is None else token_decay(reading, classes, random),
            selection=selection(reading, random) if model.config.snr_enabled else None,
            occupancy=occupancy(reading) if model.config.resonance_enabled else None,
        )


def head_decays(reading: Reading) -> list[HeadDecay]:
    """Return the decay rate of every head, and the cost of erasing its memory."""
    decays, heads = mean_decays(reading), []
    for layer, head in np.ndindex(*decays.shape):
        alone = torch.zeros_like(decays, dtype=torch.bool)
        alone[layer, head] = True
        cost = reading.cost_of_memories(_replaced(reading.memories, reading.recent_memories(0), alone))
        heads.append(HeadDecay(layer + 1, head + 1, decays[layer, head].item(), cost.estimate))
    return heads


def half_lives(reading: Reading) -> HalfLives:
    """Return the costs of erasing old writes of slow and fast heads."""
    decays = mean_decays(reading)
    ordered = decays.flatten().sort().values
    half = len(ordered) // 2
    rank = decays.flatten().argsort().argsort().view(decays.shape)
    slow, fast = rank < half, rank >= len(ordered) - half
    rows = []
    for kept in sorted(reading.states):
        memories = reading.recent_memories(kept)
        costs = [reading.cost_of_memories(_replaced(reading.memories, memories, heads)) for heads in (slow, fast)]
        rows.append(Recency(kept, *(cost.estimate for cost in (*costs, costs[0] - costs[1]))))
    return HalfLives(math.log(2) / ordered[half - 1].item(), math.log(2) / ordered[-half].item(), rows)


def mean_decays(reading: Reading) -> Tensor:
    """Return the mean Γ dt of every head over all tokens, float64 on the CPU (L, H)."""
    return reading.gamma_means.cpu() * reading.model.config.hebbian_dt


def token_decay(reading: Reading, classes: np.ndarray, random: np.random.Generator) -> TokenDecay:
    """Return Γ by the classes of the tokens (B, N), and the cost of replacing it by its mean."""

    def cost(chosen: np.ndarray) -> Cost:
        with mean_gamma_at(reading, torch.from_numpy(chosen).to(reading.inputs.device)):
            return reading.cost_of_rereading()

    rows = []
    for number in np.unique(classes).tolist():
        chosen = classes == number
        others = np.zeros_like(chosen)
        for row, count in zip(others, chosen.sum(axis=1), strict=True):
            row[random.permutation(len(row))[:count]] = True
        at_class, at_random = cost(chosen), cost(others)
        rows.append(
            ClassDecay(
                name=TOKEN_CLASSES[number],
                tokens=int(chosen.sum()),
                relative=_relative_gamma(reading, chosen),
                cost=at_class.estimate,
                random=at_random.estimate,
                difference=(at_class - at_random).estimate,
            )
        )
    return TokenDecay(cost(np.ones_like(classes, bool)).estimate, rows)


def selection(reading: Reading, random: np.random.Generator) -> Selection:
    """Return the costs of the components that the SNR filter keeps and drops, and of random ones of equal energy."""
    memories, kept = reading.memories, kept_components(reading)
    total, above = _energies(memories), _energies(memories, kept)
    parts = {
        "kept": kept,
        "dropped": [~mask for mask in kept],
        "random, energy of the kept": random_components(memories, above, random),
        "random, energy of the dropped": random_components(memories, total - above, random),
        "random, as many as the kept": shuffled(kept, random),
    }
    rows, costs = [], []
    for name, masks in parts.items():
        left = [memory.masked_fill(mask, 0) for memory, mask in zip(memories, masks, strict=True)]
        costs.append(reading.cost_of_memories(left))
        share = torch.stack([mask.double().mean() for mask in masks]).mean().item()
        rows.append(Removed(name, share, _share(_energies(memories, masks), total), costs[-1].estimate))
    seen = [snr.statistics(memory) for snr, memory in zip(_filters(reading), memories, strict=True)]
    with switched_off(reading.model, "snr_filter"):
        off = reading.cost_of_rereading().estimate
    return Selection(
        strength=[layer["strength"][0].tolist() for layer in seen],
        off=off,
        rows=rows,
        kept_over_random=(costs[0] - costs[2]).estimate,
        dropped_over_random=(costs[1] - costs[3]).estimate,
    )


def kept_components(reading: Reading) -> list[Tensor]:
    """Return the mask of components with p of the SNR filter above one half, bool (B, H, K, V) per layer."""
    pairs = zip(reading.memories, _filters(reading), strict=True)
    return [signal_to_noise(memory) > snr.threshold for memory, snr in pairs]


def random_components(memories: Sequence[Tensor], energies: Tensor, random: np.random.Generator) -> list[Tensor]:
    """Return random components with about an energy (L, B, H), bool (B, H, K, V) per layer."""
    masks = []
    for memory, energy in zip(memories, energies, strict=True):
        squares = memory.flatten(-2).double().square()
        order = torch.from_numpy(random.random(squares.shape).argsort(axis=-1)).to(squares.device)
        sums = F.pad(squares.gather(-1, order).cumsum(-1), (1, 0))  # of the first 0, 1, 2, ...
        count = (sums - energy[..., None]).abs().argmin(dim=-1, keepdim=True)
        chosen = torch.arange(squares.shape[-1], device=squares.device) < count
        masks.append(torch.zeros_like(chosen).scatter(-1, order, chosen).view(memory.shape))
    return masks


def shuffled(masks: Sequence[Tensor], random: np.random.Generator) -> list[Tensor]:
    """Return random components, as many per head as masks (B, H, K, V) select."""
    flat = (mask.flatten(-2).cpu().numpy() for mask in masks)
    mixed = (torch.from_numpy(random.permuted(mask, axis=-1)) for mask in flat)
    return [mask.view(like.shape).to(like.device) for mask, like in zip(mixed, masks, strict=True)]


def occupancy(reading: Reading) -> Occupancy:
    """Return the costs of modes that resonate, of those that do not, and of groups by energy."""
    energies, gates = mode_occupancy(reading)
    total = energies.sum(-1)
    count = min(MODE_GROUPS, energies.shape[-1])
    group = energies.argsort(-1).argsort(-1) * count // energies.shape[-1]

    def remove(name: str, mask: Tensor) -> tuple[Modes, Cost]:
        cost = reading.cost_of_memories(without_modes(reading, mask))
        gate = gates[mask].mean().item() if mask.any() else None
        energy = _share((energies * mask).sum(-1), total)
        return Modes(name, mask.double().mean().item(), energy, cost.estimate, gate), cost

    gated = [remove("gate above 1/2", gates > 0.5)[0], remove("gate up to 1/2", gates <= 0.5)[0]]
    groups, costs = zip(*(remove(f"{n + 1} of {count} by energy", group == n) for n in range(count)), strict=True)
    # The energy of every group in a text, averaged over layers and heads, and its cost in the text.
    shares = torch.stack([(energies * (group == n)).sum(-1).mean(dim=(0, 2)) for n in range(count)], dim=-1)
    by_text = zip(shares.tolist(), np.stack([cost.by_text for cost in costs], axis=-1), strict=True)
    with switched_off(reading.model, "resonance"):
        off = reading.cost_of_rereading().estimate
    return Occupancy(
        off=off,
        gated=gated,
        groups=list(groups),
        correlation=rank_correlation([row.energy for row in groups], [row.cost.mean for row in groups]),
        correlation_by_text=Estimate.of([rank_correlation(*pair) for pair in by_text]),
    )


def mode_occupancy(reading: Reading) -> tuple[Tensor, Tensor]:
    """Return the energies of the modes relative to their mean, and their gates, each (L, B, H, K)."""
    pairs = zip(_resonances(reading), reading.memories, strict=True)
    found = [resonance.statistics(memory) for resonance, memory in pairs]
    return torch.stack([layer["diag_energy"] for layer in found]), torch.stack([layer["gate"] for layer in found])


def without_modes(reading: Reading, mask: Tensor) -> list[Tensor]:
    """Return the memories at the boundary without some modes (L, B, H, K): (B, H, K, V) per layer."""
    left = []
    for resonance, memory, removed in zip(_resonances(reading), reading.memories, mask, strict=True):
        basis = resonance.basis.value.to(memory.dtype)
        left.append(memory - ((modes(memory, basis) * removed.unsqueeze(-2)) @ basis.T).mT)
    return left


def _filters(reading: Reading) -> list[SNRMemoryFilter]:
    return [block.snr_filter for block in reading.blocks if block.snr_filter is not None]


def _resonances(reading: Reading) -> list[MemoryResonanceLayer]:
    return [block.resonance for block in reading.blocks if block.resonance is not None]


def _replaced(memories: Sequence[Tensor], others: Sequence[Tensor], heads: Tensor) -> list[Tensor]:
    """Return memories with those of some heads (L, H) replaced by others."""
    layers = zip(memories, others, heads.to(memories[0].device), strict=True)
    return [torch.where(chosen[:, None, None], other, memory) for memory, other, chosen in layers]


def _relative_gamma(reading: Reading, chosen: np.ndarray) -> list[list[float]]:
    """Return the mean Γ at some tokens (B, N) in units of the mean over all tokens, by layer and head."""
    here = torch.from_numpy(chosen).to(reading.inputs.device)
    at_chosen = torch.stack([gamma[here].double().mean(dim=0) for gamma in reading.gamma])
    return (at_chosen / reading.gamma_means).tolist()


def _energies(memories: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> Tensor:
    """Return ``||S||²`` of the selected components, float64 (L, B, H)."""
    squares = [memory.double().square() for memory in memories]
    chosen = squares if masks is None else [x * mask for x, mask in zip(squares, masks, strict=True)]
    return torch.stack([x.sum(dim=(-2, -1)) for x in chosen])


def _share(part: Tensor, total: Tensor) -> float:
    """Return the mean share over layers, texts and heads (L, B, H); an empty memory does not count."""
    return torch.where(total > 0, part / total, 0).double().mean().item()


def _texts(stream: TokenStream, length: int, horizon: int, interval: int, sequences: int, joined: bool) -> np.ndarray:
    """Return the tokens of texts (B, length + horizon + 1).

    Raises:
        ConfigError: the length ends at no boundary, or a number is below one.
        DataError: no text is long enough.
    """
    if length < 1 or length % interval:
        raise ConfigError(
            f"length must end at a consolidation: a multiple of {interval}, the model's interval, got {length:,}"
        )
    if horizon < 1:
        raise ConfigError(f"horizon must be >= 1, got {horizon}")
    wanted = length + horizon
    texts = [text for text in long_texts(stream, wanted, sequences, joined) if len(text) == wanted + 1]
    if not texts:
        raise DataError(
            f"no text has the {wanted + 1:,} tokens that length and horizon need: give more text, a lesser --length"
            + ("" if joined else ", or --joined, which joins the documents")
        )
    return np.stack(texts).astype(np.int64)


def _tokens_to_read(
    config: Phase2Config, texts: np.ndarray, horizon: int, distances: Sequence[int], classes: np.ndarray | None
) -> int:
    """Return the number of tokens of all readings."""
    heads = config.n_layers * config.num_heads
    edits = 1 + heads + 2 * (1 + len(distances)) * (heads > 1) + 5 * config.snr_enabled
    edits += (2 + min(MODE_GROUPS, config.head_dim)) * config.resonance_enabled
    rereadings = 1 + config.snr_enabled + config.resonance_enabled
    rereadings += 0 if classes is None else 1 + 2 * len(np.unique(classes))
    return len(texts) * (edits * horizon + rereadings * (texts.shape[1] - 1))
