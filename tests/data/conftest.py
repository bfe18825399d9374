"""Fixtures of the tests of data."""

from dataclasses import replace

import pytest

from gpt2fast.data.corpora import CORPORA


@pytest.fixture
def corpus(monkeypatch):
    """corpus(name, **changes): change a row of the table of corpora."""
    return lambda name, **changes: monkeypatch.setitem(CORPORA, name, replace(CORPORA[name], **changes))
