"""Triton kernels for the products of one token of every sequence: embedding, norms and linear maps.

At this size a GPU waits for launches and for weights. Up to ``MOST_VECTORS`` sequences a program holds a tile of the
weights and multiplies one vector after another: norms are part of the product that follows them, activations and
residual sums of the product before. More sequences are products of matrices on the tensor cores, which read normed
vectors from memory. Where the GPU can, a launch begins while the launch before it ends: it loads its weights and then
waits for the results of the other. The functions here update their outputs in place; everything but the weights is
float32.

Shapes: B sequences, D width of the input, R rows of a weight, F width of the features.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.triton.launch import early, let_next_begin, wait_for_last

_kernel: Any = triton.jit
_ELEMENTS = 8192
"""Weights that a program of products with vectors holds: few enough for many programs, enough to hide their latency."""
MOST_VECTORS = 3
"""Sequences up to which products with one vector after another are faster than products of matrices."""


_FOR_BLOCKS = dict(ROWS=32, COLUMNS=128, num_warps=4, num_stages=3)
_FOR_HEADS = dict(ROWS=64, COLUMNS=128, num_warps=4, num_stages=3)
"""Tiles and launch options of products of matrices, for the maps of a block and for those to a vocabulary."""
_MANY_ROWS = 8192
"""Rows of a map above which it is one to a vocabulary."""


class Norm(NamedTuple):
    """A layer norm: weight (D,), bias (D,) and epsilon; Nones for none."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


class Product(NamedTuple):
    """A weight (R, D), the tensor for the product with it (B, R), and R; Nones for none."""

    weight: Tensor | None = None
    out: Tensor | None = None
    rows: int = 0


class Features(NamedTuple):
    """More columns of the input: (B, F), their weight (R, F), and F; Nones for none."""

    x: Tensor | None = None
    weight: Tensor | None = None
    width: int = 1


class _Products(NamedTuple):
    """Products with the same input."""

    first: Product
    second: Product = Product()
    third: Product = Product()
    fourth: Product = Product()


_NO_NORM, _NO_FEATURES = Norm(), Features()


