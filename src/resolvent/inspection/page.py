"""Inspection page: a single HTML file without other resources."""

import dataclasses
import json
from importlib import resources
from typing import Any

from resolvent.inspection.values import Inspection
from resolvent.inspection.words import compare


def page_data(first: Inspection, second: Inspection | None = None) -> dict[str, Any]:
    """Return the data of a page: one or two runs and, of two, their comparison."""
    if second is None:
        return {"runs": [first.to_dict()], "comparison": None}
    return {"runs": [first.to_dict(), second.to_dict()], "comparison": dataclasses.asdict(compare(first, second))}


def render_page(first: Inspection, second: Inspection | None = None) -> str:
    """Return the page of one model, or of two side by side, with style, script and data inside.

    Raises:
        DataError: the two models did not read a common word.
    """
    parts = {name: _asset(f"page.{name}") for name in ("css", "js")}
    # Escape < so that a text cannot end the element that holds it.
    data = json.dumps(page_data(first, second), allow_nan=False, separators=(",", ":"))
    parts["data"] = data.replace("<", "\\u003c")
    head, *rest = _asset("page.html").split("{{")
    return head + "".join(parts[name] + text for name, text in (part.split("}}", 1) for part in rest))


def _asset(name: str) -> str:
    return resources.files("resolvent.inspection").joinpath(name).read_text(encoding="utf-8")
