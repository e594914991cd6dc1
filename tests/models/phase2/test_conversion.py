"""Conversion preserves Phase 1 models, and copies the parts of other modules that have a role."""

import dataclasses
import logging

import pytest
import torch
from torch import nn

from resolvent import (
    ConfigError,
    Phase2Config,
    convert_phase1_to_phase2,
    create_phase1_model,
    create_phase2_model,
    get_phase1_preset,
    load_model,
    save_model,
)
from resolvent.layers import TensorTrainEmbedding

from ...learning import moved_by_training, train
from ..small import PHASE1, tokens

SMALL = {**PHASE1.sizes, "dropout": 0.1}


@torch.enable_grad()
def trained(steps=25, **options):
    """Return a Phase 1 model after some steps of training, in which every part has an effect."""
    model = create_phase1_model(**{**SMALL, **options})
    train(model, (tokens(64, 4).sort(1).values for _ in range(steps)), lr=1e-2)
    assert all(block.bk_proj.weight.abs().max() > 1e-3 for block in model.blocks)
    return model.eval()


VARIANTS = {
    "htt and ar-ssm": {},
    "table": dict(htt_enabled=False),
    "no ar-ssm": dict(ar_ssm_enabled=False),
    "plain": dict(htt_enabled=False, ar_ssm_enabled=False),
    "unbounded sum": dict(ar_ssm_bounded=False),
    "low rank": dict(ffn_rank=5, htt_phase_encoding=False),
}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "carried"),
    [*((name, False) for name in VARIANTS), *((name, True) for name in ("htt and ar-ssm", "no ar-ssm", "low rank"))],
)
def test_logits_equal_the_source_full_and_streaming(name, carried):
    source = trained(**VARIANTS[name])
    wanted = Phase2Config.from_phase1(source.config, htt_rank=6) if carried else None
    model = convert_phase1_to_phase2(source, wanted).eval()
    assert isinstance(model.token_embedding, TensorTrainEmbedding if carried else nn.Embedding)
    for length in (1, 40, 64, 300):
        ids = tokens(length)
        expected = source(ids)
        # As equal as the source is to itself in pieces: it has its potential from a product of its own, Phase 2 from a
        # wider one, whose sums have another order.
        assert (model(ids) - expected).abs().max() <= 1e-5
        state, pieces = None, []
        for piece in ids.split(1 if length <= 64 else 37, dim=1):
            logits, state = model(piece, state=state, return_state=True)
            pieces.append(logits)
        assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-5
    prompt = tokens(5)
    assert torch.equal(model.generate(prompt, 30, temperature=0), source.generate(prompt, 30, temperature=0))


def test_every_new_parameter_moves_after_two_steps():
    model = convert_phase1_to_phase2(trained())
    assert moved_by_training(model, (tokens(270) for _ in range(4))) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, dict(htt_enabled=False, ar_ssm_enabled=False), dict(ffn_rank=5)])
def test_freezing_freezes_exactly_the_copied_parameters(options):
    source = trained(steps=5, **options)
    model = convert_phase1_to_phase2(source, freeze_phase1_weights=True)
    copied = {tensor.name for tensor in model.conversion_report.copied}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == copied
    assert model.num_parameters(trainable_only=True) == model.conversion_report.parameters("new")
    new = {tensor.name for tensor in model.conversion_report.new}
    assert moved_by_training(model, (tokens(270) for _ in range(4))) == new
    assert all(p.requires_grad for p in source.parameters())


def test_loaded_model_is_not_frozen(tmp_path):
    model = convert_phase1_to_phase2(trained(steps=1), freeze_phase1_weights=True)
    assert not all(p.requires_grad for p in model.parameters())
    save_model(model, tmp_path)
    assert all(p.requires_grad for p in load_model(tmp_path, device="cpu").parameters())


def test_report_lists_every_tensor(caplog):
    source = trained(steps=1)
    with caplog.at_level(logging.DEBUG, logger="resolvent"):
        model = convert_phase1_to_phase2(source)
    report = model.conversion_report
    assert report.summary() in caplog.text
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {t.name: t.shape for t in report.copied + report.new} == shapes
    assert report.parameters("copied") + report.parameters("new") == model.num_parameters()
    assert report.left_behind == []
    used = {name for tensor in report.copied for name in tensor.sources}
    assert used == {name for name, _ in source.named_parameters()}
    entry = next(t for t in report.tensors if t.name == "token_embedding.weight")
    assert entry.sources == tuple(f"token_embedding.{part}" for part in ("core1", "core2", "phase_shift"))
    assert (entry.status, entry.count, entry.note) == ("copied", 97 * 48, "tensor train made a table")
    new = {t.name.split(".", 2)[2] for t in report.new if t.name.startswith("blocks.1.")}
    assert {"dissipative_bk.kappa", "hebbian.qkv_proj.weight", "resonance.bias"} <= new
    assert not any(part.startswith(("ln1", "ln2", "ffn", "bk_proj", "ar_ssm", "ln_ssm")) for part in new)
    assert report.to_dict()["tensors"][0]["status"] == "copied"


