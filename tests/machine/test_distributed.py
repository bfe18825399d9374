"""Many processes: the same tokens, the same losses, the same files as one; and one that ends ends all, with its cause.

"The same" is within fp32's summation order, for gradients are added in another; with ZeRO-1 it is bit for bit.
"""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch

from gpt2fast import checkpoint, config, distributed, evaluate, sample
from gpt2fast import train as program
from gpt2fast.distributed import World, joined
from gpt2fast.errors import RunError, UserError
from gpt2fast.files import write_atomic
from tests.tools import ranks, tiny
from tests.tools.gpu import CUDA
from tests.tools.programs import HANG

pytest.importorskip("tyro", reason="needs tyro for the command line")
pytestmark = pytest.mark.skipif(CUDA, reason="gloo on CPUs; on a machine with GPUs torchrun would take those")

FEW = [2, pytest.param(3, marks=pytest.mark.long)]  # ranks
WORDS = ["--model.vocab-size", "50257"]
FOUR = [*tiny.FLAGS, "--total-batch", "128", "--steps", "8", "--grad-clip", "0.5"]  # 4 micro-batches of 2 x 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the data is, in several shards, and the runs of one process that others are compared with."""
    folder = tmp_path_factory.mktemp("ranks")
    tiny.write_data(folder / "data", n=700)
    tiny.write_data(folder / "more", n=530, seed=1)
    os.rename(folder / "more/train.bin", folder / "data/train_2.bin")
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Rows of metrics.jsonl of the run of one process."""
    ranks.run(program.main, 1, folder, [*FOUR, "--run", "alone"])
    return rows(folder, "alone")


@pytest.fixture(scope="module")
def worded(folder):
    """The same with GPT-2's vocabulary, for what reads or writes text."""
    ranks.run(program.main, 1, folder, [*FOUR, *WORDS, "--steps", "2", "--run", "worded"])


def rows(folder, run):
    return [json.loads(line) for line in (folder / "out" / run / "metrics.jsonl").read_text().splitlines()]


def numbers(rows, *names):
    return np.array([row[name] for row in rows for name in names if name in row])


def assert_same_run(got, expected):
    """Losses, norms, validation losses: within 4 of fp32's units, since sums are made in another order."""
    names = ("loss", "grad_norm", "val_loss", "tokens")
    assert [sorted(row) for row in got] == [sorted(row) for row in expected]
    np.testing.assert_allclose(numbers(got, *names), numbers(expected, *names), rtol=2**-21)


def newest(folder, run):
    return checkpoint.list_checkpoints(folder / "out" / run / "checkpoints")[-1][1]


