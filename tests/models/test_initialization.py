"""Fresh weights: their standard deviations, and the outputs of a fresh model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from resolvent import create_phase1_model, create_phase2_model


def fresh(create: Callable[..., Any], **options: Any) -> Any:
    sizes = dict(vocab_size=97, d_model=128, n_layers=3, n_seq=64, num_heads=4, device="cpu")
    return create(**{**sizes, **options})


def spread_in_units_of_fan_in(layer: nn.Linear) -> float:
    return layer.weight.std().item() * layer.in_features**0.5


def last_map(network: nn.Module) -> nn.Linear:
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]


@pytest.mark.parametrize("layers", [2, 8])
def test_output_scale_falls_with_the_number_of_blocks(layers: int):
    model = fresh(create_phase2_model, n_layers=layers)
    for block in model.blocks:
        for layer in (block.hebbian.out_proj, block.ffn.out_proj):
            assert spread_in_units_of_fan_in(layer) == pytest.approx((2 * layers) ** -0.5, rel=0.05)
        for layer in (block.hebbian.qkv_proj, block.hebbian.gate_down, block.ffn.in_proj):
            assert spread_in_units_of_fan_in(layer) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("options", [{}, {"ffn_gated": False}])
def test_plain_feed_forward_has_the_output_scale_of_a_gated_one(options: dict):
    block = fresh(create_phase2_model, **options).blocks[0]
    assert spread_in_units_of_fan_in(last_map(block.ffn)) == pytest.approx(6**-0.5, rel=0.05)


@pytest.mark.parametrize("rank", [None, 48])
def test_phase1_feed_forward_has_that_output_scale_at_any_rank(rank: int | None):
    block = fresh(create_phase1_model, ffn_rank=rank).blocks[0]
    assert spread_in_units_of_fan_in(last_map(block.ffn)) == pytest.approx(6**-0.5, rel=0.05)


def test_resolvent_output_starts_at_zero():
    for model in (fresh(create_phase1_model), fresh(create_phase2_model)):
        assert all(not block.bk_proj.weight.any() for block in model.blocks)


def test_generator_decides_the_weights():
    model = fresh(create_phase2_model)
    drawn = []
    for seed in (0, 0, 1):
        model.init_weights(torch.Generator().manual_seed(seed))
        drawn.append(model.blocks[0].hebbian.qkv_proj.weight.clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
