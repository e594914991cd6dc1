import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config

from resolvent.data.tokenization import TOKENIZER_FILES
from resolvent.models import load_model
from resolvent.models.storage import save_model
from tests.data.test_detokenization import metaspace

from .conftest import call, words

Resolvent = Callable[..., Any]


def test_it_prints_prompt_and_continuation(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("generate", run_dir, "--prompt", "Rhyme: the", "--max-new-tokens", 40, "--temperature", 0)
    assert outcome.code == 0
    assert outcome.out.startswith("Rhyme: the")
    assert "cat sat on the" in outcome.out  # the model has seen little else


def test_seed_decides_the_result(resolvent: Resolvent, run_dir: Path):
    options = ["--max-new-tokens", 30, "--temperature", 1.5]
    first, again, other = (resolvent("generate", run_dir, "--seed", seed, *options).out for seed in (1, 1, 2))
    assert first == again != other


def test_streaming_prints_the_same(resolvent: Resolvent, run_dir: Path):
    options = ["--seed", 3, "--max-new-tokens", 60, "--temperature", 2.0, "--prompt", "né"]
    assert resolvent("generate", run_dir, *options, "--stream") == resolvent("generate", run_dir, *options)


def test_text_ends_before_a_stop_string(resolvent: Resolvent, run_dir: Path):
    options = ["--prompt", "Rhyme: the", "--temperature", 0, "--stop", " on the", "--stop", "nowhere"]
    outcome = resolvent("generate", run_dir, *options)
    assert outcome.out.endswith(" cat sat\n")
    assert resolvent("generate", run_dir, *options, "--stream") == outcome


def test_samples_equal_runs_of_the_following_seeds(resolvent: Resolvent, run_dir: Path):
    options = ["--max-new-tokens", 30, "--temperature", 1.5]
    single = [resolvent("generate", run_dir, "--seed", seed, *options).out for seed in (5, 6)]
    together = resolvent("generate", run_dir, "--seed", 5, "--samples", 2, *options).out
    assert together == f"--- 1 of 2 ---\n{single[0]}\n--- 2 of 2 ---\n{single[1]}"


def test_penalty_changes_the_text(resolvent: Resolvent, run_dir: Path):
    options = ["--prompt", "Rhyme: the", "--max-new-tokens", 40, "--temperature", 0]
    plain = resolvent("generate", run_dir, *options).out
    assert resolvent("generate", run_dir, *options, "--frequency-penalty", 2).out != plain


def test_an_empty_prompt_begins_a_text(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("generate", run_dir, "--max-new-tokens", 20, "--temperature", 0)
    assert outcome.out.startswith("Rhyme")


def test_no_new_tokens_leave_the_prompt(resolvent: Resolvent, run_dir: Path):
    assert resolvent("generate", run_dir, "--prompt", "日本 <|endoftext|>", "--max-new-tokens", 0).out == (
        "日本 <|endoftext|>\n"
    )


def test_generation_stops_at_the_end_of_text(resolvent: Resolvent, run_dir: Path):
    outcome = resolvent("generate", run_dir, "--temperature", 0, "--max-new-tokens", 2000)
    assert "<|endoftext|>" not in outcome.out
    assert len(outcome.out) < 1000


def test_top_k_of_one_is_the_likeliest_text(resolvent: Resolvent, run_dir: Path):
    likeliest = resolvent("generate", run_dir, "--temperature", 0, "--max-new-tokens", 40)
    assert resolvent("generate", run_dir, "--top-k", 1, "--seed", 9, "--max-new-tokens", 40) == likeliest
    assert resolvent("generate", run_dir, "--top-p", 1e-9, "--seed", 9, "--max-new-tokens", 40) == likeliest


@pytest.mark.parametrize(
    "option",
    [
        *(["--top-p", value] for value in (0, 1.5, "nan")),
        *(["--temperature", value] for value in (-1, "nan", "inf")),
        *(["--seed", value] for value in (-1, 2**63, 2**64)),
        *(["--min-p", value] for value in (-0.1, 1.5)),
        ["--repetition-penalty", 0],
        ["--presence-penalty", 3],
        ["--frequency-penalty", -3],
        ["--stop", ""],
        ["--samples", 0],
        ["--samples", 2, "--stream"],
        ["--top-k", 0],
        ["--max-new-tokens", -1],
    ],
)
def test_options_out_of_range_are_wrong_usage(resolvent: Resolvent, run_dir: Path, option: list[object]):
    outcome = resolvent("generate", run_dir, *option)
    assert outcome.code == 2
    assert str(option[0] if len(option) == 2 else option[-1]) in outcome.err


def test_prompt_from_a_file(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("Rhyme: the")
    options = ["--max-new-tokens", 40, "--temperature", 0]
    from_file = resolvent("generate", run_dir, "--prompt-file", tmp_path / "prompt.txt", *options)
    assert from_file == resolvent("generate", run_dir, "--prompt", "Rhyme: the", *options)


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["at once", "streamed"])
def test_continuation_keeps_spaces_between_words(resolvent: Resolvent, metaspace_run: Path, stream: list[str]):
    """A decoder that drops the space before a first token sees the prompt's tokens before the new ones."""
    written = resolvent("generate", metaspace_run, "--prompt", "the nation", "--temperature", 0, *stream).out
    assert written.startswith("the nation a law of the people")


def test_an_empty_prompt_begins_without_a_space(resolvent: Resolvent, metaspace_run: Path):
    written = resolvent("generate", metaspace_run, "--temperature", 0, "--max-new-tokens", 5).out
    assert written.startswith("the nation a law")


@pytest.fixture(scope="session")
def metaspace_run(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("metaspace")
    (folder / "text.txt").write_text("<|endoftext|>\n".join(["the nation a law of the people"] * 40))
    metaspace().save(str(folder / "tokenizer.json"))
    options = ["--data", folder / "text.txt", "--tokenizer", folder / "tokenizer.json", "--steps", 60]
    assert call("train", *options, "--learning-rate", "1e-2", "--out", folder / "run", *small) == 0
    return folder / "run"


def test_int8_weights_generate_or_are_refused(resolvent: Resolvent, run_dir: Path, tmp_path: Path):
    outcome = resolvent("generate", run_dir, "--weights", "int8")
    assert outcome.code == 2
    assert "at least 256 rows and columns" in " ".join(outcome.err.replace("│", "").split())
    model = load_model(run_dir, "cpu")
    torch.manual_seed(0)
    wide = type(model)(dataclasses.replace(model.config, d_model=256, num_heads=4, head_dim=64))
    save_model(wide, tmp_path / "run")
    for name in TOKENIZER_FILES:
        shutil.copy(run_dir / name, tmp_path / "run" / name)
    options = ["generate", tmp_path / "run", "--prompt", "Rhyme", "--max-new-tokens", 5, "--temperature", 0]
    outcomes = [resolvent(*options, "--weights", weights) for weights in ("full", "int8")]
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert all(outcome.out.startswith("Rhyme") for outcome in outcomes)


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_compilation_without_a_compiler_is_refused(resolvent: Resolvent, run_dir: Path, command: str):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        outcome = resolvent(command, run_dir, "--compile", "--device", "cpu")
    assert outcome.code == 2
    assert "install g++" in words(outcome.err) and "--compile" in words(outcome.err)


@pytest.mark.slow
def test_compiled_steps_write_the_same_text(resolvent: Resolvent, run_dir: Path):
    options = ["generate", run_dir, "--max-new-tokens", 40, "--seed", 1, "--device", "cpu"]
    plain, compiled = resolvent(*options), resolvent(*options, "--compile")
    assert compiled.code == 0
    assert compiled.out == plain.out
