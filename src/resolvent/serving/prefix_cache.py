"""Cache of states at block boundaries, by the tokens before them.

Prompts are read in blocks that begin at multiples of the block size, each block alone. So a state from the cache equals
the state of another reading to the bit.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from ..models.state import ModelState
from .state_files import StateFiles


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
        most_bytes: limit on the size of all states in memory; 0 keeps none.
        files: the states on disk; None for none.

    Attributes:
        nbytes: size of the states in memory.
    """

    def __init__(self, most_bytes: int, files: StateFiles | None = None) -> None:
        self._most_bytes, self._files = most_bytes, files
        self._states: OrderedDict[bytes, ModelState] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        """Return the number of states in memory."""
        return len(self._states)

    def find(self, keys: Sequence[bytes]) -> tuple[int, ModelState | None]:
        """Return the state of the longest prefix that is there, and the number of its blocks; 0 and None if none is."""
        for count in range(len(keys), 0, -1):
            key = keys[count - 1]
            if key in self._states:
                self._states.move_to_end(key)
                return count, self._states[key]
            if self._files is not None and (state := self._files.load(key, count)) is not None:
                self._keep(key, state)
                return count, state
        return 0, None

    def store(self, key: bytes, state: ModelState) -> None:
        """Keep a state, whose tensors must not change. A state that is larger than the limit is not kept."""
        self._keep(key, state)
        if self._files is not None:
            self._files.store(key, state)

    def close(self) -> None:
        """Complete the files."""
        if self._files is not None:
            self._files.close()

    def _keep(self, key: bytes, state: ModelState) -> None:
        if key in self._states or state.nbytes > self._most_bytes:
            return
        self._states[key] = state
        self.nbytes += state.nbytes
        while self.nbytes > self._most_bytes:
            _, oldest = self._states.popitem(last=False)
            self.nbytes -= oldest.nbytes
