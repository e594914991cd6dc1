"""The Phase 1 model: token embedding (a tensor train), positions, blocks, norm, head.

Shapes: B batch, N sequence, D model width, S sequences.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...layers import TensorTrainEmbedding
from ...ops.memory_rotation import Rotation
from ...ops.precision import wide_dtype
from ..base import IntegratedModel
from ..trace import Trace
from .block import Phase1Block, Phase1Record, checkpointed
from .config import Phase1Config
from .diagnostics import Phase1Diagnostics, diagnose
from .state import Phase1LayerState, Phase1State


class Phase1IntegratedModel(IntegratedModel[Phase1Config, Phase1Record, Phase1State]):
    """A language model whose tokens mix through the resolvent of a static Hamiltonian and a gated sum of the past.

    The model keeps nothing between calls: what it has read is in the state that ``forward`` returns.

    Args:
        config: the configuration.
        init: draw fresh weights from the global CPU generator; False where they will be loaded.
    """

    penalised = True
    state_type = Phase1State

    def _make_token_embedding(self, config: Phase1Config) -> nn.Module:
        if not config.htt_enabled:
            return nn.Embedding(config.vocab_size, config.d_model)
        return TensorTrainEmbedding(
            config.vocab_size, config.d_model, config.htt_rank, config.htt_num_cores, config.htt_phase_encoding
        )

    def _make_block(self, config: Phase1Config, layer: int) -> Phase1Block:
        return Phase1Block(config)

    def _embed_tokens(self, input_ids: Tensor) -> Tensor:
        config = self.config
        return checkpointed(
            config.use_gradient_checkpointing and config.checkpoint_htt, self.token_embedding, input_ids
        )

    def _run_block(
        self,
        block: nn.Module,
        x: Tensor,
        previous: Phase1Record | None,
        state: Phase1LayerState | None,
        start: Tensor | None,
        cu_seqlens: Tensor | None,
        rotation: Rotation | None,
        return_state: bool,
    ) -> Phase1Record:
        return block(x, state, cu_seqlens)

    def diagnostics(self, trace: Trace[Phase1Record, Phase1State]) -> Phase1Diagnostics:
        return diagnose(self.config, self.token_embedding, trace)

    def penalty(self, trace: Trace[Phase1Record, Phase1State], mask: Tensor | None = None) -> Tensor:
        """Return the mean gate of all layers over the tokens of the mask, weighted; zero without gates or tokens."""
        gates = [record.gates for record in trace.layers if record.gates is not None]
        if mask is None:
            means = [gate.mean(dtype=wide_dtype(gate)) for gate in gates]
        else:
            mask = trace.batch.drop_padding(mask)
            count = mask.sum().clamp(min=1)
            means = [(gate.mean(-1, dtype=wide_dtype(gate)) * mask).sum() / count for gate in gates]
        mean = torch.stack(means).mean() if means else super().penalty(trace)
        return self.config.ar_ssm_l1_regularization * mean

    @property
    def rank(self) -> int | None:
        """Channels of the semiseparable layers that are in use; None without such layers."""
        layer = self._blocks[0].ar_ssm
        return layer.rank if layer is not None else None

    def update_rank_schedule(self, step: int) -> int | None:
        """Set the rank of the semiseparable layers that the configuration schedules for a training step.

        The rank is a function of the step alone: a resumed run needs the number of its step only. Channels that were
        not in use add nothing at first: the model computes the same before and after, and with all of them.

        Returns:
            the rank; None without such layers.
        """
        for block in self._blocks:
            if block.ar_ssm is not None:
                block.ar_ssm.set_rank(self.config.rank_at(step))
        return self.rank

    @property
    def _blocks(self) -> Sequence[Phase1Block]:
        return [cast(Phase1Block, block) for block in self.blocks]
