"""The server as a process: address, API keys, and an end that waits for the answers."""

import asyncio
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from ..errors import ConfigError
from ..files import read_bytes

_MOST_KEY_BYTES = 1 << 20


def read_keys(path: Path) -> list[str]:
    """Read API keys: one a line; empty lines and lines that begin with # do not count.

    Raises:
        ConfigError: the file cannot be read, or has no key.
    """
    try:
        lines = read_bytes(path, _MOST_KEY_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the API keys in {path}: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"{path} has no API key; write one on a line of its own")
    return keys


def check_address(host: str, *, has_keys: bool) -> None:
    """Refuse an address that other machines reach, unless there are API keys.

    Raises:
        ConfigError: the address is not one of the loopback interface, and there are no keys.
    """
    if not (has_keys or is_loopback(host)):
        raise ConfigError(
            f"host {host} can be reached from other machines, and there is no API key: everybody could use the model. "
            "Give --api-key-file, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be of any address
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any free one.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}; name a free port and an address of this machine"
        ) from error


def run(app: ASGIApp, listener: socket.socket, *, drain_seconds: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT; then take no more connections, and complete the answers that were begun.

    Args:
        app: the application.
        listener: a socket that listens; it is closed at the end.
        drain_seconds: longest wait for the answers that were begun. A second signal does not wait.
        ready: called once requests are answered.
    """
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(drain_seconds),
    )
    server = _Server(config, ready)
    with listener:
        asyncio.run(server.serve(sockets=[listener]))


class _Server(uvicorn.Server):
    """Server that says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()
