"""RMSNorm of the residual stream."""

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x²) + eps) ⊙ weight`` in the dtype of x.

    PyTorch's module has one kernel for it only where x and weight have one dtype, which under autocast they have not.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) -> (..., D)."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
