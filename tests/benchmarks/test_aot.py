"""The ahead-of-time gate: every launch at GPT-2's shapes, compiled for six architectures, must not break a rule."""

import json
import re

import pytest

from benchmarks import aot, report

ROWS = [json.loads(line) for line in (aot.harness.RESULTS / "aot.jsonl").read_text().splitlines()]
VERSIONS = sorted({row["triton"] for row in ROWS})
GOOD = {
    "arch": 90, "spilled": 0, "shared": 200 << 10, "plain_dots": 0, "tensor_cores": True, "kernel": "_toy_kernel",
    "case": "toy", "instructions": dict.fromkeys(aot.TENSOR_CORES, 1),
}  # fmt: skip


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


def test_the_table_holds_every_kernel():
    kernels = {
        name
        for path in (aot.harness.ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert {row["kernel"] for row in ROWS} == kernels - {"_square_kernel", "_loop_kernel"}  # the interpreter's probes


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


def test_an_interpreted_process_is_told_that_it_cannot_compile(run_module):
    done = run_module("benchmarks.aot", "--only", 90, "--case", "124M gelu", env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it" in done.stderr


def test_an_unknown_case_is_refused(run_module):
    done = run_module("benchmarks.aot", "--case", "124M banana")
    assert done.returncode == 2
    assert "--case '124M banana': there are '124M attention bf16', " in done.stderr
