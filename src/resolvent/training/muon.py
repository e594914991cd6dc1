r"""Muon (Jordan et al., 2024): momentum, orthogonalised, for matrices; AdamW for everything else.

A matrix moves along the orthogonal factor of its momentum: of ``G = U diag(s) Vᵀ``, along ``U Vᵀ``, which five
Newton-Schulz steps approximate with products alone,

    X_0 = G / ‖G‖_F,     X_{i+1} = (a I + b A + c A²) X_i,     A = X_i X_iᵀ,

``(a, b, c) = (3.4445, -4.7750, 2.0315)``: large singular values end between 0.7 and 1.2, which trains as well as
exactly 1. The polynomial is computed as ``c (A + b/2c I)² + (a − b²/4c) I``: a step is three products and two additions
to a diagonal. In bfloat16 that is as exact as the sum of three terms. Iterating on A alone, with one product by X_0 at
the end, is not: rounding makes small eigenvalues of A negative, and the iteration lets them grow.

Why not ``torch.optim.Muon``: it takes matrices one by one, 30 launches each; it cannot be recorded in a CUDA graph, for
its learning rate is a Python number; it orthogonalises projections that lie on top of each other in one weight as if
they were one; and on the shards of FSDP2 it is slow, with a collective for every product, and not exact.

Shapes: P matrices of one shape, R rows, C columns, M = min(R, C).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Shard, distribute_tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from resolvent.training.sharding import local_tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_SHIFT, _OFFSET = _B / (2 * _C), _A - _B**2 / (4 * _C)
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups that name ``parts``, AdamW for the others.

    A step never synchronises the CPU with the device. Once every parameter has had a gradient, it allocates nothing
    that outlives it: then a CUDA graph can record it, with learning rates that are tensors. Sharded matrices (DTensors)
    are gathered as they are multiplied, with one collective for all parameters of a shape, and every process
    orthogonalises all of them: the step equals that of one process.

    Args:
        groups: parameter groups; each names ``lr`` and ``weight_decay``. ``parts`` counts, for each matrix of a group,
            the projections that lie on top of each other in it: their rows are orthogonalised apart.
        betas: of AdamW.
        momentum: of Muon, in Nesterov's form.

    Attributes:
        found_inf: float32 (); while it is 1, steps change neither weights nor averages. PyTorch's fused kernels read
            it, without a synchronisation with the CPU.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.95), momentum: float = 0.95
    ) -> None:
        super().__init__(groups, dict(parts=None, betas=betas, momentum=momentum, eps=1e-8, fused=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; the loss of ``closure``, which computes gradients, if given."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            (self._step_others if group["parts"] is None else self._step_matrices)(group)
        return loss

    def _step_others(self, group: dict[str, Any]) -> None:
        """Take a step of AdamW."""
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [self._state(p, "exp_avg", "exp_avg_sq") for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            *([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")),
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Take a step of Muon."""
        alike = defaultdict[tuple[torch.Size, int], list[Tensor]](list)
        for parameter, parts in zip(group["params"], group["parts"], strict=True):
            if parameter.grad is not None:
                alike[parameter.shape, parts].append(parameter)
        # 1. Momentum, and what it looks ahead to: whole matrices, projection by projection.
        ahead = self._look_ahead(list(alike.values()), group["momentum"])
        wholes = [
            _gather(rows, parameters[0]).view(-1, shape[0] // parts, shape[1])
            for rows, ((shape, parts), parameters) in zip(ahead, alike.items(), strict=True)
        ]
        # 2. Orthogonal factors, and 3. the step along them.
        self._move(list(alike.values()), orthogonalize(wholes), group)

    def _look_ahead(self, alike: Sequence[Sequence[Tensor]], momentum: float) -> list[Tensor]:
        """Update the momentum; Nesterov's ``g + momentum * buffer``, (P, r, C) for the matrices of each shape.

        Of a sharded matrix, r rows are here. SGD that starts at zero, with a learning rate of −1, ends there.
        """
        parameters = [p for each in alike for p in each]
        buffers: list[Tensor | None] = [
            local_tensor(self._state(p, "momentum_buffer")["momentum_buffer"]) for p in parameters
        ]
        gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
        ahead = [local_tensor(each[0]).new_zeros(len(each), *local_tensor(each[0]).shape) for each in alike]
        targets = [target for batch in ahead for target in batch.unbind()]
        settings = dict(weight_decay=0.0, dampening=0.0, nesterov=True, maximize=False, fused=True)
        sgd(targets, gradients, buffers, lr=-1.0, momentum=momentum, found_inf=self.found_inf, **settings)
        return ahead

    def _move(self, alike: Sequence[Sequence[Tensor]], directions: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Move matrices along orthogonal matrices, which are (P, R, C) for the projections of each shape."""
        of_factor = defaultdict[float, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
        for parameters, direction in zip(alike, directions, strict=True):
            shifts = _scatter(direction.reshape(len(parameters), *parameters[0].shape), parameters[0])
            weights, steps = of_factor[math.sqrt(max(1.0, direction.shape[1] / direction.shape[2]))]
            weights += [local_tensor(p) for p in parameters]
            steps += shifts.to(parameters[0].dtype).unbind()
        settings = dict(momentum=0.0, dampening=0.0, nesterov=False, maximize=False, fused=True)
        for factor, (weights, steps) in of_factor.items():
            decay = group["weight_decay"] / factor  # so that it takes lr * weight_decay off the weights
            buffers: list[Tensor | None] = [None] * len(weights)
            rate = group["lr"] * factor
            sgd(weights, steps, buffers, lr=rate, weight_decay=decay, found_inf=self.found_inf, **settings)

    def _state(self, parameter: Tensor, *averages: str) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            if parameter.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("a parameter has its first gradient in a CUDA graph: take a step before recording")
            state.update({key: torch.zeros_like(parameter) for key in averages})
            if "exp_avg" in averages:
                state["step"] = torch.zeros((), device=parameter.device)
        return state


def orthogonalize(batches: Sequence[Tensor]) -> list[Tensor]:
    """Return about the orthogonal factors ``U Vᵀ`` of matrices ``U diag(s) Vᵀ``, batch by batch: (P, R, C) each.

    A matrix of zeros stays one. As many matrices as possible are multiplied at once.

    >>> (x,) = orthogonalize([torch.randn(2, 64, 128)])
    >>> bool((torch.linalg.svdvals(x) < 1.3).all())
    True
    """
    # 1. Batches of one shape become one, and those with the same shorter side M go through the steps together.
    alike = defaultdict[torch.Size, list[int]](list)
    for index, batch in enumerate(batches):
        alike[batch.shape[1:]].append(index)
    together = defaultdict[int, list[torch.Size]](list)
    for shape in alike:
        together[min(shape)].append(shape)
    found: dict[int, Tensor] = {}
    for shapes in together.values():
        wholes = [torch.cat([batches[i] for i in alike[shape]]) for shape in shapes]
        # 2. And apart again.
        for shape, whole in zip(shapes, _newton_schulz(wholes), strict=True):
            sizes = [len(batches[i]) for i in alike[shape]]
            found.update(zip(alike[shape], whole.split(sizes), strict=True))
    return [found[index] for index in range(len(batches))]


def _newton_schulz(batches: Sequence[Tensor]) -> list[Tensor]:
    """Take all steps of batches (P, R, C) with the same M."""
    x = [_of_norm_one(batch) for batch in batches]
    wide = [batch.shape[1] <= batch.shape[2] for batch in batches]
    side = min(batches[0].shape[1:])
    grams = x[0].new_empty(sum(map(len, x)), side, side)
    slots = grams.split([len(batch) for batch in batches])
    for _ in range(_STEPS):
        for each, is_wide, slot in zip(x, wide, slots, strict=True):
            torch.bmm(*((each, each.mT) if is_wide else (each.mT, each)), out=slot)
        grams.diagonal(dim1=-2, dim2=-1).add_(_SHIFT)
        polynomials = torch.baddbmm(grams, grams, grams, beta=0, alpha=_C)
        polynomials.diagonal(dim1=-2, dim2=-1).add_(_OFFSET)
        factors = polynomials.split([len(batch) for batch in batches])
        x = [q @ each if is_wide else each @ q for q, each, is_wide in zip(factors, x, wide, strict=True)]
    return x


def _of_norm_one(x: Tensor) -> Tensor:
    """Divide every matrix by its Frobenius norm, which bounds its singular values."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    return torch.div(x, norms.clamp_min(torch.finfo(torch.float32).tiny), out=torch.empty_like(x))


def _gather(rows: Tensor, like: Tensor) -> Tensor:
    """Return whole matrices (P, R, C) of the rows (P, r, C) that every process holds, as a parameter is sharded.

    On CUDA they come in bfloat16, in which they are multiplied.
    """
    rows = rows.to(torch.bfloat16) if rows.is_cuda else rows
    if not isinstance(like, DTensor):
        return rows
    shape = torch.Size((len(rows), *like.shape))
    stride = (like.shape[0] * like.shape[1], like.shape[1], 1)
    placements = _of_batch(like)
    sharded = DTensor.from_local(rows, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)
    return sharded.full_tensor()


def _scatter(matrices: Tensor, like: Tensor) -> Tensor:
    """Return the rows (P, r, C) that this process holds of matrices that all processes have whole."""
    if not isinstance(like, DTensor):
        return matrices
    return distribute_tensor(matrices, like.device_mesh, _of_batch(like), src_data_rank=None).to_local()


def _of_batch(like: DTensor) -> list[Placement]:
    """Return how a batch of matrices is sharded if each of them is sharded as a parameter is."""
    return [Shard(each.dim + 1) if isinstance(each, Shard) else each for each in like.placements]
