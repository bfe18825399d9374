"""Signals and full disks, on real processes: what was saved stays good, and training goes on from it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import tiny
from conftest import CHECKOUT

from gpt2fast import checkpoint

pytest.importorskip("tyro", reason="needs tyro for the command line")
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "data")
    return tmp_path


def start(folder, *flags, **options):
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpt2fast.train", *flags]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def wait_for_step(folder, step, process, seconds=120):
    path = folder / "out" / "tiny" / "metrics.jsonl"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


LONG = [*tiny.FLAGS, "--steps", "100000", "--checkpoint-every", "0", "--val-every", "0"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_with_a_checkpoint(folder, number, code):
    process = start(folder, *LONG)
    wait_for_step(folder, 5, process)
    process.send_signal(number)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode == code, output
    rows = [json.loads(line) for line in (folder / "out/tiny/metrics.jsonl").read_text().splitlines()]
    (step, path), = checkpoint.list_checkpoints(folder / "out/tiny/checkpoints")  # fmt: skip
    assert step == rows[-1]["step"]
    assert checkpoint.read_state(path)["step"] == step
    assert "--resume" in output


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_given_up_after_a_signal(folder):
    """1024 micro-batches make a step of a minute or more: the checkpoint is of step 0, in time."""
    tiny.write_data(folder / "data", n=40000)
    process = start(folder, *LONG, "--total-batch", str(32 * 4096), "--model.block-size", "16")
    while not (folder / "out/tiny/metrics.jsonl").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode == 143, output
    assert [step for step, _ in checkpoint.list_checkpoints(folder / "out/tiny/checkpoints")] == [0]


@pytest.mark.slow
def test_a_full_disk_while_saving_keeps_the_last_checkpoint(folder):
    first = start(folder, *tiny.FLAGS, "--stop-at", "4")
    assert first.wait(timeout=120) == 0
    model = next((folder / "out/tiny/checkpoints").iterdir()) / "model.safetensors"
    limit = model.stat().st_size // 2

    def fill_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    second = start(folder, *tiny.FLAGS, "--resume", preexec_fn=fill_disk)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint ")
    assert "could not be saved" in line
    assert "step_00000004, which is whole" in line
    assert [path.name for path in (folder / "out/tiny/checkpoints").iterdir()] == ["step_00000004"]
    third = start(folder, *tiny.FLAGS, "--resume")
    assert third.wait(timeout=120) == 0
