"""Folders of shards by split, fingerprints, token frequencies."""

import numpy as np
import pytest

from gpt2fast.data import dataset, shards
from gpt2fast.data.dataset import count_tokens, fingerprint, open_folder, unigram_entropy
from gpt2fast.errors import UserError
from gpt2fast.model import GPTConfig

V = 50257
TOKENS = np.random.default_rng(0).integers(0, V, 1000).astype(np.uint16)


def write(path, format, tokens=TOKENS):
    if format == "llm.c":
        shards.write_shard(path, tokens)
    elif format == "npy":
        np.save(path, tokens)
    else:
        path.write_bytes(tokens.tobytes())
    return path


def header(n):
    """llm.c's header: 256 int32 that begin with magic, version and number of tokens."""
    return np.concatenate([[20240520, 1, n], np.zeros(253)]).astype(np.int32).tobytes()


WRITERS = {
    # project: the files of its folder, and how it writes an array of uint16
    "nanoGPT": (("train.bin", "val.bin"), lambda path, tokens: tokens.tofile(path)),
    "llm.c": (
        ("tiny_shakespeare_train.bin", "tiny_shakespeare_val.bin"),
        lambda path, tokens: path.write_bytes(header(len(tokens)) + tokens.tobytes()),
    ),
    "modded-nanogpt": (
        ("fineweb_train_000001.bin", "fineweb_train_000002.bin", "fineweb_val_000000.bin"),
        lambda path, tokens: path.write_bytes(header(len(tokens)) + tokens.tobytes()),
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
    write(tmp_path / "edu_train_000001.npy", "npy")
    write(tmp_path / "edu_train_000002.bin", "raw")
    write(tmp_path / "edu_val_000000.bin", "llm.c")
    dataset = open_folder(tmp_path, V)
    assert [len(dataset.train), len(dataset.val)] == [2, 1]


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "no training shard"), (["val.bin"], "no training shard"), (["train.bin", "x.bin"], "belongs to no split")],
    ids=["nothing", "val only", "stray"],
)
def test_a_folder_without_clear_splits_is_refused(tmp_path, names, message):
    for name in names:
        write(tmp_path / name, "llm.c")
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path, V)


def test_what_is_not_a_folder_of_shards_is_refused(tmp_path):
    write(tmp_path / "train.bin", "llm.c")
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
    assert count_tokens([np.array([1, 1, 3], np.uint16), np.array([3], np.uint16)], 5).tolist() == [
        0,
        2,
        0,
        2,
        0,
    ]
    assert count_tokens([np.array([1, 1, 3], np.uint16)], 5, limit=2).sum() == 2


T = 8
CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=T, vocab_size=211)
LENGTHS = [3 * T + 1, 30, 1, 0, 2, T, T + 1, 5]  # whole windows; tails; nothing to predict; one token to predict


def made_shards(lengths=LENGTHS):
    random = np.random.default_rng(0)
    return [random.integers(0, CONFIG.vocab_size, n).astype(np.uint16) for n in lengths]


def test_counting_in_parts(monkeypatch):
    whole = dataset.count_all(made_shards(), CONFIG.vocab_size)
    assert np.array_equal(whole, np.bincount(np.concatenate(made_shards()), minlength=CONFIG.vocab_size))
    monkeypatch.setattr(dataset, "PART", 7)
    assert np.array_equal(dataset.count_all(made_shards(), CONFIG.vocab_size), whole)
