"""Without Transformers, the import says what to install."""

import sys

import pytest


def test_import_without_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    for name in ("resolvent.hf", "resolvent.models.hf"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs Transformers: pip install 'resolvent\[hf\]'"):
        import resolvent.hf  # noqa: F401