def tensors(folder, run):
    return [(newest(folder, run) / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


# ---- the same as one process ----


@pytest.fixture(scope="module")
def two(folder):
    """The same run on two ranks, that have ended."""
    return ranks.run(program.main, 2, folder, [*FOUR, "--run", "ranks2"], name="ranks2_")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_get_the_losses_of_one_process_with_as_much_accumulation(folder, alone, two, size):
    ended = two if size == 2 else ranks.run(program.main, 4, folder, [*FOUR, "--run", "ranks4"], name="ranks4_")
    assert_same_run(rows(folder, f"ranks{size}"), alone)
    first, *others = [rank.text for rank in ended]
    assert f"step            128 tokens = {size} processes x {4 // size} x B 2 x T 16".split() == next(
        line.split() for line in first.splitlines() if line.startswith("step ") and "tokens" in line
    )
    assert others == [""] * (size - 1)  # rank 0 alone speaks
    recorded = json.loads((folder / f"out/ranks{size}/config.json").read_text())
    assert recorded["resolved"]["ranks"] == size


def test_zero_gives_the_same_bits(folder, two):
    ranks.run(program.main, 2, folder, [*FOUR, "--run", "zero", "--zero"], name="zero")
    assert tensors(folder, "ranks2") == tensors(folder, "zero")
    assert numbers(rows(folder, "ranks2"), "loss").tolist() == numbers(rows(folder, "zero"), "loss").tolist()


SMALL = ["--total-batch", "128", "--steps", "2", "--warmup", "1", "--val-every", "0", "--checkpoint-every", "0"]


@pytest.mark.kernel
@pytest.mark.long
def test_interpreted_kernels_get_the_losses_of_one_process(folder):
    """All of ours, AdamW included, with ZeRO-1 in the last."""
    flags = [*tiny.FLAGS, *SMALL, "--backend", "triton", "--optimizer", "triton"]
    flags += ["--model.n-head", "1", "--model.vocab-size", "256"]
    for size, run, more in ((1, "kernels1", []), (2, "kernels2", []), (4, "kernels4", ["--zero"])):
        ranks.run(interpreted, size, folder, [*flags, *more, "--run", run], name=run, interpret=True)
    assert_same_run(rows(folder, "kernels2"), rows(folder, "kernels1"))
    assert_same_run(rows(folder, "kernels4"), rows(folder, "kernels1"))


def interpreted(flags):
    from tests.tools import interpreter

    interpreter.repair()
    return program.main(flags)


def test_bf16_compiled_blocks_and_recomputing(folder):
    """What does not share the fp32 path: autocast without rounded copies, and hooks under checkpointing."""
    flags = [*FOUR, "--precision", "bf16", "--recompute"]
    for size, run in ((1, "low1"), (2, "low2")):
        ranks.run(program.main, size, folder, [*flags, "--run", run], name=run)
    got, expected = (numbers(rows(folder, run), "loss") for run in ("low2", "low1"))
    np.testing.assert_allclose(got, expected, rtol=2**-8)


@pytest.mark.parametrize(("saved", "resumed"), [pytest.param(4, 1, marks=pytest.mark.long), (2, 1), (1, 2)])
def test_saved_on_n_ranks_a_run_resumes_on_m(folder, alone, saved, resumed):
    run = f"from{saved}to{resumed}"
    flags = ["--zero"] if saved > 1 else []  # which one process has no use for, and need not be told
    ranks.run(program.main, saved, folder, [*FOUR, *flags, "--run", run, "--stop-at", "5"], name=run + "a")
    first, *_ = ranks.run(program.main, resumed, folder, ["--resume", "--run", run], name=run + "b")
    assert f"changed: processes was {saved} and is {resumed}" in first.text
    assert_same_run(rows(folder, run), alone)


# ---- validation, samples, evaluation ----


def test_validation_of_a_whole_split_and_samples_are_shared(folder):
    flags = [*FOUR, *WORDS, "--val-batches", "0", "--sample-every", "8", "--sample-tokens", "5", "--samples", "3"]
    for size, run in ((1, "events1"), (2, "events2")):
        ranks.run(program.main, size, folder, [*flags, "--run", run], name=run)
    assert_same_run(rows(folder, "events2"), rows(folder, "events1"))
    texts = [row["sample"] for row in rows(folder, "events2") if "sample" in row]
    assert len(set(texts)) == 3
    assert texts == [row["sample"] for row in rows(folder, "events1") if "sample" in row]


def judged(flags, file):
    """evaluate, and what it found, in a file."""
    with joined() as world:
        found = evaluate.evaluate(evaluate.EvaluateConfig(**flags), world)
        if world.main:
            write_atomic(file, json.dumps(found))


@pytest.mark.parametrize("size", FEW)
def test_evaluate_shares_the_split_and_hellaswag(folder, worded, size):
    examples = folder / "hellaswag.jsonl"
    line = {"ctx": "A cat sat", "endings": [" on a mat.", " there", " up", " by the door, asleep"]}
    examples.write_text("".join(json.dumps(line | {"label": i % 4}) + "\n" for i in range(7)))
    flags = {"source": "out/worded", "from_": examples, "batch_size": 3, "seq_len": 10}
    found = {}
    for n in (1, size):
        ranks.run(judged, n, folder, flags, folder / f"{n}.json", name=f"judged{n}_")
        found[n] = json.loads((folder / f"{n}.json").read_text())
    for name in ("tokens", "whole_split", "hellaswag"):
        assert found[size][name] == found[1][name]
    assert found[size]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


def test_sample_shares_the_texts(folder, worded):
    flags = ["out/worded", "--samples", "5", "--tokens", "4", "--batch-size", "1", "--prompt", "a", "--device", "cpu"]
    texts = {}
    for size in (1, 2):
        first, *others = ranks.run(sample.main, size, folder, flags, name=f"texts{size}_")
        texts[size] = first.text.split("read ")[0]
        assert all(rank.text == "" for rank in others)
    assert texts[1] == texts[2]
    assert texts[1].count("---") == 10


# ---- one that ends ends all ----

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
    """Until rank 0 has written that step's row."""
    path, (first, *_) = folder / "out" / run / "metrics.jsonl", started
    start = time.monotonic()
    while not (path.exists() and f'"step": {step},' in path.read_text()):
        assert first.process.poll() is None, first.text
        assert time.monotonic() < start + HANG, f"step {step} was not reached"
        time.sleep(0.02)


@pytest.mark.parametrize("size", FEW)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_is_named(folder, victim, size):
    run = f"killed{victim}of{size}"
    started = ranks.start(program.main, size, folder, [*LONG, "--run", run], name=run)
    wait_for_step(folder, run, 3, started)
    started[victim].kill()
    codes = [rank.end() for rank in started]
    assert codes[victim] == -signal.SIGKILL
    assert {code for i, code in enumerate(codes) if i != victim} == {1}
    first, *others = (rank.text for i, rank in enumerate(started) if i != victim)
    assert f"error: rank {1 if victim == 0 else 0}: rank {victim} is gone without a word: killed" in first
    assert not [text for text in others if "error" in text]


@pytest.mark.parametrize("size", FEW)
def test_a_rank_that_fails_ends_all_and_its_cause_is_said(folder, size):
    run = f"fails{size}"
    started = ranks.start(fails_on_rank_1, size, folder, [*LONG, "--run", run], name=run)
    assert [rank.end() for rank in started] == [1] * size
    assert "error: rank 1: the disk of rank 1 is broken" in started[1].text
    assert "error: rank 0: rank 1 ended the run: the disk of rank 1 is broken; what was saved" in started[0].text
    assert {rank.text for rank in started[2:]} <= {""}


def fails_on_rank_1(flags):
    from gpt2fast.data import Loader

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
    assert checkpoint.read_state(newest(folder, run))["step"] == rows(folder, run)[-1]["step"]


# ---- refusals ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--total-batch", "96"], "96 is 3 micro-batches of B*T = 2*16, and 2 processes cannot share them evenly"),
        (["--device", "cuda:1"], "--device cuda:1 with 2 processes: use cuda, of which each takes its own, or cpu"),
        (["--device", "cuda"], "this machine runs more processes than it has GPUs, of which torch sees 0"),
        (["--nonsense"], "nonsense"),
    ],
    ids=["not divisible", "one GPU", "no GPU", "unknown flag"],
)
def test_what_is_wrong_on_every_rank_is_said_once(folder, flags, message):
    started = ranks.start(program.main, 2, folder, [*FOUR, "--run", "refused", *flags], name="refused")
    assert [rank.end() for rank in started] == [2, 2]
    assert message.split() <= started[0].text.split() or message in " ".join(started[0].text.split())
    assert started[1].text == ""
    assert not (folder / "out/refused").exists()


