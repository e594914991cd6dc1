"""Hooks of MkDocs for the built site."""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Show links to files of the repository, which are not part of the site, as the paths of these files."""
    folder = posixpath.dirname(posixpath.join("docs", page.file.src_uri))

    def replace(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if path.startswith("docs/"):
            return match[0]
        return f"`{path}`"

    return _LINK.sub(replace, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Load the worker that searches in file:// from the site, not from a network."""
    depth = posixpath.relpath("assets", posixpath.dirname(page.file.dest_uri) or ".")
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{depth}/iframe-worker/index.js")
