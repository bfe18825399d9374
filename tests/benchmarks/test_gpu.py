"""benchmarks.gpu: its stages are processes, and its seconds on a clock of their own."""

import json
import math
import re

import pytest
import torch

from benchmarks import gpu, harness
from benchmarks.gpu_stages import DEFAULT, STAGES, GpuConfig
from gpt2fast.errors import UserError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_gpu_without_a_gpu_says_so_and_writes_nothing(tmp_path, run_module):
    done = run_module("benchmarks.gpu", "--out", "rows", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: benchmarks.gpu needs a CUDA GPU")
    assert list(tmp_path.iterdir()) == []


def config(tmp_path, **changes):
    return GpuConfig(out=tmp_path, **{"size": "nano", "batch_size": 1, "seq_len": 16} | changes)


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]


def test_a_crash_loses_nothing_and_what_does_not_fit_is_left_out(tmp_path, capsys, monkeypatch):
    seen = []

    def apart(function, job, *, limit, log):
        assert (function, log) == (gpu.run_stage, tmp_path / f"{job.stage}.log")
        seen.append(job.stage)
        return {"status": "failed" if job.stage == "tests" else "ok", "seconds": 1.0, "tail": "boom"}

    monkeypatch.setattr(harness, "apart", apart)
    rows = gpu.run_stages(config(tmp_path), list(STAGES))
    assert {row["stage"] for row in rows if row["status"] == "failed"} == {"tests"}
    assert seen == [row["stage"] for row in rows_of(tmp_path)] == list(STAGES)
    assert "tests: failed: boom" in gpu.summary(tmp_path / "gpu.jsonl")
    rows = gpu.run_stages(config(tmp_path, budget=10.0), ["ladder"])
    assert [row["status"] for row in rows] == ["no time left"]
    assert "ladder: left out, 10 s are too few: raise --budget, or use --only ladder" in capsys.readouterr().out
    assert seen == list(STAGES)


def limits_of(names, c, monkeypatch, used=1.0):
    """{stage: (limit, seconds that it plans for)} on a clock of its own, if stages take this share of their limits."""
    now, found = [0.0], {}

    def apart(function, job, *, limit, log):
        found[job.stage] = limit, job.seconds
        now[0] += used * limit
        return {"status": "timeout", "seconds": limit, "tail": "late"}

    monkeypatch.setattr(harness, "apart", apart)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    gpu.run_stages(c, names)
    return found, now[0]


@pytest.mark.parametrize("budget", [230.0, 540.0, 1800.0])
def test_a_budget_is_kept_and_no_stage_starves_those_after_it(budget, tmp_path, monkeypatch, capsys):
    found, end = limits_of(DEFAULT, config(tmp_path, budget=budget), monkeypatch)
    assert end <= budget
    shares = sum(STAGES[name].share for name in DEFAULT)
    for name in DEFAULT:
        limit, planned = found[name]
        assert limit >= max(harness.SHORTEST, 0.95 * budget * STAGES[name].share / shares)
        assert planned == max(0.0, limit - gpu.SPARE)
    assert found["ladder"][0] == pytest.approx(budget * 8 / shares, rel=0.1)


def test_time_that_a_stage_does_not_need_goes_to_the_next(tmp_path, monkeypatch, capsys):
    c = config(tmp_path, budget=540.0)
    assert limits_of(DEFAULT, c, monkeypatch, used=0.1)[0]["peers"][0] > 450
    assert limits_of(["tune"], c, monkeypatch)[0] == {"tune": (540.0, 520.0)}


def test_a_small_budget_leaves_out_the_last_stages(tmp_path, monkeypatch, capsys):
    found, end = limits_of(DEFAULT, config(tmp_path, budget=40.0), monkeypatch)
    assert list(found) == ["environment", "kernels"]
    assert end <= 40.0
    assert [row["status"] for row in rows_of(tmp_path)] == ["timeout"] * 2 + ["no time left"] * 3


def test_without_a_budget_each_stage_has_its_own_limit(tmp_path, monkeypatch, capsys):
    c = config(tmp_path, limit=100.0)
    assert c.budget == math.inf
    assert set(limits_of(DEFAULT, c, monkeypatch)[0].values()) == {(100.0, 80.0)}


def test_every_stage_is_in_the_help_and_the_docstring():
    help = GpuConfig.__doc__ + (harness.ROOT / "benchmarks" / "gpu_stages.py").read_text()
    assert f"Stages: {', '.join(STAGES)}." in help
    assert set(STAGES) > set(DEFAULT) == set(list(STAGES)[:5])
    assert all(re.search(rf"^    {name} ", gpu.__doc__, re.MULTILINE) for name in STAGES)
    with pytest.raises(UserError, match="--only climb: there are environment, kernels, "):
        gpu.run(GpuConfig(only=("climb",)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here, whose kernels would be sanitized")
def test_a_stage_is_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    """The real thing: the rows of stage and process in one file, what it printed in its log, and its end told."""
    monkeypatch.setenv("PATH", "")  # no compute-sanitizer
    rows = gpu.run_stages(config(tmp_path), ["sanitize"], device="cpu")
    assert rows[0]["status"] == "failed"
    assert [row["stage"] for row in rows_of(tmp_path)] == ["sanitize"] * 3
    assert "compute-sanitizer is not on the PATH" in (tmp_path / "sanitize.log").read_text()
    assert "sanitize: failed: compute-sanitizer is not on the PATH" in gpu.summary(tmp_path / "gpu.jsonl")
