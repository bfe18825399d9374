"""What a run prints: one live line in a terminal, plain lines in a log file, the header, TensorBoard's files."""

import os
import pty
import termios

import pytest

from gpt2fast.train import train
from gpt2fast.training import screen
from gpt2fast.training.session import start_session
from tests.tools import programs, tiny

ROW = {"step": 3, "loss": 9.87654, "lr": 6e-4, "grad_norm": 1.2345, "tokens_per_s": 123456.7, "mfu": None}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3725, "1:02:05"), (2 * 86400 + 61, "2d 00:01")],
    ids=str,
)
def test_durations_are_formatted(seconds, text):
    assert screen.clock(seconds) == text


def test_plain_lines_where_the_output_is_not_a_terminal(capsys):
    with screen.Screen(10, 0) as s:
        s.step(ROW, eta=75)
        s.step(ROW, eta=74)  # too soon for another line
        s.say("an event")
        s.step(ROW | {"step": 10, "mfu": 0.4567}, eta=0)
    assert capsys.readouterr().out.splitlines() == [
        "step  3/10  loss 9.877  lr 6.00e-04  norm 1.23  123,457 tok/s  MFU unknown  ETA 1:15",
        "an event",
        "step 10/10  loss 9.877  lr 6.00e-04  norm 1.23  123,457 tok/s  MFU 45.7%  ETA 0:00",
    ]


def test_a_terminal_gets_one_live_line(tmp_path):
    code = f"""
from gpt2fast.training.screen import Screen
with Screen(10, 0) as s:
    for i in (1, 2):
        s.step({ROW!r} | {{"step": i}}, eta=9)
    s.say("an event")
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 140))
    assert programs.start("-c", code, cwd=tmp_path, log=theirs, env={"TERM": "xterm"}).wait() == 0
    os.close(theirs)
    output = os.read(ours, 65536).decode()
    os.close(ours)
    assert output.count("\r") > 3  # redrawn in place
    assert "step  2/10  loss 9.877" in output
    assert "an event\r\n" in output


def test_a_run_without_a_validation_split_says_so(tmp_path, capsys):
    c = tiny.config(tmp_path, steps=2, warmup=1)
    (tmp_path / "data" / "val.bin").unlink()
    assert train(c) == 0
    assert "so there is no validation" in capsys.readouterr().out


def test_tensorboards_files_have_every_step(tmp_path, capsys):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    c = tiny.config(tmp_path, steps=4, warmup=1, tensorboard=True)
    train(c)
    events = reader.EventAccumulator(str(c.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_an_implausible_first_loss_is_reported(tmp_path):
    s = start_session(tiny.config(tmp_path, model=tiny.GPT2_WORDS))
    assert "warning" not in screen.header(s, "")
    s.first_loss = 14.0
    assert "the loss of an untrained model should be about 10.82, and it is 14.00" in screen.header(s, "")


def test_the_header_has_the_numbers_of_the_run(tmp_path):
    s = start_session(tiny.config(tmp_path, model=tiny.GPT2_WORDS))
    text = screen.header(s, "preset nano")
    for part in (
        "cpu",
        "fp32",
        "not compiled",
        "807,680 parameters",
        "saves 804,112",
        "1,000 training tokens",
        "20 = 640 tokens",
    ):
        assert part in text
