"""Cache of states at block boundaries, by the tokens before them.

Prompts are read in blocks that begin at multiples of the block size, each block alone. So a state from the cache equals
the state of another reading to the bit.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ..models.state import ModelState


def block_keys(tokens: np.ndarray, block: int) -> list[bytes]:
    """Return the keys of a prompt's prefixes of 1, 2, ... whole blocks; each leaves a token of the prompt to be read.

    A key is the SHA-256 of the key before it and of the block's tokens.

    Args:
        tokens: the prompt, int64 (N,).
        block: tokens per block.
    """
    keys, key = [], b""
    for start in range(0, len(tokens) - block, block):
        key = hashlib.sha256(key + tokens[start : start + block].astype("<i8").tobytes()).digest()
        keys.append(key)
    return keys


class PrefixCache:
    """States of one sequence each, of which the least recently used are evicted.

    Args:
        most_bytes: limit on the size of all states; 0 keeps none.

    Attributes:
        nbytes: size of the states.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._states: OrderedDict[bytes, ModelState] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        """Return the number of states."""
        return len(self._states)

    def find(self, keys: Sequence[bytes]) -> tuple[int, ModelState | None]:
        """Return the state of the longest prefix that is there, and the number of its blocks; 0 and None if none is."""
        for count in range(len(keys), 0, -1):
            if keys[count - 1] in self._states:
                self._states.move_to_end(keys[count - 1])
                return count, self._states[keys[count - 1]]
        return 0, None

    def store(self, key: bytes, state: ModelState) -> None:
        """Keep a state, whose tensors must not change. A state that is larger than the limit is not kept."""
        if key in self._states or state.nbytes > self._most_bytes:
            return
        self._states[key] = state
        self.nbytes += state.nbytes
        while self.nbytes > self._most_bytes:
            _, oldest = self._states.popitem(last=False)
            self.nbytes -= oldest.nbytes
