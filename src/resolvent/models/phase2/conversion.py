"""Conversion of Phase 1 models, and of parts of other modules, to Phase 2.

Phase 2 contains Phase 1. With ``κ = 0``, the memory's output at zero and Phase 1's spectral constants, a Phase 2 block
computes the same as the Phase 1 block. So layer i goes to layer i, and the converted model has the logits of its
source. New parts have their usual initialisation behind a map, or a strength, that starts at zero and has a gradient
there: training uses them from its second step on.

Of any other module, conversion takes over the parts whose role is certain: token embedding, head and layer norms.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import LowRankLinear, StaticBKLayer, TensorTrainEmbedding
from ..phase1 import Phase1Block, Phase1Config, Phase1IntegratedModel
from .config import Phase2Config
from .conversion_report import ConfigChanges, ConversionReport, ConvertedTensor
from .model import Phase2IntegratedModel

_log = logging.getLogger(__name__)


def convert_phase1_to_phase2(
    phase1_model: Phase1IntegratedModel | nn.Module,
    phase2_config: Phase2Config | None = None,
    copy_compatible_weights: bool = True,
    freeze_phase1_weights: bool = False,
) -> Phase2IntegratedModel:
    """Convert a trained model to Phase 2; ``model.conversion_report`` lists every tensor.

    A Phase 1 model is preserved exactly: the result computes its logits, full and streaming, at any length. New weights
    are drawn on the CPU from torch's global generator. The result is on the device of the source.

    Args:
        phase1_model: a Phase 1 model, or any module, of which token embedding, head and layer norms are taken over
            where their shapes fit.
        phase2_config: the configuration; None for the sizes of the source. It is not changed. A tensor-train embedding
            is carried over if ``htt_rank`` is its rank, and becomes a table if ``htt_rank`` is None.
        copy_compatible_weights: False makes a fresh model of the configuration that conversion would use.
        freeze_phase1_weights: exclude exactly the copied parameters from training. This holds for the object alone: a
            model that was saved and loaded trains all its parameters.

    Raises:
        ConfigError: the configuration cannot preserve the Phase 1 model; there is neither a configuration nor a token
            embedding to infer one from; or the model is of Phase 2 already.
    """
    if isinstance(phase1_model, Phase2IntegratedModel):
        raise ConfigError("phase1_model is a Phase 2 model already: use it as it is")
    with torch.no_grad():
        if isinstance(phase1_model, Phase1IntegratedModel):
            config = _config_for_phase1(phase1_model.config, phase2_config)
            transfer = _Transfer(phase1_model, Phase2IntegratedModel(config))
            if copy_compatible_weights:
                _copy_phase1(phase1_model, transfer)
        else:
            roles = _Roles.of(phase1_model, phase2_config)
            config = roles.config(phase2_config)
            transfer = _Transfer(phase1_model, Phase2IntegratedModel(config))
            if copy_compatible_weights:
                roles.copy(transfer)
    model = transfer.target
    model.conversion_report = transfer.report(_changes(phase2_config, config))
    if freeze_phase1_weights:
        for name in transfer.copied:
            transfer.parameters[name].requires_grad_(False)
    _log_report(model.conversion_report)
    source = next(phase1_model.parameters(), None)
    return model.to(source.device) if source is not None else model


class _Transfer:
    """Copies tensors into a target and records the sources of each.

    Args:
        source: the trained model.
        target: the fresh model.
    """

    def __init__(self, source: nn.Module, target: Phase2IntegratedModel):
        self.target = target
        self.parameters = dict(target.named_parameters())
        self.source_names: dict[Tensor, str] = {parameter: name for name, parameter in source.named_parameters()}
        self.source_shapes = {name: tuple(p.shape) for name, p in source.named_parameters()}
        self.copied: dict[str, tuple[str, ...]] = {}
        self.notes: dict[str, str] = {}

    def copy(self, name: str, *sources: Tensor, value: Tensor | None = None, note: str = "") -> None:
        """Fill the target's parameter ``name`` with a source tensor, or with a value made of several."""
        value = sources[0] if value is None else value
        parameter = self.parameters[name]
        if parameter.shape != value.shape:
            raise AssertionError(f"{name} has shape {tuple(parameter.shape)}, its source {tuple(value.shape)}")
        parameter.copy_(value)
        self.copied[name] = tuple(self.source_names[source] for source in sources)
        self.notes[name] = note

    def copy_module(self, name: str, module: nn.Module) -> None:
        """Copy all parameters of a module into the target's module of the same structure."""
        for part, parameter in module.named_parameters():
            self.copy(f"{name}.{part}", parameter)

    def set(self, name: str, value: float, note: str) -> None:
        """Fill a new parameter of the target with the value that keeps the function."""
        self.parameters[name].fill_(value)
        self.notes[name] = note

    def report(self, config_changes: ConfigChanges) -> ConversionReport:
        """Return the records of all tensors."""
        tensors = [
            ConvertedTensor(
                "copied" if name in self.copied else "new",
                name,
                tuple(parameter.shape),
                self.copied.get(name, ()),
                self.notes.get(name, ""),
            )
            for name, parameter in self.parameters.items()
        ]
        used = {source for sources in self.copied.values() for source in sources}
        left = [ConvertedTensor("left behind", n, shape) for n, shape in self.source_shapes.items() if n not in used]
        return ConversionReport((*tensors, *left), config_changes)


