"""Batch i is a pure function of i."""

import numpy as np
import pytest
import torch

from gpt2fast.data import shards
from gpt2fast.data.loader import Loader
from gpt2fast.errors import UserError

V = 50257
TOKENS = np.random.default_rng(0).integers(0, V, 1000).astype(np.uint16)


def header(n):
    """llm.c's header: 256 int32 that begin with magic, version and number of tokens."""
    return np.concatenate([[20240520, 1, n], np.zeros(253)]).astype(np.int32).tobytes()


def notes_batches(tokens, B, T, n):
    """Yield the batches of the notes' loader: B*T+1 tokens from a position that advances by B*T and wraps to 0."""
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
        header[:3] = shards.MAGIC, shards.VERSION, n
        file.write(header.tobytes())
        file.truncate(1024 + 2 * n)
        file.seek(1024 + 2 * (n - 11))
        file.write(np.arange(11, dtype="<u2").tobytes())
    loader = Loader([shards.open_shard(path, V)], 1, 10, V)
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
