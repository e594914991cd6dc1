"""LoRA: adapters of a saved model, in run folders and checkpoints."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DynamoBackend
from torch._dynamo.utils import counters

from resolvent.errors import CheckpointError, ConfigError
from resolvent.manifest import write_manifest
from resolvent.models import load_model
from resolvent.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX
from resolvent.models.phase1 import Phase1Config
from resolvent.models.storage import WEIGHTS, load_base
from resolvent.runs import load_trained
from resolvent.tensors import read_tensors, write_tensors
from resolvent.training import TrainingConfig, resume, train, train_step
from resolvent.training.checkpoint import checkpoint_path
from resolvent.training.lora import LoraOptions, add_adapters, is_adapter
from resolvent.training.memory import estimate_memory
from resolvent.training.optimizer import build_muon
from tests.processes import together

from .runs import after_step, metrics
from .test_distributed import run_here

pytest.importorskip("peft", reason="needs PEFT: pip install 'resolvent[lora]'")
MakeConfig = Callable[..., TrainingConfig]


@pytest.fixture
def base(small_config: MakeConfig, tmp_path: Path) -> Path:
    """A model in its folder."""
    train(small_config(out=str(tmp_path / "base"), steps=2, eval_interval=0))
    return tmp_path / "base"


@pytest.fixture
def adapted(small_config: MakeConfig, base: Path) -> MakeConfig:
    """A configuration that adapts the model."""

    def make(**changes: object) -> TrainingConfig:
        settings = {"start_from": str(base), "preset": "tiny", "model": None, "lora": "r=4,dropout=0.1"}
        return small_config(**{**settings, **changes})

    return make


def ids() -> torch.Tensor:
    return torch.randint(0, 257, (2, 90), generator=torch.Generator().manual_seed(0))


def test_options_of_a_text():
    assert LoraOptions.parse("r=16") == LoraOptions(r=16, alpha=32.0)
    assert LoraOptions.parse("r=8,alpha=4,dropout=0.05,targets=qkv_proj,ffn.in_proj") == LoraOptions(
        r=8, alpha=4.0, dropout=0.05, targets=("qkv_proj", "ffn.in_proj")
    )
    assert LoraOptions.parse("targets=out_proj,r=2").targets == ("out_proj",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16", "lora must be r=RANK"),
        ("alpha=3", "needs a rank"),
        ("r=1.5", "r must be an integer >= 1, got 1.5"),
        ("r=0", "r must be an integer >= 1, got 0"),
        ("r=4,r=5", "gives r twice"),
        ("r=4,rank=5", "lora has no rank"),
        ("r=4,alpha=0", "alpha must be > 0, got 0"),
        ("r=4,alpha=nan", "alpha must be a number, got 'nan'"),
        ("r=4,dropout=1", "dropout must be >= 0 and < 1, got 1"),
        ("r=4,targets=", "targets must name linear maps"),
    ],
)
def test_wrong_options_are_named(adapted: MakeConfig, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        adapted(lora=text).validate()


def test_adapters_need_a_model_and_whole_copies_of_it(small_config: MakeConfig, adapted: MakeConfig):
    with pytest.raises(ConfigError, match="name it with start_from"):
        small_config(lora="r=4").validate()
    with pytest.raises(ConfigError, match="leave parallel at ddp"):
        adapted(parallel="fsdp").validate()


def test_missing_peft_is_named(adapted: MakeConfig, monkeypatch: pytest.MonkeyPatch):
    config = adapted()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'resolvent\[lora\]'"):
        train(config)


def test_unknown_target_is_named(adapted: MakeConfig):
    with pytest.raises(ConfigError, match=r"ends with 'q_proj'; there are .*hebbian.qkv_proj"):
        train(adapted(lora="r=4,targets=q_proj"))


def test_only_adapters_are_trained_and_written(adapted: MakeConfig, base: Path):
    config = adapted(ema=0.9)
    result = train(config)
    run, source = config.run_dir, load_model(base, device="cpu")
    stored = read_tensors(run / ADAPTER_WEIGHTS)
    assert stored.keys() == read_tensors(checkpoint_path(run, 10) / ADAPTER_WEIGHTS).keys()
    assert all(name.startswith(PREFIX) and x.any() for name, x in stored.items())
    assert not (checkpoint_path(run, 10) / "model.safetensors").exists()
    with torch.no_grad():
        before, after = source(ids()), load_model(run, device="cpu")(ids())
        torch.testing.assert_close(load_base(run, "cpu")(ids()), before, rtol=0, atol=0)
        assert (after - before).abs().max() > 0.05
        assert torch.equal(result.model(ids()), after)  # PEFT's sum and ours
        assert torch.equal(load_trained(checkpoint_path(run, 10), "cpu")[0](ids()), after)
        averaged = load_trained(run / "ema", "cpu")[0](ids())
    assert 0 < (averaged - after).abs().max() < (after - before).abs().max()
    assert result.model.num_parameters() == source.num_parameters()


def test_adapted_run_reads_as_it_was_validated(adapted: MakeConfig):
    """The loss of the merged model is that of the adapters beside the weights."""
    from resolvent.evaluation import evaluate_documents
    from resolvent.training.corpus import split_corpus

    config = adapted(tokenizer="bytes")
    result = train(config)
    score = evaluate_documents(result.model, split_corpus(config)[1], result.tokenizer)
    assert score.loss == pytest.approx(result.validation.loss, rel=1e-5)


@pytest.mark.parametrize("stopped_after", [2, 7])
def test_adapted_run_resumes_bit_for_bit(
    adapted: MakeConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
):
    """Without the folder of --from, by the weights in the run folder."""

    def kill() -> None:
        raise RuntimeError("killed")

    train(adapted(out=str(tmp_path / "whole"), ema=0.9))
    after_step(monkeypatch, stopped_after, kill)
    with pytest.raises(RuntimeError, match="killed"):
        train(adapted(out=str(tmp_path / "halves"), ema=0.9))
    monkeypatch.undo()
    base.rename(tmp_path / "elsewhere")
    resume(tmp_path / "halves")
    whole, halves = (tmp_path / name for name in ("whole", "halves"))
    last = "checkpoints/step-00000010"
    for name in (
        ADAPTER_WEIGHTS,
        f"ema/{ADAPTER_WEIGHTS}",
        f"{last}/{ADAPTER_WEIGHTS}",
        f"{last}/optimizer.safetensors",
    ):
        assert (whole / name).read_bytes() == (halves / name).read_bytes(), name
    assert metrics(whole) == metrics(halves)


@pytest.mark.parametrize("read", [resume, lambda run: load_trained(checkpoint_path(run, 4), "cpu")])
def test_replaced_weights_under_the_adapters_are_refused(adapted: MakeConfig, read: Callable[[Path], object]):
    run = adapted(steps=4).run_dir
    train(adapted(steps=4))
    read(run)
    weights = read_tensors(run / WEIGHTS)
    weights["ln_f.weight"] += 1e-3
    write_tensors(run / WEIGHTS, weights)  # whole, of the same names, shapes and size
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that was saved.* restore it"):
        read(run)


@pytest.mark.slow
def test_adapters_train_compiled_as_they_do_eagerly(
    adapted: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The graphs are traced and run, but not compiled to code, which takes minutes."""
    monkeypatch.setattr(train_step, "DynamoBackend", SimpleNamespace(INDUCTOR=DynamoBackend.AOT_EAGER))
    torch.compiler.reset()
    counters.clear()
    options = dict(lora="r=4,dropout=0.1", steps=3, accumulation=2, learning_rate=1e-3, eval_interval=0)
    losses = [
        train(adapted(**options, out=str(tmp_path / str(compiled)), compile=compiled)).validation.loss
        for compiled in (False, True)
    ]
    assert counters["stats"]["unique_graphs"] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    eager, compiled = (read_tensors(tmp_path / str(compiled) / ADAPTER_WEIGHTS) for compiled in (False, True))
    for name, x in eager.items():
        torch.testing.assert_close(compiled[name], x, rtol=1e-3, atol=1e-5, msg=name)


