r"""Influence of earlier tokens on the prediction of the last token.

Two measures, both exact. The first is the gradient of the last loss with respect to a token's embedding. Its memory
hardly grows with the length: a forward pass keeps the states at the ends of pieces, and a backward pass reads each
piece again and passes the gradient of its first state to the piece before,

    ∂loss/∂s_j = (∂s_{j+1}/∂s_j)ᵀ ∂loss/∂s_{j+1},        ∂loss/∂e_t = (∂s_{j+1}/∂e_t)ᵀ ∂loss/∂s_{j+1}.

The second is the Kullback-Leibler divergence between the last predictions with the token and with another in its
position, after all later tokens are read again.

Shapes: B sequences, N tokens, D model width, K replacements.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resolvent.data import TokenStream
from resolvent.errors import DataError, check_at_least
from resolvent.evaluation.scoring import Advance, excerpts, progress_bar, separator_of
from resolvent.evaluation.statistics import Bucket, Estimate, doubling_buckets
from resolvent.models import IntegratedModel, observe
from resolvent.models.inference import inference_view
from resolvent.models.state import ModelState
from resolvent.ops.precision import at_least_float32
from resolvent.seeds import check_seed


@dataclass(frozen=True)
class Influence:
    """Influence of the tokens in a bucket of distances on the prediction of the last token.

    Attributes:
        first, last: the bucket of distances; the last token that is read has distance 1.
        gradient: mean over the tokens of the bucket: norm of the gradient of the last loss in a token's embedding.
        divergence: mean over tokens drawn from the bucket: nats between the predictions with the token and with
            another one.
    """

    first: int
    last: int
    gradient: Estimate
    divergence: Estimate

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.first, self.last)


@dataclass(frozen=True, repr=False)
class Influences:
    """The influence at all distances.

    Attributes:
        training_length: tokens of the sequences that the model was trained on.
        sequences: number of texts.
        replacements: tokens replaced per bucket of every text.
        rows: influence per bucket.
    """

    training_length: int
    sequences: int
    replacements: int
    rows: list[Influence]

    def __repr__(self) -> str:
        return f"Influences({self.sequences} texts, {len(self.rows)} rows up to distance {self.rows[-1].last:,})"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return dataclasses.asdict(self)


def measure_influence(
    model: IntegratedModel,
    stream: TokenStream,
    *,
    length: int = 65536,
    sequences: int = 4,
    replacements: int = 4,
    seed: int = 0,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> Influences:
    """Measure the influence of every token on the last prediction, by distance.

    Args:
        model: the model; it keeps its mode, dropout is off, and its parameters get no gradients.
        stream: the text; a sequence is the separator of documents and `length + 1` consecutive tokens, of which the
            last one is predicted.
        length: longest distance in tokens.
        sequences: number of positions in the text.
        replacements: tokens per bucket that are replaced, one at a time, each by another of the same sequence.
        seed: seed of positions and replacements.
        batch_tokens: most tokens in one call of the model.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: a number is below one.
        DataError: the text is too short.
        ResolventError: the gradients or predictions are not finite.
    """
    check_at_least(1, length=length, sequences=sequences, replacements=replacements)
    check_seed(seed)
    random = np.random.default_rng(seed)
    texts = excerpts(stream, sequences, length + 1, random)
    buckets = doubling_buckets(length)
    gradients, divergences = [], []
    # An upper bound: a replaced token may be anywhere in its bucket.
    replaced = sum(replacements * bucket.last for bucket in buckets)
    with progress_bar("Reading", sequences * (5 * length + replaced), progress) as advance:
        reading = dict(batch_tokens=batch_tokens, advance=advance)
        for text in texts:
            tokens = np.insert(text, 0, separator_of(stream))
            gradients.append(_mean_gradients(model, tokens, buckets, **reading))
            divergences.append(_mean_divergences(model, tokens, buckets, replacements, random, **reading))
    columns = [zip(*samples, strict=True) for samples in (gradients, divergences)]
    rows = [
        Influence(b.first, b.last, Estimate.of(g), Estimate.of(d)) for b, g, d in zip(buckets, *columns, strict=True)
    ]
    return Influences(model.n_seq, sequences, replacements, rows)


def _mean_gradients(
    model: IntegratedModel, text: np.ndarray, buckets: list[Bucket], *, batch_tokens: int, advance: Advance
) -> list[float]:
    """Return the mean norm of the gradients in each bucket of a text (N,), which begins with the separator."""
    tokens = torch.from_numpy(text).to(next(model.parameters()).device)
    pieces = input_gradients(model, tokens[None], piece_tokens=batch_tokens, advance=advance)
    # From the last token backwards, without the separator.
    norms = torch.cat([piece[0].norm(dim=-1).flip(0) for piece in pieces])[:-1].double().cpu().numpy()
    return [norms[bucket.first - 1 : bucket.last].mean() for bucket in buckets]


def _mean_divergences(
    model: IntegratedModel,
    text: np.ndarray,
    buckets: list[Bucket],
    replacements: int,
    random: np.random.Generator,
    *,
    batch_tokens: int,
    advance: Advance,
) -> list[float]:
    """Return the mean divergence of some replaced tokens in each bucket of a text (N,), as in ``_mean_gradients``."""
    tokens = torch.from_numpy(text).to(next(model.parameters()).device)
    distances = np.concatenate([random.integers(b.first, b.last + 1, replacements) for b in buckets])
    indices = len(text) - 1 - distances
    others = np.array([_other_token(text[1:], int(text[index]), random) for index in indices])
    nats = replacement_divergences(model, tokens[:-1], indices, others, batch_tokens=batch_tokens, advance=advance)
    return nats.cpu().numpy().reshape(len(buckets), replacements).mean(axis=1).tolist()


def input_gradients(
    model: IntegratedModel, tokens: Tensor, *, piece_tokens: int, advance: Advance = lambda _: None
) -> Iterator[Tensor]:
    """Yield the gradient of the last token's loss in every earlier embedding, with activations of one piece at a time.

    Args:
        model: the model; it keeps its mode, dropout is off, and its parameters get no gradients.
        tokens: int64 (B, N + 1); the last one is predicted.
        piece_tokens: number of tokens B P of a piece.
        advance: called with the number of tokens read; those of the backward pass count three times.

    Yields:
        Gradients (B, P, D) of a piece, from the last piece to the first.
    """
    pieces = tokens[:, :-1].split(max(1, piece_tokens // len(tokens)), dim=1)
    states: list[ModelState | None] = [None]
    upstream: list[Tensor | None] | None = None
    model = inference_view(model, parameter_gradients=False)
    model.token_embedding.requires_grad_(True)  # for gradients of its output, not of the model's own parameters
    for piece in pieces[:-1]:
        with torch.no_grad():
            _, state = model.hidden_states(piece, state=states[-1])
        states.append(state)
        advance(piece.numel())
    for piece in reversed(pieces):
        gradient, upstream = _backwards(model, piece, states.pop(), upstream, tokens[:, -1])
        advance(3 * piece.numel())
        yield gradient


def _backwards(
    model: IntegratedModel,
    piece: Tensor,
    state: ModelState | None,
    upstream: list[Tensor | None] | None,
    target: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients in a piece's embeddings and, tensor by tensor, in its first state.

    ``upstream`` are the gradients in its last state; None for the last piece, whose loss is that of ``target``.
    """
    with torch.enable_grad():
        start = None if state is None else state.map(_leaf)
        trace = observe(model, piece, state=start)
        if upstream is None:
            loss = F.cross_entropy(at_least_float32(model.lm_head(trace.hidden[:, -1])), target, reduction="sum")
            ends, weights = [loss], [torch.ones_like(loss)]
        else:
            known = zip(trace.after.tensors(), upstream, strict=True)
            pairs = [(end, weight) for end, weight in known if weight is not None and end.requires_grad]
            ends, weights = [list(column) for column in zip(*pairs, strict=True)]
        starts = [] if start is None else start.tensors()
        inputs = [trace.vectors, *(x for x in starts if x.requires_grad)]
        gradients = iter(torch.autograd.grad(ends, inputs, weights, allow_unused=True))
    gradient = next(gradients)
    gradient = torch.zeros_like(trace.vectors) if gradient is None else gradient
    return gradient, [next(gradients) if x.requires_grad else None for x in starts]