def test_ranks_that_see_different_things_are_refused(folder):
    started = ranks.start(other_seed_on_rank_1, 2, folder, [*FOUR, "--run", "different"], name="different")
    assert [rank.end() for rank in started] == [2, 2]
    assert "rank 1 has seed 7, and rank 0 1337: every process must see the same files" in started[0].text
    assert not (folder / "out/different").exists()


def other_seed_on_rank_1(flags):
    return program.main([*flags, "--seed", "7"] if os.environ["RANK"] == "1" else flags)


def test_a_run_that_is_in_use_is_refused_on_all_ranks(folder, alone):
    started = ranks.start(program.main, 2, folder, [*FOUR, "--run", "alone"], name="again")
    assert [rank.end() for rank in started] == [2, 1]
    assert "already holds a run: continue it with --resume" in started[0].text


def test_a_world_that_does_not_come_together(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match="WORLD_SIZE is 2, and so many processes do not come together .*torchrun"),
        joined(),
    ):
        pass


# ---- the parts ----


def test_one_process_is_a_world_in_which_nothing_happens():
    world, x = World(), torch.tensor(3.0)
    world.mean_(x)
    module = torch.nn.Linear(2, 2)
    assert x == 3
    assert world.replicate(module) is module
    assert world.any(5) == 5
    assert world.totals(1.5, 2) == [1.5, 2.0]
    assert world.gather("text") == ["text"]
    assert world.deal(["a", "b"], 2) == ["a", "b"]


