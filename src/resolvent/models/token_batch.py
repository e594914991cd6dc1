"""Batches of sequences of different lengths: packed end to end, or padded to a rectangle.

Shapes: B batch, N longest sequence, T tokens in all, S sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..files import shown


class Unpadded(NamedTuple):
    """A padded batch without its padding.

    Attributes:
        tokens: (1, T).
        cu_seqlens: offsets of the B sequences, int64 (B + 1,), on the CPU.
        index: index of each token in the flat batch (B * N,), int64 (T,).
    """

    tokens: Tensor
    cu_seqlens: Tensor
    index: Tensor

    def restore(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Restore (1, T, ...) -> (B, N, ...), zero where there was padding."""
        flat = x.new_zeros(shape[0] * shape[1], *x.shape[2:]).index_copy(0, self.index, x[0])
        return flat.unflatten(0, shape)


@dataclass(frozen=True)
class TokenBatch:
    """Tokens as the blocks read them: a rectangle of sequences of one length, or one row of packed sequences.

    Attributes:
        input_ids: (B, N), or (1, T).
        cu_seqlens: offsets of the packed sequences; None for a rectangle. Python reads offsets on the CPU, in every
            layer. It does not read offsets on a device: a captured step can be replayed with others.
        shape: shape of the input (B, N).
        unpadded: the batch without its padding, if there was padding.
    """

    input_ids: Tensor
    cu_seqlens: Tensor | None
    shape: tuple[int, int]
    unpadded: Unpadded | None

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of every sequence, int64 (S,) on the CPU."""
        return torch.full((self.shape[0],), self.shape[1]) if self.cu_seqlens is None else self.cu_seqlens.diff().cpu()

    @property
    def sequences(self) -> int:
        """Number of sequences S."""
        return self.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    def advance(self, position: Tensor) -> Tensor:
        """Return the number of tokens that the sequences have read after these: (S,) -> (S,), where the offsets are."""
        if self.cu_seqlens is None:
            return position + self.shape[1]
        return position.to(self.cu_seqlens.device) + self.cu_seqlens.diff()

    def drop_padding(self, x: Tensor) -> Tensor:
        """Return values of the tokens as they were given, (B, N), in the shape in which the blocks read them."""
        return x if self.unpadded is None else x.flatten()[self.unpadded.index].unsqueeze(0)

    def restore(self, x: Tensor) -> Tensor:
        """Give results (1, T, ...) the shape of the input, (B, N, ...); zero where there was padding."""
        return x if self.unpadded is None else self.unpadded.restore(x, self.shape)


def read_tokens(
    input_ids: Tensor, vocab_size: int, cu_seqlens: Tensor | None, attention_mask: Tensor | None
) -> TokenBatch:
    """Check the input of a model, and drop its padding.

    Raises:
        ValueError: tokens, offsets or mask do not fit each other or the vocabulary.
    """
    check_tokens(input_ids, vocab_size)
    shape = (input_ids.shape[0], input_ids.shape[1])
    if attention_mask is not None:
        if cu_seqlens is not None:
            raise ValueError("give either attention_mask (padded) or cu_seqlens (packed), not both")
        unpadded = unpad(input_ids, attention_mask)
        return TokenBatch(unpadded.tokens, unpadded.cu_seqlens, shape, unpadded)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, shape, input_ids.device)
    return TokenBatch(input_ids, cu_seqlens, shape, None)


def check_tokens(input_ids: Tensor, vocab_size: int) -> None:
    """Raise a ValueError unless these are tokens of the vocabulary, integer (B, N)."""
    _check_tensor("input_ids", input_ids)
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be integers (int64 or int32), got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids must have shape (batch, sequence) and hold a token, got {tuple(input_ids.shape)}")
    # On CUDA a look at the values would stall the queue, and a compiled graph has no place for it: there the embedding
    # itself stands guard.
    if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = input_ids.aminmax()
        if least < 0 or most >= vocab_size:
            wrong = least if least < 0 else most
            raise ValueError(f"token id {wrong} is outside the vocabulary of {vocab_size} (0..{vocab_size - 1})")


def unpad(input_ids: Tensor, attention_mask: Tensor) -> Unpadded:
    """Drop the padding of (B, N) tokens; the mask (B, N) is 1 where there is a token, and 0 elsewhere.

    Raises:
        ValueError: the mask does not fit the tokens.
    """
    check_attention_mask(attention_mask, input_ids)
    mask = attention_mask.bool()
    if not mask.any():
        raise ValueError("attention_mask leaves the batch without any token; keep at least one")
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).cpu()
    index = mask.flatten().nonzero().squeeze(1)
    return Unpadded(input_ids.flatten()[index].unsqueeze(0), cu_seqlens, index)


def check_attention_mask(attention_mask: Tensor, input_ids: Tensor) -> None:
    """Raise a ValueError unless the mask has the shape (B, N) and device of the tokens, and holds only 0 and 1.

    The values decide the shapes of later tensors, so they are read on every device.
    """
    _check_tensor("attention_mask", attention_mask)
    if attention_mask.shape != input_ids.shape:
        expected, got = tuple(input_ids.shape), tuple(attention_mask.shape)
        raise ValueError(f"attention_mask must have the shape of input_ids, {expected}, got {got}")
    _check_device("attention_mask", attention_mask, input_ids.device)
    wrong = (attention_mask != 0) & (attention_mask != 1)
    if wrong.any():
        raise ValueError(
            f"attention_mask must be 1 for tokens and 0 for padding, got {attention_mask[wrong][0].item()}; convert a "
            "mask that is added to scores (0 for tokens) with mask == 0"
        )


def check_labels(labels: Tensor, hidden: Tensor) -> None:
    """Raise a ValueError unless labels fit hidden states (B, N, D): int64 (B, N), on their device."""
    _check_tensor("labels", labels)
    if labels.shape != hidden.shape[:-1]:
        expected, got = tuple(hidden.shape[:-1]), tuple(labels.shape)
        raise ValueError(f"labels must have the shape of input_ids, {expected}, got {got}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}; use labels.long()")
    _check_device("labels", labels, hidden.device)


def check_cu_seqlens(cu_seqlens: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    """Raise a ValueError unless the offsets cut a batch of one, shape (1, T), from 0 to T without going back.

    They are on the CPU or on ``device``, that of the batch.

    Their values are not checked in a graph that is being compiled, which does not know them, and on a device, where
    reading them would stall the queue.
    """
    _check_tensor("cu_seqlens", cu_seqlens)
    if shape[0] != 1:
        raise ValueError(f"cu_seqlens needs packed input_ids of shape (1, T), got {shape}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) < 2:
        raise ValueError(
            "cu_seqlens must be at least two integers (int32 or int64) in one dimension, got "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu":
        _check_device("cu_seqlens", cu_seqlens, device)
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != shape[1] or sorted(offsets) != offsets:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {shape[1]}, got {offsets}")


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {shown(x)}; make it one with torch.tensor")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, input_ids on {device}; use {name}.to({str(device)!r})")
