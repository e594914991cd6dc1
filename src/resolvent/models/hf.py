"""The models in Transformers: ``AutoModelForCausalLM``, ``generate``, ``Trainer``, PEFT.

Nothing is modelled here. A class holds one of our models as ``model`` and translates: configurations to and from
dictionaries of fields, labels that Transformers shifts inside to ours, and the recurrent state to what ``generate``
passes around as a cache. Importing the module registers the classes and lets ``Trainer`` count the labels that they
predict.

Shapes: B batch, N sequence, D model width, V vocabulary.
"""

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from ..errors import ConfigError
from ..files import read_json, write_file, write_json
from ..layers.linear import is_plain
from ..layers.zeta import ExactConstant
from ..ops import IGNORED
from ..ops.precision import at_least_float32
from .base import IntegratedModel, observe
from .config import check_fields
from .phase1 import Phase1Config, Phase1IntegratedModel
from .phase2 import Phase2Config, Phase2IntegratedModel
from .state import ModelState
from .storage import CONFIG, FORMAT_VERSION, TRANSFORMERS_ENTRIES, in_todays_format, model_type
from .token_batch import check_attention_mask
from .trace import Trace

Batch = dict[str, Any]
"""Batch of a ``Trainer``."""

_ARGUMENTS = ("model_type", "name_or_path", "num_labels", "attn_implementation", "experts_implementation")
"""Arguments of Transformers' configurations that are no fields of them."""

_PORTABLE = "modeling_resolvent"
"""Name of the module that ``save_pretrained`` writes into a portable folder."""
_PORTABLE_SOURCE = '''"""Classes of an installed resolvent, for Transformers' trust_remote_code."""

from resolvent.hf import Phase1ForCausalLM, Phase1HFConfig, Phase2ForCausalLM, Phase2HFConfig

__all__ = ["Phase1ForCausalLM", "Phase1HFConfig", "Phase2ForCausalLM", "Phase2HFConfig"]
'''

_GENERATION_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,  # Transformers refuses it itself, for every model with a recurrent state
)
"""Modes of ``generate`` that Transformers runs with code of its own; the others are downloaded code."""


class _HFConfig(PretrainedConfig):
    """A configuration of a phase, with its fields as attributes beside those of Transformers.

    A subclass names ``__init__`` and ``__eq__`` once more: Transformers 5 makes a dataclass of it, whose own would know
    nothing of our fields.

    Args:
        values: fields of the phase's dataclass, and what Transformers keeps in every configuration.

    Raises:
        ConfigError: a field does not exist, or its value is wrong.
    """

    dataclass: ClassVar[type[Phase1Config] | type[Phase2Config]]
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  Trainer adds it to a list
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "num_heads"}  # noqa: RUF012

    def __init__(self, **values: Any) -> None:
        values = {self.attribute_map.get(name, name): value for name, value in values.items()}
        values = in_todays_format(type(self).__name__, {"format_version": FORMAT_VERSION, **values}, self.dataclass)
        names = {field.name for field in dataclasses.fields(self.dataclass)}
        fields = {name: value for name, value in values.items() if name in names}
        others = {name: value for name, value in values.items() if name not in names}
        known = {*vars(PretrainedConfig()), *TRANSFORMERS_ENTRIES, *_ARGUMENTS}
        check_fields(self.dataclass, {name: None for name in others if name not in known})
        if others.pop("tie_word_embeddings", False):  # where it is a field it has been renamed to it
            raise ConfigError("tie_word_embeddings must be False: the head of a Phase 1 model has weights of its own")
        config = self.dataclass.from_dict(fields)
        config.validate()
        super().__init__(**others)
        self.format_version = FORMAT_VERSION
        self.tie_word_embeddings = False  # Phase 2 has its own say on this in the next line
        for name, value in config.to_dict().items():
            setattr(self, name, value)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Do nothing; see the method of the same name of the models."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def to_dataclass(self) -> Phase1Config | Phase2Config:
        """Return the configuration of the model.

        Raises:
            ConfigError: a value that was set later is wrong.
        """
        config = self.dataclass.from_dict({f.name: getattr(self, f.name) for f in dataclasses.fields(self.dataclass)})
        config.validate()
        return config


