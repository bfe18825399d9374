"""Measurements: rows are whole, whatever crashes or hangs; what needs a GPU runs small on a CPU here."""

import argparse
import itertools
import json
import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, harness, kernels, ladder, sanitize, step_profile
from gpt2fast.errors import UserError

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


TINY = ["--size", "nano", "--batch-size", "1", "--seq-len", "16", "--steps", "3", "--warmup", "3", "--device", "cpu"]


@pytest.mark.slow
def test_ladder_end_to_end(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert ladder.main([*TINY, "--rungs", "fp32", "tf32", "bf16", "triton", "--file", str(path)]) == 0
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
    monkeypatch.setattr(harness, "run_apart", lambda *args, **options: next(results))
    path = tmp_path / "rows.jsonl"
    assert ladder.main([*TINY, "--rungs", "fp32", "bf16", "--file", str(path)]) == 1
    assert [json.loads(line)["status"] for line in path.read_text().splitlines()] == ["failed", "timeout"]
    assert "failed: CUDA out of memory" in capsys.readouterr().out


def test_rungs_after_the_budget_are_skipped_aloud(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    ladder.main([*TINY, "--rungs", "fp32", "--budget", "1", "--file", str(path)])
    assert "1 s for all rungs are over" in capsys.readouterr().out


def test_losses_that_differ_are_told():
    first = {"losses": [10.8, 10.7, 10.6]}
    assert ladder.agrees({"losses": [10.81, 10.7, 10.6]}, [{"status": "skipped"}, first]) is True
    assert ladder.agrees({"losses": [10.8, 10.7, 10.0]}, [first]) is False
    assert ladder.agrees(first, []) is None


def test_each_rung_adds_one_thing():
    rungs = list(ladder.CLIMB.values())
    for a, b in itertools.pairwise(rungs):
        changed = [
            name
            for name in ("allocator", "precision", "tf32", "compile", "fused", "backend")
            if getattr(a, name) != getattr(b, name)
        ]
        assert len(changed) == 1


def test_ladder_refuses_nonsense():
    with pytest.raises(UserError, match="--steps is 0: it must be more than 0"):
        ladder.main(["--steps", "0"])


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
    measure = step_profile.measure
    monkeypatch.setattr(step_profile, "measure", lambda *args, compile: measure(*args, compile=False, steps=1))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu.profiles(options(tmp_path), CPU)
    torch_row, triton_row = rows_of(tmp_path)
    assert sum(torch_row["groups"].values()) == pytest.approx(torch_row["device_ms"])
    assert {"matmul", "attention", "optimizer", "layer norm", "gelu", "cross-entropy"} <= set(torch_row["groups"])
    assert triton_row["status"] == "skipped"


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("triton_red_fused__to_copy_add_native_layer_norm_0", "layer norm"),
        ("void at::native::(anonymous namespace)::cuComputePartGradGammaBeta", "layer norm"),
        ("triton_poi_fused_gelu_gelu_backward_3", "gelu"),
        ("void cunn_SoftMaxBackward<4, float, float>", "cross-entropy"),
        ("triton_red_fused__log_softmax_nll_loss_forward_1", "cross-entropy"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::embedding_backward_feature_kernel", "embedding"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_poi_fused_add_7", "elementwise"),
        ("aten::baddbmm_", "matmul"),
        ("aten::dot", "optimizer"),
        ("gpt2fast_cpu::attention_bwd", "attention"),
        ("gpt2fast_cpu::linear_cross_entropy", "cross-entropy"),
        ("something_new", "other"),
    ],
)
def test_kernels_fall_into_groups(kernel, group):
    assert step_profile.group_of(kernel) == group


def test_the_longest_kernels_are_listed():
    row = step_profile.by_group({"gemm_a": 2.0, "gemm_b": 3.0, "x": 1.0}, top=2)
    assert row == {
        "device_ms": 6.0,
        "groups": {"matmul": 5.0, "other": 1.0},
        "kernels": [["gemm_b", 3.0], ["gemm_a", 2.0]],
    }


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
    assert [row["status"] for row in rows] == ["ok", "failed"] + ["ok"] * 7
    assert [name for name, _ in seen] == list(gpu.STAGES)
    assert all(limit <= 120 for _, limit in seen)
    assert [row["stage"] for row in rows_of(tmp_path)] == list(gpu.STAGES)
    assert "tests: failed: boom" in gpu.summary(tmp_path / "gpu.jsonl")
    assert [row["status"] for row in gpu.run_stages(options(tmp_path, budget=10.0), ["ladder"])] == ["no time left"]


@pytest.mark.slow
def test_a_stage_is_a_process_of_its_own(tmp_path, capsys):
    """The real thing at nano's size on the CPU: ladder through run_stages, rows of both in one file."""
    rows = gpu.run_stages(options(tmp_path, budget=200.0), ["ladder"])
    assert rows[0]["status"] == "ok", rows
    written = rows_of(tmp_path)
    assert [row["rung"] for row in written if row["suite"] == "ladder"] == list(ladder.CLIMB)
    assert "compile" in gpu.summary(tmp_path / "gpu.jsonl")


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


def test_the_tests_stage_runs_each_file_with_kernels_and_counts(tmp_path, monkeypatch, capsys):
    def run_apart(module, *args, limit, log):
        assert module == "pytest"
        assert "gpu or kernel" in args
        log.write_text(
            "1 failed, 3 passed in 1.2s" if args[-1].name == "test_gelu.py" else "2 passed, 1 skipped in 1.2s"
        )
        return {"status": "failed" if args[-1].name == "test_gelu.py" else "ok", "seconds": 1.0}

    monkeypatch.setattr(harness, "run_apart", run_apart)
    with pytest.raises(SystemExit):
        gpu.gpu_tests(options(tmp_path, limit=60.0), CPU)
    counts = {row["file"]: (row["passed"], row.get("failed", 0)) for row in rows_of(tmp_path)}
    assert counts["test_gelu.py"] == (3, 1)
    assert {"test_attention.py", "test_layer_norm.py", "test_cross_entropy.py", "test_kernels.py"} <= set(counts)
    assert "test_gelu.py" in gpu.summary(tmp_path / "gpu.jsonl")


def test_the_stages_of_kernels_swaps_and_sanitizer_hand_on_what_they_are_given(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(kernels, "main", lambda arguments: seen.append(arguments) or 0)
    monkeypatch.setattr(ladder, "main", lambda arguments: seen.append(arguments) or 0)
    monkeypatch.setattr(sanitize, "check_all", lambda limit, folder: [{"tool": "memcheck", "status": "ok"}])
    for stage in ("kernels", "swaps", "sanitize"):
        gpu.STAGES[stage](options(tmp_path, limit=60.0), CPU)
    kernel_arguments, ladder_arguments = seen
    assert kernels.parser().parse_args(kernel_arguments).file == tmp_path / "gpu.jsonl"
    assert ladder.parser().parse_args(ladder_arguments).rungs == ["fused", *ladder.SWAPS]
    assert rows_of(tmp_path)[-1]["tool"] == "memcheck"
