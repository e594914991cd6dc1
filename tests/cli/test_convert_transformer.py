"""`resolvent convert` of Transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from resolvent.data.tokenization import bytes_tokenizer
from resolvent.hf import Phase2ForCausalLM
from resolvent.models import load_model

from .conftest import words

Resolvent = Callable[..., Any]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SIZES = dict(hidden_size=32, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a small Llama with large weights, in shards, with a tokenizer of bytes and a chat template."""
    path = tmp_path_factory.mktemp("transformer") / "llama"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=257, tie_word_embeddings=True, eos_token_id=256))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path, max_shard_size="30KB")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer(), eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_becomes_a_model_with_its_tokenizer_and_template(resolvent: Resolvent, folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    report = json.loads(resolvent("convert", folder, out, "--set", "n_seq=64", "--json", "-").out)
    assert {tensor["status"] for tensor in report["tensors"]} == {"copied", "new"}
    ids, theirs = torch.randint(0, 257, (2, 50)), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = load_model(out, device="cpu")
        assert ours.n_seq == 64
        assert (ours(ids) - expected).abs().max() < 1e-4 * expected.std()
        again = AutoModelForCausalLM.from_pretrained(out)
        assert isinstance(again, Phase2ForCausalLM)
        assert (again(ids).logits - expected).abs().max() < 1e-4 * expected.std()
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    text = resolvent("generate", out, "--prompt", "Rhyme", "--max-new-tokens", 5, "--temperature", 0)
    assert text.code == 0 and text.out.startswith("Rhyme")


def test_mechanisms_are_left_out(resolvent: Resolvent, folder: Path, tmp_path: Path):
    report = json.loads(resolvent("convert", folder, tmp_path / "out", "--mechanisms", "none", "--json", "-").out)
    assert {tensor["status"] for tensor in report["tensors"]} == {"copied"}
    outcome = resolvent("convert", tmp_path / "out", tmp_path / "again", "--mechanisms", "none")
    assert outcome.code == 2 and "--mechanisms" in words(outcome.err)
    assert resolvent("generate", tmp_path / "out", "--max-new-tokens", 3).code == 0


def test_a_gguf_file_has_the_logits_of_the_folder(folder: Path, tmp_path: Path):
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    write_gguf(theirs, tmp_path / "model.gguf")
    from resolvent.models.phase2 import convert_transformer

    ours, ids = convert_transformer(tmp_path / "model.gguf"), torch.randint(0, 257, (2, 50))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert (ours(ids) - expected).abs().max() < 1e-4 * expected.std()


def test_a_truncated_gguf_file_is_named(resolvent: Resolvent, folder: Path, tmp_path: Path):
    path = tmp_path / "model.gguf"
    write_gguf(AutoModelForCausalLM.from_pretrained(folder), path)
    content = path.read_bytes()
    for length in (len(content) // 2, 100, 0):
        path.write_bytes(content[:length])
        outcome = resolvent("convert", path, tmp_path / "out")
        assert outcome.code == 1 and f"cannot read the GGUF file {path}" in words(outcome.err).replace("\n", "")
        assert not (tmp_path / "out").exists()


def test_bad_sources_are_named_and_nothing_is_written(resolvent: Resolvent, folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")

    def refused(message: str, *options: str, code: int = 1, **changes: object) -> None:
        config = json.loads((folder / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | changes))
        outcome = resolvent("convert", source, tmp_path / "out", *options)
        assert outcome.code == code and message in words(outcome.err), outcome.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]

    source = tmp_path / "source"
    shutil.copytree(folder, source)
    refused("model_type must be one of llama, mistral, qwen2, got 'gpt_neox'", model_type="gpt_neox")
    refused(
        "must be one of default, linear, dynamic, llama3, got 'yarn'", rope_scaling={"type": "yarn"}, rope_parameters={}
    )
    refused("head_dim is 4, that of the Transformer 8", "--set", "head_dim=4", code=2)
    refused("unknown field of Phase2Config: 'window'", "--set", "window=4", code=2)
    refused("a Transformer has no tensor train", "--keep-tensor-train", code=2)
    bytes_tokenizer().save(str(source / "tokenizer.json"))
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 257, "content": "<|more|>"})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused("has 258 tokens, the model 257")
    (source / "tokenizer.json").unlink()
    refused("holds no tokenizer.json")
    shutil.copyfile(folder / "tokenizer.json", source / "tokenizer.json")
    shard = min(source.glob("*.safetensors"))
    shard.unlink()
    refused(f"shards: {shard.name}")


def write_gguf(model: Any, path: Path) -> None:
    """Write a Llama as GGUF, with the rows of q and k in GGUF's order."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(10_000.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, x in model.named_parameters():
        array = x.detach().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                rows, columns = array.shape
                array = array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None
        writer.add_tensor(found, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
