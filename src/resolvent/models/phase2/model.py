"""The Phase 2 model: token embedding, positions, blocks, norm, head.

Shapes: B batch, N sequence, D model width, S sequences.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import TensorTrainEmbedding, ZetaEmbedding
from ...layers.linear import has_hook
from ...ops.hebbian import memory_implementation
from ...ops.memory_rotation import Rotation
from ..base import IntegratedModel
from ..compilation import CompiledSteps, check_compiler
from ..trace import Trace
from .block import Phase2Block, Phase2Record, blocks_of, stream_norm
from .config import Phase2Config
from .conversion_report import ConversionReport
from .decode import TokenStep
from .decode_torch import PlainStep, StepProgram
from .diagnostics import Phase2Diagnostics, diagnose
from .state import LayerState, Phase2State

_log = logging.getLogger(__name__)


class Phase2IntegratedModel(IntegratedModel[Phase2Config, Phase2Record, Phase2State]):
    """A language model whose tokens mix through a resolvent and a dissipative memory, in linear time.

    The model keeps nothing between calls: what it has read is in the state that ``forward`` returns.

    Args:
        config: the configuration.
        init: draw fresh weights from the global CPU generator; False where they will be loaded.

    Attributes:
        conversion_report: report of the conversion, where the model was converted.
    """

    state_type = Phase2State
    conversion_report: ConversionReport | None = None
    _compiled: CompiledSteps | None = None

    def _make_token_embedding(self, config: Phase2Config) -> nn.Module:
        if config.htt_rank is None:
            return nn.Embedding(config.vocab_size, config.d_model)
        return TensorTrainEmbedding(
            config.vocab_size, config.d_model, config.htt_rank, phase_encoding=config.htt_phase_encoding
        )

    def _make_position_embedding(self, config: Phase2Config) -> ZetaEmbedding | None:
        return ZetaEmbedding(config.d_model, config.zeta_embedding_trainable) if config.zeta_positions else None

    def _make_norm(self, config: Phase2Config) -> nn.Module:
        return stream_norm(config)

    def _make_block(self, config: Phase2Config, layer: int) -> Phase2Block:
        return Phase2Block(config, layer)

    def _run_block(
        self,
        block: nn.Module,
        x: Tensor,
        previous: Phase2Record | None,
        state: LayerState | None,
        start: Tensor | None,
        cu_seqlens: Tensor | None,
        rotation: Rotation | None,
        return_state: bool,
    ) -> Phase2Record:
        readout = None if previous is None else previous.readout
        return block(x, readout, state, start, cu_seqlens, rotation, return_state)

    def _rotation(self, position: Tensor, dtype: torch.dtype) -> Rotation | None:
        attention = next((block.attention for block in self._blocks if block.attention is not None), None)
        return None if attention is None else attention.rotation(position, dtype)

    def diagnostics(self, trace: Trace[Phase2Record, Phase2State]) -> Phase2Diagnostics:
        return diagnose(self._blocks, trace)

    def fused_step(self, state: Phase2State) -> Callable[[Tensor], Tensor] | None:
        if self._compiled is not None:
            self._check_for_compilation()
            program = StepProgram(self)
            program.run = self._compiled.step(program, self)
            return PlainStep(program, state)
        hooked = self._hooked()
        if not (obstacle := hooked or TokenStep.obstacle(self, state)):
            return TokenStep(self, state)
        if state.device.type == "cpu" and not (obstacle := hooked or StepProgram.obstacle(self)):
            return PlainStep(StepProgram(self), state)
        _log.info("one token at a time without a step of its own: %s", obstacle)
        return None

    def compile_steps(self) -> None:
        self._check_for_compilation()
        check_compiler()
        self._compiled = CompiledSteps(StepProgram.compute)

    def _check_for_compilation(self) -> None:
        """Raise a ConfigError if compiled steps cannot take the place of forward passes."""
        if (device := self.lm_head.weight.device).type != "cpu":
            raise ConfigError(f"compiled steps are for the CPU, the model is on {device}: leave out --compile")
        if obstacle := self._hooked() or StepProgram.obstacle(self):
            raise ConfigError(f"the steps of this model cannot be compiled: {obstacle}; leave out --compile")

    def _hooked(self) -> str | None:
        """Return the obstacle that a module with a hook is: steps do not call every module."""
        hooked = [name for name, module in self.named_modules() if name and has_hook(module)]
        return f"{hooked[0]} has a hook" if hooked else None

    @property
    def zeta_potential(self) -> bool:
        return self.config.use_zeta_init

    @property
    def state_grows(self) -> bool:
        return None in self.config.windows.values()

    @property
    def reads_offsets(self) -> bool:
        head, config = self.lm_head.weight, self.config
        remembers = len(config.attention_layers) < config.n_layers
        turning = config.memory_rotation and (config.snr_enabled or config.resonance_enabled)
        memory = memory_implementation(config.backend, head.device, head.dtype, config.head_dim, turning=turning)
        return remembers and memory == "torch"

    @property
    def _blocks(self) -> Sequence[Phase2Block]:
        return blocks_of(self)
