"""The launches that are compiled ahead of time: no kernel is left out."""

import json
import re

from benchmarks import aot_cases, harness


def test_the_table_holds_every_kernel():
    rows = [json.loads(line) for line in (harness.RESULTS / "aot.jsonl").read_text().splitlines()]
    kernels = {
        name
        for path in (harness.ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert {row["kernel"] for row in rows} == kernels - {"_square_kernel", "_loop_kernel"}  # the interpreter's probes
    assert {row["case"] for row in rows} == set(aot_cases.CASES)
