"""The search finds the largest batch whatever ends a try; rows say what a configuration reached, and its price."""

import argparse
import json
import re

import pytest
import torch

from benchmarks import harness, scale
from benchmarks.scale import Configuration
from gpt2fast.errors import UserError
from gpt2fast.model import GPTConfig

CPU = torch.device("cpu")


def searched(limit, most, path):
    tried = []
    scale.search(lambda B: tried.append(B) or limit >= B, path, most)
    return tried


@pytest.mark.parametrize(
    ("limit", "most", "tried"),
    [
        (13, 1024, [1, 2, 4, 8, 16, 12, 14, 13]),  # doubling, then bisection
        (0, 1024, [1]),
        (1024, 1024, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]),  # no further than it may
        (9, 6, [1, 2, 4, 6]),
        (1, 1, [1]),
    ],
)
def test_the_largest_batch_is_searched(limit, most, tried, tmp_path):
    path = tmp_path / "tries"
    assert searched(limit, most, path) == tried
    assert scale.bounds(scale.rows_of(path), most) == (min(limit, most), min(limit, most) + 1)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 40, 63])
def test_a_search_goes_on_from_what_is_known(limit, tmp_path):
    """A process that dies in a try leaves one without an outcome: it did not fit."""
    path, deaths = tmp_path / "tries", 0

    def fits(B):
        if limit < B:
            raise SystemExit("killed")
        return True

    while True:
        try:
            scale.search(fits, path, 64)
            break
        except SystemExit:
            deaths += 1
            assert deaths < 10
    assert scale.bounds(scale.rows_of(path), 64) == (limit, limit + 1)
    assert deaths >= 1
    assert searched(limit, 64, path) == []  # all is known


def test_no_memory_is_no_fit_and_leaves_none_behind():
    class Step:
        def __init__(self):
            self.model, self.optimizer, self.cleared = argparse.Namespace(config=scale.SIZES["nano"]), self, 0

        def __call__(self, batches, lr):
            if next(batches)[0].shape[0] > 2:
                raise torch.OutOfMemoryError

        def zero_grad(self, set_to_none):
            self.cleared += set_to_none

    step = Step()
    assert [scale.fits(step, B, 8, CPU) for B in (2, 3, 1)] == [True, False, True]
    assert step.cleared == 3


def test_what_matters_most_comes_first():
    found = scale.configurations(["gpt2", "gpt2-xl"], (1024, 512), both=True)
    assert [(c.size, c.T, c.recompute) for c in found] == [
        ("gpt2", 1024, False), ("gpt2-xl", 1024, False), ("gpt2", 1024, True), ("gpt2-xl", 1024, True),
        ("gpt2", 512, False), ("gpt2-xl", 512, False), ("gpt2", 512, True), ("gpt2-xl", 512, True),
    ]  # fmt: skip
    assert len(scale.configurations(["gpt2"], (1024, 512), both=False)) == 2


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        size=["nano"], lengths=[32], tokens=64, max_batch=2, plain=False, steps=3, seconds=0.1, limit=100.0,
        budget=1000.0, repetitions=1,
    )  # fmt: skip


NANO = Configuration("nano", 32, recompute=False)
OK = {"status": "ok", "B": 2, "largest_batch": 2, "searched_to": 2, "tokens_per_s": {"median": 1000.0},
      "ms": {"median": 64.0}, "peak_memory": 10**9, "floor_share": 0.5, "mfu": None}  # fmt: skip


def workers(monkeypatch, *behaviours):
    """Processes that write these tries and this row, one after the other, and end so."""
    left = list(behaviours)

    def run_apart(module, *arguments, limit, log):
        assert module == "benchmarks.scale"
        tries, out = arguments[-2:]
        made, row, status = left.pop(0)
        for one in made:
            harness.append_row(tries, one)
        if row:
            out.write_text(json.dumps(row))
        return {"status": status, "seconds": 1.0, "tail": "Killed\n"}

    monkeypatch.setattr(harness, "run_apart", run_apart)
    return left


