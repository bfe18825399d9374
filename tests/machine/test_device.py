"""Devices, precisions, and threads limited to the container's quota."""

import pytest
import torch

from gpt2fast.errors import UserError
from gpt2fast.machine import device


@pytest.fixture
def threads(monkeypatch):
    """The calls of torch.set_num_threads; torch has 8 threads before."""
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


def test_a_quota_above_torchs_threads_changes_nothing(tmp_path, threads):
    write(tmp_path, {"cpu.max": "6400000 100000"})
    device.use_allowed_cores(tmp_path)
    assert threads == [8]


def test_the_users_omp_num_threads_is_kept(tmp_path, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    write(tmp_path, {"cpu.max": "200000 100000"})
    device.use_allowed_cores(tmp_path)
    assert threads == []


def test_the_quota_of_this_machine_is_read():
    before = torch.get_num_threads()
    device.use_allowed_cores()
    assert 1 <= torch.get_num_threads() <= before
    torch.set_num_threads(before)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device.pick_device("auto").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.pick_device("auto").type == "cuda"
    assert device.pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match="cuda:2 was asked for, and torch sees 2"):
        device.pick_device("cuda:2")


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")], ids=str)
def test_precision_on_cuda(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Toy")
    cuda = torch.device("cuda")
    assert device.pick_precision("auto", cuda) == precision
    assert device.pick_precision("fp32", cuda) == "fp32"
    if precision == "fp16":
        with pytest.raises(UserError, match="NVIDIA Toy has no bf16 units"):
            device.pick_precision("bf16", cuda)


def test_interpreted_kernels_run_in_fp32():
    cpu = torch.device("cpu")
    assert device.pick_precision("auto", cpu, interpreted=True) == "fp32"
    assert device.pick_precision("fp32", cpu, interpreted=True) == "fp32"
    with pytest.raises(
        UserError, match=r"interpreter \(TRITON_INTERPRET=1\) computes bf16 wrongly: use --precision fp32"
    ):
        device.pick_precision("bf16", cpu, interpreted=True)


@pytest.mark.parametrize("limit", [{"ONEDNN_MAX_CPU_ISA": "AVX2"}, {"ATEN_CPU_CAPABILITY": "default"}], ids=str)
def test_auto_is_fp32_where_a_variable_turns_bf16_instructions_off(fresh_python, limit):
    """torch reads the variables once. A bf16 step of nano takes minutes with the first, and fails with the second."""
    code = (
        "import torch; from gpt2fast.machine.device import pick_precision as p; print(p('auto', torch.device('cpu')))"
    )
    assert fresh_python("-c", code, check=True, env=limit).stdout == "fp32\n"
