"""Looking into a model: what it does with a text, token by token, as plain values and as a page to look at."""

from resolvent.inspection.inspection import Inspection, inspect_model
from resolvent.inspection.page import render_page

__all__ = ["Inspection", "inspect_model", "render_page"]