def test_layer_i_becomes_layer_i():
    source = trained(steps=1)
    model = convert_phase1_to_phase2(source)
    for ours, theirs in zip(model.blocks, source.blocks, strict=True):
        assert torch.equal(ours.dissipative_bk.potential.v_proj.weight, theirs.bk.v_proj.weight)
        assert torch.equal(ours.ffn[0].weight, theirs.ffn[0].weight)
    assert not torch.equal(model.blocks[0].ffn[0].weight, model.blocks[1].ffn[0].weight)


def test_converted_model_has_the_sizes_of_the_source():
    source = create_phase1_model(**{**SMALL, "ffn_dim": 50})
    config = convert_phase1_to_phase2(source).config
    assert (config.vocab_size, config.d_model, config.n_layers, config.n_seq) == (97, 48, 3, 64)
    assert (config.num_heads, config.head_dim, config.ffn_dim, config.dropout) == (3, 16, 50, 0.1)
    assert config.phase1_config == source.config


def test_configuration_is_followed_or_refused_by_field():
    source = create_phase1_model(**SMALL)
    wanted = Phase2Config.from_phase1(source.config, head_dim=8, base_decay=0.05, zeta_embedding_trainable=True)
    before = wanted.to_dict()
    model = convert_phase1_to_phase2(source, wanted)
    assert (model.config.head_dim, model.config.base_decay) == (8, 0.05)
    assert wanted.to_dict() == before
    assert model.conversion_report.config_changes == {"ar_ssm_rank": (0, 8), "ar_ssm_gate_hidden_dim": (None, 12)}
    ids = tokens()
    assert (model.eval()(ids) - source.eval()(ids)).abs().max() <= 1e-5

    by_hand = dataclasses.replace(wanted, embedding_scale=None)
    model = convert_phase1_to_phase2(source, by_hand)
    assert model.conversion_report.config_changes["embedding_scale"] == (None, source.config.embedding_scale)
    assert (model.eval()(ids) - source(ids)).abs().max() <= 1e-5

    faulty = dataclasses.replace(wanted, d_model=64, n_layers=2, num_heads=4, vocab_size=98, htt_rank=5)
    with pytest.raises(ConfigError) as error:
        convert_phase1_to_phase2(source, faulty)
    for text in ("vocab_size is 98", "d_model is 64, that of the Phase 1 model 48", "n_layers is 2", "num_heads is 4"):
        assert text in str(error.value)
    assert "htt_rank is 5, but the Phase 1 model's token embedding has rank 6" in str(error.value)
    with pytest.raises(ConfigError, match="tie_embeddings"):
        convert_phase1_to_phase2(source, Phase2Config.from_phase1(source.config, tie_embeddings=True))
    with pytest.raises(ConfigError, match="token embedding is a table"):
        convert_phase1_to_phase2(create_phase1_model(**{**SMALL, "htt_enabled": False}), wanted_with_train(wanted))


def wanted_with_train(config):
    return dataclasses.replace(config, htt_rank=6)


def test_conversion_without_copying_is_fresh():
    source = create_phase1_model(**SMALL)
    model = convert_phase1_to_phase2(source, copy_compatible_weights=False, freeze_phase1_weights=True)
    report = model.conversion_report
    assert report.copied == []
    assert len(report.left_behind) == len(list(source.parameters()))
    assert all(p.requires_grad for p in model.parameters())
    assert model.blocks[0].hebbian.out_proj.weight.any()


def test_same_seed_gives_same_conversion_and_keeps_the_source():
    source = trained(steps=1)
    before = {name: p.clone() for name, p in source.state_dict().items()}

    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.detach().flatten() for p in convert_phase1_to_phase2(source).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert all(torch.equal(p, before[name]) for name, p in source.state_dict().items())


@pytest.mark.gpu
def test_same_seed_gives_same_conversion_on_cuda():
    source = trained(steps=2)
    torch.manual_seed(3)
    here = convert_phase1_to_phase2(source)
    torch.manual_seed(3)
    there = convert_phase1_to_phase2(source.cuda())
    for (name, a), b in zip(here.named_parameters(), there.parameters(), strict=True):
        assert b.is_cuda
        assert torch.equal(a, b.cpu()), name
    ids = tokens(300).cuda()
    assert (there.eval()(ids) - source(ids)).abs().max() <= 1e-4


