"""Run folders load in Transformers, including tokenizer and end of text."""

import json
import os
import shutil

import pytest
import torch

from resolvent import load_model
from resolvent.data import EOT, load_tokenizer

if not os.environ.get("CI"):
    pytest.importorskip("transformers", reason="needs Transformers: pip install 'resolvent[hf]'")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import resolvent.hf  # noqa: F401  makes the models known to Transformers

PROMPT = "Rhyme: the"


def test_transformers_generates_the_same_text(run_dir, resolvent):
    tokenizer = AutoTokenizer.from_pretrained(run_dir, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(run_dir, local_files_only=True, trust_remote_code=False)
    prompt = [tokenizer.bos_token_id, *tokenizer(PROMPT)["input_ids"]]
    out = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)
    written = tokenizer.decode(out[0], skip_special_tokens=True)
    shown = resolvent("generate", run_dir, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 60)
    assert shown.code == 0 and shown.out == written + "\n"


def test_tokenizers_of_both_libraries_agree(run_dir):
    ours, theirs = load_tokenizer(run_dir), AutoTokenizer.from_pretrained(run_dir)
    texts = [PROMPT, f"a {EOT}  é\n", "𝄞 , 's .", "L'Haÿ-les-Roses"]
    padded = theirs(texts, padding=True, return_tensors="pt")
    for text, ids, mask in zip(texts, padded["input_ids"], padded["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == ours.encode(text, add_special_tokens=False).ids
        assert theirs.decode(ids[mask.bool()]) == text
    assert padded["attention_mask"][:, -1].all(), "padding stands on the left"
    assert theirs.eos_token_id == theirs.bos_token_id == ours.token_to_id(EOT)
    assert theirs.pad_token_id == ours.token_to_id("ÿ") == 255, "the byte 0xFF, which no text holds"


def test_a_pipeline_reads_it(run_dir):
    write = pipeline("text-generation", model=str(run_dir), device="cpu")
    texts = write([PROMPT, "Rhyme: the old cat sat"], batch_size=2, max_new_tokens=5, do_sample=False)
    alone = write("Rhyme: the old cat sat", max_new_tokens=5, do_sample=False)
    assert texts[1] == alone


def test_folder_of_an_older_release_is_read(run_dir, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(run_dir / name, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    ids = torch.arange(50)[None]
    expected = load_model(run_dir, "cpu")(ids)
    assert torch.equal(load_model(tmp_path, "cpu")(ids), expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)
