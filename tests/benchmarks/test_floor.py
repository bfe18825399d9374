"""The floor is what the project is measured against; every millisecond above it has a row and a next step."""

import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks import floor, harness, step_profile
from benchmarks.floor import Ceilings, FloorConfig, lines
from benchmarks.step_parts import ALL, Options, parts
from gpt2fast.errors import UserError
from gpt2fast.model import SIZES

H200 = Ceilings()
SHAPE = SIZES["gpt2"], 64, 1024
NONE = Options()


def by_name(*shape, **changes):
    return {part.name: part for part in parts(*shape, **changes)}


def ms(found, field):
    return sum(floor.milliseconds(*(getattr(part, name) for name in field), H200) for part in found)


IDEAL, OURS = ("flops", "bytes"), ("our_flops", "our_bytes")


def test_the_floor_of_gpt2_on_an_h200():
    """PERFORMANCE's table: 48.59 and 4.33 TFLOP at 790 TFLOP/s, 40.4 GB at 4.3 TB/s, 76.4 ms together."""
    found = parts(*SHAPE)
    assert floor.split(found, H200) == "floor 76.4 ms = matmuls 61.5 + attention 5.5 + memory 9.4"
    work = {group: sum(part.flops for part in found if part.group == group) for group in ("matmul", "attention")}
    assert work["matmul"] == pytest.approx(48.59e12, rel=1e-3)
    assert work["attention"] == pytest.approx(4.33e12, rel=1e-3)
    assert sum(part.bytes for part in found) == pytest.approx(40.4e9, rel=1e-3)
    assert ms(found, IDEAL) == pytest.approx(76.4, abs=0.05)


@pytest.mark.parametrize(
    ("name", "work"),
    [("qkv", 10.6), ("attention projection", 3.5), ("fc", 14.1), ("mlp projection", 14.1), ("head", 19.2)],
)
def test_what_must_be_multiplied(name, work):
    assert floor.milliseconds(by_name(*SHAPE)[name].flops, 0, H200) == pytest.approx(work, abs=0.05)


@pytest.mark.parametrize(
    ("off", "costs", "claimed"),
    [
        (
            "residual",
            3.5,
            "an fp32 stream: 2.9 of PERFORMANCE, and a second gradient backward, in bf16",
        ),
        ("one_pass", 1.76, "two more of the backward's matmuls, at the ceiling"),
        ("epilogue", 5.6, "GELU forward 2.25 + backward 3.4"),
        ("adamw", 0.28, "blocks' weights rounded, gradients converted: 12 bytes each"),
        ("embedding", 0.01, "atomic additions of 65,536 rows, not of the 50,304 at most that were seen"),
    ],
)
def test_what_a_missing_option_costs(off, costs, claimed):
    without = ms(parts(*SHAPE, dataclasses.replace(ALL, **{off: False})), OURS) - ms(parts(*SHAPE, ALL), OURS)
    assert without == pytest.approx(costs, abs=max(0.02, 0.06 * costs)), claimed


def test_every_group_of_a_profile_has_something_to_try():
    groups = {"device idle", "other", *step_profile.GROUPS}
    assert set(floor.NEXT) == groups
    assert {part.group for part in parts(*SHAPE)} <= groups
    for line in lines(parts(*SHAPE, NONE), H200, dict.fromkeys(groups, 100.0)):
        cells = floor.cells(line)
        assert cells[-1] == floor.NEXT[line.group] != "-"
        assert cells[-2] == f"{100 - line.floor:.2f}"


def test_a_group_at_its_floor_has_nothing_to_try():
    [matmul] = [line for line in lines(parts(*SHAPE), H200) if line.group == "matmul"]
    assert floor.cells(matmul) == ["matmul", "48.59 TFLOP", "61.51", "61.51", "not measured", "0.00", "-"]


