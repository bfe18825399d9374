"""The stages of benchmarks.gpu run small on a CPU here, and hand on what they are given."""

import dataclasses
import json
import re

import pytest
import torch

from benchmarks import generate, gpu_stages, harness, kernels, ladder, peers, rungs, sanitize, step_profile, tune
from benchmarks.gpu_stages import STAGES, GpuConfig
from gpt2fast.model import SIZES

CPU = torch.device("cpu")


def config(tmp_path, **changes):
    return GpuConfig(out=tmp_path, **{"size": "nano", "batch_size": 1, "seq_len": 16} | changes)


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]


def test_environment_stage(tmp_path):
    gpu_stages.environment(config(tmp_path), CPU, 60.0, copy_bytes=2**22, matmuls=[(64, 32, 16)])
    copy, matmul = rows_of(tmp_path)
    assert copy["bytes"] == 2**23
    assert 0.01 < copy["gb_per_s"]["median"] < 1e4
    assert matmul["shape"] == [64, 32, 16]
    assert matmul["tflops"]["median"] > 0


def test_profile_stage(tmp_path, capsys, monkeypatch):
    measure, eager = step_profile.measure, dataclasses.replace(rungs.FUSED, compile=False)
    monkeypatch.setattr(
        step_profile, "measure", lambda rung, *args: measure(eager if rung is rungs.FUSED else rung, *args, steps=1)
    )
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu_stages.profiles(config(tmp_path), CPU, 60.0)
    torch_row, triton_row = rows_of(tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"^\| matmul +\| .* TFLOP +\| +0\.\d\d +\|", said, re.MULTILINE)
    assert "profile of all: skipped: the triton backend needs" in said
    assert sum(torch_row["groups"].values()) == pytest.approx(torch_row["device_ms"])
    assert {"matmul", "attention", "optimizer", "layer norm", "gelu", "cross-entropy"} <= set(torch_row["groups"])
    assert triton_row["status"] == "skipped"


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        (
            "== 3 passed, 1 failed, 2 skipped, 90 deselected in 12.3s (0:00:12) ==",
            {"passed": 3, "failed": 1, "skipped": 2},
        ),
        ("5 passed in 0.1s", {"passed": 5}),
        ("Killed", {}),
    ],
    ids=["all", "passed", "killed"],
)
def test_pytests_closing_line(line, counts):
    assert gpu_stages.count_tests("a passed in one\n" + line) == counts


def test_the_fastest_of_our_rungs_is_profiled_but_for_graphs():
    def row(name, speed, **changes):
        return {"suite": "ladder", "rung": name, "status": "ok", "tokens_per_s": {"median": speed}} | changes

    rows = [
        row("fused", 9.0),
        row("all", 5.0),
        row("graph", 8.0),
        row("+adamw", 6.0),
        row("triton", 7.0, status="failed"),
    ]
    assert gpu_stages.best_of_ours(rows).name == "+adamw"
    assert gpu_stages.best_of_ours([{"suite": "gpu", "stage": "environment"}]) is rungs.ALL


def test_the_tests_stage_runs_each_file_with_kernels_and_counts(tmp_path, monkeypatch, capsys):
    def run_apart(module, *args, limit, log):
        assert module == "pytest"
        assert "gpu or kernel" in args
        log.write_text(
            "1 failed, 3 passed in 1.2s" if args[-1].name == "test_tanh_gelu.py" else "2 passed, 1 skipped in 1.2s"
        )
        return {"status": "failed" if args[-1].name == "test_tanh_gelu.py" else "ok", "seconds": 1.0}

    monkeypatch.setattr(harness, "run_apart", run_apart)
    assert gpu_stages.gpu_tests(config(tmp_path), CPU, 50.0) == 1
    counts = {row["file"].rpartition("/")[2]: (row["passed"], row.get("failed", 0)) for row in rows_of(tmp_path)}
    assert counts["test_tanh_gelu.py"] == (3, 1)
    assert {"test_attention_forward.py", "test_layernorm.py", "test_loss.py", "test_every_kernel.py"} <= set(counts)


def test_the_stages_hand_on_what_they_are_given(tmp_path, monkeypatch):
    """The file, the device, and the seconds that they may plan for."""
    seen = {}

    def record(stage):
        return lambda config: seen.setdefault(stage, []).append(config) or []

    monkeypatch.setattr(kernels, "run", lambda c: record("kernels")(c) and 0)
    monkeypatch.setattr(tune, "run", lambda c: record("tune")(c) and 0)
    monkeypatch.setattr(ladder, "climb", record("ladder"))
    monkeypatch.setattr(peers, "compare", record("peers"))
    monkeypatch.setattr(generate, "compare", record("generate"))
    monkeypatch.setattr(sanitize, "check_all", lambda limit, folder: [{"tool": "memcheck", "status": "ok"}])
    c = config(tmp_path)
    for stage in ("kernels", "tune", "peers", "generate", "swaps", "sanitize"):
        assert not STAGES[stage].run(c, CPU, 45.0)
    assert {each.file for configs in seen.values() for each in configs} == {tmp_path / "gpu.jsonl"}
    assert {each.device for stage in seen if stage != "tune" for each in seen[stage]} == {"cpu"}
    assert {each.budget for stage in seen if stage != "generate" for each in seen[stage]} == {45.0}
    assert seen["generate"][0].limit == 15.0
    assert seen["ladder"][0].rungs == ("fused", *rungs.SWAPS, "all", *rungs.WITHOUT)
    assert seen["kernels"][0].size == ("nano",)
    assert rows_of(tmp_path)[-1]["tool"] == "memcheck"


def test_a_table_of_sizes_is_a_loop_over_the_ladder(tmp_path, monkeypatch):
    seen = []
    rows = iter([[{"status": "ok"}], [{"status": "failed"}], [{"status": "ok"}], [{"status": "skipped"}]])
    monkeypatch.setattr(ladder, "climb", lambda c: seen.append((c.size, c.batch_size, c.budget)) or next(rows))
    assert gpu_stages.sizes(config(tmp_path, seq_len=1024), CPU, 45.0) == 1
    assert [size for size, _, _ in seen] == [size for size in SIZES if size != "nano"]
    assert all(batch == 4 and 0 < budget <= 45.0 for _, batch, budget in seen)  # what training takes on a CPU


def test_loss_curves_are_a_program_of_the_long_tests(tmp_path, monkeypatch, capsys):
    def run_apart(module, *args, limit, log):
        log.write_text("BEYOND IT")
        seen.append((module, args))
        return {"status": "failed" if limit < 50 else "ok"}

    seen = []
    monkeypatch.setattr(harness, "run_apart", run_apart)
    assert [STAGES["options"].run(config(tmp_path), CPU, seconds) for seconds in (90.0, 40.0)] == [0, 1]
    assert seen == 2 * [("tests.long.options", ("--device", CPU, "--file", tmp_path / "gpu.jsonl"))]
    assert "BEYOND IT" in capsys.readouterr().out
