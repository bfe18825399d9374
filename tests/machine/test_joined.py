"""How ranks start and end together: a rank that ends ends all of them, and its cause is printed."""

import os
import signal
import time

import pytest

from gpt2fast import train as program
from gpt2fast.errors import RunError, UserError
from gpt2fast.machine.joined import joined
from gpt2fast.weights import checkpoint
from tests.tools import ranks, tiny
from tests.tools.gpu import CUDA
from tests.tools.programs import HANG

pytest.importorskip("tyro", reason="needs tyro for the command line")
pytestmark = pytest.mark.skipif(CUDA, reason="gloo on CPUs; on a machine with GPUs torchrun would take those")
FEW = [2, pytest.param(3, marks=pytest.mark.long)]  # ranks


# ---- a rank that ends ends all ----
LONG = [
    *tiny.FLAGS,
    "--total-batch",
    "192",
    "--steps",
    "100000",
    "--val-every",
    "0",
    "--checkpoint-every",
    "0",
    "--compile",
    "off",
]


def wait_for_step(folder, run, step, started):
    """Wait until rank 0 has written that step's row."""
    path, (first, *_) = folder / "out" / run / "metrics.jsonl", started
    start = time.monotonic()
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert first.process.poll() is None, first.text
        assert time.monotonic() < start + HANG, f"step {step} was not reached"
        time.sleep(0.02)


@pytest.mark.parametrize("size", FEW)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_is_named(folder, victim, size):
    run = f"killed{victim}of{size}"
    started = ranks.start(program.main, size, folder, [*LONG, "--run", run], name=run)
    wait_for_step(folder, run, 3, started)
    started[victim].kill()
    codes = [rank.end() for rank in started]
    assert codes[victim] == -signal.SIGKILL
    assert {code for i, code in enumerate(codes) if i != victim} == {1}
    first, *others = (rank.text for i, rank in enumerate(started) if i != victim)
    assert f"error: rank {1 if victim == 0 else 0}: rank {victim} disappeared without an error: killed" in first
    assert not [text for text in others if "error" in text]


@pytest.mark.parametrize("size", FEW)
def test_a_rank_that_fails_ends_all_and_its_cause_is_printed(folder, size):
    run = f"fails{size}"
    started = ranks.start(fails_on_rank_1, size, folder, [*LONG, "--run", run], name=run)
    assert [rank.end() for rank in started] == [1] * size
    assert "error: rank 1: the disk of rank 1 is broken" in started[1].text
    assert (
        "error: rank 0: rank 1 ended the run: the disk of rank 1 is broken; the saved checkpoints are"
        in started[0].text
    )
    assert {rank.text for rank in started[2:]} <= {""}


def fails_on_rank_1(flags):
    from gpt2fast.data.loader import Loader

    real = Loader.batch

    def batch(self, i):
        if os.environ["RANK"] == "1" and i > 30:
            raise RunError("the disk of rank 1 is broken")
        return real(self, i)

    Loader.batch = batch
    return program.main(flags)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(folder, number):
    run = f"signal{int(number)}"
    started = ranks.start(program.main, 2, folder, [*LONG, "--run", run], name=run)
    wait_for_step(folder, run, 3, started)
    started[1].process.send_signal(number)
    started[1].process.send_signal(number)  # once from the terminal, once from torchrun
    assert [rank.end() for rank in started] == [128 + number] * 2, started[0].text + started[1].text
    assert checkpoint.read_state(ranks.newest(folder, run))["step"] == ranks.metrics(folder, run)[-1]["step"]


# ---- refusals ----
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--total-batch", "96"], "96 is 3 micro-batches of B*T = 2*16, and 2 processes cannot share them evenly"),
        (
            ["--device", "cuda:1"],
            "--device cuda:1 with 2 processes: use cuda, where each process takes one GPU, or cpu",
        ),
        (["--device", "cuda"], "this machine runs more processes than torch sees GPUs (0)"),
        (["--nonsense"], "nonsense"),
    ],
    ids=["not divisible", "one GPU", "no GPU", "unknown flag"],
)
def test_an_error_of_every_rank_is_printed_once(folder, flags, message):
    started = ranks.start(program.main, 2, folder, [*ranks.FLAGS, "--run", "refused", *flags], name="refused")
    assert [rank.end() for rank in started] == [2, 2]
    assert message in " ".join(started[0].text.split())
    assert started[1].text == ""
    assert not (folder / "out/refused").exists()


def test_ranks_with_different_settings_are_refused(folder):
    started = ranks.start(other_seed_on_rank_1, 2, folder, [*ranks.FLAGS, "--run", "different"], name="different")
    assert [rank.end() for rank in started] == [2, 2]
    assert "rank 1 has seed 7, and rank 0 1337: every process must see the same files" in started[0].text
    assert not (folder / "out/different").exists()


def other_seed_on_rank_1(flags):
    return program.main([*flags, "--seed", "7"] if os.environ["RANK"] == "1" else flags)


def test_a_run_that_exists_is_refused_on_all_ranks(folder, alone):
    started = ranks.start(program.main, 2, folder, [*ranks.FLAGS, "--run", "alone"], name="again")
    assert [rank.end() for rank in started] == [2, 1]
    assert "already holds a run: continue it with --resume" in started[0].text


def test_processes_that_cannot_connect_are_a_user_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match="could not connect WORLD_SIZE=2 processes .*torchrun"),
        joined(),
    ):
        pass
