"""The server with OpenAI's client: answers equal those of ``generate``; an error affects its own request only."""

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
import torch

from resolvent.serving.api import Limits

from .servers import NAME, Running, serving, small_model

LIMITS = Limits(prompt_tokens=4000, new_tokens=100_000, seconds=60)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(small_model(), limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def post(server: Running, body: Any = None, path: str = "completions", **options: Any) -> httpx2.Response:
    if body is not None:
        options["json"] = body
    return httpx2.post(f"{server.url}/v1/{path}", timeout=60, **options)


def settled(server: Running) -> None:
    """Wait until no request is left in the engine."""
    deadline = time.monotonic() + 20
    while server.engine.running or server.engine.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


OPTIONS: list[dict[str, Any]] = [
    dict(temperature=0),
    dict(temperature=0.7, top_p=0.9),
    dict(presence_penalty=1.0, frequency_penalty=0.5),
    dict(extra_body=dict(top_k=20, min_p=0.02, repetition_penalty=1.2)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_completion_equals_generate(server: Running, client: openai.OpenAI, options: dict[str, Any]):
    answer = client.completions.create(model=NAME, prompt="My fellow", max_tokens=40, seed=7, **options)
    sampling = {**options, **options.get("extra_body", {})}
    sampling.pop("extra_body", None)
    assert answer.choices[0].text == server.text("My fellow", 40, 7, **sampling)
    assert answer.usage.prompt_tokens == 10  # a token opens the text
    assert 0 < answer.usage.completion_tokens <= 40
    assert answer.usage.total_tokens == 10 + answer.usage.completion_tokens


def test_streamed_completion_equals_the_whole(client: openai.OpenAI):
    options = dict(model=NAME, prompt="née 日本", max_tokens=60, seed=3, n=2)
    whole = client.completions.create(**options)
    texts, reasons = ["", ""], [None, None]
    for chunk in client.completions.create(**options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunk.usage == whole.usage


def test_answers_have_the_seeds_after_the_first(server: Running, client: openai.OpenAI):
    answer = client.completions.create(model=NAME, prompt=["one", "two"], n=3, max_tokens=20, seed=10)
    expected = [server.text(prompt, 20, 10 + i) for i, prompt in enumerate(["one"] * 3 + ["two"] * 3)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))


def test_prompt_of_tokens_is_taken_as_it_is(server: Running, client: openai.OpenAI):
    answer = client.completions.create(model=NAME, prompt=[5, 6, 7], max_tokens=20, seed=1)
    assert answer.choices[0].text == server.continued([5, 6, 7], 20, 1, (), {})
    assert answer.usage.prompt_tokens == 3


def test_stop_string_ends_an_answer_and_frees_its_place(server: Running, client: openai.OpenAI):
    free = server.text("abc", 200, 5)
    stop = free[30:32]
    end = free.index(stop)
    for stream in (False, True):
        answer = client.completions.create(
            model=NAME, prompt="abc", max_tokens=100_000, seed=5, stop=[stop, "\0never"], stream=stream
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == free[:end]
        assert chunks[-1].choices[0].finish_reason == "stop"
        settled(server)


def test_chat_equals_generate_after_the_template(server: Running, client: openai.OpenAI):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who <|endoftext|>?"}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=30, seed=2)
    text = "System:\nBe brief.\n\nUser:\nWho <|endoftext|>?\n\nAssistant:\n"
    expected = server.continued([256, *text.encode()], 30, 2, ("\nUser:",), {})
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == 1 + len(text)
    chunks = list(client.chat.completions.create(model=NAME, messages=messages, max_tokens=30, seed=2, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_log_probabilities_are_those_of_the_model(server: Running, client: openai.OpenAI):
    options = dict(model=NAME, max_tokens=8, seed=2, temperature=0)
    answer = client.completions.create(prompt="abc", logprobs=3, **options).choices[0].logprobs
    draws = server.model.draws(_ids("abc"), 8, temperature=0, logprobs=3)
    for logprob, top, draw in zip(answer.token_logprobs, answer.top_logprobs, draws, strict=True):
        assert logprob == pytest.approx(draw.logprob.item(), abs=1e-4)
        assert max(top.values()) == pytest.approx(logprob, abs=1e-6)  # the likeliest token was taken
        assert len(top) <= 4
    messages = [{"role": "user", "content": "abc"}]
    chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **options)
    for each in chat.choices[0].logprobs.content:
        assert each.logprob == pytest.approx(each.top_logprobs[0].logprob, abs=1e-6)
        assert each.bytes is None or bytes(each.bytes).decode() == each.token
    plain = client.completions.create(prompt="abc", **options)
    assert plain.choices[0].logprobs is None


def _ids(prompt: str) -> torch.Tensor:
    return torch.tensor([[256, *prompt.encode()]])


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "resolvent"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this server has 'small'"):
        client.completions.create(model="other", prompt="a")


def test_common_beginning_is_read_once(server: Running, client: openai.OpenAI):
    document = "the law of the nation " * 100
    before = server.engine.counters.read
    answers = [client.completions.create(model=NAME, prompt=document + q, max_tokens=1) for q in ("a?", "b?", "c?")]
    assert server.engine.counters.read - before < 1.2 * len(document)
    cached = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert cached == [0, 2176, 2176]  # whole blocks of 64 tokens


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (dict(prompt="a", temperature=-1), "temperature", "temperature must be >= 0 and finite, got -1"),
        (dict(prompt="a", top_p=2), "top_p", r"top_p must be in \(0, 1\], got 2"),
        (dict(prompt="a", n=0), "n", "n: .*greater than or equal to 1"),
        (dict(prompt="a", n=17), None, "17 answers to one prompt are more than the 16 places"),
        (dict(prompt="a", seed=-1), "seed", "seed: .*greater than or equal to 0"),
        (dict(prompt="a", max_tokens=1_000_000), "max_tokens", "max_tokens must be at most 100000, got 1000000"),
        (dict(prompt="a", max_tokens="3"), "max_tokens", "max_tokens: .*integer"),
        (dict(prompt="a", stop=[""]), "stop.0", "stop.0: .*at least 1 character"),
        (dict(prompt="a", best_of=3), "best_of", "unknown field: best_of; leave it out"),
        (dict(prompt=[]), "prompt", "the prompt has no token"),
        (dict(prompt=["a", 1]), "prompt", "should be a text, a list of texts, a list of tokens"),
        (dict(prompt=[[1], ["a"]]), "prompt", "should be a text, a list of texts, a list of tokens"),
        (dict(prompt=["a"] * 65), None, "65 prompts are more than the 64 that may wait: send them in several"),
        (dict(prompt=[[1]] * 3000), "prompt", "3000 prompts are more than 2048: send them in several requests"),
        (dict(prompt=[1, 257]), "prompt", r"token 257 is outside the vocabulary \(0..256\)"),
        (dict(prompt=[-1]), "prompt", "token -1 is outside the vocabulary"),
        (dict(prompt="a" * 5000), "prompt", "the prompt has 5,001 tokens, more than 4,000; shorten it"),
        (dict(), "prompt", "the field prompt is missing"),
        ([], None, "the body: Input should be an object"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_request_is_named(server: Running, body: Any, param: str | None, told: str):
    response = post(server, {"model": NAME, **body} if isinstance(body, dict) else body)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(told, error["message"]), error


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "messages: .*at least 1 item"),
        ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content is missing"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content"),
    ],
    ids=str,
)
def test_wrong_messages_are_named(server: Running, messages: Any, told: str):
    response = post(server, {"model": NAME, "messages": messages}, "chat/completions")
    assert response.status_code == 400
    assert re.search(told, response.json()["error"]["message"])


def test_invalid_json_is_named(server: Running):
    for content in (b"{", b'{"model": "small", "prompt": "a"', b"\xff", b"[" * 100_000, b""):
        response = post(server, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert "not valid JSON" in response.json()["error"]["message"]
    response = post(server, content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415


def test_unknown_paths_and_methods_are_named(server: Running):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
    ):
        response = httpx2.request(method, server.url + path)
        assert response.status_code == status
        assert path in response.json()["error"]["message"]


def test_prompt_of_ten_megabytes_is_refused_and_others_are_answered(server: Running, client: openai.OpenAI):
    with pytest.raises(
        openai.APIStatusError, match="the body is longer than 129,536 bytes; shorten the prompt"
    ) as caught:
        client.completions.create(model=NAME, prompt="x" * 10_000_000)
    assert caught.value.status_code == 413
    test_completion_equals_generate(server, client, {})


def test_client_that_goes_away_frees_its_place(server: Running, client: openai.OpenAI):
    for stream in (True, False):
        body = json.dumps(dict(model=NAME, prompt="abc", max_tokens=100_000, n=16, stream=stream)).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            while not server.engine.running:
                time.sleep(0.01)
        settled(server)
    test_completion_equals_generate(server, client, {})


def test_full_queue_is_named_and_others_are_answered():
    with (
        serving(small_model(), ends=frozenset(), max_sequences=1, max_queue=2, limits=LIMITS) as server,
        server.client() as client,
    ):
        stream = client.completions.create(model=NAME, prompt="abc", max_tokens=100_000, stream=True)
        first = next(iter(stream))
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(post, server, dict(model=NAME, prompt="a", max_tokens=2)) for _ in range(2)]
            while server.engine.waiting < 2:
                time.sleep(0.01)
            with pytest.raises(
                openai.APIStatusError, match="2 requests wait already, and 2 may; try again later"
            ) as caught:
                client.completions.create(model=NAME, prompt="b")
            assert caught.value.status_code == 503
            assert caught.value.response.headers["Retry-After"] == "1"
            stream.close()
            assert [each.result().status_code for each in waiting] == [200, 200]
        assert first.choices


def test_request_that_takes_too_long_is_ended():
    limits = Limits(new_tokens=1_000_000, seconds=0.5)
    with serving(small_model(), ends=frozenset(), limits=limits) as server, server.client() as client:
        with pytest.raises(openai.APIStatusError, match=r"took longer than 0.5 s") as caught:
            client.completions.create(model=NAME, prompt="abc", max_tokens=1_000_000)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"took longer than 0.5 s"):
            list(client.completions.create(model=NAME, prompt="abc", max_tokens=1_000_000, stream=True))
        assert client.completions.create(model=NAME, prompt="abc").choices


def test_keys_are_checked():
    with serving(small_model(), keys=["one", "two"]) as server:
        for key in ("one", "two"):
            assert server.client(key).models.list()
        for key in ("three", "on", "oné"):
            response = httpx2.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}".encode()})
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
            server.client("three").completions.create(model=NAME, prompt="a")
        assert httpx2.get(f"{server.url}/v1/models").status_code == 401
        assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}


