"""Shards in three formats, and batches that are a pure function of their number."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast import data
from gpt2fast.data import Loader
from gpt2fast.errors import UserError

V = 50257
TOKENS = np.random.default_rng(0).integers(0, V, 1000).astype(np.uint16)


def write(path, format, tokens=TOKENS):
    if format == "llm.c":
        data.write_shard(path, tokens)
    elif format == "npy":
        np.save(path, tokens)
    else:
        path.write_bytes(tokens.tobytes())
    return path


FORMATS = {"llm.c": "train.bin", "npy": "train.npy", "raw": "train.bin"}


@pytest.mark.parametrize("format", FORMATS)
def test_reads_every_format_memory_mapped(tmp_path, format):
    shard = data.open_shard(write(tmp_path / FORMATS[format], format), V)
    assert isinstance(shard, np.memmap)
    assert np.array_equal(shard, TOKENS)


def test_a_shard_of_ours_is_one_of_llmc(tmp_path):
    assert write(tmp_path / "train.bin", "llm.c").read_bytes() == header(1000) + TOKENS.tobytes()


def header(n):
    """llm.c's: 256 int32 that begin with magic, version and number of tokens."""
    return np.concatenate([[20240520, 1, n], np.zeros(253)]).astype(np.int32).tobytes()


WRITERS = {
    # who writes such a folder: its files, and how he writes an array of uint16
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
def test_folders_that_others_wrote_read_back_identical(tmp_path, writer):
    names, save = WRITERS[writer]
    tokens = {name: np.roll(TOKENS, i)[: 900 + i] for i, name in enumerate(names)}
    for name in names:
        save(tmp_path / name, tokens[name])
    dataset = data.open_folder(tmp_path, V)
    for split, shards in (("train", dataset.train), ("val", dataset.val)):
        expected = [tokens[name] for name in names if split in name]
        assert [shard.tolist() for shard in shards] == [array.tolist() for array in expected]


def corrupt(kind, path):
    """Damage a shard in one way; what the message must say."""
    raw = write(path, "llm.c").read_bytes()
    header = np.frombuffer(raw[:1024], "<i4").copy()
    if kind == "truncated":
        path.write_bytes(raw[:-2])
        return r"counts 1000 tokens, which take 3024 bytes, but it has 3022"
    if kind == "padded":
        path.write_bytes(raw + b"\0\0")
        return "truncated or padded"
    if kind == "header only half there":
        path.write_bytes(raw[:100])
        return "100 bytes are less than its header of 1024"
    if kind == "negative count":
        header[2] = -5
    elif kind == "version 7":
        header[1] = 7
    elif kind == "wrong magic":
        header[0] = 20240801
    elif kind == "empty":
        path.write_bytes(b"")
        return "is empty"
    elif kind == "odd":
        path.write_bytes(TOKENS.tobytes() + b"\1")
        return "an odd number"
    elif kind == "token too large":
        write(path, "raw", np.append(TOKENS, np.uint16(V)))
        return "token 50257 at position 1000 is not below the vocabulary of 50257"
    path.write_bytes(header.tobytes() + raw[1024:])
    return {"negative count": "truncated", "version 7": "version 7", "wrong magic": "wrong magic 20240801"}[kind]


CORRUPTIONS = [
    "truncated", "padded", "header only half there", "negative count", "version 7", "wrong magic", "empty", "odd",
    "token too large",
]  # fmt: skip


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_damaged_shard_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "train.bin"
    message = corrupt(kind, path)
    with pytest.raises(UserError, match=message) as error:
        data.open_shard(path, V)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3), np.uint16), np.zeros(9, np.int64), np.array([{}], object)], ids=["2d", "int64", "pickle"]
)
def test_other_numpy_files_are_refused(tmp_path, array):
    np.save(tmp_path / "train.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match="train.npy"):
        data.open_shard(tmp_path / "train.npy", V)


def test_truncated_numpy_file_is_refused(tmp_path):
    path = write(tmp_path / "train.npy", "npy")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged NumPy file"):
        data.open_shard(path, V)


def test_unreadable_file_is_refused(tmp_path):
    (tmp_path / "train.bin").symlink_to(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be read"):
        data.open_shard(tmp_path / "train.bin", V)


@settings(max_examples=200, deadline=None)
@given(
    content=st.binary(max_size=2000),
    suffix=st.sampled_from([".bin", ".npy"]),
    genuine=st.sampled_from(["", "llm.c", "npy"]),
)
def test_no_file_makes_it_crash(tmp_path_factory, content, suffix, genuine):
    heads = {"": b"", "llm.c": np.array([20240520, 1], "<i4").tobytes(), "npy": b"\x93NUMPY\x01\x00"}
    path = tmp_path_factory.mktemp("fuzz") / f"train{suffix}"
    path.write_bytes(heads[genuine] + content)
    try:
        assert data.open_shard(path, V).dtype == np.uint16
    except UserError as error:
        assert str(path) in str(error)


def test_a_folder_is_split_by_name_across_formats(tmp_path):
    write(tmp_path / "edu_train_000001.npy", "npy")
    write(tmp_path / "edu_train_000002.bin", "raw")
    write(tmp_path / "edu_val_000000.bin", "llm.c")
    dataset = data.open_folder(tmp_path, V)
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
        data.open_folder(tmp_path, V)


def test_folders_that_are_none(tmp_path):
    write(tmp_path / "train.bin", "llm.c")
    (tmp_path / "meta.pkl").write_bytes(b"")
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path / "train.bin", "is a file"),
        (tmp_path, "meta.pkl"),
    ):
        with pytest.raises(UserError, match=message):
            data.open_folder(path, V)