def _config_for_phase1(source: Phase1Config, wanted: Phase2Config | None) -> Phase2Config:
    """Return the configuration that preserves a Phase 1 model, as near to the wanted one as possible."""
    config = wanted if wanted is not None else Phase2Config.from_phase1(source)
    sizes = ("vocab_size", "d_model", "n_layers", "num_heads", "ffn_width")
    pairs = [(name, getattr(config, name), getattr(source, name)) for name in sizes]
    faults = [f"{name} is {ours}, that of the Phase 1 model {theirs}" for name, ours, theirs in pairs if ours != theirs]
    if config.htt_rank is not None and config.htt_rank != (source.htt_rank if source.htt_enabled else None):
        has = f"has rank {source.htt_rank}" if source.htt_enabled else "is a table"
        faults.append(f"htt_rank is {config.htt_rank}, but the Phase 1 model's token embedding {has}")
    if config.ffn_gated:
        faults.append("ffn_gated is True, but a Phase 1 model's feed-forward network has no gate")
    if not config.bk_core:
        faults.append("bk_core is False, but a Phase 1 model is BK-Core")
    if config.tie_embeddings:
        faults.append("tie_embeddings is True, but a Phase 1 model's head is a matrix of its own")
    if faults:
        raise ConfigError(
            "phase2_config cannot preserve this Phase 1 model: "
            + "; ".join(faults)
            + ". Leave phase2_config out, or start "
            "from Phase2Config.from_phase1(phase1_model.config)"
        )
    return dataclasses.replace(
        config,
        phase1_config=source,
        embedding_scale=source.embedding_scale,
        ar_ssm_rank=source.ar_ssm_max_rank if source.ar_ssm_enabled else 0,
        ar_ssm_gate_hidden_dim=source.gate_width if source.ar_ssm_enabled else None,
        ar_ssm_bounded=source.ar_ssm_bounded,
        htt_phase_encoding=source.htt_phase_encoding,
    )


def _changes(wanted: Phase2Config | None, used: Phase2Config) -> ConfigChanges:
    """Return the fields that differ, with the value asked for and the value used."""
    if wanted is None:
        return {}
    names = (field.name for field in dataclasses.fields(used) if field.name != "phase1_config")
    pairs = ((name, getattr(wanted, name), getattr(used, name)) for name in names)
    return {name: (before, after) for name, before, after in pairs if before != after}


def _copy_phase1(source: Phase1IntegratedModel, transfer: _Transfer) -> None:
    embedding = source.token_embedding
    if isinstance(embedding, TensorTrainEmbedding) and transfer.target.config.htt_rank is None:
        cores = tuple(embedding.parameters())
        transfer.copy("token_embedding.weight", *cores, value=embedding.dense(), note="tensor train made a table")
    else:
        transfer.copy_module("token_embedding", embedding)
    transfer.copy("position_embedding.gain", source.get_parameter("position_embedding.gain"))
    for i, block in enumerate(source.blocks):
        assert isinstance(block, Phase1Block)
        _copy_block(block, f"blocks.{i}", transfer)
    transfer.copy_module("ln_f", source.ln_f)
    transfer.copy_module("lm_head", source.lm_head)


def _copy_block(block: Phase1Block, name: str, transfer: _Transfer) -> None:
    static, chain = StaticBKLayer, f"{name}.dissipative_bk"
    transfer.copy_module(f"{name}.ln1", block.ln1)
    transfer.copy(f"{chain}.potential.v_proj.weight", block.bk.v_proj.weight)
    transfer.copy(
        f"{chain}.energy",
        block.bk.v_proj.bias,
        value=block.bk.energy,
        note="what is constant in alpha: E - h0_diag - bias",
    )
    transfer.set(f"{chain}.log_zeta", math.log(static.ZETA), "constant of Phase 1")
    for hopping in ("h0_super", "h0_sub"):
        transfer.set(f"{chain}.{hopping}", static.HOPPING, "constant of Phase 1")
    transfer.set(f"{chain}.kappa", 0.0, "no dissipation until training asks for it")
    transfer.copy_module(f"{name}.bk_proj", block.bk_proj)
    for mixer, kind in (("hebbian", "memory"), ("attention", "attention")):
        if (output := f"{name}.{mixer}.out_proj.weight") in transfer.parameters:
            transfer.set(output, 0.0, f"no {kind} until training asks for it")
    if block.ar_ssm is not None and block.ln2 is not None:
        transfer.copy_module(f"{name}.ln_ssm", block.ln2)
        transfer.copy_module(f"{name}.ar_ssm", block.ar_ssm)
    transfer.copy_module(f"{name}.ln2", block.ln3)
    for part, layer in block.ffn.named_children():
        if isinstance(layer, LowRankLinear):
            weight, bias = layer.dense()
            factors = (layer.down.weight, layer.up.weight)
            transfer.copy(f"{name}.ffn.{part}.weight", *factors, value=weight, note="low rank multiplied out")
            transfer.copy(f"{name}.ffn.{part}.bias", layer.up.bias, value=bias)
        else:
            transfer.copy_module(f"{name}.ffn.{part}", layer)