def test_page_under_another_name_is_refused(server: Running):
    """A web page whose name was made to lead to this machine."""
    response = httpx2.get(f"{server.url}/v1/models", headers={"Host": "evil.example:80"})
    assert response.status_code == 403
    assert "'evil.example'" in response.json()["error"]["message"]
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        assert httpx2.get(f"{server.url}/v1/models", headers={"Host": host}).status_code == 200


def test_metrics_count_requests_and_tokens(server: Running, client: openai.OpenAI):
    def value(name: str) -> float:
        lines = httpx2.get(f"{server.url}/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)

    names = {
        "resolvent_tokens_written_total": 9,
        "resolvent_prompt_tokens_read_total": 4,
        'resolvent_requests_total{path="/v1/completions",status="200"}': 1,
        "resolvent_first_token_seconds_count": 1,
        "resolvent_answer_seconds_count": 1,
    }
    before = {name: value(name) for name in names}
    text = client.completions.create(model=NAME, prompt="abc", max_tokens=9, seed=0, temperature=0)
    assert text.usage.completion_tokens == 9
    assert {name: value(name) - before[name] for name in names} == names
    assert value("resolvent_running_answers") == value("resolvent_waiting_requests") == 0


def test_ragged_clients_at_once_get_the_answers_of_single_runs(server: Running, client: openai.OpenAI):
    many_clients(server, client, clients=64, seconds=1)


@pytest.mark.slow
def test_ragged_clients_for_a_minute_get_the_answers_of_single_runs(server: Running, client: openai.OpenAI):
    many_clients(server, client, clients=64, seconds=60)


def many_clients(server: Running, client: openai.OpenAI, clients: int, seconds: float) -> None:
    """Ask from many clients at once, streamed and not, and compare all answers."""
    end = time.monotonic() + seconds

    def ask(number: int) -> list[tuple[dict[str, Any], str]]:
        found = []
        while not found or time.monotonic() < end:
            seed = number + 1000 * len(found)
            options = dict(prompt="word " * (seed % 37), max_tokens=1 + seed % 29, seed=seed, temperature=seed % 3 / 2)
            answer: Any = client.completions.create(model=NAME, **options, stream=seed % 2 == 1)
            chunks = answer if seed % 2 else [answer]
            found.append((options, "".join(chunk.choices[0].text for chunk in chunks)))
        return found

    with ThreadPoolExecutor(clients) as pool:
        answers = [each for found in pool.map(ask, range(clients)) for each in found]
    assert len(answers) >= clients
    for options, text in answers[:: max(1, len(answers) // 100)]:
        expected = server.text(
            options["prompt"], options["max_tokens"], options["seed"], temperature=options["temperature"]
        )
        assert text == expected, options
    settled(server)
