"""Launch settings are replaced, judged, timed and compared; what is timed here is a list of numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, kernels, settings, tune
from benchmarks.settings import Kernel, PerProcessor
from benchmarks.tune import TuneConfig
from gpt2fast.errors import UserError
from gpt2fast.kernels import launch

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the interpreter")
KERNEL = Kernel("elementwise_rows", "bias_gelu", "both", [launch.Rows(8, 64, 1), launch.Rows(16, 64, 1)])


@pytest.fixture(scope="module")
def cases():
    return settings.cases(32, 16, "nano", CPU)


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds that the next calls take; each is made once, since it must run."""
    times: list[float] = []
    monkeypatch.setattr(kernels, "time_ms", lambda call, device: (call(), {"median": times.pop(0)})[1])
    return times


@pytest.fixture
def options(tmp_path):
    return TuneConfig(file=tmp_path / "rows.jsonl", budget=100.0, jobs=0, tokens=32, seq_len=16, size="nano")


def rows_of(options):
    return [json.loads(line) for line in options.file.read_text().splitlines()]


def test_the_fastest_right_setting_is_found_and_named_with_its_line(clock, options, capsys):
    clock += [2.0, 3.0, 1.0]
    assert tune.tune_all([KERNEL], options, CPU) == 0
    rows = rows_of(options)
    assert [(row["settings"], row["ms"], row["default"], row["best"]) for row in rows] == [
        (repr(launch.elementwise_rows()), 2.0, True, False),
        (repr(KERNEL.values[0]), 3.0, False, False),
        (repr(KERNEL.values[1]), 1.0, False, True),
    ]
    said = capsys.readouterr().out.splitlines()[-1]
    lines = Path(launch.__file__).read_text().splitlines()
    number = lines.index("def elementwise_rows() -> Rows:") + 1
    assert said.startswith(f"kernels/launch.py:{number} elementwise_rows: Rows(")
    assert said.endswith("-> Rows(BLOCK_M=16, BLOCK_N=64, num_warps=1) (1.0000 ms, 2.0000 before)")


def test_noise_changes_nothing(clock, options, capsys):
    clock += [2.0, 3.0, 1.99]
    tune.tune_all([KERNEL], options, CPU)
    assert capsys.readouterr().out.splitlines()[-1] == "nothing in launch.py would change"


def test_a_setting_with_wrong_results_is_not_timed(clock, options, cases):
    """AdamW's norm walks the chunks that the update was promised: of another length they are others."""
    clock += [2.0]
    wrong = Kernel("adamw_chunk", "adamw", "forward", [launch.Chunk(2**14, 2**13, 4)], {"norm": True})
    first, second = tune.tune(wrong, cases["adamw"], {}, CPU, float("inf"))
    assert first["status"] == "ok"
    assert "result 0 is wrong by" in second["status"]
    assert "ms" not in second


def test_a_setting_that_does_not_compile_costs_its_own_row_only(clock, options):
    clock += [2.0, 1.0]
    kernel = Kernel("elementwise_rows", "bias_gelu", "both", [launch.Rows(7, 64, 1), launch.Rows(16, 64, 1)])
    assert tune.tune_all([kernel], options, CPU) == 0
    rows = rows_of(options)
    assert [row["status"] == "ok" for row in rows] == [True, False, True]
    assert "power of 2" in rows[1]["status"]
    assert rows[2]["best"]


def test_what_failed_elsewhere_and_what_has_no_time_left_is_not_tried(clock, cases):
    clock += [2.0]
    bad = {("elementwise_rows", repr(KERNEL.values[0])): "killed"}
    rows = list(tune.tune(KERNEL, cases["bias_gelu"], bad, CPU, end=0.0))
    assert [row["status"] for row in rows] == ["ok", "killed", "no time left"]
    assert all("elementwise_rows" in tune.describe(row) for row in rows)


def test_what_this_shape_does_not_use_is_no_failure(options, capsys):
    """Attention's backward is one kernel or two; the settings of the other way have nothing to be judged by."""
    idle = Kernel("attention_dq", "bias_gelu", "both", KERNEL.values)
    assert tune.tune_all([idle], options, CPU) == 0
    assert [row["status"] for row in rows_of(options)] == [tune.UNUSED]
    assert capsys.readouterr().out.splitlines()[-1] == "nothing in launch.py would change"