@dataclasses.dataclass(frozen=True)
class _Roles:
    """Parts of a foreign module whose roles are certain.

    Attributes:
        embedding: the token embedding.
        head: the linear map to the vocabulary.
        final_norm: the last norm outside the blocks.
        block_norms: the norms of every block, in order.
    """

    embedding: nn.Embedding | None
    head: nn.Linear | None
    final_norm: nn.LayerNorm | None
    block_norms: list[list[nn.LayerNorm]]

    @classmethod
    def of(cls, module: nn.Module, config: Phase2Config | None) -> "_Roles":
        """Find the parts by type and shape: that of the configuration or, without one, that of the module."""
        embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding)]
        linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
        if config is not None:
            shape = (config.vocab_size, config.d_model)
            embeddings = [e for e in embeddings if tuple(e.weight.shape) == shape]
        else:
            # Of several tables, that of the tokens has the shape of the head; without a head, it is the longest.
            maps = {tuple(linear.weight.shape) for linear in linears}
            matched = [e for e in embeddings if tuple(e.weight.shape) in maps]
            embeddings = matched or sorted(embeddings, key=lambda e: -e.num_embeddings)
            shape = tuple(embeddings[0].weight.shape) if embeddings else None
        embedding = embeddings[0] if embeddings else None
        heads = [linear for linear in linears if tuple(linear.weight.shape) == shape]
        tied = [head for head in heads if embedding is not None and head.weight is embedding.weight]
        head = (tied or heads or [None])[-1]
        blocks = max((m for m in module.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
        width = shape[1] if shape else None
        inside = set(blocks.modules())
        outside = [norm for norm in _norms(module, width) if norm not in inside]
        return cls(embedding, head, outside[-1] if outside else None, [list(_norms(b, width)) for b in blocks])

    @property
    def tied(self) -> bool:
        return self.embedding is not None and self.head is not None and self.head.weight is self.embedding.weight

    def config(self, wanted: Phase2Config | None) -> Phase2Config:
        """Return the wanted configuration, or one of the module's sizes; tied weights stay tied."""
        if wanted is not None:
            return dataclasses.replace(wanted, tie_embeddings=True, htt_rank=None) if self.tied else wanted
        if self.embedding is None:
            raise ConfigError("the module holds no nn.Embedding to infer sizes from: give phase2_config")
        vocab_size, d_model = self.embedding.weight.shape
        head_dim = min(64, d_model)
        return Phase2Config(
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=len(self.block_norms) or Phase2Config.n_layers,
            num_heads=max(1, d_model // head_dim),
            head_dim=head_dim,
            tie_embeddings=self.tied,
        )

    def copy(self, transfer: _Transfer) -> None:
        """Copy the parts whose shapes fit."""
        if self.embedding is not None and "token_embedding.weight" in transfer.parameters:
            transfer.copy("token_embedding.weight", self.embedding.weight)
        if self.head is not None and "lm_head.weight" in transfer.parameters:
            transfer.copy("lm_head.weight", self.head.weight)
        if self.final_norm is not None:
            transfer.copy_module("ln_f", self.final_norm)
        for i, norms in enumerate(self.block_norms[: transfer.target.n_layers]):
            # The first norm of a block stands before its mixer, the last before its feed-forward network.
            roles = {"ln1": norms[:1], "ln2": norms[1:][-1:]}
            for role, found in roles.items():
                for norm in found:
                    transfer.copy_module(f"blocks.{i}.{role}", norm)
        if not transfer.copied:
            _log.warning("no part of the source fits the Phase 2 model: all its weights are fresh")


def _norms(module: nn.Module, width: int | None) -> Iterator[nn.LayerNorm]:
    """Yield the layer norms of this width that have weights, in order."""
    for part in module.modules():
        if isinstance(part, nn.LayerNorm) and part.normalized_shape == (width,) and part.weight is not None:
            yield part


def _log_report(report: ConversionReport) -> None:
    _log.info("converted to Phase 2: %s", report.summary())
    for tensor in report.tensors:
        origin = f" from {' + '.join(tensor.sources)}" if tensor.sources else ""
        note = f" ({tensor.note})" if tensor.note else ""
        _log.debug("%s: %s %s%s%s", tensor.status, tensor.name, tensor.shape, origin, note)
    for name, (wanted, used) in report.config_changes.items():
        _log.info("%s is %r instead of %r, to preserve the logits of the source", name, used, wanted)
