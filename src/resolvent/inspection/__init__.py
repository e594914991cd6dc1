"""Inspection of a model on a text, token by token, as plain values and as a page."""

from resolvent.inspection.inspection import inspect_model
from resolvent.inspection.page import page_data, render_page
from resolvent.inspection.values import Inspection

__all__ = ["Inspection", "inspect_model", "page_data", "render_page"]