def test_finished_run_returns_its_model(adapted: MakeConfig):
    config = adapted(steps=2)
    trained = train(config).model
    again = resume(config.run_dir, steps=2).model
    assert torch.equal(again(ids()), trained(ids()))


def test_adapted_run_is_a_start(adapted: MakeConfig, tmp_path: Path):
    """New adapters stand on the sum of the weights and those before."""
    first = adapted(steps=4, learning_rate=1e-2)
    train(first)
    second = adapted(start_from=str(first.run_dir), out=str(tmp_path / "second"), steps=1, learning_rate=1e-9)
    train(second)
    torch.testing.assert_close(
        load_model(tmp_path / "second", device="cpu")(ids()), load_model(first.run_dir, device="cpu")(ids())
    )
    whole = adapted(start_from=str(first.run_dir), out=str(tmp_path / "whole"), steps=1, lora=None)
    assert all(x.requires_grad for x in train(whole).model.parameters())
    assert not (tmp_path / "whole" / ADAPTER_WEIGHTS).exists()


def test_two_processes_adapt_as_one(adapted: MakeConfig, tmp_path: Path):
    runs = []
    for processes in (1, 2):
        config = adapted(out=str(tmp_path / str(processes)), accumulation=2 // processes, steps=4, learning_rate=1e-4)
        runs.append(config.run_dir)
        together(2, run_here, config) if processes == 2 else train(config)
    alone, shared = map(metrics, runs)
    assert len(alone) == len(shared)
    for one, two in zip(alone, shared, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    mine, theirs = (read_tensors(run / ADAPTER_WEIGHTS) for run in runs)
    for name, x in mine.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-6, msg=name)


def test_phase1_takes_adapters(small_config: MakeConfig, tmp_path: Path):
    sizes = dict(d_model=32, n_layers=2, n_seq=64, num_heads=2, ar_ssm_max_rank=12, htt_rank=5)
    source = small_config(phase=1, model=Phase1Config(vocab_size=257, **sizes), steps=1, out=str(tmp_path / "one"))
    train(source)
    config = small_config(start_from=str(source.run_dir), model=None, preset="tiny", lora="r=2", steps=3)
    train(config)
    stored = read_tensors(config.run_dir / ADAPTER_WEIGHTS)
    assert stored and all(x.any() for x in stored.values())


def test_adamw_moves_adapters_of_any_rank(base: Path):
    model = load_model(base, device="cpu")
    add_adapters(model, LoraOptions.parse("r=64,targets=qkv_proj"))
    rates = dict(learning_rate=1e-3, muon_learning_rate=1e-3)
    optimizer = build_muon(model, weight_decay=0.0, betas=(0.9, 0.95), **rates)
    moved = {x for group in optimizer.param_groups for x in group["params"]}
    assert moved == {x for name, x in model.named_parameters() if is_adapter(name)}
    assert all(group["parts"] is None for group in optimizer.param_groups)


def test_frozen_weights_take_less_memory(base: Path):
    model = load_model(base, device="cpu")
    whole = estimate_memory(model, tokens=1).parameters
    count = model.num_parameters()
    add_adapters(model, LoraOptions.parse("r=4"))
    added = model.num_parameters() - count
    assert estimate_memory(model, tokens=1).parameters == whole // 4 + 16 * added


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / ADAPTER_WEIGHTS).unlink(), ADAPTER_WEIGHTS),
        (lambda run: (run / ADAPTER_CONFIG).unlink(), ADAPTER_CONFIG),
        (lambda run: _change(run, lambda x: x[:, :1]), "fits no weight of the model"),
        (lambda run: _edit(run, '"use_dora": false', '"use_dora": true'), "only plain LoRA is read"),
        (lambda run: _edit(run, '"r": 4', '"r": 0'), "must have r and lora_alpha"),
    ],
)
def test_damaged_adapters_are_named(adapted: MakeConfig, damage: Callable[[Path], None], message: str):
    config = adapted(steps=1)
    train(config)
    damage(config.run_dir)
    with pytest.raises(CheckpointError, match=message):
        load_trained(config.run_dir, "cpu")


