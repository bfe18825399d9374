"""The faults of docs/faults.md by signals, on real processes; and a disk that is really full."""

import json
import signal

import pytest

from gpt2fast.weights import checkpoint
from tests.tools import programs, tiny

pytest.importorskip("tyro", reason="needs tyro for the command line")

LONG = [*tiny.FLAGS, "--steps", "100000", "--checkpoint-every", "0", "--val-every", "0"]


def start(folder, *flags):
    return programs.start("-m", "gpt2fast.train", *flags, cwd=folder, log=folder / "log")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_run_with_a_checkpoint(folder, number, code):
    process, metrics = start(folder, *LONG), folder / "out/tiny/metrics.jsonl"
    programs.until(lambda: metrics.exists() and '"step": 5,' in metrics.read_text(), process, folder / "log")
    process.send_signal(number)
    assert process.wait() == code, (folder / "log").read_text()
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    (step, path), = checkpoint.list_checkpoints(folder / "out/tiny/checkpoints")  # fmt: skip
    assert step == rows[-1]["step"]
    assert checkpoint.read_state(path)["step"] == step
    assert "--resume" in (folder / "log").read_text()


def test_a_step_that_takes_too_long_is_given_up_after_a_signal(folder):
    """A step of 2^18 micro-batches takes many minutes: a checkpoint of step 0 shows that it was not finished."""
    tiny.write_data(folder / "data", n=40000)
    process = start(folder, *LONG, "--total-batch", str(32 * 2**18))
    programs.until((folder / "out/tiny/metrics.jsonl").exists, process, folder / "log")
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143, (folder / "log").read_text()
    assert [step for step, _ in checkpoint.list_checkpoints(folder / "out/tiny/checkpoints")] == [0]


FULL = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = ["train", *{flags!r}]
runpy.run_module("gpt2fast.train", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(folder, run_module, run_python):
    flags = [*tiny.FLAGS, "--model.vocab-size", "50257"]  # so that the weights are the largest file of the run
    run_module("gpt2fast.train", *flags, "--stop-at", "4", cwd=folder, check=True)
    model = next((folder / "out/tiny/checkpoints").iterdir()) / "model.safetensors"
    code = FULL.format(limit=model.stat().st_size // 2, flags=[*flags, "--resume"])
    second = run_python("-c", code, cwd=folder)
    assert second.returncode == 1
    line = second.stderr.strip().splitlines()[-1]
    assert line.startswith("error: checkpoint ")
    assert "could not be saved" in line
    assert "step_00000004, which is whole" in line
    assert [path.name for path in (folder / "out/tiny/checkpoints").iterdir()] == ["step_00000004"]
    run_module("gpt2fast.train", *flags, "--resume", cwd=folder, check=True)
