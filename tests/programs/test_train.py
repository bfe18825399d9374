"""Training: it learns, writes its files, and resumes with the same bits."""

import json
import math
from dataclasses import replace

import pytest
import torch

from gpt2fast.train import train
from gpt2fast.training import optim
from gpt2fast.training.session import start_session
from gpt2fast.weights import checkpoint
from tests.tools import tiny
from tests.tools.runs import assert_same_run, metrics


def test_a_run_learns_more_than_token_frequencies(tmp_path, capsys):
    c = tiny.config(tmp_path, steps=150, model=replace(tiny.MODEL, n_embd=32), lr=3e-2, val_every=50)
    assert train(c) == 0
    rows = metrics(c)
    entropy = json.loads((c.folder / "config.json").read_text())["resolved"]["unigram_entropy"]
    assert abs(rows[0]["loss"] - math.log(256)) < 0.5
    assert rows[-2]["loss"] < entropy
    assert rows[-1]["val_loss"] < entropy


def test_a_run_writes_its_files(tmp_path, capsys, picture):
    c = tiny.config(tmp_path)
    train(c)
    assert {path.name for path in c.folder.iterdir()} >= {"metrics.jsonl", "config.json", "loss.png", "checkpoints"}
    assert (c.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in checkpoint.list_checkpoints(c.folder / "checkpoints")] == [10, 20]
    stored = json.loads((c.folder / "config.json").read_text())
    assert stored["config"]["model"]["n_embd"] == 16
    assert set(stored["resolved"]["ops"].values()) == {"torch"}
    assert stored["machine"]["torch"] == torch.__version__
    assert "commit" in stored["machine"]
    assert [row["step"] for row in metrics(c) if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in metrics(c) if "val_loss" in row] == [5, 10, 15, 20]


def test_the_learning_rate_is_the_schedule(tmp_path, capsys):
    c = tiny.config(tmp_path)
    train(c)
    rates = [row["lr"] for row in metrics(c) if "lr" in row]
    expected = [optim.learning_rate(i, peak=1e-2, floor=1e-3, warmup=2, total=20) for i in range(20)]
    assert rates == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"total_batch": 96, "steps": 12, "stop_at": 7},  # 3 micro-batches a step, 31 in an epoch: resumed within one
        {"shuffle": False, "log_every": 7},
        {"checkpoint_every": 4, "steps": 13, "stop_at": 9, "keep": 1},
    ],
    ids=["plain", "bf16", "accumulated", "sequential", "odd"],
)
def test_a_stopped_and_resumed_run_equals_a_straight_one(tmp_path, capsys, changes):
    stop = changes.pop("stop_at", 10)
    straight, parts = (tiny.config(tmp_path, run=name, **changes) for name in ("straight", "parts"))
    train(straight)
    train(replace(parts, stop_at=stop))
    torch.rand(7)  # a resumed process has other random states
    train(replace(parts, resume=True))
    assert_same_run(straight, parts)


def test_the_seed_determines_the_run(tmp_path, capsys):
    runs = [tiny.config(tmp_path, run=name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    for c in runs:
        train(c)
    assert_same_run(runs[0], runs[1])
    assert metrics(runs[0]) != metrics(runs[2])


def test_log_every_does_not_change_losses(tmp_path, capsys):
    often, rarely = (tiny.config(tmp_path, run=f"every{n}", log_every=n) for n in (1, 7))
    train(often)
    train(rarely)
    by_step = [{row["step"]: row["loss"] for row in metrics(c) if "loss" in row} for c in (often, rarely)]
    assert by_step[0] == by_step[1]


def test_a_resume_keeps_the_runs_settings_and_is_recorded(tmp_path, capsys):
    c = tiny.config(tmp_path)
    train(replace(c, stop_at=10))
    train(replace(c, resume=True, steps=24, keep=3))
    stored = json.loads((c.folder / "config.json").read_text())
    assert stored["resumes"][0]["step"] == 10
    assert stored["resumes"][0]["changed"] == {"steps": [20, 24], "keep": [2, 3]}
    assert "steps was 20 and is 24" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_cuda_in_every_precision(tmp_path, capsys, precision):
    c = tiny.config(
        tmp_path, device="cuda", precision=precision, steps=60, compile="on" if precision == "bf16" else "off"
    )
    assert train(c) == 0
    losses = [row["loss"] for row in metrics(c) if "loss" in row]
    assert losses[-1] < losses[0] - 2


@pytest.mark.gpu
def test_a_step_on_cuda_does_not_wait_for_the_device(tmp_path):
    s = start_session(tiny.config(tmp_path, device="cuda", precision="bf16", compile="off"))
    stream = s.inputs.train.batches(0, s.place.device)
    s.take_step(stream, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        s.take_step(stream, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
