"""README and plots say what the raw rows say: these rows, the newest, all of them, and what is missing."""

import pytest

from benchmarks import harness, plots, report, rows
from gpt2fast.errors import UserError
from tests.tools.rows import H200, MACHINE, cells, copy_whole, kernel, peer, profile, tables, write


def test_the_repositorys_readme_and_plots_are_what_its_rows_say():
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


def test_what_the_reproduction_takes_follows_from_our_fastest_step(tmp_path):
    gpt2 = {"size": "gpt2", "B": 64, "T": 1024, "precision": "bf16", "device": "cuda"}
    speeds = {"torch eager": 500_000, "torch compiled": 1e10 / 3600 / 5, "textbook eager": 900_000}
    found = [peer(name, speed, config=gpt2, machine=H200) for name, speed in speeds.items()]
    write(tmp_path, "nvidia-h200", "2026-11-21_aaaaaaa_gpu.jsonl", *found)
    line = cells(tables(tmp_path)["reproduce"])["NVIDIA H200"]
    assert line[1:] == ["5.00", "$5.00", "ours, torch compiled, B=64, T=1024, bf16"]
    unmeasured = "Ours on a GPU: not measured yet."
    assert unmeasured not in tables(tmp_path)["reproduce"]
    assert unmeasured in report.reproduce_table(tmp_path / "nothing")


def test_losses_that_differ_are_said_beside_the_speed(tmp_path):
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_peers.jsonl", peer("torch eager", 10, agrees=False))
    assert "losses differ" in tables(tmp_path)["peers"]


def test_kernels_are_ours_beside_the_best_opponent(tmp_path):
    found = [kernel("eager", 0.9), kernel("compile", 0.5), kernel("triton", 0.4), kernel("liger", 0.1, status="wrong")]
    write(tmp_path, "nvidia-h200", "2026-11-21_aaaaaaa_gpu.jsonl", *found)
    line = cells(tables(tmp_path)["kernels"])["`gelu`, forward + backward".strip("`")]
    assert line == ["0.400", "0.500 (compile)", "1.25", "62%"]
    wrong = kernel("triton", 0.1, status="result 0 is wrong by 1")
    write(tmp_path, "nvidia-h200", "2026-11-22_aaaaaaa_gpu.jsonl", kernel("eager", 0.9), wrong)
    assert "result 0 is wrong" in tables(tmp_path)["kernels"]


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


def test_rows_of_a_cpu_are_no_kernels_of_a_gpu(tmp_path):
    write(tmp_path, "cpu", "2026-11-21_aaaaaaa_kernels.jsonl", kernel("eager", 0.9, machine=MACHINE))
    assert tables(tmp_path)["kernels"] == rows.UNMEASURED.format("GPU")


@pytest.fixture
def checkout(tmp_path):
    """A README with all places, and rows of everything on a GPU."""
    results = tmp_path / "benchmarks" / "results"
    write(results, "nvidia-h200", "2026-11-21_aaaaaaa_gpu.jsonl", profile("torch"), profile("triton"),
          *(kernel(name, ms, way) for name, ms in (("eager", 0.9), ("triton", 0.4)) for way in ("forward", "both")),
          peer("textbook eager", 400_000, machine=H200), peer("torch compiled", 600_000, machine=H200))  # fmt: skip
    copy_whole(results)
    places = "\n".join(f"<!-- {name} -->\n<!-- /{name} -->" for name in report.tables(results))
    (tmp_path / "README.md").write_text(places)
    return tmp_path


def test_what_is_stale_is_named_and_then_made(checkout):
    stale = report.update(checkout, check=True)
    assert len([what for what in stale if what.endswith(".png")]) == len(plots.PLOTS)
    assert not (checkout / "benchmarks" / "plots").exists()  # it only looked
    assert report.update(checkout, check=False) == stale
    assert report.update(checkout, check=True) == []
    before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*.png")}
    assert len(before) == len(plots.PLOTS)
    assert all(path.stat().st_size < 150_000 for path in before)
    report.update(checkout, check=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # right ones are left alone
    rows_file = next(checkout.rglob("*_gpu.jsonl"))
    harness.append_row(rows_file, peer("torch compiled", 700_000, machine=H200))
    assert report.update(checkout, check=True) == ["README.md, table peers", "benchmarks/plots/peers.png"]
    (checkout / "README.md").write_text((checkout / "README.md").read_text().replace("400,000", "399,000"))
    (checkout / "benchmarks" / "plots" / "step.png").write_bytes(b"no picture")
    assert "benchmarks/plots/step.png" in report.update(checkout, check=True)


def test_a_readme_without_a_place_is_refused(checkout):
    (checkout / "README.md").write_text("nothing")
    with pytest.raises(UserError, match="put the markers back"):
        report.update(checkout, check=True)


def test_a_kernel_that_some_architectures_do_without_has_its_figures_below_the_others():
    row = {"triton": "3.9.0", "case": "124M attention bf16", "num_warps": 8, "shared": 2048}
    rows = [row | {"kernel": "_a_kernel", "arch": arch, "registers": arch} for arch in report.ARCHITECTURES]
    rows += [row | {"kernel": "_b_kernel", "arch": 90, "registers": 7}]
    *_, a, b = report.aot_table(rows).splitlines()
    assert a == "| `_a_kernel`, 8 warps | " + " | ".join(f"{arch}, 2 KiB" for arch in report.ARCHITECTURES) + " |"
    assert b == "| `_b_kernel`, 8 warps | - | - | - | 7, 2 KiB | - | - |"
