import dataclasses

import pytest
import torch
import torch.nn.functional as F

from experiments.quality.attention import WindowedAttention
from experiments.quality.models import PEERS, Size, build
from experiments.quality.variants import ABLATION, MECHANISMS, OPTIONS, mechanisms_of, parse_variant

SMALL = Size(vocabulary=97, width=128, layers=2, parameters=500_000, length=64)
NAMES = (*PEERS, *ABLATION)


def loss_of(entry) -> torch.Tensor:
    ids = torch.randint(97, (2, 31), generator=torch.Generator().manual_seed(0))
    return entry.model(ids[:, :-1], labels=ids[:, 1:])


@pytest.mark.parametrize("name", NAMES)
def test_all_have_as_many_parameters(name: str):
    entry = build(name, SMALL)
    assert entry.parameters == pytest.approx(SMALL.parameters, rel=0.02)
    entry.reset(0)
    assert loss_of(entry).item() == pytest.approx(torch.tensor(97.0).log().item(), abs=0.3)


PARTS = ("conv", "qk-norm", "norm", "gate")
OURS = (
    "phase2",
    "phase2/bare",
    "phase2/hybrid",
    "phase2/one",
    "phase2/at-2-4-6",
    "phase2/heads-4",
    "phase2/attention",
    "gated-deltanet/hybrid",
)


@pytest.mark.parametrize("name", [*PEERS, *OURS, *(f"phase2/attention/no-{part}" for part in PARTS)])
def test_the_experiment_s_size_is_within_reach(name: str):
    size = Size(vocabulary=16384, width=512, layers=6, parameters=30_000_000, length=1024)
    with torch.device("meta"):
        assert build(name, size, "meta").parameters == pytest.approx(30e6, rel=0.02)


def test_weights_depend_on_the_seed_alone():
    for name in ("gated-deltanet", "phase2/no-snr"):
        entry = build(name, SMALL)
        losses = []
        for seed in (1, 2, 1):
            entry.reset(seed)
            losses.append(loss_of(entry).item())
        assert losses[0] == losses[2] != losses[1]


def test_unknown_models_and_sizes_are_errors():
    with pytest.raises(ValueError, match="there is no model 'lstm'; known are transformer, "):
        build("lstm", SMALL)
    with pytest.raises(ValueError, match="there is no 'no-magic'; known are bare, original, bk, "):
        build("phase2/no-magic", SMALL)
    with pytest.raises(ValueError, match="no 'gla/wide' of 2 blocks: a peer's variants are /hybrid, with three"):
        build("gla/wide", SMALL)
    with pytest.raises(ValueError, match="parameters, not 10,000: change the width"):
        build("gla", Size(97, 128, 2, 10_000, 64))


@pytest.mark.parametrize("mechanism", [*MECHANISMS, *OPTIONS])
def test_a_change_leaves_all_other_weights_as_they_are(mechanism: str):
    size = dataclasses.replace(SMALL, parameters=2_000_000)  # a gate is few of so many
    whole, changed = build("phase2", size), build(f"phase2/no-{mechanism}", size)
    for entry in (whole, changed):
        entry.reset(3)
    weights = dict(whole.model.named_parameters())
    variant = parse_variant(changed.name)
    potential = ("v_proj.weight", "gamma_proj.weight", "memory_to_potential.weight")
    own = {
        "zeta-init": potential,
        "reach": ("gamma_bias",),
        "base-decay": ("gamma_bias",),
        "gated-ffn": ("ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"),
    }
    for name, parameter in changed.model.named_parameters():
        if variant.zeros and name.endswith(variant.zeros):
            assert not parameter.any() and not parameter.requires_grad
        elif not any(name.endswith(ending) for ending in own.get(mechanism, ())):
            assert torch.equal(parameter, weights[name]), name
    assert all(getattr(changed.model.config, name) == value for name, value in variant.config.items())


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_variant_changes_the_loss(mechanism: str):
    """Every switch acts: with all weights away from zero, the model without it computes something else."""
    losses = []
    for name in ("phase2", f"phase2/no-{mechanism}"):
        entry = build(name, SMALL)
        entry.reset(0)
        with torch.no_grad():
            for key, parameter in entry.model.named_parameters():
                if parameter.requires_grad and not (mechanism == "zeta-init" and ".potential." in key):
                    generator = torch.Generator().manual_seed(sum(map(ord, key)))
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                if key.endswith("strength_logit"):
                    parameter.zero_()  # the filter starts almost off
        ids = torch.randint(97, (1, 300), generator=torch.Generator().manual_seed(0))
        losses.append(entry.model(ids[:, :-1], labels=ids[:, 1:]).item())
    assert abs(losses[0] - losses[1]) > 1e-6


