"""A server in a thread, and what it answers compared with."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from openai import OpenAI

from resolvent.data import EOT, build_tokenizer, encode_documents
from resolvent.data.chat_template import ChatTemplate
from resolvent.data.detokenization import decode_until
from resolvent.serving.api import Limits, Service
from resolvent.serving.engine import Engine
from resolvent.serving.server import listen
from tests.models.small import PHASE2

NAME = "small"
TOKENIZER = build_tokenizer("bytes", [])
END = 256


@dataclass
class Running:
    """A server that runs.

    Attributes:
        url: address without a path.
        engine: its engine.
        model: its model.
    """

    url: str
    engine: Engine
    model: Any

    def client(self, key: str = "none") -> OpenAI:
        """Return a client that tries once."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def text(self, prompt: str, max_tokens: int, seed: int, *, stop: tuple[str, ...] = (), **options: Any) -> str:
        """Return what ``generate`` writes alone."""
        return self.continued(
            encode_documents([prompt], TOKENIZER).tokens[:-1].tolist(), max_tokens, seed, stop, options
        )

    def continued(
        self, ids: list[int], max_tokens: int, seed: int, stop: tuple[str, ...], options: dict[str, Any]
    ) -> str:
        """Return the text that follows tokens."""
        tokens = self.model.stream(torch.tensor([ids]), max_tokens, seeds=[seed], **options)
        return "".join(decode_until(TOKENIZER, (int(token) for token in tokens), ids, stop=stop, ends=(END,)))


def small_model() -> Any:
    """Return a model of bytes whose sequences differ, and end now and then."""
    torch.manual_seed(0)
    return PHASE2.model(vocab_size=257)


@contextlib.contextmanager
def serving(
    model: Any,
    *,
    keys: list[str] | None = None,
    limits: Limits | None = None,
    template: str | None = None,
    ends: frozenset[int] = frozenset({END}),
    **options: Any,
) -> Iterator[Running]:
    """Serve a model as long as the block lasts; without ``ends``, answers have no end. The options are ``Engine``'s."""
    engine = Engine(model, **{"max_sequences": 16, "max_queue": 64, "cache_bytes": 1 << 24, "block": 64, **options})
    chat = ChatTemplate(template, TOKENIZER, {"bos_token": EOT, "eos_token": EOT}, ends)
    service = Service(engine, TOKENIZER, chat, NAME, limits=limits or Limits(), keys=keys)
    config = uvicorn.Config(service.application(), lifespan="on", log_config=None, timeout_graceful_shutdown=10)
    server, listener = uvicorn.Server(config), listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, model)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
        assert not engine.alive
