"""Experiments behind the documents, run from the root of a checkout: `python -m experiments.NAME`."""
