"""The ladder: its rungs differ in what they say, and its rows are whole, whatever crashes."""

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, ladder, rungs
from benchmarks.ladder import LadderConfig
from gpt2fast.errors import UserError

CPU = torch.device("cpu")
TINY = LadderConfig(size="nano", batch_size=1, seq_len=16, steps=3, warmup=3, device="cpu")


@pytest.mark.long
def test_ladder_end_to_end(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    ladder.climb(replace(TINY, rungs=("fp32", "tf32", "bf16", "triton"), file=path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["rung"], row["status"]) for row in rows] == [
        ("fp32", "ok"), ("tf32", "skipped"), ("bf16", "ok"), ("triton", "skipped"),
    ]  # fmt: skip
    done = rows[0]
    assert set(done["tokens_per_s"]) == {"median", "p20", "p80"}
    assert done["tokens_per_s"]["median"] == pytest.approx(16e3 / done["ms"]["median"], rel=0.2)
    assert done["peak_memory"] > 1e8
    assert done["mfu"] is None
    assert done["config"]["B"] == 1
    assert done["machine"]["torch"] == torch.__version__
    assert {"commit", "dirty", "date"} <= set(done["machine"])
    assert done["losses"][0] == pytest.approx(10.8, abs=0.5)
    assert rows[2]["agrees"] is True
    assert "no TF32" in rows[1]["why"]
    table = capsys.readouterr().out
    assert "unknown" in table
    assert re.search(r"^triton +skipped", table, re.MULTILINE)


def test_a_rung_that_crashes_costs_its_own_row_only(tmp_path, capsys, monkeypatch):
    results = iter(
        [
            {"status": "failed", "seconds": 1.0, "tail": "CUDA out of memory\n"},
            {"status": "timeout", "seconds": 9.0, "tail": "..."},
        ]
    )
    monkeypatch.setattr(harness, "apart", lambda *args, **options: next(results))
    path = tmp_path / "rows.jsonl"
    rows = ladder.climb(replace(TINY, rungs=("fp32", "bf16"), file=path))
    assert [json.loads(line)["status"] for line in path.read_text().splitlines()] == ["failed", "timeout"]
    assert harness.exit_code(rows) == 1
    assert "failed: CUDA out of memory" in capsys.readouterr().out


def test_rungs_after_the_budget_are_skipped_with_a_reason(tmp_path, capsys):
    ladder.climb(replace(TINY, rungs=("fp32",), budget=1.0, file=tmp_path / "rows.jsonl"))
    assert "fp32: skipped: no time is left: raise --budget or --limit" in capsys.readouterr().out


def test_losses_that_differ_are_told():
    first = {"losses": [10.8, 10.7, 10.6]}
    assert ladder.agrees({"losses": [10.81, 10.7, 10.6]}, [{"status": "skipped"}, first]) is True
    assert ladder.agrees({"losses": [10.8, 10.7, 10.0]}, [first]) is False
    assert ladder.agrees(first, []) is None


@pytest.mark.parametrize(
    ("name", "why"), [("graph", "cpu has no CUDA graphs"), ("tf32", "cpu has no TF32"), ("fp32", None)]
)
def test_what_makes_no_sense_here_is_a_row_that_says_why(name, why, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert rungs.refusal(rungs.RUNGS[name], CPU) == why


def test_rungs_that_compile_together_are_timed_one_by_one(tmp_path):
    """The lock has one holder at a time, and is free again afterwards."""
    inside, most = [], []

    def take(i):
        with ladder.turn(str(tmp_path / "lock")):
            inside.append(i)
            most.append(len(inside))
            time.sleep(0.02)
            inside.remove(i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(take, range(4)))
    assert most == [1, 1, 1, 1]
    with ladder.turn(None):
        pass


def test_what_compiles_beforehand_may_find_no_memory():
    class Step:
        def __init__(self):
            self.model, self.optimizer = SimpleNamespace(config=rungs.SIZES["nano"]), self
            self.cleared = False

        def rehearse(self, batch):
            raise torch.OutOfMemoryError

        def zero_grad(self, set_to_none):
            self.cleared = set_to_none

    step = Step()
    ladder.compile_beforehand(step, 1, 16, CPU)
    assert step.cleared


def test_jobs_run_together_and_rows_keep_their_order(tmp_path, monkeypatch, capsys):
    """The first rung ends last; each is told where the lock is, and the rows are in the order that was asked for."""
    release, locks = threading.Event(), []

    def apart(function, job, *, limit):
        assert function is ladder.measure
        locks.append(job.lock)
        assert release.wait(20) if job.rung == "fp32" else release.set() or True
        return {"status": "skipped", "why": job.rung}

    monkeypatch.setattr(harness, "apart", apart)
    rows = ladder.climb(replace(TINY, rungs=("fp32", "bf16"), jobs=2, file=tmp_path / "rows.jsonl"))
    assert [row["why"] for row in rows] == ["fp32", "bf16"]
    assert len(set(locks)) == 1
    assert locks[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "--steps is 0: it must be at least 1"),
        ({"seconds": float("nan")}, "--seconds is nan: it must be at least 0"),
        ({"rungs": ("fp33",)}, "--rungs fp33: there are fp32, allocator, "),
    ],
)
def test_ladder_refuses_nonsense(settings, said):
    with pytest.raises(UserError, match=said):
        ladder.climb(replace(TINY, **settings))