def test_names_of_variants():
    bare = parse_variant("phase2/bare")
    assert bare.config == {
        "memory_feedback": False, "snr_enabled": False, "resonance_enabled": False, "use_zeta_init": False
    }  # fmt: skip
    held = ("bk_proj.weight", "dissipative_bk.kappa", "memory_to_potential.weight", "position_embedding.gain")
    assert bare.zeros == held
    assert parse_variant("phase2/bare/bk/snr").zeros == bare.zeros[1:]
    assert "snr_enabled" not in parse_variant("phase2/bare/bk/snr").config
    assert parse_variant("phase2/no-conv/no-gate").config == {"conv_size": 1, "output_gate": False}
    assert parse_variant("phase2/no-snr-training").config == {"snr_trained": False}
    assert parse_variant("phase2/original").config["snr_trained"] is False
    assert parse_variant("phase2").config == {} and parse_variant("phase2").zeros == ()


def test_hybrids_attend_in_every_third_block():
    size = dataclasses.replace(SMALL, layers=6, parameters=2_000_000)
    windows = {
        "hybrid": SMALL.length // 2, "hybrid/window-9": 9, "hybrid/window-all": None, "one": SMALL.length // 2,
        "at-2-5/window-9": 9, "at-1-4-6": SMALL.length // 2, "attention": None,
    }  # fmt: skip
    blocks = {"hybrid": (2, 5), "one": (3,), "at-2-5": (1, 4), "at-1-4-6": (0, 3, 5), "attention": tuple(range(6))}
    for name, window in windows.items():
        config = build(f"phase2/{name}", size).model.config
        assert config.attention_layers == blocks[name.partition("/")[0]]
        assert config.attention_window == window
    with pytest.raises(ValueError, match="every third block, and there are 2"):
        build("phase2/hybrid", SMALL)
    with pytest.raises(ValueError, match="window-9 needs hybrid, one, attention or at-2-5"):
        build("phase2/window-9", SMALL)
    with pytest.raises(ValueError, match="short-9 needs hybrid, one, attention or at-2-5"):
        build("phase2/short-9", SMALL)
    for wrong in ("at-3", "at-2-1", "at-2-2"):
        with pytest.raises(ValueError, match=f"{wrong}: name blocks of 1 to 2, in ascending order"):
            build(f"phase2/{wrong}", SMALL)


def test_attention_in_every_third_block_is_that_in_the_blocks_of_these_numbers():
    size = dataclasses.replace(SMALL, layers=6, parameters=2_000_000)
    losses = []
    for name in ("hybrid", "at-3-6"):
        entry = build(f"phase2/{name}", size)
        entry.reset(3)
        losses.append(loss_of(entry))
    assert losses[0] == losses[1]


def test_fewer_heads_hold_a_larger_memory_at_equal_parameters():
    size = dataclasses.replace(SMALL, width=256, parameters=2_000_000)
    usual, wide = build("phase2", size), build("phase2/heads-2", size)
    config = wide.model.config
    assert (config.num_heads, config.head_dim) == (2, 128)
    assert wide.parameters == pytest.approx(usual.parameters, rel=0.007)  # of which half a step of the width is 0.006
    assert config.ffn_width < usual.model.config.ffn_width
    memories = [2 * 4 * config.num_heads * config.head_dim**2 for config in (usual.model.config, config)]
    assert wide.state_bytes - usual.state_bytes == memories[1] - memories[0] - 2 * 4 * 3 * 2  # and two heads less
    wide.reset(3)
    loss_of(wide).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in wide.model.parameters())