def replacement_divergences(
    model: IntegratedModel,
    tokens: Tensor,
    indices: np.ndarray,
    others: np.ndarray,
    *,
    batch_tokens: int,
    advance: Advance = lambda _: None,
) -> Tensor:
    """Return the divergence of the prediction after the last token when an earlier token is replaced.

    The text is read once; every variant is read from its replaced token on, with a copy of the state there.

    Args:
        model: the model; it keeps its mode, and dropout is off.
        tokens: int64 (N,).
        indices: positions of the tokens that are replaced, one at a time, (K,).
        others: tokens that replace them, (K,).
        batch_tokens: most tokens in one call of the model.
        advance: called with the number of tokens read.

    Returns:
        Kullback-Leibler divergence of each variant's prediction from the original's, nats, float64 (K,).
    """
    order = np.argsort(indices, kind="stable")
    cuts = np.unique([0, *indices, len(tokens)])
    substitutes = torch.from_numpy(others[order]).to(tokens)
    hidden, state = None, None
    model = inference_view(model)
    with torch.inference_mode():
        for start, end in itertools.pairwise(cuts.tolist()):
            before, rows = (1 + int(np.searchsorted(indices[order], start, side)) for side in ("left", "right"))
            if state is not None:
                state = state[[*range(before), *[0] * (rows - before)]]
            stretch = tokens[start:end].repeat(rows, 1)
            stretch[before:, 0] = substitutes[before - 1 : rows - 1]
            for piece in stretch.split(max(1, batch_tokens // rows), dim=1):
                hidden, state = model.hidden_states(piece, state=state)
                advance(piece.numel())
        assert hidden is not None
        log_p = at_least_float32(model.lm_head(hidden[:, -1])).double().log_softmax(dim=-1)
        divergence = F.kl_div(log_p[1:], log_p[:1].expand_as(log_p[1:]), reduction="none", log_target=True).sum(dim=-1)
        return divergence[torch.from_numpy(np.argsort(order)).to(divergence.device)]


def _other_token(text: np.ndarray, token: int, random: np.random.Generator) -> int:
    """Return a token drawn by its frequency in the text, other than the given one."""
    others = text[text != token]
    if not len(others):
        raise DataError(f"the text repeats one token, {token}, and no other token could replace it: give other text")
    return int(random.choice(others))


def _leaf(x: Tensor) -> Tensor:
    """Return x as a leaf that collects its gradient, if x can have one."""
    return x.detach().requires_grad_(x.is_floating_point() or x.is_complex())
