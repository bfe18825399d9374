"""The ahead-of-time gate: every launch at GPT-2's shapes, compiled for six architectures, must not break a rule."""

import json
import re

import pytest
import torch

from benchmarks import aot, harness, report
from gpt2fast.errors import UserError

ROWS = [json.loads(line) for line in (aot.harness.RESULTS / "aot.jsonl").read_text().splitlines()]
VERSIONS = sorted({row["triton"] for row in ROWS})
GOOD = {
    "arch": 90, "spilled": 0, "shared": 200 << 10, "plain_dots": 0, "tensor_cores": True, "kernel": "_toy_kernel",
    "case": "toy", "instructions": dict.fromkeys(aot.TENSOR_CORES, 1),
}  # fmt: skip
SHAPE = {"num_warps": 4, "num_stages": 3, "triton": aot.triton.__version__}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"arch": 86}, "needs 204800 bytes of shared memory, and a block gets 101376"),
        ({"plain_dots": 1}, r"does not use the tensor cores \(1 tl.dot without\)"),
        ({"instructions": dict.fromkeys(aot.TENSOR_CORES, 0)}, "does not use the tensor cores"),
        ({"tensor_cores": False, "plain_dots": 3}, None),
        ({"error": "ptxas died"}, "ptxas died"),
    ],
    ids=str,
)
def test_the_rules(change, fault):
    found = aot.faults(GOOD | change)
    assert [bool(re.search(fault or "^$", text)) for text in found] == ([True] if fault else [])


def covered(rows):
    return {(row["case"], row["arch"]) for row in rows}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_table_is_complete_and_breaks_no_rule(version):
    rows = [row for row in ROWS if row["triton"] == version]
    assert {(row["case"], row["arch"]) for row in rows} == {
        (case, arch) for case in aot.CASES for arch in aot.MAX_SHARED
    }
    assert [(row["kernel"], row["case"], row["arch"], aot.faults(row)) for row in rows if aot.faults(row)] == []


def test_the_results_show_the_table_that_the_rows_give():
    page = (aot.harness.ROOT / report.DOCUMENT).read_text()
    assert report.fill(page, "aot", report.aot_table(ROWS)) == page


def test_attention_uses_each_architectures_tensor_cores():
    units = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
    rows = [row for row in ROWS if row["case"] == "124M attention bf16"]
    assert {(row["arch"], *row["ptx_mma"]) for row in rows} == set(units.items())


@pytest.mark.long
def test_what_this_triton_makes_of_the_kernels_as_they_are_now(run_module, tmp_path):
    cases = [case for case in aot.CASES if case.startswith("124M")]
    architectures = [90, 100]  # a minute each; the table has all of them
    options = ["--case", *cases, "--arch", *architectures, "--out", tmp_path / "aot.jsonl"]
    done = run_module("benchmarks.aot", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "aot.jsonl").read_text().splitlines()]
    assert covered(rows) == {(case, arch) for case in cases for arch in architectures}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
def test_an_interpreted_process_is_told_that_it_cannot_compile(monkeypatch):
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", True)
    with (
        pytest.raises(UserError, match="TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it"),
        aot.compiling_for(90),
    ):
        pass


def test_what_does_not_exist_is_refused():
    with pytest.raises(UserError, match="--case '124M banana': there are '124M attention bf16', "):
        aot.run(aot.AotConfig(case=("124M banana",)))
    with pytest.raises(UserError, match="--arch 70: there are 80, 86, 89, 90, 100, 120"):
        aot.run(aot.AotConfig(arch=(70,)))


def test_a_compiler_that_dies_costs_one_case(monkeypatch, capsys, tmp_path):
    """The process dies at the second of three cases; another one compiles the third."""
    asked = []

    def apart(function, job, *, limit, environment):
        assert (function, environment) == (aot.compile_here, {"TRITON_INTERPRET": "0"})
        asked.append(job.cases)
        harness.append_row(job.out, {"rows": [GOOD | {"case": job.cases[0], "registers": 1, "ptx_mma": []} | SHAPE]})
        return {"status": "failed", "tail": "Segmentation fault"} if len(job.cases) > 1 else {"status": "ok"}

    monkeypatch.setattr(harness, "apart", apart)
    monkeypatch.setattr(aot, "CASES", dict.fromkeys("abc"))
    assert aot.run(aot.AotConfig(arch=(90,), out=tmp_path / "aot.jsonl")) == 1
    assert asked == [("a", "b", "c"), ("c",)]
    rows = [json.loads(line) for line in (tmp_path / "aot.jsonl").read_text().splitlines()]
    assert {row["case"]: row.get("error") for row in rows} == {
        "a": None, "b": "the process that compiled it failed: Segmentation fault", "c": None,
    }  # fmt: skip
    assert "FAULT: the process that compiled it failed" in capsys.readouterr().out
