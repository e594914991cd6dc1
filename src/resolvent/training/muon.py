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

Several processes share the matrices: each orthogonalises some and sends them to the others, in one message to each.
Of a sharded matrix (FSDP2), every process first sends its rows to the one that orthogonalises it, and receives only
its own rows.

Shapes: P matrices of one shape, R rows, C columns, M = min(R, C); r of the rows are in this process.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from resolvent.training.sharding import local_tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315
_SHIFT, _OFFSET = _B / (2 * _C), _A - _B**2 / (4 * _C)
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon for the parameter groups that name ``parts``, AdamW for the others.

    A step never synchronises the CPU with the device. Once every parameter has had a gradient, it allocates nothing
    that outlives it: then a CUDA graph can record it, with learning rates that are tensors. With several processes, the
    step equals that of one process but for the order of sums.

    Args:
        groups: parameter groups; each names ``lr`` and ``weight_decay``. ``parts`` counts, for each matrix of a group,
            the projections that lie on top of each other in it: their rows are orthogonalised apart.
        betas: of AdamW.
        momentum: of Muon, in Nesterov's form.
        processes: processes with the same parameters and gradients that share the work of orthogonalising; None for
            this one alone. Those of sharded parameters (DTensors) always do.

    Attributes:
        found_inf: float32 (); while it is 1, steps change neither weights nor averages. PyTorch's fused kernels read
            it, without a synchronisation with the CPU.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        processes: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(groups, dict(parts=None, betas=betas, momentum=momentum, eps=1e-8, fused=True))
        self._processes = processes

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every parameter that has a gradient; the loss of ``closure``, which computes gradients, if given."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            (self._step_others if group["parts"] is None else self._step_matrices)(group)
        return loss

    def _step_others(self, group: dict[str, Any]) -> None:
        """Take a step of AdamW, in a sharded model on the shards: DTensors cost Python much time."""
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [self._state(p, "exp_avg", "exp_avg_sq") for p in parameters]
        adamw(
            [local_tensor(p) for p in parameters],
            [local_tensor(p.grad) for p in parameters],
            *([local_tensor(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq")),
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
        if not alike:
            return
        # 1. Momentum, and what it looks ahead to.
        ahead = self._look_ahead(list(alike.values()), group["momentum"])
        # 2. Whole matrices, each in one process, and their orthogonal factors, projection by projection.
        shares = self._shares(list(alike.values()))
        wholes = ahead if shares is None else shares.collect(ahead)
        heights = [shape[0] // parts for shape, parts in alike]
        factors = orthogonalize([x.view(-1, height, x.shape[2]) for x, height in zip(wholes, heights, strict=True)])
        # 3. The step along them, of the rows that are here.
        directions = [x.view(whole.shape) for x, whole in zip(factors, wholes, strict=True)]
        directions = directions if shares is None else shares.distribute(directions)
        ratios = [height / shape[1] for height, (shape, _) in zip(heights, alike, strict=True)]
        self._move(list(alike.values()), directions, ratios, group)

    def _shares(self, alike: Sequence[Sequence[Tensor]]) -> "_Shares | None":
        """Return how processes share the matrices of each shape; None if this process is alone."""
        first = alike[0][0]
        processes = first.device_mesh.get_group() if isinstance(first, DTensor) else self._processes
        return None if processes is None else _Shares.of(alike, processes)

    def _look_ahead(self, alike: Sequence[Sequence[Tensor]], momentum: float) -> list[Tensor]:
        """Update the momentum; Nesterov's ``g + momentum * buffer``, (P, r, C) for the matrices of each shape.

        They come as they are multiplied, on CUDA in bfloat16. SGD that starts at zero, with a learning rate of −1, ends
        there.
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
        return [x.to(torch.bfloat16) if x.is_cuda else x for x in ahead]

    def _move(
        self,
        alike: Sequence[Sequence[Tensor]],
        directions: Sequence[Tensor],
        ratios: Sequence[float],
        group: dict[str, Any],
    ) -> None:
        """Move matrices along orthogonal ones, (P, r, C) for each shape; ``ratios`` are rows over columns of these."""
        of_factor = defaultdict[float, tuple[list[Tensor], list[Tensor]]](lambda: ([], []))
        for parameters, direction, ratio in zip(alike, directions, ratios, strict=True):
            weights, steps = of_factor[math.sqrt(max(1.0, ratio))]
            weights += [local_tensor(p) for p in parameters]
            steps += direction.to(parameters[0].dtype).unbind()
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


class _Shares(NamedTuple):
    """Matrices of some shapes, of which every process orthogonalises a share.

    Attributes:
        processes: the processes.
        shapes: (P, R, C) for each shape.
        owned: for each shape and process, the range of the matrices that the process orthogonalises.
        rows: for each shape and process, the range of the rows of every matrix that the process holds.
        sharded: no process holds whole matrices.
    """

    processes: dist.ProcessGroup
    shapes: list[tuple[int, int, int]]
    owned: list[list[range]]
    rows: list[list[range]]
    sharded: bool

    @classmethod
    def of(cls, alike: Sequence[Sequence[Tensor]], processes: dist.ProcessGroup) -> "_Shares":
        """Return the shares of parameters, which are lists of equal shape."""
        count, first, owned, rows = processes.size(), 0, [], []
        shapes = [(len(parameters), parameters[0].shape[0], parameters[0].shape[1]) for parameters in alike]
        sharded = isinstance(alike[0][0], DTensor)
        for each, (matrices, height, _) in zip(alike, shapes, strict=True):
            placements = each[0].placements if isinstance(each[0], DTensor) else None
            if sharded and placements != (Shard(0),):
                raise ValueError(f"Muon takes matrices that are sharded by rows, got {placements}")
            owned.append(_even(matrices, count, first))
            first += matrices % count  # the processes with one more
            held = -(-height // count)
            whole = range(height)
            rows.append([whole[i * held : (i + 1) * held] if sharded else whole for i in range(count)])
        return cls(processes, shapes, owned, rows, sharded)

    def collect(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Return the whole matrices (P, R, C) of this process's share, of the rows (P, r, C) that every process has."""
        me, everyone = self.processes.rank(), range(self.processes.size())
        if not self.sharded:
            return [x[_slice(owned[me])] for x, owned in zip(rows, self.owned, strict=True)]
        sent = [[x[_slice(owned[to])] for x, owned in zip(rows, self.owned, strict=True)] for to in everyone]
        shapes = [[(len(owned[me]), len(held[of]), shape[2]) for shape, owned, held in self._each] for of in everyone]
        return [torch.cat(pieces, dim=1) for pieces in self._exchange(sent, shapes)]

    def distribute(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows (P, r, C) of all matrices that this process holds, of every process's share (P, R, C)."""
        me, everyone = self.processes.rank(), range(self.processes.size())
        sent = [[x[:, _slice(held[to])] for x, held in zip(wholes, self.rows, strict=True)] for to in everyone]
        shapes = [[(len(owned[of]), len(held[me]), shape[2]) for shape, owned, held in self._each] for of in everyone]
        return [torch.cat(pieces) for pieces in self._exchange(sent, shapes)]

    @property
    def _each(self) -> list[tuple[tuple[int, int, int], list[range], list[range]]]:
        return list(zip(self.shapes, self.owned, self.rows, strict=True))

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, int, int]]]
    ) -> list[list[Tensor]]:
        """Send tensors to every process in one message; return, for each shape, what every process sent.

        Args:
            sent: for every process, a tensor of each shape.
            shapes: for every process, the shapes of the tensors that it sends here.
        """
        sizes = [[math.prod(shape) for shape in of] for of in shapes]
        message = torch.cat([x.flatten() for to in sent for x in to])
        received = message.new_empty(sum(map(sum, sizes)))
        lengths = [sum(x.numel() for x in to) for to in sent]
        dist.all_to_all_single(received, message, [sum(of) for of in sizes], lengths, group=self.processes)
        pieces = iter(received.split([size for of in sizes for size in of]))
        by_process = [[next(pieces).view(shape) for shape in of] for of in shapes]
        return [list(of_shape) for of_shape in zip(*by_process, strict=True)]


def _even(count: int, processes: int, first: int) -> list[range]:
    """Divide ``count`` things among processes; those from ``first`` on have one more if it does not come out even."""
    ranges, start = [], 0
    for i in range(processes):
        end = start + count // processes + ((i - first) % processes < count % processes)
        ranges.append(range(start, end))
        start = end
    return ranges


def _slice(x: range) -> slice:
    return slice(x.start, x.stop)


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