class Phase1HFConfig(_HFConfig):
    """``Phase1Config`` for Transformers."""

    model_type = model_type(1)
    dataclass = Phase1Config
    __init__, __eq__ = _HFConfig.__init__, _HFConfig.__eq__


class Phase2HFConfig(_HFConfig):
    """``Phase2Config`` for Transformers."""

    model_type = model_type(2)
    dataclass = Phase2Config
    __init__, __eq__ = _HFConfig.__init__, _HFConfig.__eq__
    attribute_map = {**_HFConfig.attribute_map, "tie_word_embeddings": "tie_embeddings"}  # noqa: RUF012


class RecurrentCache(Cache):
    """State of a model in the place of a cache; its size does not depend on the number of tokens read.

    As with every cache of Transformers, a forward pass that is given one leaves in it what it read; take a
    ``copy.copy`` of it to go on from one place twice.

    Attributes:
        state: what the sequences have read; None before the first token.
        columns: tokens of a sequence that were read, padding included.
    """

    def __init__(self, state: ModelState | None = None, columns: int = 0) -> None:
        super().__init__(layers=[])
        self.state, self.columns = state, columns

    def __repr__(self) -> str:
        return f"RecurrentCache({self.batch_size} sequences, {self.columns} columns)"

    @property
    def batch_size(self) -> int:
        """Number of sequences B; -1 before the first token."""
        return -1 if self.state is None else len(self.state)

    @property
    def is_initialized(self) -> bool:
        """True if tokens were read."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: a functional state does not stay at its addresses."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False: a recurrent state cannot take tokens back."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns read."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no maximum."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """True if tokens were read."""
        return self.state is not None

    def reset(self) -> None:
        """Return to the state before the first token."""
        self.state, self.columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select sequences in this order: int64 (B,)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select sequences in this order."""
        self.state = self.state[indices] if self.state is not None else None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times in a row."""
        self.state = self.state.repeat(repeats) if self.state is not None else None

    def crop(self, *lengths: int, **options: int) -> None:
        """Raise: a recurrent state cannot take tokens back."""
        raise NotImplementedError("a recurrent state cannot be cropped: keep a copy.copy of the cache and return to it")


class _ForCausalLM(PreTrainedModel, GenerationMixin):
    """A model behind the interface of Transformers.

    Its subclasses name ``GenerationMixin`` as a base of their own: of a class from a portable folder that does not,
    Transformers makes a copy, and the model is of another class than the one registered.

    Attributes:
        model: the model.
    """

    integrated: ClassVar[type[IntegratedModel]]
    base_model_prefix = "model"  # a checkpoint of ours has the names without it, as base models have
    _is_stateful = True
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True

    config_class: Any
    model: Any

    def __init__(self, config: _HFConfig) -> None:
        super().__init__(config)
        self.model = self.integrated(config.to_dataclass(), init=False)
        if self.model.tied:  # Transformers ties the two itself, and counts what it loads before that
            self.model.lm_head.weight = nn.Parameter(torch.empty_like(self.model.lm_head.weight))
        self.post_init()

    @property
    def _inherited(self) -> Any:
        """Methods of Transformers below those here, whose signatures differ between its versions."""
        return super()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Draw the weights that are in no checkpoint, as in a fresh model; loaded weights stay as they are."""
        missing: dict[str, Tensor] = {}
        for path, module in self.model.named_modules():
            if isinstance(module, ExactConstant):  # not in a checkpoint, and left empty where Transformers makes room
                module.value = module.make().to(module.value.device)
            elif not _is_initialized(module):
                parameters = module.named_parameters(path, recurse=False)
                missing |= {name: x for name, x in parameters if not _is_initialized(x)}
            cast(Any, module)._is_hf_initialized = True
        if len(missing) == len(list(self.model.parameters())):
            if self.config.tie_word_embeddings:
                self.model.lm_head.weight = self.model.token_embedding.weight
            self.model.init_weights()
        elif missing:
            fresh = dict(self.integrated(self.config.to_dataclass()).named_parameters())
            for name, parameter in missing.items():
                parameter.copy_(fresh[name])

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "") -> None:
        """Do nothing: Transformers would copy this module into the folders of models that came with a portable one."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *arguments: Any,
        portable: bool | None = None,
        **options: Any,
    ) -> None:
        """Write the model as every model of Transformers does.

        Args:
            save_directory: the folder.
            is_main_process: False in all processes but the one that writes.
            *arguments: those of Transformers, as ``options``.
            portable: also write a module that imports these classes from an installed resolvent. With
                ``trust_remote_code=True``, Transformers then reads the folder without ``import resolvent.hf``. None
                does so if the model was read from such a folder.
            **options: those of Transformers.
        """
        self._inherited.save_pretrained(save_directory, is_main_process, *arguments, **options)
        if not is_main_process:
            return
        folder = Path(save_directory)
        entries = read_json(folder / CONFIG)
        known = entries.pop("auto_map", None)
        if portable or (portable is None and known):
            classes = {"AutoConfig": self.config_class.__name__, "AutoModelForCausalLM": type(self).__name__}
            entries["auto_map"] = {auto: f"{_PORTABLE}.{name}" for auto, name in classes.items()}
            write_file(folder / f"{_PORTABLE}.py", _PORTABLE_SOURCE.encode())
        write_json(folder / CONFIG, entries)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.token_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.token_embedding = value
        self.model.vocab_size = self.model.config.vocab_size = cast(nn.Embedding, value).num_embeddings

    def resize_token_embeddings(self, *args: object, **kwargs: object) -> nn.Embedding:
        """Change the number of rows of token table and head, as in every model of Transformers.

        Raises:
            ConfigError: the token embedding is a tensor train, which has no rows.
        """
        if not isinstance(embedding := self.get_input_embeddings(), nn.Embedding):
            raise ConfigError(
                f"the token embedding must be a table to be resized, got a {type(embedding).__name__}; train a model "
                "with htt_enabled=False"
            )
        return self._inherited.resize_token_embeddings(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.model.lm_head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of the next token, the loss of labels, and the state.

        Args:
            input_ids: tokens, int64 (B, N).
            attention_mask: 1 for tokens, 0 for padding on either side, (B, N), or with the columns before them that
                the cache has read.
            labels: int64 (B, N), by Transformers' convention those of ``input_ids`` themselves, which are shifted here,
                and -100 at positions that do not count. A label counts if the column before it holds a token: the first
                token of a row has no prediction (``predicted_labels``).
            past_key_values: state before the first token; it is updated to that after the last.
            use_cache: return the state; by default when not training.
            output_attentions: accepted, as in every model of Transformers; the blocks have no attention weights, and
                ``attentions`` is None.
            output_hidden_states: also return the input of the first block and the output of each block, the last after
                the norm.
            logits_to_keep: compute the logits of this many last positions only, or of those in a tensor; 0 for all.
            skip_logits: compute the loss without the logits in memory, and return none; by default in training with
                labels.
            num_items_in_batch: number of labels that count over all batches of a training step: the sum over the labels
                here is divided by it. By default the mean over the labels here.
            others: ``shift_labels``, the token that follows each position, int64 (B, N), in the place of ``labels``
                (``Trainer`` would expect an argument of that name in every batch); arguments of other models, such as
                embeddings and positions, which must be None or False.

        Raises:
            TypeError: there is no such argument.
            ValueError: tokens, mask, labels or cache do not fit each other or the model.
        """
        shift_labels = others.pop("shift_labels", None)
        if unknown := [name for name, value in others.items() if value is not None and value is not False]:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(unknown)}")
        cache = self._used_cache(past_key_values, use_cache)
        if attention_mask is not None:
            attention_mask = _mask_of_inputs(attention_mask, input_ids)
        if shift_labels is None and labels is not None:
            shift_labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        learning = self.training and shift_labels is not None
        penalised = self.model.penalised and learning
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden, trace = self._read(input_ids, attention_mask, cache, recorded=output_hidden_states or penalised)
        logits = loss = None
        if not (learning if skip_logits is None else skip_logits):
            kept = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.logits(hidden[:, kept])
        if shift_labels is not None:
            recorded = trace if penalised else None
            loss = self._loss(hidden, shift_labels, attention_mask, recorded, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=_hidden_states(trace) if output_hidden_states and trace is not None else None,
        )

    def _used_cache(self, given: RecurrentCache | None, use_cache: bool | None) -> RecurrentCache | None:
        """Return the given cache or, where one is used, a fresh one.

        Raises:
            ValueError: the cache is of another model.
        """
        if given is not None and not isinstance(given, RecurrentCache):
            raise ValueError(f"past_key_values must be a RecurrentCache, got {type(given).__name__}")
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        return RecurrentCache() if given is None and use_cache else given

    def _read(
        self, input_ids: Tensor, attention_mask: Tensor | None, cache: RecurrentCache | None, *, recorded: bool
    ) -> tuple[Tensor, Trace | None]:
        """Read tokens (B, N) behind the cache, which takes over the state after them.

        Returns:
            Final hidden states (B, N, D), and the trace where it is ``recorded``.
        """
        before = None if cache is None else cache.state
        trace = None
        if recorded:
            trace = observe(self.model, input_ids, state=before, attention_mask=attention_mask)
            hidden, after = trace.hidden, trace.after
        else:
            hidden, after = self.model.hidden_states(input_ids, state=before, attention_mask=attention_mask)
        if cache is not None:
            cache.state = after
            cache.columns += input_ids.shape[1]
        return hidden, trace

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None,
        penalised: Trace | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Return the loss of shifted labels (B, N) given hidden states (B, N, D), with the penalty of a trace if given.

        ``num_items_in_batch`` divides the sum over the labels; None for their number.
        """
        targets = labels.to(hidden.device)
        if attention_mask is not None:  # padding is not read, and predicts nothing
            targets = targets.masked_fill(attention_mask == 0, IGNORED)
        counts = targets != IGNORED
        penalty = 0.0 if penalised is None else counts.sum() * self.model.penalty(penalised, counts)
        count = counts.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return (self._loss_sum(hidden, targets) + penalty) / count

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: object, **kwargs: object) -> dict[str, object]:
        """Return the arguments of the next ``forward``, which takes positions from the state, and no embeddings.

        Transformers passes on the tokenizers that its stopping criteria are made with.
        """
        inputs = self._inherited.prepare_inputs_for_generation(input_ids, *args, **kwargs)
        foreign = ("cache_position", "position_ids", "inputs_embeds", "tokenizer", "assistant_tokenizer")
        return {name: value for name, value in inputs.items() if name not in foreign}

    def _loss_sum(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of labels (B, N) given hidden states (B, N, D).

        The logits are never in memory together, unless the head is more than a matrix: with a bias, wrapped by PEFT, or
        fetched by Accelerate when it is called.
        """
        head = self.model.lm_head
        if is_plain(head) and head.bias is None:
            return self.model.loss(hidden, labels, "sum")
        logits = self.model.logits(hidden).flatten(0, 1)
        return F.cross_entropy(at_least_float32(logits), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: ``generate`` makes no cache of keys and values."""
        return False

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: object, **kwargs: object
    ) -> Any:
        """Give ``generate`` a cache from the start: long prompts are read in pieces only where there is one.

        Raises:
            ValueError: a prompt does not end with a token.
        """
        mask = model_kwargs.get("attention_mask")
        if mask is not None and (rows := (mask[:, -1] == 0).nonzero().flatten().tolist()):
            raise ValueError(
                f"attention_mask must end with 1 in every row, got 0 in rows {rows}: pad on the left, and begin "
                f"an empty prompt with bos_token_id ({generation_config.bos_token_id})"
            )
        self._inherited._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RecurrentCache()

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: object, **kwargs: object
    ) -> tuple[GenerationConfig, dict[str, object]]:
        """Return the options of ``generate``, and the arguments of ``forward`` among its own.

        Raises:
            ValueError: the options ask for a mode whose code Transformers would download.
        """
        config, model_kwargs = self._inherited._prepare_generation_config(generation_config, *args, **kwargs)
        if (mode := config.get_generation_mode()) not in _GENERATION_MODES:
            name = mode.value.replace("_", " ")
            raise ValueError(f"{type(self).__name__} generates greedily, by sampling and with beams, not by {name}")
        return config, model_kwargs

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., object] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """Recompute every n-th block in the backward pass, always without re-entrance.

        The re-entrant form would lose the gradients of tensors that blocks return in tuples.
        """
        for index, block in enumerate(self.model.blocks):
            block.gradient_checkpointing = enable and index % every_n_layers == 0
            block._gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)


def _mask_of_inputs(attention_mask: Tensor, input_ids: Tensor) -> Tensor | None:
    """Return the mask (B, N) of tokens (B, N), of one that may have columns before them; None without padding.

    Raises:
        ValueError: the mask does not fit the tokens.
    """
    mask = attention_mask[:, -input_ids.shape[1] :]
    check_attention_mask(mask, input_ids)
    return None if mask.all() else mask


def _hidden_states(trace: Trace) -> tuple[Tensor, ...]:
    """Return the input of the first block and the output of each block, the last after the norm: (B, N, D)."""
    inner = (trace.entered, *(record.output for record in trace.layers[:-1]))
    return (*map(trace.restore, inner), trace.hidden)


def _is_initialized(part: nn.Module | Tensor) -> bool:
    """Return True if Transformers has marked a module or a tensor as loaded."""
    return getattr(part, "_is_hf_initialized", False)


class Phase1ForCausalLM(_ForCausalLM, GenerationMixin):
    """``Phase1IntegratedModel`` for Transformers; in training, its penalty is part of the loss."""

    config_class = Phase1HFConfig
    integrated = Phase1IntegratedModel
    _no_split_modules = ["Phase1Block"]  # noqa: RUF012


class Phase2ForCausalLM(_ForCausalLM, GenerationMixin):
    """``Phase2IntegratedModel`` for Transformers."""

    config_class = Phase2HFConfig
    integrated = Phase2IntegratedModel
    _no_split_modules = ["Phase2Block"]  # noqa: RUF012
    _tied_weights_keys = {"model.lm_head.weight": "model.token_embedding.weight"}  # noqa: RUF012


def predicted_labels(labels: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Take the labels that no token predicts out of a batch: those of the first column and those after padding.

    Args:
        labels: those of ``input_ids``, int64 (B, N), not shifted; -100 at places that do not count.
        attention_mask: 1 for tokens, 0 for padding on either side, (B, N).

    Returns:
        The labels with -100 in the place of each that no token predicts, (B, N).
    """
    predicted = labels.clone()
    predicted[:, :1] = IGNORED
    if attention_mask is not None:
        predicted[:, 1:].masked_fill_(attention_mask[:, :-1] == 0, IGNORED)
    return predicted


def _teach_trainer() -> None:
    """Let ``Trainer`` count the labels that one of our models predicts, in training and in evaluation.

    ``Trainer`` counts the labels of a step before a model reads its batches, and each batch's loss is divided by that
    number. Up to Transformers 5.10 all labels count, later those behind the first column. No version knows that padding
    on the left predicts nothing, and where padding lies depends on how a step is split into batches. So the labels that
    no token predicts leave the batches first: every version counts the same, and label smoothing and metrics see the
    same labels.
    """
    get_batch_samples, prediction_step = Trainer.get_batch_samples, Trainer.prediction_step

    @functools.wraps(get_batch_samples)
    def get_predicted_samples(self: Trainer, epoch_iterator: Iterator[Batch], *args: Any, **kwargs: Any) -> Any:
        return get_batch_samples(self, map(partial(_predicted_batch, self), epoch_iterator), *args, **kwargs)

    @functools.wraps(prediction_step)
    def predicted_step(self: Trainer, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        return prediction_step(self, model, _predicted_batch(self, inputs), *args, **kwargs)

    Trainer.get_batch_samples, Trainer.prediction_step = get_predicted_samples, predicted_step


def _predicted_batch(trainer: Trainer, batch: Batch) -> Batch:
    """Return the batch of a trainer of one of our models, with adapters or not, with predicted labels only."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(model, _ForCausalLM):
        return batch
    batch, mask = copy.copy(batch), batch.get("attention_mask")
    if "labels" in batch:
        batch["labels"] = predicted_labels(batch["labels"], mask)
    if "shift_labels" in batch and mask is not None:
        batch["shift_labels"] = batch["shift_labels"].masked_fill(mask == 0, IGNORED)
    return batch


def _register() -> None:
    """Enter the classes in the tables of Transformers.

    By them it finds configurations, models and tokenizers, tells causal language models from others (label smoothing,
    pipelines, model cards), and looks up ``architectures``.
    """
    # Transformers replaces its lazy module while it is imported, and `transformers serve` looks into an earlier one:
    # names of their class are found in all of them.
    packages: Any = type(sys.modules["transformers"])
    for model in (Phase1ForCausalLM, Phase2ForCausalLM):
        config, name = model.config_class, model.__name__
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = name
        setattr(packages, name, model)


_register()
_teach_trainer()
