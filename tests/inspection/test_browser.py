"""The inspection page in a browser: what it draws, and that keys, themes and narrow screens work."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from resolvent.data import build_tokenizer
from resolvent.inspection import inspect_model, render_page
from tests.models.small import HYBRID, PHASE1, PHASE2, SmallPhase

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no chromium or google-chrome in the path"),
]

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--virtual-time-budget=4000", "--window-size=1200,900"),
]
TEXT = "The old cat, père №7, sat on the mat.\nIt <b>purred</b> &amp; slept.\n" * 2
TOKENS = len(TEXT.encode()) + 1

WATCH = """<script>
const faults = [];
addEventListener("error", (event) => faults.push(event.message));
addEventListener("securitypolicyviolation", (event) => faults.push(event.blockedURI));
</script>"""
PROBE = (Path(__file__).parent / "probe.js").read_text(encoding="utf-8")
FRAME = """<!doctype html><iframe src="page.html" style="width: {width}px; height: 800px"></iframe><pre></pre>
<script>addEventListener("message", (event) => (document.querySelector("pre").textContent = event.data));</script>"""


def seen(phases: list[SmallPhase], folder: Path, width: int, metrics: Path | None) -> dict[str, Any]:
    """Return the results of the probe on the page of one or two models, in a frame of a width."""
    torch.manual_seed(0)
    inspections = [
        inspect_model(phase.model(vocab_size=257), build_tokenizer("bytes", []), TEXT, name=f"run {n}", metrics=metrics)
        for n, phase in enumerate(phases)
    ]
    page = render_page(*inspections).replace("<head>", f"<head>{WATCH}", 1) + f"<script>{PROBE}</script>"
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'user'}", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    record = dict(loss=2.0, lr=0.1, grad_norm=1.0)
    lines = [dict(step=step, bits_per_byte=8 / step, **record) for step in range(1, 50)]
    lines.append(dict(step=49, validation_loss=2.0, validation_bits_per_byte=1.0))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, metrics: Path) -> dict[str, Any]:
    return seen([PHASE2], tmp_path_factory.mktemp("wide"), 1100, metrics)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return seen([PHASE1], tmp_path_factory.mktemp("narrow"), 340, None)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return seen([HYBRID], tmp_path_factory.mktemp("hybrid"), 1100, None)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, metrics: Path) -> dict[str, Any]:
    return seen([PHASE2, PHASE1], tmp_path_factory.mktemp("two"), 340, metrics)


def test_two_runs_are_compared_word_by_word(two: dict[str, Any]):
    assert two["faults"] == two["numbers_are_bad"] == []
    assert two["sections"][0] == "comparison" and two["runs"] == ["run 0", "run 1"]
    assert "".join(two["compared"]) == TEXT and len(two["compared"]) == len(TEXT.split()) + 1
    assert two["comparison_rows"] > 8
    assert two["scroll_width"] <= 340


def test_findings_and_navigation_lead_to_sections(wide: dict[str, Any], narrow: dict[str, Any]):
    for found in (wide, narrow):
        assert found["findings"] and all(text.endswith(".") and leads for text, leads in found["findings"])
        assert found["links"] == [f"#{section}" for section in found["sections"]]
    assert "The SNR filter is inactive" in " ".join(text for text, _ in wide["findings"])


def test_bounds_are_hidden_until_asked_for(wide: dict[str, Any]):
    assert wide["bounds"] == [3, 6]
    assert wide["largest_share"] <= 1.001


def test_slow_heads_stand_first_and_bytes_form_words(wide: dict[str, Any]):
    halves = [float(re.search(r"· ([\d.]+)$", row)[1]) for row in wide["rows"]]
    assert len(halves) == 9 and halves == sorted(halves, reverse=True)
    assert wide["words"][1:4] == ["The", "old", "cat,"]


def test_the_likeliest_tokens_are_shown_with_the_one_in_the_text(wide: dict[str, Any]):
    assert len(wide["guesses"]) == 6 and [row.endswith("← the text") for row in wide["guesses"]] == [False] * 5 + [True]


def test_choosing_a_token_moves_nothing_on_the_page(wide: dict[str, Any], narrow: dict[str, Any], two: dict[str, Any]):
    assert wide["heights"] == narrow["heights"] == two["heights"] == 1


def test_a_hybrid_shows_where_it_looks(hybrid: dict[str, Any]):
    assert len(hybrid["attended"]) == 3 and all(re.search(r"head \d.*%.*“", row) for row in hybrid["attended"])
    assert hybrid["faults"] == hybrid["numbers_are_bad"] == []
    assert {"decay", "looks", "energy", "snr", "resonance"} <= {*hybrid["sections"]}
    assert not hybrid["missing_is_shown"]


def test_no_script_fails(wide: dict[str, Any], narrow: dict[str, Any]):
    assert wide["faults"] == narrow["faults"] == []


def test_every_part_of_a_model_is_drawn(wide: dict[str, Any], narrow: dict[str, Any]):
    every = ["surprise", "influence", "learning", "decay", "energy", "snr", "resonance", "resolvent"]
    assert wide["sections"] == every and not wide["missing_is_shown"]
    assert narrow["sections"] == ["surprise", "influence", "resolvent"] and narrow["missing_is_shown"]
    assert all(size > 100 for size in wide["drawn"] + narrow["drawn"])
    assert len(wide["drawn"]) == 7 + 3 and len(narrow["drawn"]) == 2 + 3  # the last are the three heads' paths
    assert wide["numbers_are_bad"] == narrow["numbers_are_bad"] == []
    assert wide["text"] == "⟨start⟩" + TEXT.replace("\n", "⏎\n").replace("è", "…è").replace("№", "……№")
    assert wide["canvases"] == [[TOKENS, 9]] * 2 and wide["canvas_colours"] > 10


def test_keys_move_the_token_in_every_picture(wide: dict[str, Any]):
    assert wide["after_keys"] == dict(text=12, slider=12, curve=5, path=6, strip=16, end=TOKENS - 1, home=0)
    assert wide["column_follows"] and wide["reading"].startswith(f"13 of {TOKENS}")


def test_numbers_appear_for_keys_and_pointers(wide: dict[str, Any]):
    assert all(re.search(r"\d", tip) for tip in wide["tips"].values()), wide["tips"]
    assert not wide.get("text_is_covered")
    assert "loss" in wide["reading"] and "|g|" in wide["tips"]["resolvent-path"]
    assert "half is forgotten" in wide["tips"]["decay-map"] and "resonate" in wide["tips"]["resonance-map"]
    assert wide["tip_goes"]


def test_the_layer_can_be_chosen(wide: dict[str, Any]):
    assert wide["layer_changes"] == {
        "energy-curve": True,
        "snr-bars": True,
        "resonance-map": True,
        "resolvent-share": True,
        "resolvent-path": True,
    }
    assert wide["layer_named"] == "layer 3 of 3"
    assert re.fullmatch(r"Strength in this layer, by head: 0\.\d+(, 0\.\d+){2}\.", wide["strength"])


def test_text_can_be_read_in_both_themes(wide: dict[str, Any], narrow: dict[str, Any]):
    for found in (wide, narrow):
        assert found["themes"] == ["light", "dark"] or found["themes"] == ["dark", "light"]
        for contrasts in found["contrasts"]:
            assert min(contrasts["text"].values()) >= 4.5, contrasts
            assert min(contrasts["graphics"].values()) >= 3, contrasts


def test_a_narrow_page_does_not_scroll_sideways(wide: dict[str, Any], narrow: dict[str, Any]):
    assert narrow["width"] == 340 and narrow["scroll_width"] <= 340
    assert wide["scroll_width"] <= wide["width"]
    assert min(narrow["targets"]) >= 24  # CSS pixels: what a finger can hit


def test_everything_is_reached_by_the_keyboard_and_has_a_name(wide: dict[str, Any]):
    assert wide["unnamed"] == []
    assert wide["focusable"] == wide["pictures"]
