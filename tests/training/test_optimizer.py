import pytest
import torch

from resolvent.errors import CheckpointError
from resolvent.models.phase2 import Phase2IntegratedModel, create_phase2_model
from resolvent.training.optimizer import GuardedAdamW, build_optimizer, load_optimizer_tensors, optimizer_tensors


@pytest.fixture
def model() -> Phase2IntegratedModel:
    return new_model()


def new_model() -> Phase2IntegratedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, d_model=32, n_layers=2, n_seq=64, num_heads=2, head_dim=16)
    return create_phase2_model(**sizes, zeta_embedding_trainable=True, dropout=0.0, device=torch.device("cpu"))


def optimizer_of(model: Phase2IntegratedModel) -> GuardedAdamW:
    return build_optimizer(model, learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95))


def step(model: Phase2IntegratedModel, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(100).reshape(1, 100)).square().mean().backward()
    optimizer.step()


def test_only_matrices_decay(model: Phase2IntegratedModel):
    decayed, kept = optimizer_of(model).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed_names = {names[parameter] for parameter in decayed["params"]}
    kept_names = {names[parameter] for parameter in kept["params"]}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert decayed_names | kept_names == set(names.values())
    assert not decayed_names & kept_names
    assert {"token_embedding.weight", "lm_head.weight", "blocks.1.ffn.in_proj.weight"} <= decayed_names
    for name, parameter in model.named_parameters():
        assert (name in kept_names) == (parameter.ndim < 2), name
    assert {"ln_f.weight", "blocks.0.hebbian.gate_up.bias"} <= kept_names


def test_frozen_parameters_are_left_out(model: Phase2IntegratedModel):
    model.token_embedding.weight.requires_grad_(False)
    for group in optimizer_of(model).param_groups:
        assert all(parameter is not model.token_embedding.weight for parameter in group["params"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_changes_nothing_while_the_switch_is_on(device: str):
    def after(*switches: bool | None) -> list[torch.Tensor]:
        """Weights and averages after a step for every switch; gradients are NaN where it is on."""
        model = new_model().to(device)
        optimizer = optimizer_of(model)
        for on in switches:
            optimizer.found_inf = None if on is None else torch.tensor(float(on), device=device)
            optimizer.zero_grad()
            model(torch.arange(100, device=device).reshape(1, 100)).square().mean().backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= float("nan") if on else 1.0
            optimizer.step()
        return [*model.parameters(), *optimizer_tensors(model, optimizer).values()]

    for found, expected in zip(after(True, False, True, True, False), after(None, None), strict=True):
        assert torch.equal(found, expected)


def test_state_round_trip_through_tensors(model: Phase2IntegratedModel):
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
    twin = new_model()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = optimizer_of(twin)
    stored = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    load_optimizer_tensors(twin, twin_optimizer, stored)
    for _ in range(3):
        step(model, optimizer)
        step(twin, twin_optimizer)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_state_of_another_model_is_refused(model: Phase2IntegratedModel):
    optimizer = optimizer_of(model)
    step(model, optimizer)
    tensors = optimizer_tensors(model, optimizer) | {"blocks.7.ffn.0.weight/exp_avg": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"lacks blocks\.7\.ffn\.0\.weight"):
        load_optimizer_tensors(model, optimizer, tensors)
