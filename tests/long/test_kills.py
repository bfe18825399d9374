"""kill -9, 20 times at random moments: no checkpoint is lost, and the run ends with an uninterrupted run's bits."""

import json

import pytest

from gpt2fast.errors import UserError
from gpt2fast.weights import checkpoint
from tests.long import kills

pytestmark = pytest.mark.long

pytest.importorskip("tyro", reason="needs tyro for the command line")

OLD = {("step_00000003", 1)}


@pytest.mark.parametrize(
    ("after", "metrics", "phase"),
    [
        (OLD, 7, "starting"),
        (OLD, 8, "stepping"),
        (OLD | {(".step_00000006.tmp", 2)}, 8, "writing"),
        (OLD | {("step_00000006", 2)}, 8, "renamed"),
        ({("step_00000006", 2), (".step_00000003.deleted", 1)}, 8, "deleting"),
        ({("step_00000006", 2)}, 8, "stepping"),  # written, and the one before it deleted
    ],
)
def test_the_interrupted_phase_is_inferred_from_the_folder(after, metrics, phase):
    assert kills.phase(OLD, after, 7, metrics) == phase


def test_files_left_by_an_earlier_kill_are_not_attributed_to_this_one():
    left = OLD | {(".step_00000006.tmp", 2)}
    assert kills.phase(left, left, 7, 7) == "starting"
    assert kills.phase(left, OLD | {(".step_00000006.tmp", 3)}, 7, 8) == "writing"


def test_20_kills_lose_no_checkpoint_and_change_no_bit(tmp_path):
    rows = []

    def say(row):
        rows.append(row)
        print(kills.describe(row))

    found = kills.kills(tmp_path, 20, 0, say)
    assert found["different"] == []
    assert found["during_a_checkpoint"] >= 8, found
    assert len(rows) == 20
    assert all(0 <= row["lost"] <= kills.EVERY for row in rows)
    assert all(row["newest"] >= row["from"] for row in rows)

    # it detects a difference in one bit of a weight, a moment or a loss
    out = tmp_path / "out" / "killed"
    path = checkpoint.list_checkpoints(out / "checkpoints")[-1][1]
    for name in kills.FILES:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} does not match its checksum"):
            kills.same(tmp_path, rows)
        (path / name).write_bytes(data)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (out / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | {"loss": 1.0})]))
    assert kills.same(tmp_path, rows) == ["metrics"]
    (out / "metrics.jsonl").write_text("\n".join(lines))
    rows[7]["bits"] = "another run's"
    assert kills.same(tmp_path, rows) == [f"step {rows[7]['newest']} after kill 8"]


@pytest.mark.parametrize(("different", "lost", "code"), [([], 3, 0), (["model.safetensors"], 3, 1), ([], 4, 1)])
def test_the_exit_code_is_1_if_anything_was_lost(tmp_path, monkeypatch, capsys, different, lost, code):
    row = {"kill": 1, "kind": "writing", "phase": "writing", "seconds": 0.5}
    row |= {"from": 3, "reached": 6, "newest": 3, "lost": 3}

    def planted(folder, number, seed, say):
        say(row)
        return {"kills": 1, "steps": 8, "phases": {"writing": 1}, "most_lost": lost, "different": different}

    monkeypatch.setattr(kills, "kills", planted)
    file = tmp_path / "rows.jsonl"
    assert kills.main(["--kills", "1", "--file", str(file)]) == code
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["suite"] for r in rows] == ["kills", "kills"]
    assert rows[-1]["machine"]
    assert "kept    3, lost 3" in capsys.readouterr().out


def test_zero_kills_are_refused():
    with pytest.raises(UserError, match="--kills is 0: it must be at least 1"):
        kills.main(["--kills", "0"])
