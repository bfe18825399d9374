"""benchmarks.gpu: its stages run small on a CPU here, its seconds on a clock of their own."""

import argparse
import dataclasses
import json
import re

import pytest
import torch

from benchmarks import gpu, harness, kernels, ladder, rungs, sanitize, scale, step_profile, tune

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_gpu_without_a_gpu_says_so_and_writes_nothing(tmp_path, run_module):
    done = run_module("benchmarks.gpu", "--out", "rows", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: benchmarks.gpu needs a CUDA GPU")
    assert list(tmp_path.iterdir()) == []


def options(tmp_path, **changes):
    defaults = {
        "out": tmp_path,
        "size": "nano",
        "batch_size": 1,
        "seq_len": 16,
        "device": "cpu",
        "limit": 60.0,
        "budget": 120.0,
    }
    return argparse.Namespace(**defaults | changes)


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]


def test_environment_stage(tmp_path):
    gpu.environment(options(tmp_path), CPU, copy_bytes=2**22, matmuls=[(64, 32, 16)])
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
    gpu.profiles(options(tmp_path), CPU)
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
    assert gpu.count_tests("a passed in one\n" + line) == counts


def test_stages_share_the_budget_and_a_crash_loses_nothing(tmp_path, capsys, monkeypatch):
    seen = []

    def run_apart(module, *args, limit, log):
        seen.append((args[-1], limit))
        return {"status": "failed" if args[-1] == "tests" else "ok", "seconds": 1.0, "tail": "boom"}

    monkeypatch.setattr(harness, "run_apart", run_apart)
    rows = gpu.run_stages(options(tmp_path), list(gpu.STAGES))
    assert {row["stage"] for row in rows if row["status"] == "failed"} == {"tests"}
    assert [name for name, _ in seen] == list(gpu.STAGES)
    assert all(limit <= 120 for _, limit in seen)
    assert [row["stage"] for row in rows_of(tmp_path)] == list(gpu.STAGES)
    assert "tests: failed: boom" in gpu.summary(tmp_path / "gpu.jsonl")
    assert [row["status"] for row in gpu.run_stages(options(tmp_path, budget=10.0), ["ladder"])] == ["no time left"]
    assert "ladder: skipped, 10 s for all stages are over: --only ladder" in capsys.readouterr().out


def test_no_stage_starves_those_behind_it(tmp_path, monkeypatch, capsys):
    """On a clock of its own: each stage takes all it may; those behind it still get what PLAN keeps for them."""
    now, limits = [0.0], {}

    def run_apart(module, *args, limit, log):
        limits[args[-1]] = limit
        now[0] += limit
        return {"status": "timeout", "seconds": limit, "tail": "late"}

    monkeypatch.setattr(harness, "run_apart", run_apart)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    rows = gpu.run_stages(options(tmp_path, budget=gpu.BUDGET), gpu.DEFAULT)
    assert [row["stage"] for row in rows] == list(gpu.DEFAULT)
    assert limits == {name: gpu.PLAN[name] for name in gpu.DEFAULT}
    assert now[0] == sum(limits.values()) == gpu.BUDGET == 540  # nine minutes
    limits.clear()
    gpu.run_stages(options(tmp_path, budget=gpu.BUDGET), ["tune"])
    assert limits == {"tune": 540}  # alone, it may take everything


def test_every_stage_has_its_seconds_and_its_line_in_the_help():
    assert set(gpu.PLAN) == set(gpu.STAGES) > set(gpu.DEFAULT)
    assert all(re.search(rf"^    {name} ", gpu.__doc__, re.MULTILINE) for name in gpu.STAGES)


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
    assert gpu.best_of_ours(rows).name == "+adamw"
    assert gpu.best_of_ours([{"suite": "gpu", "stage": "environment"}]) is rungs.ALL


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here, whose kernels would be sanitized")
def test_a_stage_is_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    """The real thing: the rows of stage and process in one file, what it printed in its log, and its end told."""
    monkeypatch.setenv("PATH", "")  # no compute-sanitizer
    rows = gpu.run_stages(options(tmp_path), ["sanitize"])
    assert rows[0]["status"] == "failed"
    assert [row["stage"] for row in rows_of(tmp_path)] == ["sanitize"] * 3
    assert "compute-sanitizer is not on the PATH" in (tmp_path / "sanitize.log").read_text()
    assert "sanitize: failed: compute-sanitizer is not on the PATH" in gpu.summary(tmp_path / "gpu.jsonl")


def test_the_tests_stage_runs_each_file_with_kernels_and_counts(tmp_path, monkeypatch, capsys):
    def run_apart(module, *args, limit, log):
        assert module == "pytest"
        assert "gpu or kernel" in args
        log.write_text(
            "1 failed, 3 passed in 1.2s" if args[-1].name == "test_tanh_gelu.py" else "2 passed, 1 skipped in 1.2s"
        )
        return {"status": "failed" if args[-1].name == "test_tanh_gelu.py" else "ok", "seconds": 1.0}

    monkeypatch.setattr(harness, "run_apart", run_apart)
    with pytest.raises(SystemExit):
        gpu.gpu_tests(options(tmp_path, limit=60.0), CPU)
    counts = {row["file"].rpartition("/")[2]: (row["passed"], row.get("failed", 0)) for row in rows_of(tmp_path)}
    assert counts["test_tanh_gelu.py"] == (3, 1)
    assert {"test_attention_forward.py", "test_layernorm.py", "test_loss.py", "test_every_kernel.py"} <= set(counts)
    assert "test_tanh_gelu.py" in gpu.summary(tmp_path / "gpu.jsonl")


def test_the_stages_hand_on_what_they_are_given(tmp_path, monkeypatch, capsys):
    """The file, and less than their own limit, so that they end by themselves."""
    seen = []
    programs = {"kernels": kernels, "swaps": ladder, "tune": tune, "scale": scale}
    for program in programs.values():
        monkeypatch.setattr(program, "main", lambda arguments: seen.append(arguments) or 0)
    monkeypatch.setattr(sanitize, "check_all", lambda limit, folder: [{"tool": "memcheck", "status": "ok"}])
    for stage in (*programs, "sanitize"):
        gpu.STAGES[stage](options(tmp_path, limit=60.0), CPU)
    parsed = {
        stage: program.parser().parse_args(arguments) for (stage, program), arguments in zip(programs.items(), seen)
    }
    assert {each.file for each in parsed.values()} == {tmp_path / "gpu.jsonl"}
    assert all(0 < each.budget < 60 for each in parsed.values())
    assert parsed["swaps"].rungs == ["fused", *rungs.SWAPS, "all", *rungs.WITHOUT]
    assert parsed["kernels"].lengths == [16, 64]  # seconds are few: one size, two lengths
    assert rows_of(tmp_path)[-1]["tool"] == "memcheck"


def test_loss_curves_are_a_program_of_the_long_tests(tmp_path, monkeypatch, capsys):
    def run_apart(module, *args, limit, log):
        log.write_text("BEYOND IT")
        return {"status": "failed" if limit < 50 else "ok", "module": module, "args": seen.append((module, args))}

    seen = []
    monkeypatch.setattr(harness, "run_apart", run_apart)
    gpu.STAGES["options"](options(tmp_path, limit=100.0), CPU)
    with pytest.raises(SystemExit):
        gpu.STAGES["options"](options(tmp_path, limit=50.0), CPU)
    assert seen == 2 * [("tests.long.options", ("--device", CPU, "--file", tmp_path / "gpu.jsonl"))]
    assert "BEYOND IT" in capsys.readouterr().out