PROFILE = {
    "suite": "gpu", "stage": "profile", "backend": "triton", "rung": "all", "size": "gpt2", "B": 64, "T": 1024,
    "options": dataclasses.asdict(ALL), "wall_ms": 101.0, "device_ms": 100.0, "groups": {"matmul": 80.0, "other": 20.0},
    "machine": {"gpu": "NVIDIA H200", "gpu_memory": 15 * 10**10, "date": "2026-11-21"},
}  # fmt: skip
MEASURED = [
    {"suite": "gpu", "measured": "copy", "gb_per_s": {"median": 4000.0}},
    {"suite": "gpu", "measured": "matmul", "shape": [65536, 2304, 768], "tflops": {"median": 1.0}},
    {"suite": "gpu", "measured": "matmul", "shape": [8192, 8192, 8192], "tflops": {"median": 700.0}},
]


def table_of(said):
    """{group: cells} of the Markdown table."""
    found = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in said.splitlines() if line[:1] == "|"]
    assert found[0] == floor.HEAD
    assert set("".join(found[1])) == {"-"}
    return {line[0]: line[1:] for line in found[2:]}


def test_a_profile_is_set_beside_the_floor_of_its_own_ceilings(tmp_path, capsys):
    path = tmp_path / "gpu.jsonl"
    for row in (*MEASURED, PROFILE):
        harness.append_row(path, row)
    assert floor.run(FloorConfig(profile=path)) == 0
    said = capsys.readouterr().out
    assert said.startswith("ceilings: 700 TFLOP/s bf16, 4.00 TB/s\n")
    table = table_of(said)
    assert table["matmul"][1:5] == ["69.41", "69.41", "80.00", "10.59"]
    assert table["attention"][3] == "0.00"
    assert table["other"] == ["-", "0.00", "0.00", "20.00", "20.00", floor.NEXT["other"]]
    assert table["device idle"][3:] == ["1.00", "1.00", floor.NEXT["device idle"]]
    assert table["step"][3] == "101.00"


def test_the_newest_profile_among_the_results_is_taken(tmp_path, capsys):
    folder = tmp_path / "nvidia-h200"
    for day, wall in ((20, 300.0), (21, 101.0)):
        for row in (*MEASURED, PROFILE | {"wall_ms": wall}):
            harness.append_row(folder / f"2026-11-{day}_aaaaaaa_gpu.jsonl", row)
    floor.run(FloorConfig(), tmp_path)
    assert table_of(capsys.readouterr().out)["step"][3] == "101.00"
    floor.run(FloorConfig(batch_size=8), tmp_path)  # of this shape there is none
    assert "by count alone" in capsys.readouterr().out


def test_without_a_profile_it_is_counted(tmp_path, capsys):
    assert floor.run(FloorConfig(parts=True, off=("epilogue",)), tmp_path) == 0
    said = capsys.readouterr().out
    assert "gpt2, B=64, T=1024, by count alone, no profile of a GPU: floor 76.4 ms = " in said
    assert re.search(r"^\| GELU backward +\| gelu +\| 0.00 +\| 3.37 +\|$", said, re.MULTILINE)
    table = table_of(said.split("\n\n| part")[0])
    assert {cells[3] for cells in table.values()} == {"not measured"}
    assert all((float(cells[4]) > 0) == (cells[5] != "-") for group, cells in table.items() if group != "step")


def test_ceilings_come_from_what_was_measured_in_the_same_run():
    assert floor.ceilings_of(MEASURED) == Ceilings(700.0, 4.0, Ceilings.memory)
    assert floor.ceilings_of(MEASURED[:2]) is None
    kernel = {"suite": "kernels", "ceilings": {"gb_per_s": 3000.0, "tflops": 600.0}, "machine": {"gpu_memory": 80e9}}
    assert floor.ceilings_of([kernel]) == Ceilings(600.0, 3.0, 80e9)
    assert floor.ceilings_of([{"suite": "ladder"}]) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tflops": 0.0}, "--tflops is 0.0: it must be at least 0.001"),
        ({"profile": Path("no")}, "--profile no is not a file"),
    ],
)
def test_nonsense_is_refused_in_one_line(settings, said):
    with pytest.raises(UserError, match=said):
        floor.run(FloorConfig(**settings))


def test_markdown_is_aligned():
    assert floor.markdown(["a", "bcd"], [["ef", "g"]]).splitlines() == ["| a  | bcd |", "| -- | --- |", "| ef | g   |"]
