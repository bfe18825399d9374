"""Threads: no more than this process may keep busy."""

import pytest
import torch

from gpt2fast import device


@pytest.fixture
def threads(monkeypatch):
    """What torch was told; it has 8."""
    told = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device.torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(device.torch, "set_num_threads", told.append)
    return told


def write(folder, files: dict[str, str]):
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


V1 = "cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({V1[0]: "300000\n", V1[1]: "100000\n"}, 3.0),
        ({V1[0]: "-1\n", V1[1]: "100000\n"}, None),
        ({"cpu.max": "what is this"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota_bounds_the_threads(files, quota, tmp_path, threads):
    write(tmp_path, files)
    assert device.cpu_quota(tmp_path) == quota
    device.use_allowed_cores(tmp_path)
    assert threads == ([] if quota is None else [max(1, round(quota))])


def test_more_than_torch_would_take_is_not_taken(tmp_path, threads):
    write(tmp_path, {"cpu.max": "6400000 100000"})
    device.use_allowed_cores(tmp_path)
    assert threads == [8]


def test_what_the_user_says_stays(tmp_path, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    write(tmp_path, {"cpu.max": "200000 100000"})
    device.use_allowed_cores(tmp_path)
    assert threads == []


def test_here():
    before = torch.get_num_threads()
    device.use_allowed_cores()
    assert 1 <= torch.get_num_threads() <= before
    torch.set_num_threads(before)
