"""Folders of shards by split, fingerprints, token frequencies."""

import numpy as np
import pytest

from gpt2fast.data import dataset
from gpt2fast.data.dataset import count_tokens, fingerprint, open_folder, unigram_entropy
from gpt2fast.errors import UserError
from tests.tools.shard_files import TOKENS, V, llmc_header, write_tokens

WRITERS = {
    # project: the files of its folder, and how it writes an array of uint16
    "nanoGPT": (("train.bin", "val.bin"), lambda path, tokens: tokens.tofile(path)),
    "llm.c": (
        ("tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"),
        lambda path, tokens: path.write_bytes(llmc_header(len(tokens)) + tokens.tobytes()),
    ),
    "modded-nanogpt": (
        ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"),
        lambda path, tokens: path.write_bytes(llmc_header(len(tokens)) + tokens.tobytes()),
    ),
    "build-nanogpt": (
        ("edufineweb_train_000001.npy", "edufineweb_train_000002.npy", "edufineweb_val_000000.npy"),
        lambda path, tokens: np.save(path, tokens),
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_folders_of_other_projects_are_read_exactly(tmp_path, writer):
    names, save = WRITERS[writer]
    tokens = {name: np.roll(TOKENS, i)[: 900 + i] for i, name in enumerate(names)}
    for name in names:
        save(tmp_path / name, tokens[name])
    dataset = open_folder(tmp_path, V)
    for split, opened in (("train", dataset.train), ("val", dataset.val)):
        expected = [tokens[name] for name in names if split in name]
        assert [shard.tolist() for shard in opened] == [array.tolist() for array in expected]


def test_a_folder_is_split_by_name_across_formats(tmp_path):
    write_tokens(tmp_path / "edu_train_000001.npy", "npy")
    write_tokens(tmp_path / "edu_train_000002.bin", "raw")
    write_tokens(tmp_path / "edu_val_000000.bin", "llm.c")
    dataset = open_folder(tmp_path, V)
    assert [len(dataset.train), len(dataset.val)] == [2, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "no training shard"), (["val.bin"], "no training shard"), (["train.bin", "x.bin"], "belongs to no split")],
    ids=["nothing", "val only", "stray"],
)
def test_a_folder_without_clear_splits_is_refused(tmp_path, names, message):
    for name in names:
        write_tokens(tmp_path / name, "llm.c")
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path, V)


def test_what_is_not_a_folder_of_shards_is_refused(tmp_path):
    write_tokens(tmp_path / "train.bin", "llm.c")
    (tmp_path / "meta.pkl").write_bytes(b"")
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "train.bin", "is a file"),
        (tmp_path, "meta.pkl"),
    ):
        with pytest.raises(UserError, match=message):
            open_folder(path, V)


def test_fingerprint_sees_names_lengths_and_contents():
    changed = TOKENS.copy()
    changed[-1] ^= 1
    prints = [fingerprint(x) for x in ({"a": TOKENS}, {"b": TOKENS}, {"a": TOKENS[:-1]}, {"a": changed})]
    assert len(set(prints)) == 4
    assert fingerprint({"a": TOKENS.copy()}) == prints[0]


def test_unigram_entropy():
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4))
    assert count_tokens([np.array([1, 1, 3], np.uint16), np.array([3], np.uint16)], 5).tolist() == [0, 2, 0, 2, 0]
    assert count_tokens([np.array([1, 1, 3], np.uint16)], 5, limit=2).sum() == 2


def test_counting_in_parts(monkeypatch):
    arrays = [np.arange(n, dtype=np.uint16) % 211 for n in (25, 30, 1, 0, 2, 500)]
    expected = np.bincount(np.concatenate(arrays), minlength=211)
    assert np.array_equal(dataset.count_all(arrays, 211), expected)
    monkeypatch.setattr(dataset, "PART", 7)
    assert np.array_equal(dataset.count_all(arrays, 211), expected)
