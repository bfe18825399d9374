"""tests.long.options: the runs that it plans, and the verdicts on their losses."""

import json

import pytest
import torch

from gpt2fast.errors import UserError
from gpt2fast.ops import NAMES
from tests.long import options
from tests.long.options import OPTIONS, SEEDS, WINDOW, Job, apart, main, plan, settings, verdicts, windows

pytestmark = pytest.mark.long

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def row(option: str, losses: list[float], seed: int = 1, precision: str = "bf16", status: str = "ok") -> dict:
    return {"option": option, "seed": seed, "precision": precision, "losses": losses, "status": status, "seconds": 1.0}


REFERENCE = [row("torch", [4.0 + 0.1 * seed] * 2 * WINDOW, seed) for seed in range(1, 5)]


def test_windows_are_means_and_the_last_may_be_short():
    assert windows([1.0] * WINDOW + [2.0, 4.0]) == [1.0, 3.0]


@pytest.mark.parametrize(("step", "share"), [(0.0, 0.0), (0.15, 0.5), (-0.45, 1.5)])
def test_an_option_is_judged_by_the_window_with_the_largest_difference(step, share):
    ours = [4.1] * WINDOW + [4.1 + step] * WINDOW
    (found,) = verdicts([*REFERENCE, row("residual", ours)])
    assert found["option"] == "residual"
    assert found["nats"] == pytest.approx(abs(step))
    assert found["share"] == pytest.approx(share)
    assert ("TOO FAR" in options.table([found])) == (share > 1)


def test_an_option_is_compared_with_its_own_seed_and_precision():
    others = [row("torch", [9.0 + seed] * 2 * WINDOW, seed, "fp32") for seed in range(1, 5)]
    found = verdicts([*REFERENCE, *others, row("mlp", [10.5] * 2 * WINDOW, 1, "fp32")])
    assert [(f["precision"], f["nats"], f["share"]) for f in found] == [
        ("fp32", pytest.approx(0.5), pytest.approx(1 / 6))
    ]


def test_without_a_gpu_triton_options_are_interpreted_in_fp32_and_start_first():
    runs = plan(list(OPTIONS), CPU)
    assert {name for name, *_ in runs} == {*OPTIONS, "torch"} - {"cuda graph"}
    interpreted = [r for r in runs if r[3]]
    assert runs[: len(interpreted)] == interpreted
    assert {name for name, *_ in interpreted} == {*NAMES, "epilogue", "optimizer", "all ours"}
    assert {kind for _, _, kind, _ in interpreted} == {"fp32"}
    assert sum(name == "torch" for name, *_ in runs) == 2 * len(SEEDS)


def test_on_a_gpu_all_options_run_in_bf16():
    runs = plan(list(OPTIONS), CUDA)
    assert {name for name, *_ in runs} == {*OPTIONS, "torch"}
    assert {(kind, interpreted) for *_, kind, interpreted in runs} == {("bf16", False)}


def job(option: str, seed: int = 1) -> Job:
    return Job(option, seed, "bf16", "cpu", steps=2, batch_size=2)


def test_every_option_changes_the_settings(tmp_path):
    plain = settings(job("torch"), tmp_path)
    assert (plain.backend, plain.optimizer, plain.residual, plain.recompute) == ("torch", "torch", "fp32", False)
    for name in OPTIONS:
        changed = settings(job(name), tmp_path)
        assert changed != plain, name
        assert changed.total_batch == plain.total_batch, name


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_exit_code_is_1_if_an_option_does_not_learn_alike(shift, tmp_path, capsys):
    def do(job, interpret):
        losses = [4 + 0.1 * job.seed + (shift if job.option == "residual" else 0)] * WINDOW
        return row(job.option, losses, job.seed, job.precision)

    file = tmp_path / "rows.jsonl"
    code = main(["--device", "cpu", "--option", "residual", "mlp", "--file", str(file)], do)
    assert code == (shift > 0)
    assert ("TOO FAR" in capsys.readouterr().out) == (shift > 0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2 + 2 * len(SEEDS)
    assert {r["suite"] for r in rows} == {"options"}
    assert all(r["machine"] for r in rows)


def test_the_exit_code_is_1_if_a_run_fails(tmp_path):
    def do(job, interpret):
        status = "failed" if job.option == "residual" else "ok"
        return row(job.option, [], job.seed, job.precision, status) | {"tail": "no"}

    assert main(["--device", "cpu", "--option", "residual", "--file", str(tmp_path / "rows")], do) == 1


def test_an_unknown_option_is_refused():
    with pytest.raises(UserError, match="--option speed: there are embedding"):
        main(["--device", "cpu", "--option", "speed"])


@pytest.mark.parametrize("flag", ["--steps", "--batch-size", "--jobs"])
def test_a_number_below_one_is_refused(flag):
    with pytest.raises(UserError, match=f"{flag} is 0: it must be at least 1"):
        main(["--device", "cpu", flag, "0"])


def test_a_run_is_a_process_and_reports_what_went_wrong():
    good, bad = apart(job("residual"), False), apart(job("cuda graph"), False)
    assert good["status"] == "ok"
    assert len(good["losses"]) == 2
    assert bad["status"] == "failed"
    assert "--cuda-graph needs a CUDA GPU" in bad["tail"]
