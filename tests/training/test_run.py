"""The folder of a run: one run, one process, and metrics of whole lines."""

import json
import math
from dataclasses import replace

import pytest

from gpt2fast import train as program
from gpt2fast.errors import UserError
from gpt2fast.train import train
from gpt2fast.training import run
from tests.tools import tiny


def test_metrics_are_json_with_an_infinite_norm_or_a_nan_loss(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with run.Metrics(path, last_step=0) as rows:
        rows.write({"step": 1, "loss": 2.5, "grad_norm": math.inf, "mfu": None})
        rows.write({"step": 2, "loss": math.nan})
    assert [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.5, "grad_norm": None, "mfu": None},
        {"step": 2, "loss": None},
    ]


def test_metrics_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val_loss": 3}\n{"step": 3}\n{"st')
    with run.Metrics(path, last_step=2) as rows:
        rows.write({"step": 3, "loss": 1.0})
    assert [row["step"] for row in run.read_metrics(path)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"step": 1, "lo\n{"step": 2}\n', "line 1 is damaged .JSONDecodeError: .*: delete that line"),
        ('{"step": 1}\n{"loss": 1.0}\n{"step": 3}\n', "line 2 is damaged .KeyError: 'step'"),
        ('{"step": "1"}\n', "line 1 is damaged .ValueError: step is '1'"),
        ('{"step": 1}\n\n{"step": 2}\n', "line 2 is damaged"),
        ("[]\n", "line 1 is damaged .TypeError"),
        ("\xff\n", "line 1 is damaged .UnicodeDecodeError"),
    ],
)
def test_a_damaged_line_is_refused_with_its_number_and_the_file_kept(tmp_path, content, message):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content.encode("latin-1"))
    for read in (run.read_metrics, lambda path: run.Metrics(path, last_step=2)):
        with pytest.raises(UserError, match=f"{path}, {message}"):
            read(path)
    assert path.read_bytes() == content.encode("latin-1")


def test_a_missing_file_and_a_last_line_without_its_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert run.read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, but for the newline
    assert run.read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_folder_that_holds_a_run_is_refused_unless_resumed(folder, capsys):
    c = tiny.config(folder, steps=4, warmup=1)
    train(c)
    before = {path: path.read_bytes() for path in c.folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run: continue it with --resume"):
        train(c)
    with pytest.raises(UserError, match="is complete at step 4: raise --steps"):
        train(replace(c, resume=True))
    assert {path: path.read_bytes() for path in c.folder.rglob("*") if path.is_file()} == before


def test_a_folder_with_other_files_is_refused(folder):
    (folder / "out" / "tiny").mkdir(parents=True)
    (folder / "out" / "tiny" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="already holds other files: choose another name with --run NAME"):
        train(tiny.config(folder))


def test_a_run_that_appears_while_this_one_is_prepared_is_kept(folder, monkeypatch):
    c = tiny.config(folder)

    def start_late(config, world):
        s = real(config, world)
        c.folder.mkdir(parents=True)
        (c.folder / "config.json").write_text("another's")
        return s

    real = program.start_session
    monkeypatch.setattr(program, "start_session", start_late)
    with pytest.raises(UserError, match="already holds a run"):
        train(c)
    assert (c.folder / "config.json").read_text() == "another's"
