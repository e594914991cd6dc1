"""Several processes that work together on one machine's CPU, as `torchrun` starts them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from resolvent.training import run as _loaded_before_the_fork  # noqa: F401

PATIENCE = 120.0
"""Seconds after which processes count as waiting for each other."""


class Failed(Exception):
    """A process raised an exception, or died."""


def together(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run a function in so many processes, forked from one that has loaded torch; what it returned in each.

    Raises:
        Failed: with what was wrong in the first that failed; the others are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receivers, processes = {}, []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_member, args=(sender, rank, count, port, function, arguments))
        process.start()
        sender.close()
        receivers[receiver] = rank
        processes.append(process)
    try:
        return _results(receivers)
    finally:
        for process in processes:
            process.join(1.0)
            process.kill()
            process.join()


def _results(receivers: dict[Any, int]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        ready = wait([receiver for receiver, rank in receivers.items() if rank not in results], PATIENCE)
        if not ready:
            raise Failed(f"only processes {sorted(results)} came to an end")
        for receiver in ready:
            rank = receivers[receiver]
            try:
                results[rank], fault = receiver.recv()
            except EOFError:
                fault = "died"
            if fault is not None:
                raise Failed(f"process {rank}: {fault}")
    return [results[rank] for rank in range(len(receivers))]


def _member(
    sender: Connection, rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))
    if dist.is_initialized():
        dist.destroy_process_group()
