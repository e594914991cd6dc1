"""Encode texts, in the process that imports this module or, run as a script, in a process of its own.

The script imports nothing of the package: that would load PyTorch into every process. Requests are texts as JSON on
standard input, and replies are numbers on standard output; the end of the input ends the process.
"""

import json
import os
import struct
import sys
from array import array
from typing import IO

import numpy as np
from tokenizers import Tokenizer

_LENGTH = struct.Struct("<Q")


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return the ids of texts, each (N,) uint32."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.frombuffer(array("I", encoding.ids), np.uint32) for encoding in encodings]


def send(pipe: IO[bytes], *parts: bytes) -> None:
    """Write parts, each after its length."""
    for part in parts:
        pipe.write(_LENGTH.pack(len(part)))
        pipe.write(part)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes:
    """Read a part that `send` wrote.

    Raises:
        EOFError: the other end is closed.
    """
    header = pipe.read(_LENGTH.size)
    part = pipe.read(_LENGTH.unpack(header)[0]) if len(header) == _LENGTH.size else b""
    if len(header) < _LENGTH.size or len(part) < _LENGTH.unpack(header)[0]:
        raise EOFError("the pipe is closed")
    return part


def main() -> None:
    """Reply to every list of texts with a fault, or an empty one, with the numbers of tokens and with all ids."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write between the replies
    tokenizer = Tokenizer.from_str(receive(requests).decode())
    tokenizer.encode_special_tokens = True
    while True:
        try:
            texts = json.loads(receive(requests))
        except EOFError:
            return
        try:
            ids = token_ids(tokenizer, texts)
        except BaseException as error:  # a panic of the library is a BaseException
            send(replies, str(error).encode() or b"unknown", b"", b"")
        else:
            counts = np.array([len(part) for part in ids], np.int64)
            send(replies, b"", counts.tobytes(), np.concatenate(ids).tobytes())


if __name__ == "__main__":
    main()
