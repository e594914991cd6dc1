import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resolvent import CheckpointError, create_phase1_model, create_phase2_model, save_model
from resolvent.data import save_tokenizer
from resolvent.data.tokenization import bytes_tokenizer
from resolvent.runs import RUN_FILE, fixed_files, load_trained, run_of

SIZES = dict(d_model=32, n_layers=1, n_seq=64, num_heads=2, dropout=0.0, device="cpu")
GOLDEN = Path(__file__).parent / "data" / "golden" / "format-5" / "run"


def loaded_by(code: str) -> set[str]:
    """Modules of training that Python has loaded after some code."""
    ask = "import sys; print(*(name for name in sys.modules if name.split('.')[:2] == ['resolvent', 'training']"
    script = f"{code}\n{ask} or name == 'accelerate'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_a_trained_model_loads_without_training():
    code = "import resolvent.cli.generate; from pathlib import Path; from resolvent.runs import load_trained\n"
    assert loaded_by(f"{code}load_trained(Path({str(GOLDEN)!r}), 'cpu')") == set()


def test_generating_loads_nothing_of_training_but_the_fields_of_its_options():
    arguments = ["resolvent", "generate", str(GOLDEN), "--max-new-tokens", "1"]
    code = (
        f"import sys; from resolvent.cli import main; sys.argv = {arguments!r}\ntry: main()\nexcept SystemExit: pass\n"
    )
    names = ("training", "training.config", "training.lora", "training.schedule")
    assert loaded_by(code) == {f"resolvent.{name}" for name in names}


def test_a_checkpoint_belongs_to_its_run():
    assert run_of(Path("runs/a")) == run_of(Path("runs/a/checkpoints/step-00000001")) == Path("runs/a")


def test_folder_may_be_named_by_a_string():
    model, tokenizer = load_trained(str(GOLDEN), "cpu")
    assert model.vocab_size == tokenizer.get_vocab_size()


def test_the_files_that_never_change_are_those_of_a_run():
    assert RUN_FILE in fixed_files() and all((GOLDEN / name).exists() for name in fixed_files())


def save(model, folder):
    save_model(model, folder)
    save_tokenizer(bytes_tokenizer(), folder)


@pytest.mark.parametrize("tied", [False, True])
def test_padded_table_is_cut_to_the_tokenizer(tied, tmp_path):
    padded = create_phase2_model(vocab_size=320, head_dim=16, tie_embeddings=tied, **SIZES)
    padded.lm_head.weight.data[257:] *= 100  # tokens that would be the likeliest
    save(padded, tmp_path)
    model, tokenizer = load_trained(tmp_path, "cpu")
    ids = torch.randint(0, 257, (3, 20))
    assert model.vocab_size == model.config.vocab_size == tokenizer.get_vocab_size() == 257
    assert model.tied == tied and not model.training
    assert torch.equal(model(ids), padded(ids)[..., :257])
    torch.manual_seed(0)
    assert padded.generate(ids, 20).max() >= 257 > model.generate(ids, 20).max()
    model(ids, labels=ids).backward()
    save(model, tmp_path / "cut")
    assert torch.equal(load_trained(tmp_path / "cut", "cpu")[0](ids), model(ids))


@pytest.mark.parametrize("vocab_size", [256, 257 + 1025])
def test_table_of_another_tokenizer_is_refused(vocab_size, tmp_path):
    save(create_phase2_model(vocab_size=vocab_size, head_dim=16, **SIZES), tmp_path)
    with pytest.raises(CheckpointError, match=f"has 257 tokens, the model {vocab_size}: they are not of the same run"):
        load_trained(tmp_path, "cpu")


def test_tensor_train_cannot_be_cut(tmp_path):
    save(create_phase1_model(vocab_size=320, htt_rank=4, ar_ssm_max_rank=8, **SIZES), tmp_path)
    with pytest.raises(CheckpointError, match=r"has 257 tokens, the model 320: .*TensorTrainEmbedding has no rows"):
        load_trained(tmp_path, "cpu")


@pytest.mark.parametrize("shards", ["20KB", "1GB"])
def test_table_that_transformers_padded_is_read(shards, tmp_path):
    transformers = pytest.importorskip("transformers") if not os.environ.get("CI") else __import__("transformers")
    import resolvent.hf  # noqa: F401  makes the models known to Transformers

    save(create_phase2_model(vocab_size=257, head_dim=16, **SIZES), tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    model.resize_token_embeddings(pad_to_multiple_of=64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "padded")
    model.save_pretrained(tmp_path / "padded", max_shard_size=shards)
    assert model.config.vocab_size == 320
    assert load_trained(tmp_path / "padded", "cpu")[0].vocab_size == 257
