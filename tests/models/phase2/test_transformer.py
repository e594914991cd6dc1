"""Transformers of the Llama family that become Phase 2 models."""

import json
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from resolvent import CheckpointError, ConfigError, load_model, save_model
from resolvent.inspection.trace import trace_text
from resolvent.models.phase2 import Phase2Config, Phase2IntegratedModel, convert_transformer, transformer_config

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=72,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "tied": (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=True)),
    "ungrouped": (LlamaForCausalLM, LlamaConfig, dict(num_key_value_heads=4)),
    "one key": (LlamaForCausalLM, LlamaConfig, dict(num_key_value_heads=1)),
    "wide heads": (LlamaForCausalLM, LlamaConfig, dict(head_dim=20)),
    "base": (LlamaForCausalLM, LlamaConfig, dict(rope_theta=500_000.0, rms_norm_eps=1e-3)),
    "linear": (LlamaForCausalLM, LlamaConfig, dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
    "llama3": (LlamaForCausalLM, LlamaConfig, dict(rope_scaling=LLAMA3, rope_theta=100.0)),
    "mistral": (MistralForCausalLM, MistralConfig, dict(sliding_window=16)),
    "mistral without window": (MistralForCausalLM, MistralConfig, dict(sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2 with windows": (
        Qwen2ForCausalLM,
        Qwen2Config,
        dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
    ),
}
DYNAMIC = (LlamaForCausalLM, LlamaConfig, dict(rope_scaling=dict(rope_type="dynamic", factor=2.0)))


def transformer(family: tuple[Any, Any, dict[str, Any]], **options: Any) -> Any:
    """Return a small model of Transformers with large weights, biases and norms: no part is lost in rounding."""
    kind, config, own = family
    model = kind(config(**{**SIZES, **own, **options})).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, length))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference of logits, in units of their spread."""
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Phase2IntegratedModel]:
    theirs = transformer(FAMILIES[request.param])
    return theirs, convert_transformer(theirs)


@torch.no_grad()
def test_logits_equal_transformers_at_any_length_whole_and_token_by_token(pair):
    theirs, ours = pair
    ids = tokens(150)
    expected = theirs(ids).logits
    whole, state = ours(ids[:, :100], return_state=True)
    assert error(whole, expected[:, :100]) < 1e-4
    logits = []
    for token in ids[:, 100:].split(1, dim=1):
        out, state = ours(token, state=state, return_state=True)
        logits.append(out)
    assert error(torch.cat(logits, 1), expected[:, 100:]) < 1e-4


@torch.no_grad()
def test_padded_and_packed_rows_equal_transformers(pair):
    theirs, ours = pair
    long, short = tokens(40, batch=1), tokens(25, batch=1)
    expected = [theirs(x).logits for x in (long, short)]
    packed = ours(torch.cat([long, short], 1), cu_seqlens=torch.tensor([0, 40, 65]))
    rows = torch.cat([long, torch.nn.functional.pad(short, (15, 0))])
    mask = torch.ones_like(rows)
    mask[1, :15] = 0
    padded = ours(rows, attention_mask=mask)
    assert error(packed, torch.cat(expected, 1)) < 1e-4
    assert error(padded[0], expected[0][0]) < 1e-4 and error(padded[1, 15:], expected[1][0]) < 1e-4


@torch.no_grad()
def test_greedy_continuations_equal_transformers(pair):
    theirs, ours = pair
    prompt = tokens(20, batch=1)
    expected = theirs.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert ours.generate(prompt, max_new_tokens=30, temperature=0).tolist() == expected.tolist()


@torch.no_grad()
def test_dynamic_scaling_equals_transformers_that_read_token_by_token():
    theirs = transformer(DYNAMIC)
    ours, ids = convert_transformer(theirs), tokens(100, batch=1)
    assert error(ours(ids[:, :64]), theirs(ids[:, :64]).logits) < 1e-4
    cache, logits = None, []
    for token in ids.split(1, dim=1):
        out = theirs(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    assert error(ours(ids), torch.cat(logits, 1)) < 1e-4


@torch.no_grad()
def test_a_part_that_is_left_out_has_no_parameter_and_no_state(pair, tmp_path):
    theirs, gated = pair
    ours, ids = convert_transformer(theirs, transformer_config(theirs, bk_core=False)), tokens(50)
    assert ours.num_parameters() == sum(x.numel() for x in theirs.parameters())
    assert not ours.conversion_report.new
    assert torch.equal(ours(ids), gated(ids))
    logits, state = ours(ids[:, :30], return_state=True)
    assert all(layer.resolvent is layer.memory is None for layer in state.layers)
    after, _ = ours(ids[:, 30:], state=state, return_state=True)
    assert error(torch.cat([logits, after], 1), theirs(ids).logits) < 1e-4
    assert ours(ids, return_diagnostics=True)[1]["gamma_values"] == [None] * 3
    save_model(ours, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model", device="cpu")(ids), ours(ids))
    with pytest.raises(ConfigError, match="no BK-Core to inspect in a model with bk_core=False"):
        trace_text(ours, ids[0])


@torch.no_grad()
def test_a_saved_conversion_has_the_same_logits(pair, tmp_path):
    _, ours = pair
    save_model(ours, tmp_path / "model")
    again, ids = load_model(tmp_path / "model", device="cpu"), tokens(30)
    assert again.config == ours.config and torch.equal(again(ids), ours(ids))


def test_folders_shards_and_bfloat16_convert_like_the_model(tmp_path):
    theirs = transformer(FAMILIES["llama"]).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = convert_transformer(theirs).state_dict()
    copied = {tensor.name for tensor in convert_transformer(theirs).conversion_report.copied}
    for folder in ("one", "shards"):
        state = convert_transformer(tmp_path / folder).state_dict()
        for name in copied:
            assert state[name].dtype == torch.bfloat16 and torch.equal(state[name], expected[name]), name


def test_gradients_reach_every_part_but_what_the_gates_hold_back():
    ours = convert_transformer(transformer(FAMILIES["llama"])).train()
    ours(tokens(20), labels=tokens(20)).backward()
    for tensor in ours.conversion_report.copied:
        assert ours.get_parameter(tensor.name).grad.abs().sum() > 0, tensor.name
    assert ours.get_parameter("blocks.0.bk_proj.weight").grad.abs().sum() > 0


def test_a_given_configuration_is_used_or_refused_with_every_field():
    theirs = transformer(FAMILIES["llama"])
    config = transformer_config(theirs, n_seq=128, dropout=0.5)
    assert convert_transformer(theirs, config).config == config
    with pytest.raises(
        ConfigError, match=r"num_heads is 8, that of the Transformer 4; .*norm is 'layernorm'.* 'rmsnorm'"
    ):
        convert_transformer(theirs, Phase2Config(vocab_size=97, d_model=48, n_layers=3))
    with pytest.raises(ConfigError, match="base_decay must be > 0"):
        convert_transformer(theirs, replace(config, base_decay=-1.0))


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (dict(hidden_act="gelu"), "hidden_act must be silu, got 'gelu'"),
        (dict(attention_bias=True), "attention_bias must be False, got True"),
        (dict(mlp_bias=True), "mlp_bias must be False, got True"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=2.0)), "must be one of default, .*, got 'yarn'"),
    ],
)
def test_parts_that_phase_2_lacks_are_named(options, fault):
    with pytest.raises(ConfigError, match=fault):
        convert_transformer(transformer(FAMILIES["llama"], **options))


def test_damaged_folders_are_named(tmp_path):
    theirs = transformer(FAMILIES["llama"])
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    first = min(tmp_path.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-10])
    with pytest.raises(CheckpointError, match=first.name):
        convert_transformer(tmp_path)
    first.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of \d+ shards: {first.name}"):
        convert_transformer(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a GGUF file"):
        convert_transformer(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda x: x.index_fill(0, torch.tensor([3]), torch.nan), "has values that are not finite: copy the model"),
        (lambda x: x.index_fill(0, torch.tensor([3]), -torch.inf), "has values that are not finite: copy the model"),
        (lambda x: x.to(torch.int8), "is int8, not one of float64, .*: save the model with weights that are not quan"),
        (lambda x: x.to(torch.float8_e4m3fn), "is float8_e4m3fn, not one of float64"),
    ],
)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_no_finite_floats_are_named(tmp_path, name, change, fault):
    transformer(FAMILIES["llama"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, name: change(tensors[name])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} in .* {fault}"):
        convert_transformer(tmp_path)


@pytest.mark.parametrize(
    ("family", "entries", "error", "fault"),
    [
        ("llama", dict(num_hidden_layers=10**9), CheckpointError, "num_hidden_layers is 1000000000, .* of 3 layers"),
        ("llama", dict(num_attention_heads=10**9, head_dim=12), CheckpointError, "the model of its configuration: "),
        ("llama", dict(vocab_size=10**9), CheckpointError, "token_embedding.weight has 1000000000 rows"),
        ("llama", dict(rope_parameters=5), ConfigError, "rope_parameters must be an object, got 5"),
        ("llama", dict(rope_scaling="x"), ConfigError, "rope_scaling must be an object, got 'x'"),
        ("qwen2 with windows", dict(layer_types=3), ConfigError, "layer_types must be a list, got 3"),
        (
            "qwen2 with windows",
            dict(layer_types=None, max_window_layers="x"),
            ConfigError,
            "max_window_layers must be an integer, got 'x'",
        ),
    ],
)
def test_wrong_entries_of_a_configuration_are_named(tmp_path, family, entries, error, fault):
    transformer(FAMILIES[family]).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | entries))
    with pytest.raises(error, match=fault):
        convert_transformer(tmp_path)


def test_weights_in_a_pipe_are_not_waited_for(tmp_path):
    transformer(FAMILIES["llama"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="it is no regular file"):
        convert_transformer(tmp_path)


def test_tensors_of_another_configuration_are_named(tmp_path):
    theirs = transformer(FAMILIES["llama"])
    theirs.config.num_key_value_heads = 4
    with pytest.raises(CheckpointError, match=r"v_proj.weight has the shape \(24, 48\), which does not fit"):
        convert_transformer(theirs)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="model_type must be one of llama, mistral, qwen2, got 'gpt2'"):
        convert_transformer(other)
    with pytest.raises(ConfigError, match="must be a model of Transformers, a folder or a GGUF file, got Linear"):
        convert_transformer(torch.nn.Linear(2, 2))
