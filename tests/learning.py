"""A little training, for the tests that need some."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resolvent.models import IntegratedModel


def next_token_loss(model: IntegratedModel, ids: Tensor, penalty_weight: float = 1.0) -> Tensor:
    """Mean nats per token, and what the model asks to be added."""
    logits, penalty = model(ids, return_penalty=True) if model.penalised else (model(ids), 0.0)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + penalty_weight * penalty


def train(model: IntegratedModel, batches: Iterable[Tensor], lr: float = 1e-3) -> list[float]:
    """One step a batch of tokens, each with a finite gradient for every parameter that trains; returns the losses."""
    model.train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=lr, weight_decay=0.0)
    losses = []
    for ids in batches:
        loss = next_token_loss(model, ids)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in trainable.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
    return losses


def moved_by_training(model: IntegratedModel, batches: Iterable[Tensor]) -> set[str]:
    """Train; the names of the parameters that changed."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, batches)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