def test_a_default_that_fails_is_told(options, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(tune, "ready", fail)
    assert tune.tune_all([KERNEL], options, CPU) == 1
    assert [row["status"] for row in rows_of(options)] == ["RuntimeError: no such kernel"]


TINY = {
    "attention_forward": launch.Tiles(16, 16, 4, 1), "attention_dkdv": launch.Tiles(16, 16, 4, 1),
    "attention_dq": launch.Tiles(16, 16, 4, 1), "attention_backward": launch.Tiles(16, 16, 4, 1),
    "attention_one_pass": False, "cross_entropy_block": (2**15, 4), "persistent": PerProcessor(1),
    "elementwise_rows": launch.Rows(16, 256, 4), "matmul_tiles": launch.MatmulTiles(32, 64, 32, 2, 4, 2),
    "MATMUL_PROGRAMS": 1, "head_budget": 2**21, "LAYER_NORM_STAGES": 1,
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("title", [title for title, kernel in settings.tunables().items() if kernel.name in TINY])
def test_each_op_runs_with_another_setting(title, clock, cases, monkeypatch):
    """The setting is used (the default's label differs), and the results stay right."""
    if title in ("attention_dkdv", "attention_dq"):  # the two kernels that one pass replaces
        monkeypatch.setattr(launch, "attention_one_pass", lambda *_: False)
    clock += [2.0, 1.0]
    found = settings.tunables()[title]
    kernel = Kernel(found.name, found.op, found.direction, [TINY[found.name]], found.when)
    standing, other = tune.tune(kernel, cases[kernel.op], {}, CPU, float("inf"))
    assert (standing["status"], other["status"]) == ("ok", "ok")
    assert standing["settings"] != other["settings"] == repr(TINY[found.name])
    assert not clock


def test_a_process_that_compiles_is_replaced_after_a_crash(monkeypatch, options):
    """The first dies at the second setting; the next one finds a setting that does not compile."""
    shares = []

    def apart(function, job, *, limit, environment):
        assert (function, job.size, job.seq_len, limit) == (tune.compile_here, "nano", 16, pytest.approx(50, abs=1))
        shares.append(len(job.wanted))
        row = {"kernel": KERNEL.title, "status": "ok"}
        harness.append_row(job.out, row)
        if len(shares) == 1:
            return {"status": "failed"}
        harness.append_row(job.out, row | {"status": "CompilationError: no"})
        return {"status": "ok"}

    monkeypatch.setattr(harness, "apart", apart)
    kernel = replace(KERNEL, values=["1", "2", "3", "4"])
    bad = tune.compile_all([kernel], replace(options, jobs=1))
    assert bad == {
        (KERNEL.title, "'2'"): "the process that tried it: failed", (KERNEL.title, "'4'"): "CompilationError: no",
    }  # fmt: skip
    assert shares == [4, 2]


def test_what_such_a_process_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "tunables", lambda size: {"elementwise_rows": KERNEL})
    monkeypatch.setattr(tune, "COMPILE_TOKENS", 32)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    wanted = (("elementwise_rows", repr(KERNEL.values[1])),)
    tune.compile_here(tune.Job(wanted=wanted, out=tmp_path / "rows", size="nano", seq_len=16, device="cpu"))
    row = json.loads((tmp_path / "rows").read_text())
    assert (row["kernel"], row["settings"], row["status"]) == ("elementwise_rows", repr(KERNEL.values[1]), "ok")


def test_without_a_gpu_it_says_so(run_module):
    done = run_module("benchmarks.tune")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: benchmarks.tune needs a CUDA GPU")


def test_unknown_kernels_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--kernel attn: there are LAYER_NORM_STAGES, MATMUL_PROGRAMS"):
        tune.run(TuneConfig(kernel=("attn",)))


def test_kernels_can_be_chosen_by_op(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "tune_all", lambda kernels, c, device: chosen.extend(k.name for k in kernels) or 0)
    tune.run(TuneConfig(kernel=("attention",)))
    assert set(chosen) == {
        "attention_forward", "attention_one_pass", "attention_backward", "attention_dkdv", "attention_dq",
    }  # fmt: skip
