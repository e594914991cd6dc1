"""The inspection page: whole, on its own, and safe whatever text it shows. No browser is needed here."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from resolvent.data import build_tokenizer
from resolvent.inspection import Inspection, inspect_model, page_data, render_page
from tests.models.small import PHASE2

HOSTILE = "</script><script>alert(1)</script><!-- <script> {{css}} \u2028 ' \" & é 🎈"
SECTIONS = [
    "comparison",
    "surprise",
    "influence",
    "learning",
    "decay",
    "looks",
    "energy",
    "snr",
    "resonance",
    "resolvent",
]
VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """Elements with their attributes, and the text in them, by what they are in."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = [("", {})]
        self.text: dict[str, str] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1]
        self.text[attributes.get("id") or tag] = self.text.get(attributes.get("id") or tag, "") + data

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    torch.manual_seed(0)
    return inspect_model(PHASE2.model(vocab_size=257), build_tokenizer("bytes", []), HOSTILE, name=HOSTILE)


@pytest.fixture(scope="module")
def page(inspection: Inspection) -> str:
    return render_page(inspection)


def test_every_element_is_closed_and_named_once(page: str):
    parsed = Page(page)
    assert parsed.open == []
    names = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert [attributes["id"] for attributes in parsed.all("section")] == SECTIONS
    wanted = set(re.findall(r'\$\("([\w-]+)"\)', parsed.text["script"]))
    assert wanted <= set(names)


def test_every_picture_has_a_caption(page: str):
    for section in re.findall(r"<section.*?</section>", page, re.DOTALL):
        before = re.split(r'<figure|<div class="text"', section)[:-1]
        assert before and all(re.search(r"<p>[A-Z].{60,}", part, re.DOTALL) for part in before if "<p>" in part)
        assert (
            section.index("<h2>") < section.index("<p>") < min(map(section.index, re.findall("<figure|<div", section)))
        )


def test_page_loads_no_other_resources(page: str):
    parsed = Page(page)
    for _, attributes in parsed.elements:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()  # the script adds links within the page
    code = parsed.text["style"] + parsed.text["script"]
    assert set(re.findall(r"\w+://[^\"\s]+", code)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|WebSocket|innerHTML|eval\(", code)
    (policy,) = (meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def test_the_data_are_those_of_the_inspection(page: str, inspection: Inspection):
    assert json.loads(Page(page).text["data"]) == json.loads(json.dumps(page_data(inspection)))
    assert page_data(inspection)["runs"] == [inspection.to_dict()]


def test_text_is_escaped_in_its_element(page: str):
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "alert" not in Page(page).text["script"]
    assert "{{" not in page.replace(json.dumps(HOSTILE)[1:-1].replace("<", "\\u003c"), "")


def test_page_and_program_are_small(page: str, inspection: Inspection):
    data: Any = json.dumps(page_data(inspection), separators=(",", ":")).replace("<", "\\u003c")
    assert len(page) - len(data) < 60_000
