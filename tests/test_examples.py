"""The examples that train with Transformers are run, on a model and a text that take seconds."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from resolvent import create_phase2_model, load_model, save_model
from resolvent.data import load_tokenizer, save_tokenizer
from resolvent.data.tokenization import bytes_tokenizer

if not os.environ.get("CI"):
    pytest.importorskip("peft", reason="needs Transformers and PEFT: pip install 'resolvent[dev]'")
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = "The cat sat on the mat, and the rat sat on the hat. " * 40


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A small model with its tokenizer; calls an example with it, a text and a folder for what comes out."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=257, d_model=48, n_layers=2, n_seq=256, num_heads=3, head_dim=16, dropout=0.0, device="cpu")
    save_model(create_phase2_model(**sizes), tmp_path / "run")
    save_tokenizer(bytes_tokenizer(), tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT)

    def call(example):
        arguments = [example, str(tmp_path / "run"), str(tmp_path / "text.txt"), str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", arguments)
        torch.manual_seed(0)
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
        return tmp_path / "out"

    return call


def loss(model):
    ids = torch.tensor([list(TEXT[:200].encode())])
    with torch.inference_mode():
        return torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:]).item()


def test_fine_tuning(run, tmp_path):
    out = run("finetune_with_transformers.py")
    before, after = load_model(tmp_path / "run", "cpu"), load_model(out, "cpu")
    assert loss(after) < loss(before) - 1
    tokenizer = load_tokenizer(out)
    ids = torch.tensor([[tokenizer.token_to_id("<|endoftext|>"), *tokenizer.encode("The cat").ids]])
    hf = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert torch.equal(hf.generate(ids, max_new_tokens=8, do_sample=False), after.generate(ids, 8, temperature=0))
    assert AutoTokenizer.from_pretrained(out)("The cat")["input_ids"] == tokenizer.encode("The cat").ids


def test_lora(run, tmp_path, capsys):
    out = run("lora.py")
    assert "trainable params" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    before = loss(base.model)
    merged = PeftModel.from_pretrained(base, out).merge_and_unload()
    assert loss(merged.model.eval()) < before - 0.3  # with embedding and head frozen as they were drawn