@_kernel
def normalized(x, norm, columns, inside, width):
    """Apply a layer norm to a row."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + norm.eps)
    gain = tl.load(norm.weight + columns, mask=inside, other=0.0).to(tl.float32)
    return centred * scale * gain + tl.load(norm.bias + columns, mask=inside, other=0.0).to(tl.float32)


@_kernel
def _embed(
    token, position, table, pace, amplitude, x, factor, D, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    let_next_begin(EARLY)
    sequence, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < D
    read = tl.load(position + sequence)
    row = tl.load(table + tl.load(token + sequence) * D + columns, mask=inside, other=0.0).to(tl.float32)
    turns = read.to(tl.float64) * tl.load(pace + columns // 2, mask=inside, other=0.0)
    phase = (turns - tl.floor(turns)).to(tl.float32) * 6.283185307179586
    waves = tl.where(columns % 2 == 0, tl.sin(phase), tl.cos(phase))
    row += tl.load(amplitude) * waves
    tl.debug_barrier()  # several threads read the same number: all of them, before one of them writes
    tl.store(position + sequence, read + 1)
    tl.store(x + sequence * D + columns, row * factor, mask=inside)


@_kernel
def _of_program(products, program, ROWS: tl.constexpr):
    """Return the product that a program computes rows of, as weight, result and rows, and its number among them."""
    weight, out, rows = products.first.weight, products.first.out, products.first.rows + 0 * program
    if products.second.weight is not None:
        tiles = tl.cdiv(rows, ROWS)
        if program >= tiles:
            weight, out, rows = products.second.weight, products.second.out, products.second.rows + 0 * program
            program -= tiles
    if products.third.weight is not None:
        tiles = tl.cdiv(rows, ROWS)
        if program >= tiles:
            weight, out, rows = products.third.weight, products.third.out, products.third.rows + 0 * program
            program -= tiles
    if products.fourth.weight is not None:
        tiles = tl.cdiv(rows, ROWS)
        if program >= tiles:
            weight, out, rows = products.fourth.weight, products.fourth.out, products.fourth.rows + 0 * program
            program -= tiles
    return weight, out, rows, program


@_kernel
def _activated(result, values, ACTIVATION: tl.constexpr):
    """Apply GELU, or the gate of SwiGLU to ``values``."""
    if ACTIVATION == "gelu":
        result *= 0.5 * (1 + tl.erf(result * 0.7071067811865476))
    if ACTIVATION == "swiglu":
        result *= tl.sigmoid(result) * values
    return result


@_kernel
def _multiply_vectors(
    x, norm, products, bias, features, batch, width, ACTIVATION: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of weights with one sequence's vector after another."""
    let_next_begin(EARLY)
    weight, out, rows, program = _of_program(products, tl.program_id(0), ROWS)
    columns, row = tl.arange(0, BLOCK), program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, wanted = columns < width, row < rows
    in_tile, more = wanted[:, None] & inside[None, :], tl.arange(0, FEATURES)
    of_values, shift, of_more = 0.0, 0.0, 0.0
    matrix = tl.load(weight + row[:, None] * width + columns[None, :], mask=in_tile, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu":
        tile = (rows + row)[:, None] * width + columns[None, :]
        of_values = tl.load(weight + tile, mask=in_tile, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + row, mask=wanted, other=0.0).to(tl.float32)
    if features.weight is not None:
        in_more = wanted[:, None] & (more < features.width)[None, :]
        tile = row[:, None] * features.width + more[None, :]
        of_more = tl.load(features.weight + tile, mask=in_more, other=0.0).to(tl.float32)
    wait_for_last(EARLY)
    for sequence in range(batch):
        given = tl.load(x + sequence * width + columns, mask=inside, other=0.0)
        if norm.weight is not None:
            given = normalized(given, norm, columns, inside, width)
        result, values = tl.sum(matrix * given[None, :], 1), 0.0
        if features.weight is not None:
            at = features.x + sequence * features.width + more
            also = tl.load(at, mask=more < features.width, other=0.0)
            result += tl.sum(of_more * also[None, :], 1)
        if bias is not None:
            result += shift
        if ACTIVATION == "swiglu":
            values = tl.sum(of_values * given[None, :], 1)
        result = _activated(result, values, ACTIVATION)
        at_out = out + sequence * rows + row
        if ADD:
            result += tl.load(at_out, mask=wanted, other=0.0)
        tl.store(at_out, result, mask=wanted)


@_kernel
def _normalize(x, norm, out, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    let_next_begin(EARLY)
    sequence, columns = tl.program_id(0), tl.arange(0, BLOCK)
    inside = columns < width
    wait_for_last(EARLY)
    given = tl.load(x + sequence * width + columns, mask=inside, other=0.0)
    result = normalized(given, norm, columns, inside, width)
    tl.store(out + sequence * width + columns, result.to(out.dtype.element_ty), mask=inside)


@_kernel
def _multiply_matrices(
    x, products, bias, features, batch, width, ACTIVATION: tl.constexpr, ADD: tl.constexpr, COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Multiply the vectors of some sequences with some rows of the weights, in the dtype of the weights."""
    let_next_begin(EARLY)
    weight, out, rows, program = _of_program(products, tl.program_id(0), ROWS)
    row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sequence = tl.program_id(1) * SEQUENCES + tl.arange(0, SEQUENCES)
    wanted, there, offsets = row < rows, sequence < batch, tl.arange(0, COLUMNS)
    result, values = tl.zeros([SEQUENCES, ROWS], tl.float32), tl.zeros([SEQUENCES, ROWS], tl.float32)
    wait_for_last(EARLY)
    for start in range(0, width, COLUMNS):
        column = start + offsets
        inside = column < width
        in_x, in_tile = there[:, None] & inside[None, :], inside[:, None] & wanted[None, :]
        given = tl.load(x + sequence[:, None] * width + column[None, :], mask=in_x, other=0.0)
        given = given.to(weight.dtype.element_ty)
        matrix = tl.load(weight + row[None, :] * width + column[:, None], mask=in_tile, other=0.0)
        result = tl.dot(given, matrix, result, input_precision="ieee")
        if ACTIVATION == "swiglu":
            tile = (rows + row)[None, :] * width + column[:, None]
            values = tl.dot(given, tl.load(weight + tile, mask=in_tile, other=0.0), values, input_precision="ieee")
    if features.weight is not None:
        more = tl.arange(0, FEATURES)
        known = more < features.width
        at = features.x + sequence[:, None] * features.width + more[None, :]
        also = tl.load(at, mask=there[:, None] & known[None, :], other=0.0).to(weight.dtype.element_ty)
        at = features.weight + row[None, :] * features.width + more[:, None]
        of_more = tl.load(at, mask=known[:, None] & wanted[None, :], other=0.0)
        result = tl.dot(also, of_more, result, input_precision="ieee")
    if bias is not None:
        result += tl.load(bias + row, mask=wanted, other=0.0).to(tl.float32)[None, :]
    result = _activated(result, values, ACTIVATION)
    at_out, in_out = out + sequence[:, None] * rows + row[None, :], there[:, None] & wanted[None, :]
    if ADD:
        result += tl.load(at_out, mask=in_out, other=0.0)
    tl.store(at_out, result, mask=in_out)


# ------------------------------------------------------------------------------------------------------- the launches


def embed(
    token: Tensor,
    position: Tensor,
    table: Tensor,
    pace: Tensor,
    amplitude: Tensor,
    factor: float,
    out: Tensor,
) -> None:
    """Compute ``out`` (B, D), ``factor`` times the sum of token and position embedding, and count the token.

    The launch begins when all others have ended, so that the state of the token before is complete for those after it.

    Args:
        token: (B,).
        position: tokens read before, (B,); it is increased.
        table: token embedding, (vocabulary, D).
        pace: turns per token of the waves of ``ZetaEmbedding``, float64 (D / 2,).
        amplitude: of the waves, ().
        factor: factor of the sum.
        out: allocated for the result.
    """
    width = table.shape[1]
    sizes = (factor, width, triton.next_power_of_2(width))
    options = {name: value for name, value in early(out.device).items() if name == "EARLY"}
    with torch.cuda.device_of(out):
        _embed[(len(token),)](token.contiguous(), position, table, pace, amplitude, out, *sizes, num_warps=4, **options)


def linear(
    x: Tensor,
    products: Sequence[tuple[Tensor, Tensor]],
    *,
    bias: Tensor | None = None,
    norm: Norm = _NO_NORM,
    activation: Literal["gelu", "swiglu"] | None = None,
    add: bool = False,
    features: Features = _NO_FEATURES,
) -> None:
    """Compute ``activation(norm(x) weightᵀ + features + bias)`` into the results, or with ``add`` add it to them.

    Args:
        x: (B, D).
        products: up to four weights (R, D), each with the tensor for its product (B, R).
        bias: of the first product, (R,); needs to be the only one.
        norm: layer norm of x.
        activation: for ``swiglu`` the weight is (2R, D), gates and values, as ``layers.GatedFeedForward`` has them.
        add: add to the results.
        features: more columns of the input, and of the only weight.
    """
    matrices = 2 if activation == "swiglu" else 1
    chosen = _Products(*(Product(weight, out, len(weight) // matrices) for weight, out in products))
    of_features = max(16, triton.next_power_of_2(features.width))
    common = dict(ACTIVATION=activation, ADD=add, FEATURES=of_features, **early(x.device))
    with torch.cuda.device_of(x):
        if len(x) <= MOST_VECTORS:
            block = triton.next_power_of_2(x.shape[1])
            most = max(product.rows for product in chosen)
            held = max(1, min(triton.next_power_of_2(most), _ELEMENTS // (matrices * block)))
            _multiply_vectors[(_tiles(chosen, held),)](
                x, norm, chosen, bias, features, *x.shape, BLOCK=block, ROWS=held, num_warps=4, **common
            )
            return
        if norm.weight is not None:
            x = _normalize_rows(x, norm, products[0][0].dtype)
        tile = _FOR_HEADS if chosen.first.rows > _MANY_ROWS else _FOR_BLOCKS
        sequences = min(64, max(16, triton.next_power_of_2(len(x))))
        _multiply_matrices[(_tiles(chosen, tile["ROWS"]), triton.cdiv(len(x), sequences))](
            x, chosen, bias, features, *x.shape, SEQUENCES=sequences, **tile, **common
        )


def _tiles(products: _Products, rows: int) -> int:
    """Return the number of programs that compute ``rows`` rows of a product each."""
    return sum(triton.cdiv(product.rows, rows) for product in products)


def _normalize_rows(x: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """Return x (B, D) normed, in another dtype."""
    out = torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(x.shape[1])
    _normalize[(len(x),)](x, norm, out, x.shape[1], BLOCK=block, num_warps=4, **early(x.device))
    return out
