from pathlib import Path

import pytest
import torch
import yaml

from resolvent.models import IntegratedModel
from resolvent.models.card import CARD, is_own_card, write_card
from resolvent.models.phase2 import Phase2Config, create_phase2_model


@pytest.fixture(scope="module")
def model() -> IntegratedModel:
    torch.manual_seed(0)
    config = Phase2Config(vocab_size=257, d_model=32, n_layers=2, num_heads=2, head_dim=16, n_seq=64)
    return create_phase2_model(config=config, device="cpu")


def test_card_says_what_the_model_is_and_how_it_was_made(model: IntegratedModel, tmp_path: Path):
    write_card(tmp_path, model, ["Made by hand."], name="mine", measured={"loss": "1.5", "tokens": "20"})
    text = (tmp_path / CARD).read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    inner = model.num_parameters() - 2 * 257 * 32
    assert f"with {model.num_parameters():,} parameters, {inner:,} of them non-embedding" in body
    assert "# mine" in body and "| 2 | 32 | 2 | 257 | 64 tokens |" in body
    assert "* Made by hand." in body and "| loss | tokens |\n| ---: | ---: |\n| 1.5 | 20 |" in body
    assert "add `license:`" in body


def test_card_without_figures_has_no_table_of_them(model: IntegratedModel, tmp_path: Path):
    write_card(tmp_path, model, ["Made."], licence="Apache-2.0.")
    text = (tmp_path / CARD).read_text()
    assert "Held-out" not in text and text.endswith("## Licence\n\nApache-2.0.\n")
    assert f"# {tmp_path.name}" in text


@pytest.mark.parametrize("kind", ["other", "taken over", "link", "dangling"])
def test_card_of_other_origin_stays(model: IntegratedModel, tmp_path: Path, kind: str):
    path, other = tmp_path / CARD, tmp_path / "other.md"
    write_card(tmp_path, model, ["First."])
    assert is_own_card(path)
    if kind == "taken over":
        path.write_text(path.read_text().replace("<!-- Written by resolvent", "<!-- Written by me"))
    else:
        path.unlink()
        path.write_text("Notes.\n") if kind == "other" else path.symlink_to(other)
    if kind == "link":
        other.write_text("Notes.\n")
    before = None if kind == "dangling" else path.read_text()
    write_card(tmp_path, model, ["Second."])
    assert not is_own_card(path) and path.is_symlink() == (kind in ("link", "dangling"))
    assert before is None or path.read_text() == before
    assert other.exists() == (kind == "link")


def test_own_card_is_written_anew(model: IntegratedModel, tmp_path: Path):
    for sentence in ("First.", "Second."):
        write_card(tmp_path, model, [sentence])
    assert "Second." in (tmp_path / CARD).read_text() and "First." not in (tmp_path / CARD).read_text()
