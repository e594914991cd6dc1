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


def seen(phase: SmallPhase, folder: Path, width: int, metrics: Path | None) -> dict[str, Any]:
    """Return the results of the probe on the page of a model, in a frame of a width."""
    torch.manual_seed(0)
    inspection = inspect_model(phase.model(vocab_size=257), build_tokenizer("bytes", []), TEXT, metrics=metrics)
    page = render_page(inspection).replace("<head>", f"<head>{WATCH}", 1) + f"<script>{PROBE}</script>"
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
    return seen(PHASE2, tmp_path_factory.mktemp("wide"), 1100, metrics)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return seen(PHASE1, tmp_path_factory.mktemp("narrow"), 340, None)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return seen(HYBRID, tmp_path_factory.mktemp("hybrid"), 1100, None)


def test_a_hybrid_shows_where_it_looks(hybrid: dict[str, Any]):
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
    assert len(wide["drawn"]) == 6 + 3 and len(narrow["drawn"]) == 1 + 3  # the last are the three heads' paths
    assert wide["numbers_are_bad"] == narrow["numbers_are_bad"] == []
    assert wide["text"] == "⟨start⟩" + TEXT.replace("\n", "⏎\n").replace("è", "…è").replace("№", "……№")
    assert wide["canvases"] == [[TOKENS, 3]] * 3 and wide["canvas_colours"] > 10


def test_keys_move_the_token_in_every_picture(wide: dict[str, Any]):
    assert wide["after_keys"] == dict(text=12, slider=12, curve=5, path=6, strip=16, end=TOKENS - 1, home=0)
    assert wide["column_follows"] and wide["reading"].startswith(f"13 of {TOKENS}")


def test_numbers_appear_for_keys_and_pointers(wide: dict[str, Any]):
    assert all(re.search(r"\d", tip) for tip in wide["tips"].values()), wide["tips"]
    assert "loss" in wide["tips"]["surprise-text"] and "|g|" in wide["tips"]["resolvent-path"]
    assert "half is forgotten" in wide["tips"]["decay-map"] and "resonate" in wide["tips"]["resonance-map"]
    assert wide["tip_goes"]


def test_the_layer_can_be_chosen(wide: dict[str, Any]):
    assert wide["layer_changes"] == {
        "energy-curve": True,
        "snr-bars": True,
        "resonance-map": True,
        "resolvent-path": True,
    }
    assert wide["layer_named"] == "layer 3 of 3"
    assert re.fullmatch(r"Strength here, by head: 0\.\d+(, 0\.\d+){2}\.", wide["strength"])


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