@pytest.mark.parametrize("carried", [False, True])
def test_loaded_conversion_equals_saved(tmp_path, carried):
    source = trained(steps=2)
    save_model(source, tmp_path / "one")
    again = load_model(tmp_path / "one", device="cpu")
    ids = tokens()
    assert again.config == source.config
    assert torch.equal(again(ids), source(ids))
    wanted = Phase2Config.from_phase1(again.config, htt_rank=6) if carried else None
    model = convert_phase1_to_phase2(again, wanted).eval()
    save_model(model, tmp_path / "two")
    loaded = load_model(tmp_path / "two", device="cpu")
    assert loaded.config == model.config
    assert torch.equal(loaded(ids), model(ids))


class Foreign(nn.Module):
    """A Transformer whose module names tell no role."""

    def __init__(self, tied=False, vocab_size=90, width=32, layers=4, positions=50):
        super().__init__()
        self.a = nn.Embedding(positions, width)
        self.b = nn.Embedding(vocab_size, width)
        self.c = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True) for _ in range(layers)
        )
        self.d = nn.LayerNorm(width)
        self.e = nn.Linear(width, vocab_size)
        if tied:
            self.e.weight = self.b.weight
        for parameter in self.parameters():
            parameter.data.normal_()


def test_foreign_modules_are_matched_by_shape_and_role():
    source = Foreign()
    model = convert_phase1_to_phase2(source)
    assert (model.vocab_size, model.d_model, model.n_layers) == (90, 32, 4)
    assert torch.equal(model.token_embedding.weight, source.b.weight)
    assert torch.equal(model.lm_head.weight, source.e.weight)
    assert torch.equal(model.ln_f.weight, source.d.weight)
    for ours, theirs in zip(model.blocks, source.c, strict=True):
        assert torch.equal(ours.ln1.bias, theirs.norm1.bias)
        assert torch.equal(ours.ln2.weight, theirs.norm2.weight)
    report = model.conversion_report
    assert len(report.copied) == 2 + 2 + 4 * 4
    assert {"a.weight", "e.bias"} <= {t.name for t in report.left_behind}
    assert any("self_attn" in t.name for t in report.left_behind)
    assert model(torch.randint(0, 90, (1, 200))).isfinite().all()


def test_tied_weights_stay_tied(tmp_path):
    source = Foreign(tied=True)
    model = convert_phase1_to_phase2(source, freeze_phase1_weights=True)
    assert model.config.tie_embeddings
    assert model.lm_head.weight is model.token_embedding.weight
    assert not model.lm_head.weight.requires_grad
    assert torch.equal(model.lm_head.weight, source.b.weight)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.lm_head.weight is loaded.token_embedding.weight
    ids = torch.randint(0, 90, (1, 20))
    assert torch.equal(loaded(ids), model.eval()(ids))
    wanted = Phase2Config(vocab_size=90, d_model=32, n_layers=2, num_heads=2, head_dim=16)
    report = convert_phase1_to_phase2(source, wanted).conversion_report
    assert report.config_changes == {"tie_embeddings": (False, True)}


def test_warning_if_no_part_of_a_module_fits(caplog):
    wanted = Phase2Config(vocab_size=91, d_model=16, n_layers=1, num_heads=2, head_dim=8)
    model = convert_phase1_to_phase2(Foreign(), wanted)
    assert model.conversion_report.copied == []
    assert "no part of the source fits" in caplog.text
    with pytest.raises(ConfigError, match="give phase2_config"):
        convert_phase1_to_phase2(nn.Linear(3, 4))


def test_only_parts_that_fit_are_copied():
    wanted = Phase2Config(vocab_size=90, d_model=32, n_layers=2, num_heads=2, head_dim=16, htt_rank=4)
    model = convert_phase1_to_phase2(Foreign(), wanted)
    names = {t.name for t in model.conversion_report.copied}
    assert "lm_head.weight" in names
    assert not any(name.startswith("token_embedding") for name in names)
    assert {"blocks.0.ln1.weight", "blocks.1.ln2.bias"} <= names


def test_phase2_model_is_refused():
    with pytest.raises(ConfigError, match="is a Phase 2 model"):
        convert_phase1_to_phase2(create_phase2_model(vocab_size=20, d_model=16, n_layers=1, num_heads=2, head_dim=8))


@pytest.mark.parametrize("wrong", ["tiny", {"d_model": 128}, get_phase1_preset("tiny")], ids=lambda x: type(x).__name__)
def test_error_names_a_configuration_of_another_kind(wrong):
    with pytest.raises(ConfigError, match="config must be a Phase2Config, got"):
        create_phase2_model(wrong)
    with pytest.raises(ConfigError, match="config must be a Phase1Config, got"):
        create_phase1_model(wrong if isinstance(wrong, str | dict) else Phase2Config())
