"""Multiple choice and recall by likelihood, on the examples of ``task_files``.

No code of a model runs: a choice is scored by its likelihood after the context.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from resolvent.data import EOT
from resolvent.errors import DataError
from resolvent.evaluation.scoring import progress_bar, rectangle, score_tokens
from resolvent.evaluation.statistics import Estimate
from resolvent.evaluation.task_files import Example
from resolvent.models import IntegratedModel
from resolvent.models.inference import inference_view
from resolvent.native import panics_are_errors


@dataclass(frozen=True)
class TaskScore:
    """Scores of a task.

    Attributes:
        examples: number of questions.
        accuracy: share of the questions whose likeliest choice is correct; None without choices.
        accuracy_per_byte: the same, with the log-likelihood of a choice divided by its bytes.
        chance: accuracy of a random choice.
        nats_per_byte: negative log-likelihood of the first correct choice per byte of it.
        exact: share of the questions whose first correct choice is what greedy decoding writes.
    """

    examples: int
    accuracy: Estimate | None
    accuracy_per_byte: Estimate | None
    chance: float | None
    nats_per_byte: Estimate
    exact: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, for JSON."""
        return asdict(self)


@torch.no_grad()
def evaluate_examples(
    model: IntegratedModel,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 16_384,
    progress: bool = False,
) -> TaskScore:
    """Score the choices of questions by their likelihood after the context.

    Args:
        model: the model; it reads each question from a fresh state.
        tokenizer: its tokenizer.
        examples: the questions.
        batch_tokens: tokens of a forward pass; a longer question is read alone.
        progress: show a progress bar.
    """
    pairs = [(example.context, choice) for example in examples for choice in example.choices]
    rows = _encode(tokenizer, pairs)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    view = inference_view(model)
    with progress_bar("questions", sum(len(ids) for ids, _ in rows), progress) as advance:
        for chosen in _batches(order, [len(ids) for ids, _ in rows], batch_tokens):
            found = _score(view, [rows[i] for i in chosen])
            for i, score in zip(chosen, found, strict=True):
                scores[i] = score
            advance(sum(len(rows[i][0]) for i in chosen))
    return _summary(examples, scores)


def _encode(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Return tokens of each context with its continuation, and how many of them are of the continuation.

    A space at the end of a context belongs to the continuation, whose first token includes it. Behind an empty context,
    the first token of a continuation follows the separator of documents.
    """
    if (separator := tokenizer.token_to_id(EOT)) is None:
        raise DataError(f"the tokenizer has no {EOT}, which stands before a text: make it with build_tokenizer")
    split = [(context.rstrip(" "), context[len(context.rstrip(" ")) :] + choice) for context, choice in pairs]
    with panics_are_errors():
        whole = tokenizer.encode_batch([context + choice for context, choice in split], add_special_tokens=False)
        alone = tokenizer.encode_batch([context for context, _ in split], add_special_tokens=False)
    # A context may end in the middle of a token: at least one token is of the continuation.
    rows = [(x.ids, max(1, len(x.ids) - len(y.ids))) for x, y in zip(whole, alone, strict=True)]
    return [([separator, *ids], scored) if len(ids) == scored else (ids, scored) for ids, scored in rows]


def _batches(order: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield questions of about equal length together: number and longest length make up to ``batch_tokens``."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score(model: IntegratedModel, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Return the nats of each continuation, and whether greedy decoding writes it."""
    contexts = [(len(ids) - scored, np.array(ids, np.int64)) for ids, scored in rows]
    # The complement of an id stands for a token that is read only, as in a signed stream.
    tokens, labels = rectangle([np.where(np.arange(len(ids)) < read, ~ids, ids) for read, ids in contexts])
    device = next(model.parameters()).device
    hidden, _ = model.hidden_states(tokens.to(device))
    scores = score_tokens(model, hidden, labels.to(device))
    nats, exact = scores.nats.double().sum(dim=1).tolist(), scores.likeliest.all(dim=1).tolist()
    return list(zip(nats, exact, strict=True))


def _summary(examples: Sequence[Example], scores: Sequence[tuple[float, bool]]) -> TaskScore:
    by_sum, by_byte, chances, nats, exact, start = [], [], [], [], [], 0
    for example in examples:
        found = scores[start : start + len(example.choices)]
        start += len(example.choices)
        sizes = [max(1, len(choice.encode())) for choice in example.choices]
        ratios = [score / size for (score, _), size in zip(found, sizes, strict=True)]
        first = min(example.right)
        nats.append(ratios[first])
        exact.append(float(found[first][1]))
        if len(found) > 1:
            sums = [score for score, _ in found]
            by_sum.append(float(sums.index(min(sums)) in example.right))
            by_byte.append(float(ratios.index(min(ratios)) in example.right))
            chances.append(len(example.right) / len(found))
    return TaskScore(
        len(examples),
        Estimate.of(by_sum) if by_sum else None,
        Estimate.of(by_byte) if by_byte else None,
        sum(chances) / len(chances) if chances else None,
        Estimate.of(nats),
        Estimate.of(exact),
    )