@pytest.mark.parametrize(("memory", "size", "batch"), [(None, 1, 4), (None, 64, 4), (None, 256, 2), (None, 512, 1)])
def test_the_batch_divides_each_ranks_share(memory, size, batch):
    c = config.resolve(config.PRESETS["gpt2"], memory, size)
    assert c.batch_size == batch
    config.check(c, size)


def test_collectives(folder):
    ranks.run(collectives, 3, folder, name="collectives")


def collectives():
    with joined() as world:
        world = world.on(torch.device("cpu"))
        rank = world.rank
        assert (world.size, world.main) == (3, rank == 0)
        assert world.any(rank) == 2
        assert world.totals(rank, 0.5) == [3.0, 1.5]
        assert world.gather("é" * rank) == ["", "é", "éé"]
        assert world.share(f"of {rank}") == "of 0"
        assert world.deal([f"{i}" for i in range(rank, 7, 3)], 7) == list("0123456")
        x = torch.tensor(float(rank))
        world.mean_(x)
        assert x == 1
        mine = {f"x{rank}": torch.full((rank, 2), rank), "scalar" * (rank == 2) or f"y{rank}": torch.tensor(0.5)}
        found = world.collect(mine)
        assert set(found) == ({"x0", "x1", "x2", "y0", "y1", "scalar"} if rank == 0 else set())
        assert rank or torch.equal(found["x2"], torch.full((2, 2), 2))


def test_ddp_adds_into_its_buckets(folder):
    """Gradients lie in DDP's buckets, and the next step adds to them there: no copy is made."""
    ranks.run(buckets, 2, folder, name="buckets")


def buckets():
    from gpt2fast import optim
    from gpt2fast.model import GPT
    from gpt2fast.ops import OpsConfig, build
    from gpt2fast.step import TrainingStep

    with joined() as world:
        world = world.on(torch.device("cpu"))
        model = GPT(tiny.MODEL, build(OpsConfig(), "cpu"), 1)
        step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp32", accumulation=2, world=world)
        tokens = torch.randint(100, (2, 2, 17))
        for _ in range(2):  # after the first, DDP orders its buckets anew
            step(iter([(x[:, :-1], x[:, 1:]) for x in tokens]), 1e-2)
        places = [p.grad.data_ptr() for p in model.parameters()]
        assert all(p.grad.count_nonzero() == 0 for p in model.parameters())
        step(iter([(x[:, :-1], x[:, 1:]) for x in tokens]), 1e-2)
        assert places == [p.grad.data_ptr() for p in model.parameters()]
        storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(storages) < len(places)
        assert distributed.part(step.optimizer) is step.optimizer
