"""Encode texts, in the process that imports this module or, run as a script, in a process of its own.

The script imports nothing of the package: that would load PyTorch into every process. Requests and replies are pickles
on standard input and output; the end of the input ends the process.
"""

import os
import pickle
import sys
from array import array

import numpy as np
from tokenizers import Tokenizer


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return the ids of texts, each (N,) uint32."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.frombuffer(array("I", encoding.ids), np.uint32) for encoding in encodings]


def main() -> None:
    """Reply to every list of texts with their numbers of tokens and all ids, or with a fault as text."""
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing else may write between the replies
    tokenizer = Tokenizer.from_str(pickle.load(requests))
    tokenizer.encode_special_tokens = True
    while True:
        try:
            texts = pickle.load(requests)
        except EOFError:
            return
        reply: tuple[np.ndarray, np.ndarray] | str
        try:
            ids = token_ids(tokenizer, texts)
            reply = np.array([len(part) for part in ids]), np.concatenate(ids)
        except BaseException as error:  # a panic of the library is a BaseException
            reply = str(error)
        pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


if __name__ == "__main__":
    main()
