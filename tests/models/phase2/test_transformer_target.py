"""Phase 2 models that become Transformers again."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from resolvent import ConfigError, load_model, save_model
from resolvent.models.phase2 import (
    Phase2Config,
    Phase2IntegratedModel,
    convert_transformer,
    save_transformer,
    transformer_config,
)

from .test_transformer import DYNAMIC, FAMILIES, error, tokens, transformer


@pytest.mark.parametrize("family", [*FAMILIES, "dynamic"])
@torch.no_grad()
def test_a_transformer_comes_back_bit_for_bit(family, tmp_path):
    theirs = transformer(FAMILIES.get(family, DYNAMIC))
    ours, ids = convert_transformer(theirs), tokens(50)
    kind = save_transformer(ours, tmp_path)
    assert kind == theirs.config.model_type or (family, kind) == ("mistral without window", "llama")
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    mine, yours = back.state_dict(), theirs.state_dict()
    assert mine.keys() == yours.keys()
    assert all(torch.equal(mine[name], yours[name]) for name in mine)
    assert error(back(ids).logits, theirs(ids).logits) < 1e-6
    again = convert_transformer(tmp_path)
    assert replace(again.config, n_seq=ours.config.n_seq) == ours.config
    copied = {tensor.name for tensor in again.conversion_report.copied}
    assert all(torch.equal(again.get_parameter(name), ours.get_parameter(name)) for name in copied)


def test_bfloat16_stays_through_a_saved_model(tmp_path):
    theirs = transformer(FAMILIES["tied"]).to(torch.bfloat16)
    save_model(convert_transformer(theirs), tmp_path / "ours")
    ours = load_model(tmp_path / "ours", device="cpu", dtype="stored")
    assert {x.dtype for x in ours.parameters()} == {torch.bfloat16} and ours.tied
    assert load_model(tmp_path / "ours", device="cpu").lm_head.weight.dtype == torch.float32
    save_transformer(ours, tmp_path / "theirs")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").state_dict()
    assert back["model.norm.weight"].dtype == torch.bfloat16
    assert all(torch.equal(back[name], x) for name, x in theirs.state_dict().items())
    assert torch.isfinite(ours(tokens(20))).all()


def test_the_first_block_and_part_that_llama_lacks_are_named(tmp_path):
    theirs = transformer(FAMILIES["llama"])
    ours = convert_transformer(theirs)
    ours.blocks[1].bk_proj.weight.data[3, 1] = 0.1
    hybrid = convert_transformer(theirs, transformer_config(theirs, keep_attention=[0]))
    windows = convert_transformer(theirs, replace(transformer_config(theirs), attention_windows=(0, 8, 16)))
    biased = transformer(FAMILIES["qwen2"])
    two = convert_transformer(biased, replace(transformer_config(biased), attention_windows=(0, 8, 16)))
    fresh = Phase2Config(vocab_size=97, d_model=48, n_layers=2, num_heads=2, head_dim=24, attention_layers=(0, 1))
    for model, fault in (
        (ours, "block 1 has BK-Core, whose map bk_proj is not zero"),
        (hybrid, "block 1 has a memory: attention_layers names 1 of 3 blocks"),
        (windows, "block 1 has a window of 8 tokens, another block of all: only Qwen2, with biases"),
        (two, "block 2 has a window of 16 tokens, another block of 8: these Transformers have one"),
        (Phase2IntegratedModel(fresh), "block 0 has a convolution before q, k and v: conv_size is 4"),
        (Phase2IntegratedModel(replace(fresh, conv_size=1)), "block 0 has normalised queries and keys"),
    ):
        with pytest.raises(ConfigError, match=fault):
            save_transformer(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    scaled = convert_transformer(theirs)
    scaled.config = replace(scaled.config, embedding_scale=2.0)
    with pytest.raises(ConfigError, match="embedding_scale is 2, not 1"):
        save_transformer(scaled, tmp_path / "out")
