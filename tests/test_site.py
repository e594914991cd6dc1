"""The built documentation: links, and formulas and search from disk in a browser."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.inspection.test_browser import CHROMIUM, FLAGS

pytest.importorskip("mkdocs", reason="needs MkDocs: pip install 'resolvent[docs]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SEARCH = """<script>addEventListener("load", () => setTimeout(() => {
  const query = document.querySelector(".md-search__input");
  query.focus();
  query.value = "resonance";
  query.dispatchEvent(new Event("keyup", {bubbles: true}));
  query.dispatchEvent(new Event("input", {bubbles: true}));
}, 500));</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, timeout=300)
    return folder


class Targets(HTMLParser):
    """Addresses in a page: of links and of everything that a browser loads."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src", "srcset"):
                (self.links if tag == "a" else self.loaded).append(value)


def test_every_link_of_the_site_has_a_file(site: Path):
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 20
    for path in pages:
        targets = Targets(path.read_text("utf-8"))
        assert not [address for address in targets.loaded if urlsplit(address).netloc], path
        for address in targets.links + targets.loaded:
            parts = urlsplit(address)
            if not parts.scheme and parts.path:
                assert (path.parent / unquote(parts.path)).is_file(), (path, address)


def dom(page: Path, user: Path) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, "--virtual-time-budget=20000", f"--user-data-dir={user}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no chromium or google-chrome in the path")
def test_formulas_are_drawn_and_search_finds_pages_from_disk(site: Path, tmp_path: Path):
    shown = dom(site / "mathematics.html", tmp_path / "user")
    count = len(re.findall(r'class="arithmatex', (site / "mathematics.html").read_text("utf-8")))
    assert count > 80 and len(re.findall(r'class="arithmatex drawn"', shown)) == count
    assert "katex-error" not in shown
    copy = Path(shutil.copytree(site, tmp_path / "copy"))
    page = (copy / "index.html").read_text("utf-8")
    (copy / "index.html").write_text(page.replace("</body>", f"{SEARCH}</body>"), "utf-8")
    found = re.findall(r'href="([^"]*)" class="md-search-result__link', dom(copy / "index.html", tmp_path / "user"))
    assert any("evidence.html" in link for link in found)
