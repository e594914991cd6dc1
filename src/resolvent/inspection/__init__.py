"""Inspection of a model on a text, token by token, as plain values and as a page."""

from resolvent.inspection.inspection import Inspection, inspect_model
from resolvent.inspection.page import render_page

__all__ = ["Inspection", "inspect_model", "render_page"]
