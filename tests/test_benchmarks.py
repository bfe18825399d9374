"""Measurements: rows are whole, whatever crashes or hangs; what needs a GPU runs small on a CPU here."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, kernels, sanitize

CPU = torch.device("cpu")


def test_spread():
    assert harness.spread([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]) == {"median": 6, "p20": 3.0, "p80": 9.0}


def test_time_calls_keeps_to_its_seconds_but_makes_three_calls():
    calls = []
    times = harness.time_calls(lambda: calls.append(time.sleep(0.02)), CPU, n=1000, max_seconds=0.2)
    assert 3 <= len(times) <= 10
    assert len(calls) == len(times) + 1  # the first is for the estimate
    assert all(0.02 <= t < 0.2 for t in times)
    assert len(harness.time_calls(lambda: time.sleep(0.02), CPU, n=1000, max_seconds=0.0)) == 3


def test_rows_are_appended(tmp_path):
    path = tmp_path / "a" / "rows.jsonl"
    for i in range(2):
        harness.append_row(path, {"i": i})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"i": 0}, {"i": 1}]


def test_results_are_filed_by_device_date_and_commit(tmp_path):
    path = harness.results_file("ladder", tmp_path)
    assert path.parent.parent == tmp_path
    assert path.name.endswith("_ladder.jsonl")
    assert torch.cuda.is_available() or path.parent.name == "cpu"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """program(code): the name of a module with that code, importable by a process that is run apart."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code):
        (tmp_path / "stage_under_test.py").write_text(code)
        return "stage_under_test"

    return write


def test_a_crash_is_a_row_with_the_end_of_its_output(program, tmp_path):
    module = program("import sys\nprint('before'); sys.exit('the reason')")
    row = harness.run_apart(module, limit=60, log=tmp_path / "log")
    assert row["status"] == "failed"
    assert "before" in row["tail"]
    assert "the reason" in row["tail"]


def test_a_hang_is_killed_with_its_children(program, tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); print('hanging', flush=True); time.sleep(600)\n"
    )
    start = time.monotonic()
    row = harness.run_apart(program(code), tmp_path / "pid", limit=2, log=tmp_path / "log")
    assert time.monotonic() - start < 20
    assert (row["status"], row["tail"]) == ("timeout", "hanging\n")
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid, patience=5.0):
    """Whether a process still runs; an orphan that was killed may be a zombie until it is reaped."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


TINY_KERNELS = {case.op: case for case in kernels.cases(["nano"], 32, [16], CPU)}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="times the interpreter")
@pytest.mark.parametrize("op", TINY_KERNELS)
def test_every_provider_of_a_kernel_is_verified_and_timed(op, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **_: fn)
    monkeypatch.setattr(kernels, "time_ms", lambda call, device: call() and {"median": 2.0, "p20": 1.0, "p80": 3.0})
    rows = list(kernels.measure(TINY_KERNELS[op], CPU, {"gb_per_s": 1e-3, "tflops": 1e-6}))
    providers = ["eager", "compile", "triton"]
    assert [(row["provider"], row["direction"], row["status"]) for row in rows] == [
        (name, direction, "ok") for name in providers for direction in ("forward", "both")
    ]
    assert all(row["share"] > 0 for row in rows)
    assert all(op in kernels.describe(row) for row in rows)


def test_a_kernel_that_is_wrong_is_not_timed(monkeypatch):
    case = TINY_KERNELS["gelu"]
    liar = {"eager": case.fn, "liar": lambda x: case.fn(x) * 1.1, "nan": lambda x: case.fn(x) * float("nan")}
    monkeypatch.setattr(kernels, "providers", lambda *_: liar | {"absent": kernels_that_fail})
    monkeypatch.setattr(kernels, "time_ms", lambda call, device: {"median": 2.0, "p20": 1.0, "p80": 3.0})
    rows = list(kernels.measure(case, CPU, {"gb_per_s": 1.0, "tflops": 1.0}))
    assert [row["provider"] for row in rows] == ["eager", "eager", "liar", "nan", "absent"]
    assert "result 0 is wrong by 1.00e-01, eager torch by" in rows[2]["status"]
    assert "wrong by nan" in rows[3]["status"]
    assert "RuntimeError: not here" in rows[4]["status"]
    assert "not here" in kernels.describe(rows[4])


def kernels_that_fail(*_):
    raise RuntimeError("not here")


def test_what_a_kernel_must_move_and_multiply():
    """GPT-2 124M at B=64, T=1024, as in PERFORMANCE's table of the floor."""
    tokens, C = 65536, 768
    found = {}
    for case in kernels.cases(["gpt2"], tokens, [1024], torch.device("meta")):
        found[case.op] = case.elements if any(case.elements) else case.flops
    assert found["add_layer_norm"] == (4 * tokens * C, 8 * tokens * C)
    assert 12 * found["attention"][1] == pytest.approx(4.33e12, rel=0.01)
    assert found["linear_cross_entropy"][1] == pytest.approx(15.19e12, rel=0.01)
    assert 2 * found["cross_entropy"][1] == pytest.approx(13.19e9, rel=0.01)


@pytest.mark.slow
def test_kernels_end_to_end(run_module, tmp_path):
    done = run_module("benchmarks.kernels", "--op", "gelu", "--tokens", 64, "--file", tmp_path / "k.jsonl", check=True)
    assert "lengths" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert {(row["provider"], row["status"]) for row in rows} == {("eager", "ok"), ("compile", "ok")}
    assert all(row["ceilings"]["gb_per_s"] > 0 for row in rows)
    refused = run_module("benchmarks.kernels", "--tokens", 64, "--lengths", 128)
    assert "--lengths 128: it must be between 1 and --tokens 64" in refused.stderr


def test_sanitizer_without_a_gpu_or_itself(run_module, monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        assert "benchmarks.sanitize needs a CUDA GPU" in run_module("benchmarks.sanitize").stderr
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert {row["status"] for row in sanitize.check_all(10.0, tmp_path)} == {"failed"}


@pytest.mark.parametrize(("code", "status"), [(0, "ok"), (9, "failed")])
def test_what_the_sanitizer_says(code, status, monkeypatch, tmp_path):
    fake = tmp_path / "compute-sanitizer"
    fake.write_text(f"#!/bin/sh\necho found $2\nexit {code}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(fake))
    rows = sanitize.check_all(10.0, tmp_path)
    assert [(row["tool"], row["status"]) for row in rows] == [("memcheck", status), ("racecheck", status)]
    assert ("found memcheck" in rows[0].get("tail", "")) == (code != 0)
