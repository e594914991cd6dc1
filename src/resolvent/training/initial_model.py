"""Models that training begins with: fresh weights, a saved model, or a checkpoint."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer

from resolvent.models import IntegratedModel
from resolvent.models.phase1 import Phase1Config
from resolvent.models.phase2 import Phase2Config
from resolvent.models.phases import PHASES
from resolvent.ops.hebbian import CHUNK
from resolvent.runs import load_trained
from resolvent.training.checkpoint import load_weights
from resolvent.training.config import TrainingConfig
from resolvent.training.freezing import check_patterns, freeze
from resolvent.training.lora import add_adapters
from resolvent.training.sharding import shard

logger = logging.getLogger(__name__)


def saved_model(config: TrainingConfig) -> tuple[IntegratedModel, Tokenizer] | None:
    """Return the model to start from, with fresh adapters if the run has some, and its tokenizer.

    None if the run starts from fresh weights. A missing model or an unknown preset raises here, and so do
    parameters to freeze that there are not.
    """
    if config.start_from is None:
        model_config = _model_config(config)
        with torch.device("meta"):
            check_patterns(PHASES[config.phase].model(model_config, init=False), config.freeze or [])
        return None
    model, tokenizer = load_trained(Path(config.start_from), "cpu")
    check_patterns(model, config.freeze or [])
    model.config = _for_windows(model.config, config)
    if config.lora_options is not None:
        torch.manual_seed(config.seed)
        add_adapters(model, config.lora_options)
    return model, tokenizer


def _model_config(config: TrainingConfig) -> Phase1Config | Phase2Config:
    chosen = config.model if config.model is not None else PHASES[config.phase].preset(str(config.preset))
    return _for_windows(chosen, config)


def _for_windows(model_config: Any, config: TrainingConfig) -> Any:
    """Return a model configuration with the window length of the run as its `n_seq`, which later readers use."""
    return dataclasses.replace(model_config, n_seq=config.window(model_config.n_seq))


def initial_model(
    config: TrainingConfig, vocab_size: int, accelerator: Accelerator, saved: IntegratedModel | None = None
) -> IntegratedModel:
    """Return a model on the device of this process, or sharded.

    Args:
        config: the run.
        vocab_size: tokens of a fresh model.
        accelerator: device and processes.
        saved: the model to start from; None for fresh weights, which depend on the seed and not on the number of
            processes.
    """
    sharded = _shares_model(config, accelerator)
    model = saved
    if model is None:
        torch.manual_seed(config.seed)
        create = PHASES[config.phase].create
        # If the model is sharded, only the first process draws its weights.
        initial_device = torch.device("meta" if sharded and not accelerator.is_main_process else "cpu")
        with initial_device:
            model = create(config=_model_config(config), vocab_size=vocab_size, device=initial_device)
    model = shard(model, accelerator.device) if sharded else model.to(accelerator.device)
    freeze(model, config.freeze or [])
    return model


def model_of_checkpoint(config: TrainingConfig, checkpoint: Path, accelerator: Accelerator) -> IntegratedModel:
    """Return the model of a checkpoint, on the device of this process, or sharded.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    sharded = _shares_model(config, accelerator)
    model = load_weights(checkpoint, accelerator.device, sharded=sharded, lora=config.lora_options)
    freeze(model, config.freeze or [])
    return model


def warn_of_untrained_filters(model: IntegratedModel) -> None:
    """Warn if no window is long enough for a consolidation to affect a prediction."""
    wanted = model.config
    if not isinstance(wanted, Phase2Config) or not (wanted.snr_enabled or wanted.resonance_enabled):
        return
    interval = wanted.consolidation_interval
    if model.n_seq <= interval:
        oftener = f"set consolidation_interval={CHUNK}, or " if model.n_seq > CHUNK else ""
        filters = {"the SNR filter": wanted.snr_enabled, "the resonance": wanted.resonance_enabled}
        untrained = " and ".join(name for name, enabled in filters.items() if enabled)
        logger.warning(
            f"Memories are consolidated every {interval:,} tokens (consolidation_interval), and windows have "
            f"{model.n_seq}: no step trains {untrained}. For steps that do, {oftener}take a --seq-len of "
            f"more than {interval}"
        )


def _shares_model(config: TrainingConfig, accelerator: Accelerator) -> bool:
    """Return True if the model is sharded over the processes."""
    return config.parallel == "fsdp" and accelerator.num_processes > 1
