import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from tokenizers import Tokenizer

from resolvent.data import build_tokenizer, encode_documents, load_tokenizer
from resolvent.data.tokenization import bytes_tokenizer
from resolvent.errors import DataError
from resolvent.native import LibraryPanic, call, panics_are_errors

ENDLESS = "a" * 40 + "c"
"""A text on which the pattern below tries 2^40 ways, before the library gives up and panics."""


@pytest.fixture
def panicking(tmp_path):
    """A tokenizer file with a regular expression that fails on some texts."""
    values = json.loads(bytes_tokenizer().to_str())
    pattern = {"Regex": "(a+)+$"}
    values["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    (tmp_path / "t.json").write_text(json.dumps(values))
    return load_tokenizer(tmp_path / "t.json")


def test_panic_is_one_error(panicking):
    with pytest.raises(
        DataError, match=r"the tokenizers library failed \(.*retry-limit-in-match over\): use another tokenizer"
    ):
        encode_documents(["fine", ENDLESS], panicking)
    assert encode_documents(["fine"], panicking).num_predictions == 5


def test_panic_while_training_is_one_error(panicking, monkeypatch):
    monkeypatch.setattr("resolvent.data.tokenization._short_words", lambda: panicking.pre_tokenizer)
    with pytest.raises(DataError, match=r"library failed \(.*retry-limit"):
        build_tokenizer("bpe", [ENDLESS] * 2)


def test_panic_while_loading_is_one_error(tmp_path, panicking, monkeypatch):
    panicking.save(str(tmp_path / "t.json"))
    monkeypatch.setattr(Tokenizer, "from_str", lambda text: panicking.encode(ENDLESS))
    with pytest.raises(DataError, match=r"t\.json is not a Hugging Face tokenizers JSON file: .*retry-limit"):
        load_tokenizer(tmp_path / "t.json")


def test_panics_become_errors_and_others_stay(panicking):
    with pytest.raises(LibraryPanic, match="retry-limit"), panics_are_errors():
        panicking.encode(ENDLESS)
    for error in (KeyboardInterrupt, SystemExit, ValueError):
        with pytest.raises(error), panics_are_errors():
            raise error


def test_call_returns_and_raises_what_the_function_does():
    def fail():
        raise KeyError("x")

    assert call(lambda: (threading.current_thread().name, 1)) == ("tokenizers", 1)
    with pytest.raises(KeyError, match="x"):
        call(fail)


def test_call_from_another_thread_stays_there():
    found = []
    thread = threading.Thread(target=lambda: found.append(call(threading.current_thread)))
    thread.start()
    thread.join()
    assert found == [thread]


def test_signal_ends_the_wait_for_a_call():
    over = threading.Event()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            call(lambda: over.wait(20))
        assert time.monotonic() - began < 2
    finally:
        over.set()


def test_command_ends_at_once_while_a_library_still_computes():
    """Python would first tear everything down, and a library that returns meanwhile aborts the process."""
    code = """if True:
        import atexit, os, signal, threading, time
        from resolvent import cli
        from resolvent.native import call

        def interrupted():
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            print("began")
            call(lambda: time.sleep(60))

        atexit.register(print, "torn down")
        cli._run = interrupted
        cli.main()
    """
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (finished.returncode, finished.stdout, finished.stderr) == (128 + signal.SIGINT, "began\n", "")


def test_training_ends_soon_after_its_caller_was_interrupted(monkeypatch):
    fed = []

    def interrupted(function):
        thread = threading.Thread(target=function)
        thread.start()
        while len(fed) < 1000:
            time.sleep(0.001)
        found.append(thread)
        raise KeyboardInterrupt

    def endless(_):
        while True:
            fed.append(1)
            yield "some words " * 20

    found = []
    monkeypatch.setattr("resolvent.data.tokenization.call", interrupted)
    monkeypatch.setattr("resolvent.data.tokenization._training_pieces", endless)
    with pytest.raises(KeyboardInterrupt):
        build_tokenizer("bpe", ["text"], vocab_size=257)
    found[0].join(10)
    assert not found[0].is_alive()
