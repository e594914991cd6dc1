from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resolvent.cli.generate import decode_stream
from resolvent.data import build_tokenizer

Resolvent = Callable[..., Any]
BYTES = build_tokenizer("bytes", [])


def test_it_prints_prompt_and_continuation(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("generate", run_dir, "--prompt", "Rhyme: the", "--max-new-tokens", 40, "--temperature", 0)
    assert outcome.code == 0
    assert outcome.out.startswith("Rhyme: the")
    assert "cat sat on the" in outcome.out  # the model has seen little else


def test_the_seed_decides(resolvent: Resolvent, run_dir: Path):
    options = ["--max-new-tokens", 30, "--temperature", 1.5]
    first, again, other = (resolvent("generate", run_dir, "--seed", seed, *options).out for seed in (1, 1, 2))
    assert first == again != other


def test_streaming_prints_the_same(resolvent: Resolvent, run_dir: Path):
    options = ["--seed", 3, "--max-new-tokens", 60, "--temperature", 2.0, "--prompt", "né"]
    assert resolvent("generate", run_dir, *options, "--stream") == resolvent("generate", run_dir, *options)


def test_an_empty_prompt_begins_a_text(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("generate", run_dir, "--max-new-tokens", 20, "--temperature", 0)
    assert outcome.out.startswith("Rhyme")


def test_no_new_tokens_leave_the_prompt(resolvent: Resolvent, run_dir: Path):
    assert resolvent("generate", run_dir, "--prompt", "日本 <|endoftext|>", "--max-new-tokens", 0).out == (
        "日本 <|endoftext|>\n"
    )


def test_it_stops_where_the_text_ends(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("generate", run_dir, "--temperature", 0, "--max-new-tokens", 2000)
    assert "<|endoftext|>" not in outcome.out
    assert len(outcome.out) < 1000


def test_top_k_of_one_is_the_likeliest_text(resolvent: Resolvent, run_dir: Path):
    likeliest = resolvent("generate", run_dir, "--temperature", 0, "--max-new-tokens", 40)
    assert resolvent("generate", run_dir, "--top-k", 1, "--seed", 9, "--max-new-tokens", 40) == likeliest
    assert resolvent("generate", run_dir, "--top-p", 1e-9, "--seed", 9, "--max-new-tokens", 40) == likeliest


@pytest.mark.parametrize(
    "option",
    [["--top-p", 0], ["--top-p", 1.5], ["--top-k", 0], ["--temperature", -1], ["--max-new-tokens", -1], ["--seed", -1]],
)
def test_options_out_of_range_are_wrong_usage(resolvent: Resolvent, run_dir: Path, option: list[object]):
    outcome = resolvent("generate", run_dir, *option)
    assert outcome.code == 2
    assert str(option[0]) in outcome.err


@given(st.binary(max_size=60))
def test_pieces_together_are_the_decoded_whole(data: bytes):
    assert "".join(decode_stream(BYTES, data)) == data.decode("utf-8", errors="replace")


@given(st.text(max_size=30))
def test_characters_are_never_cut(text: str):
    pieces = list(decode_stream(BYTES, text.encode()))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_characters_come_as_soon_as_they_are_whole():
    data = "aé日🙂".encode()
    consumed: list[int] = []

    def feed():
        for byte in data:
            consumed.append(byte)
            yield byte

    seen = [(piece, len(consumed)) for piece in decode_stream(BYTES, feed())]
    assert seen == [("a", 1), ("é", 3), ("日", 6), ("🙂", 10)]


def test_a_prompt_may_come_from_a_file(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("Rhyme: the")
    options = ["--max-new-tokens", 40, "--temperature", 0]
    from_file = resolvent("generate", run_dir, "--prompt-file", tmp_path / "prompt.txt", *options)
    assert from_file == resolvent("generate", run_dir, "--prompt", "Rhyme: the", *options)