def test_hybrids_of_peers_have_the_attention_of_ours():
    size = dataclasses.replace(SMALL, layers=6, parameters=2_000_000)
    for name, window in {"gated-deltanet/hybrid": SMALL.length // 2, "gla/hybrid/window-9": 9}.items():
        entry = build(name, size)
        entry.reset(3)
        mixers = [block.mixer for block in entry.model.blocks]
        assert [isinstance(mixer, WindowedAttention) for mixer in mixers] == 2 * [False, False, True]
        assert mixers[2].layer.window == window
        assert mixers[2].layer.temperature.tolist() == pytest.approx([10.0, 10.0])
        assert mixers[2].layer.conv_weight[1:].eq(0).all()


@pytest.mark.parametrize("joined", [False, True])
def test_scores_without_norms_are_products_of_q_and_k(joined: bool, monkeypatch: pytest.MonkeyPatch):
    """With one product for each layer, and with one product for several layers."""
    monkeypatch.setattr("resolvent.layers.linear._launches_cost", lambda device: joined)
    size = dataclasses.replace(SMALL, parameters=2_000_000)
    normed, plain = build("phase2/attention", size), build("phase2/attention/no-qk-norm", size)
    for entry in (normed, plain):
        entry.reset(5)
    ours, other = (entry.model.blocks[0].attention for entry in (plain, normed))
    assert torch.equal(ours.qkv_proj.weight, other.qkv_proj.weight)
    assert ours.temperature == 1 / 8
    x = torch.randn(2, 20, 128)
    found, expected = (layer.given(x, None, None)[0].heads for layer in (ours, other))
    q, k, v = F.silu(ours.qkv_proj(x)).unflatten(-1, (3, 2, 64)).unbind(2)  # the convolution passes the token through
    torch.testing.assert_close(found[:3], (q, k, v), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(F.normalize(found.q, dim=-1), expected.q, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="block 0 has a memory, whose bound needs L2-normalised keys"):
        build("phase2/no-qk-norm", size)


def test_attention_starts_with_the_weights_of_the_memory():
    size = dataclasses.replace(SMALL, parameters=2_000_000)
    memory, attention = build("phase2", size), build("phase2/attention", size)
    for entry in (memory, attention):
        entry.reset(5)
    weights = dict(memory.model.named_parameters())
    shared = [name for name, _ in attention.model.named_parameters() if not name.endswith("log_temperature")]
    for name in shared:
        ours = attention.model.get_parameter(name)
        assert torch.equal(ours, weights[name.replace(".attention.", ".hebbian.")]), name


@pytest.mark.parametrize("mechanism", mechanisms_of("phase2"))
def test_a_trained_model_does_without_a_mechanism_and_has_it_back(mechanism: str):
    entry = build("phase2", SMALL)
    entry.reset(0)
    model = entry.model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(97, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, weights = model(ids), {name: p.clone() for name, p in model.named_parameters()}
        with mechanisms_of("phase2")[mechanism].off(model):
            without = model(ids)
        assert (without - before).abs().max() > 1e-5
        assert torch.equal(model(ids), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_only_what_is_on_can_be_put_to_zero():
    assert list(mechanisms_of("phase2")) == ["bk", "kappa", "feedback", "snr", "resonance", "positions"]
    assert list(mechanisms_of("phase2/no-snr/no-bk")) == ["kappa", "feedback", "resonance", "positions"]
    assert list(mechanisms_of("phase2/bare/bk")) == ["bk"]


def test_the_original_initialisation_is_as_small_as_it_was():
    entry = build("phase2/original", SMALL)
    entry.reset(0)
    model = entry.model
    largest = torch.linalg.matrix_norm(model.blocks[0].hebbian.qkv_proj.weight.chunk(3)[0], 2)
    assert largest.item() == pytest.approx(0.02 / 14.134725, rel=1e-4)
    assert model.token_embedding.weight.abs().max() <= 0.02
    assert model.position_embedding(torch.arange(5)).abs().max().item() == pytest.approx(1.0, rel=1e-3)
    _, gamma = model.blocks[0].dissipative_bk.potential(torch.zeros(1, 1, 128))
    torch.testing.assert_close(gamma, torch.full_like(gamma, 0.01 + torch.tensor(2.0).log().item()))


def test_state_bytes():
    memory, tail, resolvents = 2 * 64 * 64, 3 * 3 * 128, 2 * 2
    assert build("phase2/bare", SMALL).state_bytes == 2 * 4 * (memory + tail + resolvents)
    assert build("phase2", SMALL).state_bytes == 2 * 4 * (memory + tail + resolvents + 2)
    assert build("phase2/no-snr", SMALL).state_bytes == build("phase2/bare", SMALL).state_bytes
    assert build("transformer", SMALL).state_bytes == 2 * 4 * 2 * 64 * 128
    assert build("phase2/attention", SMALL).state_bytes == 2 * 4 * (2 * 64 * 128 + tail + resolvents)
    assert build("phase2/attention/window-9", SMALL).state_bytes == 2 * 4 * (2 * 9 * 128 + tail + resolvents)
