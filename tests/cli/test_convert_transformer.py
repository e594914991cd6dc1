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
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# out\n" in card and f"Converted from the Transformer `{folder.name}`" in card and "is exact" in card
    assert f"That of the Transformer `{folder.name}`" in card


def test_layers_that_keep_attention_and_the_loss_of_the_others(resolvent: Resolvent, folder: Path, tmp_path: Path):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("A river, a stone, a cloud and a tower. " * 20)
    less = ("--keep-attention", "every:2", "--attention-window", "32", "--mechanisms", "none", "--text", text)
    outcome = resolvent("convert", folder, out, *less, "--json", tmp_path / "report.json")
    assert outcome.code == 0
    told = words(outcome.out)
    assert "Not exact: 1 layer has a memory in the place of attention, and attention reads 32 tokens" in told
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["exact"] and report["loss"]["text"] == str(text) and report["loss"]["tokens"] > 300
    assert f"{report['loss']['before']:.4f} nats per token before, {report['loss']['after']:.4f} after" in told
    card = (out / "README.md").read_text()
    assert f"not exact: {report['loss']['before']:.4f} nats per token before" in card and "is exact" not in card
    config = load_model(out, device="cpu").config
    assert config.attention_layers == (1,) and config.attention_window == 32
    assert config.bk_core and not config.snr_enabled and not config.resonance_enabled
    trained = resolvent(
        "train", "--from", out, "--data", text, "--steps", 2, "--seq-len", 64, "--freeze", "blocks.*.ffn.*",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert trained.code == 0 and "are trained (" in trained.out
    assert (tmp_path / "run" / "chat_template.jinja").exists() or TEMPLATE in (
        tmp_path / "run" / "tokenizer_config.json"
    ).read_text().replace('\\"', '"')
    outcome = resolvent("convert", tmp_path / "run", tmp_path / "back", "--to", "llama")
    assert outcome.code == 1 and "block 0 has a memory" in outcome.err and not (tmp_path / "back").exists()


def test_back_to_llama_with_its_tokenizer(resolvent: Resolvent, folder: Path, tmp_path: Path):
    resolvent("convert", folder, tmp_path / "ours")
    outcome = resolvent("convert", tmp_path / "ours", tmp_path / "back", "--to", "llama")
    assert outcome.code == 0 and "A Transformer (llama) is in" in outcome.out
    theirs, back = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "back"))
    assert all(torch.equal(back.state_dict()[name], x) for name, x in theirs.state_dict().items())
    assert back.config.eos_token_id == theirs.config.eos_token_id
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == TEMPLATE
    outcome = resolvent("convert", folder, tmp_path / "again", "--to", "llama")
    assert outcome.code == 2 and "is a Transformer already" in words(outcome.err)


def test_generation_ends_at_the_end_tokens_of_the_model(resolvent: Resolvent, folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    resolvent("convert", folder, out)
    greedy = ("generate", out, "--prompt", "Rhyme", "--max-new-tokens", 12, "--temperature", 0)
    model = load_model(out, device="cpu")
    written = model.generate(torch.tensor([[256, *b"Rhyme"]]), 12, temperature=0, eos_token_id=256)[0, 6:].tolist()
    settings = out / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [256, written[2]]}))
    ended = written[: written.index(written[2])]
    assert resolvent(*greedy).out == "Rhyme" + bytes(ended).decode("utf-8", "replace") + "\n"


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


def test_an_unknown_quantisation_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from resolvent.errors import CheckpointError
    from resolvent.models.phase2 import convert_transformer

    def unknown(*_: object) -> None:
        raise NotImplementedError("Dequantization for I8 is not yet implemented")

    path = tmp_path / "model.gguf"
    write_gguf(AutoModelForCausalLM.from_pretrained(folder), path)
    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(CheckpointError, match=r"cannot read model\.embed_tokens.* in .*gguf: Dequantization for I8"):
        convert_transformer(path)


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
    (source / "few.txt").write_text("Too few.")
    refused("model_type must be one of llama, mistral, qwen2, got 'gpt_neox'", model_type="gpt_neox")
    refused(
        "must be one of default, linear, dynamic, llama3, got 'yarn'", rope_scaling={"type": "yarn"}, rope_parameters={}
    )
    refused("head_dim is 4, that of the Transformer 8", "--set", "head_dim=4", code=2)
    refused("unknown field of Phase2Config: 'window'", "--set", "window=4", code=2)
    refused("a Transformer has no tensor train", "--keep-tensor-train", code=2)
    refused("must be layers such as 3,9,15, or every:N, got 'all'", "--keep-attention", "all", code=2)
    refused("the model has layers 0..1, there is no layer 2", "--keep-attention", "0,2", code=2)
    refused("every:N needs N in 1..2, got 3", "--keep-attention", "every:3", code=2)
    refused("there is no loss to measure", "--text", str(folder / "config.json"), code=2)
    refused("cannot read", "--attention-window", "8", "--text", str(tmp_path / "nothing"))
    refused("too few to measure a conversion", "--attention-window", "8", "--text", str(source / "few.txt"))
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