def _change(run: Path, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = read_tensors(run / ADAPTER_WEIGHTS)
    write_tensors(run / ADAPTER_WEIGHTS, {name: function(x) for name, x in tensors.items()})


def _edit(run: Path, before: str, after: str) -> None:
    text = (run / ADAPTER_CONFIG).read_text()
    assert before in text
    (run / ADAPTER_CONFIG).write_text(text.replace(before, after))


def test_checkpoint_of_other_adapters_is_refused(adapted: MakeConfig):
    config = adapted(steps=4)
    train(config)
    checkpoint = checkpoint_path(config.run_dir, 4)
    _change(checkpoint, lambda x: x.repeat(1, 2))
    write_manifest(checkpoint, [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"])
    with pytest.raises(CheckpointError, match="holds other adapters than the run has"):
        resume(config.run_dir, steps=6)


def test_transformers_reads_the_run_folder(adapted: MakeConfig):
    import transformers
    from transformers import AutoModelForCausalLM

    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("earlier versions look for the weights that adapters are for in another folder only")

    import resolvent.hf  # noqa: F401

    config = adapted(steps=4, learning_rate=1e-2)
    train(config)
    theirs = AutoModelForCausalLM.from_pretrained(config.run_dir).eval()
    torch.testing.assert_close(theirs(ids()).logits, load_model(config.run_dir, device="cpu")(ids()))


def test_rank_fits_the_named_maps(adapted: MakeConfig, tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"r must be at most \d+, the shorter side of blocks\.0\..*gate_down, got 4096"
    ):
        train(adapted(out=str(tmp_path / "run"), lora="r=4096,targets=gate_down,qkv_proj"))
    assert LoraOptions.parse("r = 4 , alpha = 2") == LoraOptions(r=4, alpha=2.0)


def test_adapters_without_their_weights_are_named(adapted: MakeConfig, tmp_path: Path):
    run_dir = tmp_path / "run"
    train(adapted(out=str(run_dir), steps=1))
    checkpoint = checkpoint_path(run_dir, 1).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match="away holds adapters alone"):
        load_model(checkpoint, "cpu")
    settings = json.loads((run_dir / ADAPTER_CONFIG).read_text())
    (run_dir / ADAPTER_CONFIG).write_text(json.dumps(settings | {"init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(CheckpointError, match="init_lora_weights = 'pissa_niter_4', and only plain LoRA"):
        load_model(run_dir, "cpu")
