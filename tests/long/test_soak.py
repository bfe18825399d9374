"""tests.long.soak: its verdicts on a run's memory, files, speed and metrics, and that it detects a leak."""

import json
import os
import re

import pytest

from gpt2fast import train
from gpt2fast.errors import UserError
from gpt2fast.training import log
from tests.long import soak

pytestmark = pytest.mark.long

STEPS, MB = 1000, 2**20


def rows(**planted) -> tuple[list[dict], list[dict]]:
    """Return samples and metrics of a run without faults: 5 ms a step, 3 of them noise; `planted` replaces values."""
    ok = {"rss": lambda i: 500 * MB + i % 3 * 1000, "files": lambda i: 13, "threads": lambda i: 1}
    ok |= {"cpu_seconds": lambda i: 0.125 * i + 0.003 * (i % 2)}
    samples = [{"step": 25 * i, **{name: of(i) for name, of in (ok | planted).items()}} for i in range(1, 41)]
    return samples, [{"step": i, "loss": 3.0} for i in range(1, STEPS + 1)]


def faults(**planted) -> list[str]:
    return soak.judge(*rows(**planted), STEPS, limit=MB)["faults"]


def test_a_steady_run_has_no_faults():
    assert faults() == []
    assert faults(rss=lambda i: 300 * MB + min(i, 7) * 30 * MB) == []  # warming up
    assert faults(rss=lambda i: 500 * MB + i * MB // 50) == []  # 0.8 MB in 1000 steps
    assert (
        faults(rss=lambda i: 500 * MB + (i > 25) * 3 * MB + (i > 33) * 3 * MB) == []
    )  # two tensors that fit into no hole of the heap


def test_growing_memory_is_a_fault():
    (fault,) = faults(rss=lambda i: 500 * MB + i * MB // 20)
    assert re.fullmatch(r"memory grows by 2,097,1\d\d bytes in 1000 steps, more than 1,048,576", fault)


@pytest.mark.parametrize("name", ["files", "threads"])
def test_one_file_or_thread_more_is_a_fault(name):
    assert faults(**{name: lambda i: 13 + (i > 30)}) == [f"open {name} grew from 13 to 14"]
    assert faults(**{name: lambda i: 13 - (i > 30)}) == []


def test_steps_that_become_slower_are_a_fault():
    assert faults(cpu_seconds=lambda i: 0.125 * i + 0.0005 * i) == []
    (fault,) = faults(cpu_seconds=lambda i: 0.125 * i + 0.001 * i * i)
    assert fault.startswith("a step took 5.68 ms of CPU time, and later 7.60")


@pytest.mark.parametrize("spoil", [lambda m: m[:-1], lambda m: [*m, m[-1]], lambda m: [m[1], m[0], *m[2:]]])
def test_a_step_that_is_missing_repeated_or_out_of_order_is_a_fault(spoil):
    samples, metrics = rows()
    found = soak.judge(samples, spoil(metrics), STEPS, limit=MB)
    assert found["faults"] == ["metrics.jsonl does not have each of 1000 steps once, in order"]


def test_slope_and_standard_error_are_those_of_least_squares():
    assert soak.slope([(x, 3.0 + 2 * x) for x in range(9)]) == (pytest.approx(2.0), pytest.approx(0.0, abs=1e-9))
    b, error = soak.slope([(0, 0.0), (1, 2.0), (2, 1.0), (3, 3.0)])
    assert (b, error) == (pytest.approx(0.8), pytest.approx((0.9 / 5) ** 0.5))


def test_the_summary_has_memory_and_time_every_1000_steps_and_jumps():
    samples = [{"step": 25 * i, "cpu_seconds": 0.1 * i + 0.05 * max(0, i - 41)} for i in range(1, 101)]
    for row in samples:
        row["rss"] = MB + (3 * MB if row["step"] >= 750 else 0) - (MB if row["step"] >= 2250 else 0)
    found = soak.course(samples, limit=MB)
    assert found["readings"] == 100
    assert found["rss_each_1000_steps"] == [MB, 4 * MB, 4 * MB]  # at steps 25, 1,025 and 2,025
    assert found["cpu_ms_each_1000_steps"] == [4.0, 6.0]
    assert found["rss_jumps"] == [[750, 3 * MB]]


KEPT: list = []


def leaking(argv):
    """Train, and leak 2 MB and an open file in each step."""
    step = log.Log.step

    def leak(self, *args):
        KEPT.append((bytes(range(256)) * 8192, os.open("log", os.O_RDONLY)))
        step(self, *args)

    log.Log.step = leak
    return train.main(argv)


def test_a_planted_leak_is_detected(tmp_path):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    file = tmp_path / "rows.jsonl"
    # the limit is a quarter of the leak, since memory still grows by itself in the first 60 steps
    assert soak.main(["--steps", "60", "--every", "6", "--limit", str(512 * 1024), "--file", str(file)], leaking) == 1
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert row["suite"] == "soak"
    assert row["readings"] > 20
    assert row["machine"]["torch"]
    assert [fault.split(" grew ")[0].split(" by ")[0] for fault in row["faults"]] == ["memory grows", "open files"]


def test_a_run_leaks_nothing(tmp_path):
    """In 1000 steps, not the documented thousands. CPU time is not judged, since other programs change it."""
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    found = soak.soak(tmp_path, "small", steps=1000, every=20, limit=MB, main=train.main)
    assert found["readings"] > 100
    assert [fault for fault in found["faults"] if "CPU time" not in fault] == []


def test_too_few_events_are_refused():
    with pytest.raises(UserError, match="--steps is 60 and --every 7: they must make at least ten events"):
        soak.main(["--steps", "60", "--every", "7"])