def test_fingerprint_sees_names_lengths_and_contents():
    changed = TOKENS.copy()
    changed[-1] ^= 1
    prints = [data.fingerprint(x) for x in ({"a": TOKENS}, {"b": TOKENS}, {"a": TOKENS[:-1]}, {"a": changed})]
    assert len(set(prints)) == 4
    assert data.fingerprint({"a": TOKENS.copy()}) == prints[0]


def test_unigram_entropy():
    assert data.unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(np.log(4))
    assert data.count_tokens([np.array([1, 1, 3], np.uint16), np.array([3], np.uint16)], 5).tolist() == [0, 2, 0, 2, 0]
    assert data.count_tokens([np.array([1, 1, 3], np.uint16)], 5, limit=2).sum() == 2


def notes_batches(tokens, B, T, n):
    """The loader of the notes: B*T+1 tokens from a position that moves on by B*T and returns to 0 at the end."""
    position = 0
    for _ in range(n):
        chunk = torch.from_numpy(tokens[position : position + B * T + 1].astype(np.int64))
        yield chunk[:-1].view(B, T), chunk[1:].view(B, T)
        position += B * T
        if position + B * T + 1 > len(tokens):
            position = 0


@pytest.mark.parametrize(("B", "T"), [(4, 16), (1, 100), (3, 7), (1, 999), (999, 1)])
def test_sequential_batches_are_those_of_the_notes(B, T):
    loader = Loader([TOKENS], B, T, V)
    n = 2 * loader.batches_per_epoch + 3
    for i, (x, y) in enumerate(notes_batches(TOKENS, B, T, n)):
        got_x, got_y = loader.batch(i)
        assert got_x.dtype == torch.int64
        assert torch.equal(got_x, x)
        assert torch.equal(got_y, y)


def test_a_batch_may_span_shards_but_a_window_does_not():
    shards = [np.arange(0, 25, dtype=np.uint16), np.arange(100, 125, dtype=np.uint16)]
    x, y = Loader(shards, 4, 10, V).batch(0)
    assert x[:, 0].tolist() == [0, 10, 100, 110]
    assert torch.equal(y, x + 1)


def test_shuffled_epochs_hold_every_window_once_in_another_order():
    loader = Loader([TOKENS, TOKENS[:500]], 2, 10, V, shuffle=True, seed=3)
    n = loader.batches_per_epoch
    epochs = [torch.cat([loader.batch(e * n + k)[0] for k in range(n)]) for e in (0, 1)]
    plain = Loader([TOKENS, TOKENS[:500]], 2, 10, V)
    expected = {tuple(row) for k in range(n) for row in plain.batch(k)[0].tolist()}
    rows = [[tuple(row) for row in epoch.tolist()] for epoch in epochs]
    assert rows[0] != rows[1]
    assert set(rows[0]) == set(rows[1]) == expected


def test_order_depends_on_seed_and_epoch_alone():
    a, b, c = (Loader([TOKENS], 2, 10, V, shuffle=True, seed=seed) for seed in (1, 1, 2))
    far = 5 * a.batches_per_epoch + 1
    a.batch(0), a.batch(far)
    assert torch.equal(a.batch(far)[0], b.batch(far)[0])
    assert not torch.equal(a.batch(0)[0], c.batch(0)[0])


def test_shuffled_order_never_changes_between_numpy_versions():
    loader = Loader([np.arange(101, dtype=np.uint16)], 10, 10, V, shuffle=True, seed=1337)
    assert (loader.batch(0)[0][:, 0] // 10).tolist() == [3, 5, 2, 9, 6, 1, 0, 4, 7, 8]


def test_batches_from_a_position_are_the_batches_of_that_number(device):
    loader = Loader([TOKENS], 2, 10, V, shuffle=True)
    stream = loader.batches(7, device)
    for i in range(7, 12):
        x, y = next(stream)
        assert x.device.type == device.type
        assert all(torch.equal(a.cpu(), b) for a, b in zip((x, y), loader.batch(i)))


def test_too_short_for_one_batch_is_refused_with_the_numbers():
    Loader([TOKENS[:41]], 4, 10, V)
    with pytest.raises(UserError, match=r"B\*T\+1 = 41 tokens \(B=4, T=10\), and the longest shard holds 40"):
        Loader([TOKENS[:40]], 4, 10, V)


def test_a_bad_token_beyond_the_scan_is_found_when_it_is_read():
    bad = np.append(TOKENS[:40], np.uint16(60000))
    with pytest.raises(UserError, match="token 60000"):
        Loader([bad], 4, 10, V).batch(0)


def test_positions_beyond_2_gib(tmp_path):
    """A sparse file: offsets of shards must not be 32-bit."""
    path, n = tmp_path / "train.bin", 3 * 2**29 + 5  # n - 1 is a multiple of T: the last window ends the file
    with path.open("wb") as file:
        header = np.zeros(256, "<i4")
        header[:3] = data.MAGIC, data.VERSION, n
        file.write(header.tobytes())
        file.truncate(1024 + 2 * n)
        file.seek(1024 + 2 * (n - 11))
        file.write(np.arange(11, dtype="<u2").tobytes())
    loader = Loader([data.open_shard(path, V)], 1, 10, V)
    x, y = loader.batch(loader.batches_per_epoch - 1)
    assert x.tolist() == [list(range(10))]
    assert y.tolist() == [list(range(1, 11))]


@pytest.mark.gpu
def test_prefetch_on_cuda_is_pinned_and_does_not_synchronise():
    loader = Loader([TOKENS], 2, 10, V)
    stream = loader.batches(0, torch.device("cuda"))
    next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        x, _ = next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(x.cpu(), loader.batch(1)[0])
