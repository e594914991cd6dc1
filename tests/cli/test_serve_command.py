"""`resolvent serve`: what it refuses before it listens, and how it ends."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from .conftest import words

Resolvent = Callable[..., Any]


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command; yield the process and the address that it says."""
    command = [sys.executable, "-m", "resolvent", "serve", *map(str, arguments), "--device", "cpu", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert " answers at http://" in line, line + process.stderr.read()
            yield process, line.split(" answers at ")[1].split(";")[0]
        finally:
            process.kill()


def test_sigterm_completes_the_answers_that_were_begun(run_dir: Path):
    with serving(run_dir) as (process, url):
        assert httpx2.get(f"{url}/models").json()["data"][0]["id"] == "rhymes"
        body = dict(model="rhymes", prompt="Rhyme: the", max_tokens=300, stream=True, temperature=0, seed=0)
        body |= dict(presence_penalty=2.0, frequency_penalty=2.0)  # the text does not end soon
        with httpx2.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines).removeprefix("data: "))["object"] == "text_completion"
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] is not None
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == -signal.SIGTERM
        assert process.stderr is not None and process.stderr.read() == ""


def test_other_machines_need_a_key(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        outcome = resolvent("serve", run_dir, "--host", host)
        assert outcome.code == 2
        assert "there is no API key" in words(outcome.err)
    (tmp_path / "keys").write_text("# ours\n\n")
    outcome = resolvent("serve", run_dir, "--host", "0.0.0.0", "--api-key-file", tmp_path / "keys")
    assert outcome.code == 2
    assert "has no API key; write one" in words(outcome.err)
    outcome = resolvent("serve", run_dir, "--api-key-file", tmp_path / "missing")
    assert outcome.code == 2
    assert "cannot read the API keys" in words(outcome.err)


def test_keys_open_the_server_to_others(run_dir: Path, tmp_path: Path):
    (tmp_path / "keys").write_text("# ours\nsecret\n")
    options = ["--host", "0.0.0.0", "--api-key-file", tmp_path / "keys", "--name", "poet"]
    with serving(run_dir, *options) as (process, url):
        url = url.replace("0.0.0.0", "127.0.0.1")
        assert httpx2.get(f"{url}/models").status_code == 401
        models = httpx2.get(f"{url}/models", headers={"Authorization": "Bearer secret"}).json()
        assert models["data"][0]["id"] == "poet"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (-signal.SIGINT, 130)


def test_port_in_use_is_named(resolvent: Resolvent, run_dir: Path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        outcome = resolvent("serve", run_dir, "--port", port, "--device", "cpu")
    assert outcome.code == 1
    assert f"cannot listen on 127.0.0.1 port {port}: Address already in use; name a free port" in outcome.err


def test_missing_packages_are_named(resolvent: Resolvent, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("resolvent.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    outcome = resolvent("serve", run_dir)
    assert outcome.code == 1
    assert "serving needs starlette: pip install 'resolvent[serve]'" in outcome.err


def test_states_on_disk_survive_a_restart(run_dir: Path, tmp_path: Path):
    body, replies = dict(model="rhymes", prompt="A rhyme about mats. " * 40, max_tokens=8, seed=3), []
    for _ in range(2):
        with serving(run_dir, "--prefix-cache-dir", tmp_path / "states") as (process, url):
            replies.append(httpx2.post(f"{url}/completions", json=body, timeout=60).json())
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            assert process.stderr is not None and process.stderr.read() == ""
    first, again = replies
    assert first["choices"] == again["choices"]
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
    assert cached == [0, 512]


def test_folder_of_states_that_cannot_be_written_is_named(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    outcome = resolvent("serve", run_dir, "--prefix-cache-dir", tmp_path / "file", "--device", "cpu")
    assert outcome.code == 2
    assert "cannot keep states in" in words(outcome.err)