def test_a_try_that_ends_its_process_is_not_the_end(monkeypatch, options):
    tries = [{"B": 1}, {"B": 1, "fits": True}, {"B": 2}]
    left = workers(monkeypatch, (tries, None, "failed"), ([], OK, "ok"))
    row = scale.apart(NANO, options, CPU, float("inf"))
    assert (row["status"], row["largest_batch"]) == ("ok", 2)
    assert not left


@pytest.mark.parametrize(
    "behaviour",
    [
        ([], None, "failed"),  # it never came to a try
        ([{"B": 1}, {"B": 1, "fits": True}], None, "failed"),  # it died when it measured
        ([{"B": 1}], None, "timeout"),
    ],
)
def test_what_would_only_happen_again_is_not_repeated(behaviour, monkeypatch, options):
    workers(monkeypatch, behaviour)
    row = scale.apart(NANO, options, CPU, float("inf"))
    assert row["status"] == behaviour[2]
    assert scale.outcome(row) == f"{behaviour[2]}: Killed"


def test_no_process_is_begun_without_time(monkeypatch, options):
    workers(monkeypatch)
    row = scale.apart(NANO, options, CPU, end=0.0)
    assert (row["status"], scale.outcome(row)) == ("skipped", "skipped: no time left")


def test_every_configuration_is_a_row_and_the_price_is_told(monkeypatch, options, tmp_path, capsys):
    slower = OK | {"ms": {"median": 80.0}, "peak_memory": 4 * 10**8, "largest_batch": 1}
    workers(monkeypatch, ([], OK, "ok"), ([], slower, "ok"))
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--lengths", "32", "--tokens", "64", "--file", str(path)]
    assert scale.main(arguments) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["suite"], row["size"], row["recompute"]) for row in rows] == [
        ("scale", "nano", False), ("scale", "nano", True),
    ]  # fmt: skip
    assert {"torch", "commit"} <= set(rows[0]["machine"])
    said = capsys.readouterr().out
    assert re.search(r"^nano, T 32 +2 +1,000 +64\.0 +1\.00 +2\+ +50\.0% +unknown$", said, re.MULTILINE)
    assert "checkpointing, nano, B 2, T 32: 1.25 x the time, 0.40 x the memory" in said


def test_a_failure_is_an_exit_code(monkeypatch, tmp_path, capsys):
    workers(monkeypatch, ([], None, "failed"))
    assert scale.main(["--device", "cpu", "--plain", "--file", str(tmp_path / "rows.jsonl")]) == 1
    assert "failed: Killed" in capsys.readouterr().out


def test_repetitions_count_by_their_middle():
    rows = [OK | {"size": "nano", "T": 32, "recompute": False, "ms": {"median": ms}} for ms in (3.0, 1.0, 2.0)]
    failed = {"size": "nano", "T": 32, "recompute": False, "status": "failed"}
    assert [row["ms"]["median"] for row in scale.medians([*rows, failed])] == [2.0]
    assert scale.medians([failed]) == [failed]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_configuration_is_measured(recompute, options, tmp_path, monkeypatch):
    """The real thing, in this process."""
    monkeypatch.setitem(scale.SIZES, "nano", GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300))
    monkeypatch.setattr(scale, "ceilings", lambda device: scale.floor.Ceilings(1.0, 0.01))
    tries = tmp_path / "tries"
    row = scale.measure(Configuration("nano", 32, recompute), tries, options, CPU)
    assert (row["status"], row["B"], row["largest_batch"]) == ("ok", 2, 2)
    assert [one["B"] for one in scale.rows_of(tries)] == [1, 1, 2, 2]
    assert row["tokens_per_s"]["median"] == pytest.approx(64e3 / row["ms"]["median"], rel=0.2)
    assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["ms"]["median"])
    assert row["floor_ms"] > 0


def test_on_a_gpu_without_triton_it_refuses_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(scale.ops, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the triton backend needs the package triton"):
        scale.main(["--file", str(tmp_path / "rows.jsonl")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--tokens", "0"], "--tokens is 0: it must be more than 0"), (["--lengths", "0"], "--lengths 0: it must be at")],
)
def test_nonsense_is_refused_in_one_line(arguments, said):
    with pytest.raises(UserError, match=said):
        scale.main(["--device", "cpu", *arguments])
