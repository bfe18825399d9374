"""Measurements: rows are whole, whatever crashes or hangs; what needs a GPU runs small on a CPU here."""

import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from gpt2fast.errors import UserError
from tests.tools.clock import Clock
from tests.tools.programs import HANG, until

CPU = torch.device("cpu")


def test_spread():
    assert harness.spread([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]) == {"median": 6, "p20": 3.0, "p80": 9.0}


def test_time_calls_keeps_to_its_seconds_but_makes_three_calls(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(harness, "time", clock)
    times = harness.time_calls(lambda: calls.append(clock.sleep(0.02)), CPU, n=1000, max_seconds=0.2)
    assert len(times) == 9
    assert len(calls) == len(times) + 1  # the first is for the estimate
    assert times == pytest.approx([0.02] * 9, abs=1e-5)
    assert len(harness.time_calls(lambda: clock.sleep(0.02), CPU, n=1000, max_seconds=0.0)) == 3


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
    row = harness.run_apart(module, limit=HANG, log=tmp_path / "log")
    assert row["status"] == "failed"
    assert "before" in row["tail"]
    assert "the reason" in row["tail"]


def test_a_hang_is_killed_with_its_children(program, tmp_path, monkeypatch):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); print('hanging', flush=True); time.sleep(600)\n"
    )
    log, real = tmp_path / "log", subprocess.Popen.wait

    def wait(process, timeout=None):
        """As if the limit were reached when it hangs."""
        if timeout is None:
            return real(process)
        until(lambda: log.exists() and log.read_text() == "hanging\n", process, log)
        raise subprocess.TimeoutExpired(process.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    row = harness.run_apart(program(code), tmp_path / "pid", limit=2, log=log)
    assert (row["status"], row["tail"]) == ("timeout", "hanging\n")
    assert not alive(int((tmp_path / "pid").read_text()))


def alive(pid):
    """Whether a process still runs; an orphan that was killed may be a zombie until it is reaped."""
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return False
        if state == "Z":
            return False
        time.sleep(0.05)
    return True


@dataclass(frozen=True)
class Inner:
    path: Path
    limit: float = math.inf


@dataclass(frozen=True)
class Job:
    do: str
    inner: Inner
    pairs: tuple[tuple[str, str], ...] = ()
    file: Path | None = None


def work(job: Job) -> dict | None:
    if job.do == "fail":
        raise UserError("the reason")
    if job.do == "nothing":
        return None
    if job.do == "die at b":
        for name, _ in job.pairs:
            if name == "b":
                sys.exit("b")
            harness.append_row(job.file, {"name": name})
        return None
    return {"status": "ok", "job": repr(job)}


JOB = Job("return", Inner(Path("a")), (("b", "c"), ("d", "e")))


@pytest.fixture
def here(monkeypatch, tmp_path):
    """In place of a process: what it would be started with, in this one."""

    def run_apart(module, *args, limit, log, environment):
        assert module == "benchmarks.harness"
        try:
            harness.main(list(map(str, args)))
        except (UserError, SystemExit) as error:
            return {"status": "failed", "seconds": 1.0, "tail": str(error)}
        return {"status": "ok", "seconds": 1.0}

    monkeypatch.setattr(harness, "run_apart", run_apart)


def test_a_function_runs_in_a_process_with_its_settings(tmp_path):
    row = harness.apart(work, JOB, limit=HANG, log=tmp_path / "log")
    assert row.pop("seconds") > 0
    assert row == {"status": "ok", "job": repr(JOB)}


def test_the_row_is_that_of_the_function_or_says_how_the_process_ended(here):
    assert harness.apart(work, JOB, limit=9) == {"status": "ok", "job": repr(JOB), "seconds": 1.0}
    assert harness.apart(work, Job("nothing", JOB.inner), limit=9) == {"status": "ok", "seconds": 1.0}
    failed = {"status": "failed", "seconds": 1.0, "tail": "the reason"}
    assert harness.apart(work, Job("fail", JOB.inner), limit=9) == failed


def test_each_job_has_its_row_and_those_without_time_say_so(here, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    jobs = [Job(do, JOB.inner) for do in ("nothing", "fail", "nothing")]
    rows = []
    for row in harness.each_apart(work, jobs[:2], limit=99, end=clock.now + 20):
        rows.append(row["status"])
    clock.sleep(6)  # less than SHORTEST is left
    assert rows == ["ok", "failed"]
    [row] = harness.each_apart(work, jobs[2:], limit=99, end=clock.now + 14)
    assert row == {"status": "skipped", "why": "no time is left: raise --budget or --limit"}


def test_a_list_is_worked_through_by_another_process_if_one_dies(here):
    def job(left, file):
        return Job("die at b", JOB.inner, tuple((name, "") for name in left), file)

    rows = list(harness.work_through(work, ["a", "b", "c", "d"], job))
    assert [(item, row.get("name"), row.get("status")) for item, row in rows] == [
        ("a", "a", None), ("b", None, "failed"), ("c", "c", None), ("d", "d", None),
    ]  # fmt: skip
    assert list(harness.work_through(work, ["a"], job, end=0.0)) == []


def test_a_function_of_the_program_itself_is_found_by_the_programs_name(monkeypatch):
    """`python -m benchmarks.ladder` is the module __main__, which is another one in the process that it starts."""
    spec = type("Spec", (), {"name": "benchmarks.ladder"})
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    function = type("F", (), {"__module__": "__main__"})
    assert harness.module_of(function) == "benchmarks.ladder"
    assert harness.module_of(work) == __name__
