"""Fixtures that all tests share."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():  # before anything imports Triton
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as nohup starts what outlives its terminal
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

os.environ.pop("COLUMNS", None)  # processes of pytest-xdist have one, others not

torch.set_num_threads(1)  # the tensors are small: two threads would wait for each other longer than they compute


def _patch_triton_once() -> None:
    """Look through ``triton.language`` once for every module of kernels.

    The interpreter looks through it anew for every call of a function of a kernel, which takes longer than what the
    kernels compute.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set[int]()

    class Kept:
        def restore(self) -> None:
            pass

    def patch_once(fn: Any) -> Kept:
        if id(fn.__globals__) not in patched:
            patch(fn)
            patched.add(id(fn.__globals__))
        return Kept()

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_triton_once()


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Restore the environment variables that a test, a command or a library changed."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    """The same random numbers for every test; float32 products in float32, whatever a test before asked for."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
