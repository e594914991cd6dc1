"""Inspection page: a single HTML file without other resources."""

import json
from importlib import resources

from resolvent.inspection.inspection import Inspection


def render_page(inspection: Inspection) -> str:
    """Return the page, with style, script and data inside."""
    parts = {name: _asset(f"page.{name}") for name in ("css", "js")}
    # Escape < so that a text cannot end the element that holds it.
    parts["data"] = json.dumps(inspection.to_dict(), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    head, *rest = _asset("page.html").split("{{")
    return head + "".join(parts[name] + text for name, text in (part.split("}}", 1) for part in rest))


def _asset(name: str) -> str:
    return resources.files("resolvent.inspection").joinpath(name).read_text(encoding="utf-8")
