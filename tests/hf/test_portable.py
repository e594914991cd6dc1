"""Folders that Transformers reads in a fresh process, without an import by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from resolvent import load_model
from resolvent.data import build_tokenizer, save_tokenizer
from resolvent.models import save_model
from tests.models.small import PHASE1, PHASE2, tokens

FRESH = """
import json, sys
import transformers

early, folder = transformers, sys.argv[1]
pipe = transformers.pipeline("text-generation", model=folder, trust_remote_code=True)
text = pipe("The", max_new_tokens=8, do_sample=False)[0]["generated_text"]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(sys.argv[2])
architecture = getattr(early, model.config.architectures[0])  # as `transformers serve` does
print(json.dumps([text, type(model).__module__, architecture is type(model)]))
"""


@pytest.fixture(scope="module", params=[PHASE2, PHASE1], ids=["phase2", "phase1"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ours")
    save_model(request.param.model(vocab_size=257), folder)
    save_tokenizer(build_tokenizer("bytes", []), folder)
    return folder


def test_fresh_process_reads_a_portable_folder(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import resolvent.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(ours)
    model.save_pretrained(tmp_path / "portable", portable=True)
    AutoTokenizer.from_pretrained(ours).save_pretrained(tmp_path / "portable")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    command = [sys.executable, "-c", FRESH, str(tmp_path / "portable"), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    text, module, found = json.loads(done.stdout.splitlines()[-1])
    ids = torch.tensor([list(b"The")])
    new = load_model(ours, device="cpu").generate(ids, 8, temperature=0, eos_token_id=256)[0, 3:]
    assert text == "The" + build_tokenizer("bytes", []).decode([token for token in new.tolist() if token != 256])
    assert module == "resolvent.models.hf" and found
    again = tmp_path / "again"
    assert (again / "modeling_resolvent.py").read_bytes() == (tmp_path / "portable/modeling_resolvent.py").read_bytes()
    assert not (again / "hf.py").exists()
    ids = tokens(20)
    assert torch.equal(load_model(again, device="cpu")(ids), load_model(ours, device="cpu")(ids))


def test_folder_is_portable_where_asked_only(ours: Path, tmp_path: Path):
    import resolvent.hf  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(ours)
    for name, portable in (("plain", None), ("portable", True), ("plain again", False)):
        model.save_pretrained(tmp_path / name, portable=portable)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        is_portable = "auto_map" in json.loads((tmp_path / name / "config.json").read_text())
        assert is_portable == (tmp_path / name / "modeling_resolvent.py").exists() == (portable is True)
        load_model(tmp_path / name, device="cpu")
