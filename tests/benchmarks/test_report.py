"""Tables and pictures say what the raw rows say: the newest rows, all of them, and what was not measured."""

import pytest

from benchmarks import harness, plots, report
from gpt2fast.errors import UserError
from tests.tools.rows import H200, MACHINE, cells, copy_whole, peer, profile, rung, tables, write


def test_the_repositorys_tables_and_pictures_are_what_its_rows_say():
    assert report.update(harness.ROOT, check=True) == []


def test_peers_are_medians_of_repetitions_beside_the_best_opponent(tmp_path):
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_peers.jsonl",
          *(peer("textbook eager", speed, i) for i, speed in enumerate((100, 300, 200))),
          *(peer("torch eager", speed, i) for i, speed in enumerate((700, 500, 600))),
          peer("liger eager", 1, status="skipped", why="needs a GPU"))  # fmt: skip
    table = tables(tmp_path)["peers"]
    assert "nano, B=8, T=128, bf16 on Some Processor, 2 threads" in table
    assert "commit aaaaaaa" in table
    assert "Not measured on a GPU yet: no row exists." in table
    found = cells(table)
    assert found["textbook eager"][0] == "200 (100 to 300)"
    assert found["torch eager"][0] == "600 (500 to 700)"
    assert (found["textbook eager"][-1], found["torch eager"][-1]) == ("1.00", "3.00")
    assert found["liger eager"][0] == "skipped: needs a GPU"
    assert list(found)[2] == "torch eager"  # the fastest first, below the head and its line


def test_losses_that_differ_are_said_beside_the_speed(tmp_path):
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_peers.jsonl", peer("torch eager", 10, agrees=False))
    assert "losses differ" in tables(tmp_path)["peers"]


def test_a_ladder_is_beside_its_first_rung(tmp_path):
    rungs = [
        rung("fp32", 100),
        rung("compile", 250),
        rung("triton", 1, status="failed", tail="Traceback\nout of memory\n"),
    ]
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_ladder.jsonl", *rungs)
    found = cells(tables(tmp_path)["ladder"])
    assert found["fp32, eager"] == ["100 (90.0 to 110)", "10,000", "2.00", "unknown", "1.00"]
    assert found["+ torch.compile"] == ["250 (225 to 275)", "4,000", "2.00", "unknown", "2.50"]
    assert found["+ our kernels"][0] == "failed: out of memory"


def test_ranks_are_those_measured_last_whatever_their_commit(tmp_path):
    row = {"suite": "ranks", "status": "ok", "backend": "torch", "numbers": 22, "in_units_of_fp32": 1.0}
    for commit, hour, speed in (("bbbbbbb", 10, 1_000), ("aaaaaaa", 11, 2_000)):
        machine = MACHINE | {"date": f"2026-11-26T{hour}:00:00+00:00"}
        for processes in (1, 2):
            more = {"processes": processes, "largest_relative_difference": 1e-7, "tokens_per_s": speed * processes}
            write(tmp_path, "cpu", f"2026-11-26_{commit}_ranks.jsonl", row | more | {"machine": machine})
    made = tables(tmp_path)["ranks"]
    assert "**torch on " in made
    assert "| 2 | 22 | 1.0e-07 | 1.0 | 4,000 |" in made
    assert "| 1,000 |" not in made


@pytest.fixture
def checkout(tmp_path):
    """A page with a place for every table, and rows of a GPU."""
    results = tmp_path / "benchmarks" / "results"
    write(results, "nvidia-h200", "2026-11-21_aaaaaaa_gpu.jsonl", profile("torch"), profile("triton"),
          rung("fp32", 100_000, machine=H200), rung("triton", 500_000, machine=H200),
          peer("textbook eager", 400_000, machine=H200), peer("torch compiled", 600_000, machine=H200))  # fmt: skip
    copy_whole(results)
    places = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in report.tables(results))
    (tmp_path / "docs").mkdir()
    (tmp_path / report.DOCUMENT).write_text(places)
    return tmp_path


def test_what_is_stale_is_named_and_then_made(checkout):
    stale = report.update(checkout, check=True)
    assert len([what for what in stale if what.endswith(".png")]) == len(plots.TITLES)
    assert not (checkout / "benchmarks" / "plots").exists()  # a check writes nothing
    assert report.update(checkout, check=False) == stale
    assert report.update(checkout, check=True) == []
    before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*.png")}
    assert len(before) == len(plots.TITLES)
    assert all(path.stat().st_size < 150_000 for path in before)
    report.update(checkout, check=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # those that are right are not written again
    rows_file = next(checkout.rglob("*_gpu.jsonl"))
    harness.append_row(rows_file, peer("torch compiled", 700_000, machine=H200))
    assert report.update(checkout, check=True) == ["docs/results.md, table peers", "benchmarks/plots/peers.png"]
    assert report.update(checkout, check=False) == ["docs/results.md, table peers", "benchmarks/plots/peers.png"]
    page = checkout / report.DOCUMENT
    page.write_text(page.read_text().replace("400,000", "399,000"))
    (checkout / "benchmarks" / "plots" / "ladder.png").write_bytes(b"not a picture")
    assert report.update(checkout, check=True) == ["docs/results.md, table peers", "benchmarks/plots/ladder.png"]


def test_a_page_without_a_place_is_refused(checkout):
    (checkout / report.DOCUMENT).write_text("nothing")
    with pytest.raises(UserError, match="put the markers back"):
        report.update(checkout, check=True)


def test_a_kernel_that_some_architectures_lack_has_a_line_below_the_others():
    row = {"triton": "3.9.0", "case": "124M attention bf16", "num_warps": 8, "shared": 2048}
    rows = [row | {"kernel": "_a_kernel", "arch": arch, "registers": arch} for arch in report.ARCHITECTURES]
    rows += [row | {"kernel": "_b_kernel", "arch": 90, "registers": 7}]
    *_, a, b = report.aot_table(rows).splitlines()
    assert a == "| `_a_kernel`, 8 warps | " + " | ".join(f"{arch}, 2 KiB" for arch in report.ARCHITECTURES) + " |"
    assert b == "| `_b_kernel`, 8 warps | - | - | - | 7, 2 KiB | - | - |"
