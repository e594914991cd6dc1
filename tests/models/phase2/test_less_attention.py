"""Transformers some of whose layers become memories, or attend to a window."""

from dataclasses import replace

import pytest
import torch

from resolvent import ConfigError, load_model, save_model
from resolvent.models.base import observe
from resolvent.models.phase2 import Phase2IntegratedModel, convert_transformer, match_readouts, transformer_config
from resolvent.models.phase2.block import blocks_of
from resolvent.ops.rotary import rotary_turns

from .test_transformer import FAMILIES, error, tokens, transformer


@pytest.fixture
def pair() -> tuple[Phase2IntegratedModel, Phase2IntegratedModel]:
    """Return the exact model of a Transformer, and one that attends in its second block alone, to 16 tokens."""
    theirs = transformer(FAMILIES["llama"])
    config = transformer_config(theirs, keep_attention=[1], attention_window=16, n_seq=64, consolidation_interval=64)
    return convert_transformer(theirs), convert_transformer(theirs, config)


@pytest.fixture
def hybrid(pair) -> Phase2IntegratedModel:
    return pair[1]


def test_layers_that_do_not_attend_take_over_the_maps_of_attention():
    theirs = transformer(FAMILIES["qwen2"])
    hybrid = convert_transformer(theirs, transformer_config(theirs, keep_attention=[1]))
    exact = convert_transformer(theirs)
    assert [block.hebbian is None for block in blocks_of(hybrid)] == [False, True, False]
    assert not hybrid.conversion_report.exact and exact.conversion_report.exact
    for mine, yours in zip(blocks_of(hybrid), blocks_of(exact), strict=True):
        for name in ("qkv_proj.weight", "qkv_proj.bias", "out_proj.weight"):
            assert torch.equal(mine.mixer.get_parameter(name), yours.mixer.get_parameter(name))
    left = {tensor.name for tensor in hybrid.conversion_report.left_behind}
    assert len(hybrid.conversion_report.copied) == len(exact.conversion_report.copied) and not left


def test_memories_start_with_rotary_positions_and_slow_decays(hybrid):
    layer = blocks_of(hybrid)[0].hebbian
    phases, _ = layer.phases(torch.zeros(1, 50, 48), None, None)
    expected = rotary_turns(torch.arange(1, 51), layer.head_dim)
    difference = phases - expected.unsqueeze(0)
    assert (difference - difference.round()).abs().max() < 1e-5
    gamma = observe(hybrid, tokens(30)).layers[0].gamma
    assert torch.allclose(gamma[..., 0], torch.tensor(1 / 64)) and torch.allclose(gamma[..., -1], torch.tensor(1 / 8))


@torch.no_grad()
def test_any_split_of_a_text_gives_the_same_logits(hybrid, tmp_path):
    ids = tokens(150)
    whole, (first, state) = hybrid(ids), hybrid(ids[:, :100], return_state=True)
    logits = [first]
    for token in ids[:, 100:].split(1, dim=1):
        out, state = hybrid(token, state=state, return_state=True)
        logits.append(out)
    assert error(torch.cat(logits, 1), whole) < 1e-4
    assert hybrid(ids, return_state=True)[1].nbytes == hybrid(ids[:, :20], return_state=True)[1].nbytes
    save_model(hybrid, tmp_path)
    assert torch.equal(load_model(tmp_path, device="cpu")(ids), whole)


@torch.no_grad()
def test_readouts_are_fitted_by_least_squares(pair):
    (exact, hybrid), ids = pair, tokens(60)
    match_readouts(hybrid, exact, ids)
    trace = observe(exact, ids)
    read = blocks_of(hybrid)[0](trace.entered, None, None, None, None).readout
    wanted = trace.layers[0].readout
    residual = (read - wanted).square().sum((0, 1))
    for factor in (0.0, 0.9, 1.1):
        assert (residual <= (factor * read - wanted).square().sum((0, 1)) + 1e-6).all()


@torch.no_grad()
def test_a_narrower_window_is_exact_within_it():
    theirs, ids = transformer(FAMILIES["mistral"]), tokens(40)
    narrow = convert_transformer(theirs, transformer_config(theirs, attention_window=8))
    expected = theirs(ids).logits
    assert not narrow.conversion_report.exact
    assert error(narrow(ids)[:, :8], expected[:, :8]) < 1e-4 < error(narrow(ids)[:, 8:], expected[:, 8:])
    same = transformer_config(theirs, attention_window=100)
    assert same == transformer_config(theirs) and convert_transformer(theirs, same).conversion_report.exact


def test_windows_are_the_smaller_of_the_layer_and_the_limit():
    theirs = transformer(FAMILIES["qwen2 with windows"])
    assert transformer_config(theirs, attention_window=32).windows == {0: 32, 1: 16, 2: 16}
    assert transformer_config(theirs, keep_attention=[2, 0]).windows == {0: None, 2: 16}


def test_gradients_reach_all_of_a_memory(hybrid):
    hybrid.train()(tokens(70), labels=tokens(70)).backward()
    layer = blocks_of(hybrid)[2].hebbian
    for name in ("norm_weight", "rotation_proj.bias", "rotation_proj.weight", "qkv_proj.weight", "log_eta"):
        assert layer.get_parameter(name).grad.abs().sum() > 0, name


def test_bad_choices_are_named():
    theirs = transformer(FAMILIES["mistral"])
    with pytest.raises(ConfigError, match=r"keep_attention must name layers of 0\.\.2, got -1, 5"):
        transformer_config(theirs, keep_attention=[5, -1])
    with pytest.raises(ConfigError, match="attention_window must be >= 1, got 0"):
        transformer_config(theirs, attention_window=0)
    with pytest.raises(ConfigError, match="block 0 attends to 17 tokens, the Transformer to 16"):
        convert_transformer(theirs, replace(transformer_config(theirs), attention_window=17))
    with pytest.raises(ConfigError, match="bk_core switched off needs no memory"):
        transformer_config(theirs, keep_attention=[1], bk_core=False)
    with pytest.raises(ConfigError, match=r"hebbian_dt must be > 1/π, got 0\.3"):
        transformer_config(theirs, keep_attention=[1], hebbian_dt=0.3)
    with pytest.raises(ConfigError, match="memory_rotation_bias needs memory_rotation"):
        transformer_config(theirs, keep_attention=[1], memory_rotation=False)
