"""How a run starts, and how it resumes."""

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from rich.console import Console
from tokenizers import Tokenizer

from resolvent.data import load_tokenizer, save_tokenizer
from resolvent.device import pick_device
from resolvent.errors import CheckpointError, ConfigError
from resolvent.models import IntegratedModel, load_model
from resolvent.models.phase1 import Phase1Config
from resolvent.models.phase2 import Phase2Config
from resolvent.models.phases import PHASES
from resolvent.training.checkpoint import latest_checkpoint
from resolvent.training.config import TrainingConfig
from resolvent.training.corpus import Corpus, load_corpus
from resolvent.training.record import read_run, write_run
from resolvent.training.trained import load_trained
from resolvent.training.trainer import Trainer, TrainingResult


def train(config: TrainingConfig, *, console: Console | None = None) -> TrainingResult:
    """Train a model, fresh or saved, from the first step of a new run.

    Args:
        config: the run.
        console: where to show progress; None shows nothing.

    Raises:
        ConfigError: faults of the configuration, or a run folder that is in use.
        CheckpointError: there is no model to start from.
        DataError: text or tokenizer that cannot be used.
        NonFiniteError: the loss or its gradient is not finite.
        TrainingInterrupted: SIGINT or SIGTERM, after saving a checkpoint.
    """
    config.validate()
    run_dir = config.run_dir
    if run_dir.exists() and not (run_dir.is_dir() and not any(run_dir.iterdir())):
        raise ConfigError(
            f"the run folder {run_dir} is not empty: continue its run with --resume {run_dir}, "
            "or choose another one with --out"
        )
    config = dataclasses.replace(
        config,
        data=_absolute(config.data),
        validation_data=_absolute(config.validation_data),
        start_from=_absolute(config.start_from),
    )
    tokenizer = _saved_tokenizer(config)
    accelerator = _accelerator(config)
    console = _console(console, accelerator)
    corpus = load_corpus(config, tokenizer, progress=console.is_terminal)
    model = _initial_model(config, corpus, accelerator)
    trainer = Trainer(config, accelerator, corpus, model, console)
    accelerator.wait_for_everyone()  # nobody writes before everybody has found the folder empty
    if accelerator.is_main_process:
        save_tokenizer(corpus.tokenizer, run_dir)
        if config.start_from is not None:
            trainer.save()  # the run resumes whatever becomes of the folder it started from
        write_run(run_dir, config, corpus.fingerprint)  # last: from here on the run can be resumed
    return trainer.run()


def resume(
    run_dir: str | Path, *, device: Literal["auto", "cpu", "cuda"] | None = None, console: Console | None = None
) -> TrainingResult:
    """Go on with a run from its last checkpoint, or from its beginning where there is none.

    On the CPU, the result is bit for bit that of a run that was never interrupted.

    Args:
        run_dir: the run folder.
        device: replaces the run's device.
        console: where to show progress; None shows nothing.

    Raises:
        CheckpointError: no run to resume, a damaged checkpoint, changed data, or another number of processes.
        DataError: text that cannot be read any more.
        NonFiniteError: the loss or its gradient is not finite.
        TrainingInterrupted: SIGINT or SIGTERM, after saving a checkpoint.
    """
    run_dir = Path(run_dir)
    config, fingerprint = read_run(run_dir)
    config = dataclasses.replace(config, out=str(run_dir), device=device or config.device)
    accelerator = _accelerator(config)
    console = _console(console, accelerator)
    corpus = load_corpus(config, load_tokenizer(run_dir), progress=console.is_terminal)
    if corpus.fingerprint != fingerprint:
        raise CheckpointError(
            f"{config.data or 'the default corpus'} has changed since the run {run_dir} began (fingerprint "
            f"{corpus.fingerprint[:12]}, was {fingerprint[:12]}): restore the text, or start a new run"
        )
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        model = _initial_model(config, corpus, accelerator)
        return Trainer(config, accelerator, corpus, model, console).run()
    trainer = Trainer(config, accelerator, corpus, load_model(checkpoint, device=accelerator.device), console)
    trainer.restore(checkpoint)
    return trainer.run()


def _saved_tokenizer(config: TrainingConfig) -> Tokenizer | None:
    """The tokenizer of the model to start from; None for the configuration's own.

    What no run can start from, a missing model or an unknown preset, shall not wait for the data.
    """
    if config.start_from is not None:
        return load_trained(Path(config.start_from), "cpu")[1]
    _model_config(config)
    return None


def _model_config(config: TrainingConfig) -> Phase1Config | Phase2Config:
    return config.model if config.model is not None else PHASES[config.phase].preset(str(config.preset))


def _initial_model(config: TrainingConfig, corpus: Corpus, accelerator: Accelerator) -> IntegratedModel:
    """A saved model, or fresh weights, the same in every process, from the seed."""
    if config.start_from is not None:
        return load_trained(Path(config.start_from), "cpu")[0].to(accelerator.device)
    torch.manual_seed(config.seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    create = PHASES[config.phase].create
    return create(config=_model_config(config), vocab_size=vocab_size, device=accelerator.device)


def _accelerator(config: TrainingConfig) -> Accelerator:
    """Device, precision and processes of a run."""
    device = pick_device(config.device)
    precision = {"auto": "bf16" if device.type == "cuda" else "no", "fp32": "no", "bf16": "bf16"}[config.precision]
    if not torch.distributed.is_initialized():
        # Accelerate keeps the settings of a process's first Accelerator and refuses others.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    compiler = TorchDynamoPlugin(
        backend=DynamoBackend.INDUCTOR if config.compile else DynamoBackend.NO,
        mode="reduce-overhead" if device.type == "cuda" else "default",  # CUDA graphs: Python is slower than the GPU
    )
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        gradient_accumulation_steps=config.accumulation,
        dynamo_plugin=compiler,
    )


def _console(console: Console | None, accelerator: Accelerator) -> Console:
    """The console of the first process; all others are silent."""
    return console if console is not None and accelerator.is_main_process else Console(quiet=True)


def _absolute(path: str | None) -> str | None:
    """So that a run can be resumed from any working directory."""
    return None if path is None else str(Path(path).resolve())
