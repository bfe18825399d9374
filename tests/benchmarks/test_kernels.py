"""Single kernels: verified before they are timed, against what must be moved and multiplied."""

import json

import pytest
import torch

from benchmarks import kernels

CPU = torch.device("cpu")


TINY_KERNELS = {case.op: case for case in kernels.cases(["nano"], 32, [16], CPU)}


@pytest.mark.long
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
    assert "result 0 is wrong by 1.0e-01, eager torch's by" in rows[2]["status"]
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


@pytest.mark.long
def test_kernels_end_to_end(run_module, tmp_path):
    done = run_module("benchmarks.kernels", "--op", "gelu", "--tokens", 64, "--file", tmp_path / "k.jsonl", check=True)
    assert "lengths" not in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    assert {(row["provider"], row["status"]) for row in rows} == {("eager", "ok"), ("compile", "ok")}
    assert all(row["ceilings"]["gb_per_s"] > 0 for row in rows)
    refused = run_module("benchmarks.kernels", "--tokens", 64, "--lengths", 128)
    assert "--lengths 128: it must be between 1 and --tokens 64" in refused.stderr
