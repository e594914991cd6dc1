"""Configuration of a training run, without torch: the command line makes its options from these fields."""

import dataclasses
import operator
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from resolvent.errors import ConfigError, DataError
from resolvent.fields import fits, kind_name
from resolvent.files import shown
from resolvent.seeds import MOST_SEED
from resolvent.training.lora import LoraOptions
from resolvent.training.schedule import WSD_DECAY_FRACTION, decay_start, learning_rate_factor
from resolvent.wording import JSON, PYTHON, Notation

if TYPE_CHECKING:
    from resolvent.models.phase1 import Phase1Config
    from resolvent.models.phase2 import Phase2Config

LEAST_COMPILED_BATCHES = 1000
"""Batches of a run on each device, steps times accumulation, from which on compilation repays its time on CUDA."""

RUN, TEXT, SIZE, OPTIMISER, REPORTS = "Run", "Model and text", "Size", "Optimiser", "Reports and checkpoints"

Tracker = Literal[
    "none", "tensorboard", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"
]
"""Trackers that metrics can be sent to: those of Accelerate."""

Texts = str | list[str] | None
"""Paths of one text or of several; None for the default one."""


def setting(default: Any, group: str, help: str, **rules: Any) -> Any:
    """Return a dataclass field with its help for the command line and the rules for its value.

    Args:
        default: the default.
        group: heading of the option in the help.
        help: text of the option in the help.
        rules: `at_least`, `above`, `at_most`, `below`: bounds; `option`, `aliases`, `metavar`, `default_text`: names
            and default of the option in the help.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **rules})


@dataclass(kw_only=True)
class TrainingConfig:
    """Configuration of a training run, which is saved in `training.json` in the run folder.

    A `model` configuration may replace the preset (then None); its `vocab_size` is set to that of the tokenizer. A
    saved model, `start_from`, replaces all fields that describe the model and the tokenizer; these then keep their
    defaults. A rank schedule of the saved model counts as finished: all its channels are trained.
    """

    out: str | None = setting(
        None, RUN, "Run folder for model and metrics; new or empty.", metavar="DIR", default_text="runs/PRESET"
    )
    seed: int = setting(0, RUN, "Seed of weights, order of the data and dropout.", at_least=0, at_most=MOST_SEED)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", RUN, "auto: cuda where there is one.")
    precision: Literal["auto", "fp32", "bf16"] = setting("auto", RUN, "auto: bf16 on cuda, fp32 on the cpu.")
    deterministic: bool = setting(False, RUN, "The same seed gives the same bits on cuda, too; slower.")
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", RUN, "Of several processes, each holds the whole model (ddp), or a share of it (fsdp)."
    )
    compile: bool | None = setting(
        None,
        RUN,
        "Compile the model with torch.compile: faster steps after a minute or two.",
        default_text=f"on cuda, for runs of one process and at least {LEAST_COMPILED_BATCHES:,} batches",
    )
    recompute: bool = setting(
        False,
        RUN,
        "Activation checkpointing: recompute blocks in the backward pass, for less memory and more time.",
    )

    phase: int = setting(
        2, TEXT, "2: resolvent and memory; 1: the static Hamiltonian it grows out of.", at_least=1, at_most=2
    )
    preset: str | None = setting(
        "tiny",
        TEXT,
        "Size of the model: tiny, small, base or large, each with -hybrid for attention in every third block, too; "
        "`resolvent presets` lists them.",
        metavar="NAME",
    )
    model: "Phase1Config | Phase2Config | None" = None
    start_from: str | None = setting(
        None,
        TEXT,
        "Start from the model in DIR: its sizes, weights and tokenizer; the rest of the run is new.",
        option="--from",
        metavar="DIR",
        default_text="fresh weights",
    )
    freeze: list[str] | None = setting(  # noqa: RUF009
        None,
        TEXT,
        "Leave these parameters as they are, named by a glob such as `blocks.*.ffn.*` (repeatable).",
        metavar="PATTERN",
        default_text="none",
    )
    lora: str | None = setting(
        None,
        TEXT,
        "With --from: train low-rank adapters of this rank and leave the weights as they are (LoRA), such as r=16 or "
        "r=16,alpha=32,dropout=0.05,targets=NAME,NAME.",
        metavar="r=RANK[,...]",
        default_text="all weights are trained",
    )
    data: Texts = setting(  # noqa: RUF009  every run has its own
        None,
        TEXT,
        "Text to learn from: a file or folder with text, JSON Lines or Parquet, a folder of tokens, or a data set as "
        "hf:NAME (repeatable); with weights, texts are mixed.",
        metavar="PATH[:WEIGHT]",
        default_text="State of the Union addresses",
    )
    format: Literal["text", "chat"] = setting(
        "text",
        TEXT,
        "chat: the data are conversations, JSON records with `messages`, and only the assistant's answers are learnt.",
    )
    text_field: str = setting(
        "text", TEXT, "Field of JSON objects, or column of Parquet files, that holds their text.", metavar="NAME"
    )
    validation_data: Texts = setting(  # noqa: RUF009
        None,
        TEXT,
        "Text to validate on (repeatable).",
        metavar="PATH",
        default_text="a share of --data",
    )
    validation_fraction: float = setting(
        0.1,
        TEXT,
        "Share of the bytes of --data to validate on: whole documents, cut where they are too long.",
        above=0,
        below=1,
    )
    cache: str | None = setting(
        None,
        TEXT,
        "Folder that keeps tokens for other runs; the variable RESOLVENT_CACHE names it too.",
        metavar="DIR",
        default_text="token-cache, beside the run folder",
    )
    tokenizer: str = setting(
        "bytes", TEXT, "Bytes, a BPE trained on the data, GPT-2's, or a tokenizers file.", metavar="bytes|bpe|gpt2|FILE"
    )
    vocab_size: int = setting(8192, TEXT, "Tokens that bpe learns; the other tokenizers have their own.", at_least=257)

    steps: int = setting(1000, SIZE, "Optimiser steps.", at_least=1)
    seq_len: int | None = setting(
        None,
        SIZE,
        "Tokens in a training window.",
        at_least=1,
        default_text="the model's n_seq: 256 for tiny, 1024 for base",
    )
    batch_size: int = setting(8, SIZE, "Windows in a batch, on each device.", at_least=1)
    accumulation: int = setting(1, SIZE, "Batches in a step, on each device.", at_least=1)

    optimizer: Literal["muon", "adamw"] = setting(
        "muon", OPTIMISER, "muon: Muon for wide matrices, AdamW for embeddings, head and all else."
    )
    learning_rate: float | None = setting(
        None,
        OPTIMISER,
        "Highest learning rate; with muon, of what AdamW moves.",
        above=0,
        aliases=("--lr",),
        default_text="0.004; with adamw 0.5 / d_model; a quarter of it with --from, unless with --lora",
    )
    muon_learning_rate: float | None = setting(
        None,
        OPTIMISER,
        "Highest learning rate of what Muon moves.",
        above=0,
        option="--muon-lr",
        default_text="5 times --lr",
    )
    muon_momentum: float = setting(0.95, OPTIMISER, "Muon's decay of the average of gradients.", at_least=0, below=1)
    schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", OPTIMISER, "Learning rate after the warm-up; wsd is stable, then decays."
    )
    warmup_steps: int | None = setting(
        None, OPTIMISER, "Steps of warm-up.", at_least=0, default_text="a twentieth of --steps, at most 200"
    )
    decay_fraction: float = setting(
        WSD_DECAY_FRACTION, OPTIMISER, "Share of the steps, at the end, in which wsd decays.", above=0, at_most=1
    )
    min_lr_ratio: float = setting(
        0.1, OPTIMISER, "Last learning rate, as a part of the highest.", at_least=0, at_most=1
    )
    weight_decay: float = setting(0.1, OPTIMISER, "Weight decay, of matrices only.", at_least=0)
    beta1: float = setting(0.9, OPTIMISER, "AdamW's decay of the average of gradients.", at_least=0, below=1)
    beta2: float = setting(0.95, OPTIMISER, "AdamW's decay of the average of squared gradients.", at_least=0, below=1)
    grad_clip: float = setting(1.0, OPTIMISER, "Largest gradient norm; 0 for any.", at_least=0)
    ema: float = setting(
        0.0,
        OPTIMISER,
        "Decay of a moving average of the weights, which is validated and saved beside them; 0 for none.",
        at_least=0,
        below=1,
    )
    rewinds: int = setting(
        0, OPTIMISER, "Times to go back to a checkpoint and halve the rate when something is not finite.", at_least=0
    )

    log_interval: int = setting(10, REPORTS, "Steps between two lines of output that is no terminal.", at_least=1)
    eval_interval: int = setting(250, REPORTS, "Steps between validations; 0 for one at the end only.", at_least=0)
    eval_tokens: int | None = setting(
        None,
        REPORTS,
        "Held-out tokens of a validation during the run, from all over the text; 0 for all.",
        at_least=0,
        default_text="a twentieth of those trained on between two validations, at most 65536",
    )
    final_eval_tokens: int | None = setting(
        None,
        REPORTS,
        "The same for the validation at the end.",
        at_least=0,
        default_text="a twentieth of those trained on in the whole run",
    )
    checkpoint_interval: int = setting(250, REPORTS, "Steps between checkpoints; 0 for the end only.", at_least=0)
    tracker: Tracker = setting(  # noqa: RUF009  a Literal's values do not change
        "none",
        REPORTS,
        "Tracker of metrics and diagnostics of the model, beside metrics.jsonl: tensorboard, wandb, or another of "
        "Accelerate's.",
        metavar="NAME",
    )
    keep_checkpoints: int = setting(2, REPORTS, "Newest checkpoints to keep.", at_least=1)

    @property
    def run_dir(self) -> Path:
        """Return the run folder, with the default resolved."""
        if self.out is not None:
            return Path(self.out)
        if self.start_from is not None:
            return Path("runs") / f"from-{Path(self.start_from).name}"
        name = self.preset or "model"
        return Path("runs") / (name if self.phase == 2 else f"phase1-{name}")

    @property
    def warmup(self) -> int:
        """Return the number of warm-up steps, with the default resolved."""
        return min(200, self.steps // 20) if self.warmup_steps is None else self.warmup_steps

    @property
    def held_out_fraction(self) -> float | None:
        """Return the share of the bytes of the data to hold out; None where another text is validated on."""
        return self.validation_fraction if self.validation_data is None else None

    def window(self, n_seq: int) -> int:
        """Return the tokens in a training window, by default the length that the model is configured for."""
        return n_seq if self.seq_len is None else self.seq_len

    def peak_learning_rate(self, d_model: int) -> float:
        """Return the peak learning rate, with Muon that of AdamW's parameters, with the default resolved.

        With AdamW alone, wider models need smaller learning rates. The default of a saved model is below that of fresh
        weights, so that the model does not forget its training before the learning rate falls.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        fresh = _MUON_RATE if self.optimizer == "muon" else 0.5 / d_model
        return (FROM_RATE if self.start_from is not None and self.lora is None else 1.0) * fresh

    def peak_muon_learning_rate(self, d_model: int) -> float:
        """Return the peak learning rate of Muon, with the default resolved."""
        given = self.muon_learning_rate
        return _MUON_RATIO * self.peak_learning_rate(d_model) if given is None else given

    def rate_factor(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0, as a fraction of the peak."""
        return learning_rate_factor(
            step,
            steps=self.steps,
            warmup=self.warmup,
            schedule=self.schedule,
            min_ratio=self.min_lr_ratio,
            decay_fraction=self.decay_fraction,
        )

    @property
    def stable_steps(self) -> int | None:
        """Steps before the decay of a `wsd` schedule, whose checkpoint a longer run goes on from; None without one."""
        if self.schedule != "wsd":
            return None
        return decay_start(steps=self.steps, warmup=self.warmup, decay_fraction=self.decay_fraction)

    def validation_tokens(self, tokens_per_step: int, *, final: bool) -> int:
        """Return the number of held-out tokens of a validation, with the default resolved; 0 for all of them.

        Predicting a token takes between a third of the time of training on it and all of that time: by default, all
        validations of a run together take less than a tenth of its time.
        """
        given = self.final_eval_tokens if final else self.eval_tokens
        if given is not None:
            return given
        trained_on = tokens_per_step * (self.steps if final else self.eval_interval)
        tokens = max(1, trained_on // _TRAINED_PER_VALIDATED)
        return tokens if final else min(tokens, _MOST_EVAL_TOKENS)

    def validate(self, notation: Notation = PYTHON) -> None:
        """Check every field.

        Args:
            notation: of the values in messages: of the file that they come from.

        Raises:
            ConfigError: lists all faults at once, each with field and value.
        """
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        faults = [fault for field, value in fields for fault in faults_of(field, value, notation)]
        faults += self._faults_of_fractions()
        if self.format == "chat":
            faults += self._faults_of_chat()
        if isinstance(self.lora, str):
            faults += self._faults_of_lora(self.lora)
        if self.optimizer != "muon":
            faults += self._faults_of_muon()
        faults += [
            f"{name} must name a file or a folder, got {paths!r}" for name, paths in self.named_texts() if "" in paths
        ]
        faults += self._faults_of_origin(notation)
        faults += self._faults_of_model(notation)
        if faults:
            raise ConfigError.of(self, faults)

    def _faults_of_fractions(self) -> Iterator[str]:
        if self.schedule != "wsd" and self.decay_fraction != TrainingConfig.decay_fraction:
            yield f"decay_fraction has no effect on a {self.schedule} schedule: leave it out, or take wsd"
        if self.validation_data is not None and self.validation_fraction != TrainingConfig.validation_fraction:
            yield "validation_fraction has no effect beside validation_data: leave out one of them"

    def _faults_of_muon(self) -> Iterator[str]:
        """Yield the fields of Muon that are set without it."""
        for name in ("muon_learning_rate", "muon_momentum"):
            if getattr(self, name) != getattr(TrainingConfig, name):
                yield f"{name} has no effect with the optimizer {shown(self.optimizer)}: leave it out"

    def _faults_of_origin(self, notation: Notation) -> Iterator[str]:
        """Yield what is wrong with the choice among preset, configuration and saved model."""
        if self.start_from is not None:
            saved = (field for field in dataclasses.fields(self) if field.name in SAVED_WITH_A_MODEL)
            if given := [field.name for field in saved if getattr(self, field.name) != field.default]:
                yield f"start_from brings a model and its tokenizer along: leave out {', '.join(given)}"
        elif (self.preset is None) == (self.model is None):
            yield f"one of preset and model must be {notation.none}, got {self.preset!r} and {self.model!r}"

    def _faults_of_model(self, notation: Notation) -> Iterator[str]:
        if self.model is None:
            return
        if not dataclasses.is_dataclass(self.model):
            yield f"model must be a configuration or {notation.none}, got {notation.show(self.model)}"
            return
        if type(self.model).__name__ != f"Phase{self.phase}Config":
            yield f"model is a {type(self.model).__name__}, but phase is {self.phase}"
        try:
            self.model.validate(notation)
        except ConfigError as error:
            yield f"model: {error}"

    def _faults_of_chat(self) -> Iterator[str]:
        if self.data is None:
            yield "format chat needs data: name a file of conversations"
        if self.text_field != TrainingConfig.text_field:
            yield "text_field has no effect with the format chat, whose field is messages: leave it out"
        if self.tokenizer == "bpe":
            yield "tokenizer bpe learns from text, and the format is chat: take another one, or start_from a model"

    def _faults_of_lora(self, text: str) -> Iterator[str]:
        try:
            LoraOptions.parse(text)
        except ConfigError as error:
            yield str(error)
        if self.start_from is None:
            yield "lora adapts a trained model: name it with start_from"
        if self.parallel == "fsdp":
            yield "lora trains few parameters, which fsdp does not shard: leave parallel at ddp"

    @property
    def lora_options(self) -> LoraOptions | None:
        """Options of the adapters; None where all weights are trained."""
        return None if self.lora is None else LoraOptions.parse(self.lora)

    def named_texts(self) -> Iterator[tuple[str, list[str]]]:
        """Yield the fields that name texts, with their paths; an empty list gives one empty path."""
        for name in ("data", "validation_data"):
            paths = getattr(self, name)
            if isinstance(paths, str | list):
                yield name, [paths] if isinstance(paths, str) else paths or [""]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by field, for JSON; `from_dict` restores an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the configuration that `to_dict` described.

        Raises:
            ConfigError: names every field that does not exist.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [shown(name) for name in values if name not in known]:
            raise ConfigError(f"unknown field of TrainingConfig: {', '.join(unknown[:20])}. Fields: {', '.join(known)}")
        fields = dict(values)
        if isinstance(fields.get("model"), dict):
            from resolvent.models.phases import PHASES

            phase = fields.get("phase", cls.phase)
            if not isinstance(phase, int) or phase not in PHASES:
                raise ConfigError(f"phase must be 1 or 2, got {shown(phase)}")
            fields["model"] = PHASES[phase].config.from_dict(fields["model"])
        return cls(**fields)


def option_names(field: dataclasses.Field[Any]) -> list[str]:
    """Return the names of a field's option, without dashes: its own, then the aliases."""
    names = (field.metadata.get("option", field.name), *field.metadata.get("aliases", ()))
    return [name.lstrip("-").replace("-", "_") for name in names]


def changed_preset(phase: int, preset: str, changes: dict[str, Any]) -> "Phase1Config | Phase2Config":
    """Return the configuration of a preset with some fields replaced.

    Raises:
        ConfigError: no such preset or field, or a value that the field does not take.
    """
    from resolvent.models.phases import PHASES

    if "vocab_size" in changes:
        raise ConfigError("the tokenizer decides vocab_size; see --tokenizer")
    config = PHASES[phase].config.from_dict(PHASES[phase].preset(preset).to_dict() | changes)
    config.validate(JSON)
    return config


def weighted_paths(paths: list[str]) -> list[tuple[str, float | None]]:
    """Split each `PATH:WEIGHT` into path and weight; None where there is none, or where a file has that name.

    Raises:
        ConfigError: a weight is not above zero, or not finite.
    """
    return [_weighted(path) for path in paths]


def check_paths(paths: list[str]) -> None:
    """Check, before heavy imports, that the files and folders of texts exist.

    Args:
        paths: of texts as `--data` takes them; a data set of the library `datasets` is not looked up.

    Raises:
        DataError: names the first that is missing.
    """
    for name, _ in weighted_paths(paths):
        path = Path(name)
        if path.suffix == ".idx" and not path.exists():  # names a file of tokens, also where there is no index
            path = path.with_suffix(".bin")
        if name and not name.startswith("hf:") and not path.exists():
            raise DataError(f"cannot read {name}: No such file or directory; check that it exists and is readable")


def _weighted(path: str) -> tuple[str, float | None]:
    name, colon, number = path.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        return path, None
    if not (colon and name) or Path(path).exists():
        return path, None
    if 0 < weight < float("inf"):
        return name, weight
    if Path(name).exists():
        raise ConfigError(f"the weight of {name} must be above 0 and finite, got {number}")
    return path, None


FROM_RATE = 0.25
"""Peak learning rate of a run from a saved model, as a fraction of that for fresh weights."""

_MUON_RATE = 0.004
"""Peak learning rate of embeddings, head and vectors beside Muon, whatever the width."""
_MUON_RATIO = 5.0
"""Muon's peak learning rate over theirs."""

_TRAINED_PER_VALIDATED = 20
_MOST_EVAL_TOKENS = 65_536

SAVED_WITH_A_MODEL = ("phase", "preset", "model", "tokenizer", "vocab_size")
"""Fields that `start_from` replaces."""

BOUNDS = {
    "at_least": (operator.ge, ">="),
    "above": (operator.gt, ">"),
    "at_most": (operator.le, "<="),
    "below": (operator.lt, "<"),
}
"""Rules for the values of fields, each with its comparison and its sign."""


def faults_of(field: dataclasses.Field[Any], value: Any, notation: Notation = PYTHON) -> Iterator[str]:
    """Yield the faults of a field's value; a nested configuration checks itself."""
    kind: Any = field.type
    rules = field.metadata
    if "help" not in rules:
        return
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            yield f"{field.name} must be one of {', '.join(typing.get_args(kind))}, got {notation.show(value)}"
        return
    if not fits(value, kind, sys.float_info.max):
        yield f"{field.name} must be {kind_name(kind, notation)}, got {notation.show(value)}"
        return
    for rule, (holds, sign) in BOUNDS.items():
        if value is not None and rule in rules and not holds(value, rules[rule]):
            yield f"{field.name} must be {sign} {rules[rule]}, got {value}"
