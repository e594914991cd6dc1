"""Small models whose weights are large, so that nothing they do is lost in rounding."""

import pytest
import torch

from resolvent import Phase2IntegratedModel, create_phase2_model

SMALL = dict(vocab_size=97, d_model=48, n_layers=3, n_seq=64, num_heads=3, head_dim=16, dropout=0.0, device="cpu")


def small_model(spread: float = 0.3, **options) -> Phase2IntegratedModel:
    model = create_phase2_model(**{**SMALL, **options})
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * spread)
    return model.eval()


@pytest.fixture
def model() -> Phase2IntegratedModel:
    return small_model()
