"""Several processes: the same tokens, losses and files as one process.

"The same" allows for fp32's summation order, since gradients are added in another order; with ZeRO-1 it is bit for bit
what several processes give without it.
"""

import json

import numpy as np
import pytest
import torch

from gpt2fast import evaluate, sample
from gpt2fast import train as program
from gpt2fast.files.atomic import write_atomic
from gpt2fast.machine.joined import joined
from gpt2fast.machine.world import World, unwrapped
from gpt2fast.training import config
from tests.tools import ranks, tiny
from tests.tools.gpu import CUDA

pytest.importorskip("tyro", reason="needs tyro for the command line")
pytestmark = pytest.mark.skipif(CUDA, reason="gloo on CPUs; on a machine with GPUs torchrun would take those")
FEW = [2, pytest.param(3, marks=pytest.mark.long)]  # ranks
WORDS = ["--model.vocab-size", "50257"]


@pytest.fixture(scope="module")
def worded(folder):
    """A run with GPT-2's vocabulary, for tests that read or write text."""
    ranks.run(program.main, 1, folder, [*ranks.FLAGS, *WORDS, "--steps", "2", "--run", "worded"])


def numbers(rows, *names):
    return np.array([row[name] for row in rows for name in names if name in row])


def assert_same_run(got, expected):
    """Losses, norms and validation losses agree within 4 of fp32's units, since sums are taken in another order."""
    names = ("loss", "grad_norm", "val_loss", "tokens")
    assert [sorted(row) for row in got] == [sorted(row) for row in expected]
    np.testing.assert_allclose(numbers(got, *names), numbers(expected, *names), rtol=2**-21)


def tensors(folder, run):
    return [(ranks.newest(folder, run) / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


# ---- the same as one process ----
@pytest.fixture(scope="module")
def two(folder):
    """The same run on two ranks, which have ended."""
    return ranks.run(program.main, 2, folder, [*ranks.FLAGS, "--run", "ranks2"], name="ranks2_")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_get_the_losses_of_one_process_with_the_same_total_batch(folder, alone, two, size):
    ended = two if size == 2 else ranks.run(program.main, 4, folder, [*ranks.FLAGS, "--run", "ranks4"], name="ranks4_")
    assert_same_run(ranks.metrics(folder, f"ranks{size}"), alone)
    first, *others = [rank.text for rank in ended]
    assert f"step            128 tokens = {size} processes x {4 // size} x B 2 x T 16".split() == next(
        line.split() for line in first.splitlines() if line.startswith("step ") and "tokens" in line
    )
    assert others == [""] * (size - 1)  # only rank 0 prints
    recorded = json.loads((folder / f"out/ranks{size}/config.json").read_text())
    assert recorded["resolved"]["ranks"] == size


def test_zero_gives_the_same_bits(folder, two):
    ranks.run(program.main, 2, folder, [*ranks.FLAGS, "--run", "zero", "--zero"], name="zero")
    assert tensors(folder, "ranks2") == tensors(folder, "zero")
    assert (
        numbers(ranks.metrics(folder, "ranks2"), "loss").tolist()
        == numbers(ranks.metrics(folder, "zero"), "loss").tolist()
    )


SMALL = ["--total-batch", "128", "--steps", "2", "--warmup", "1", "--val-every", "0", "--checkpoint-every", "0"]


@pytest.mark.kernel
@pytest.mark.long
def test_interpreted_kernels_get_the_losses_of_one_process(folder):
    """All of our kernels, AdamW included, and ZeRO-1 in the last run."""
    flags = [*tiny.FLAGS, *SMALL, "--backend", "triton", "--optimizer", "triton"]
    flags += ["--model.n-head", "1", "--model.vocab-size", "256"]
    for size, run, more in ((1, "kernels1", []), (2, "kernels2", []), (4, "kernels4", ["--zero"])):
        ranks.run(interpreted, size, folder, [*flags, *more, "--run", run], name=run, interpret=True)
    assert_same_run(ranks.metrics(folder, "kernels2"), ranks.metrics(folder, "kernels1"))
    assert_same_run(ranks.metrics(folder, "kernels4"), ranks.metrics(folder, "kernels1"))


def interpreted(flags):
    from tests.tools import interpreter

    interpreter.repair()
    return program.main(flags)


def test_bf16_compiled_blocks_and_recomputing(folder):
    """Paths that fp32 does not take: autocast without rounded copies, and hooks under activation checkpointing."""
    flags = [*ranks.FLAGS, "--precision", "bf16", "--recompute"]
    for size, run in ((1, "low1"), (2, "low2")):
        ranks.run(program.main, size, folder, [*flags, "--run", run], name=run)
    got, expected = (numbers(ranks.metrics(folder, run), "loss") for run in ("low2", "low1"))
    np.testing.assert_allclose(got, expected, rtol=2**-8)


@pytest.mark.parametrize(("saved", "resumed"), [pytest.param(4, 1, marks=pytest.mark.long), (2, 1), (1, 2)])
def test_a_run_saved_on_n_ranks_resumes_on_m(folder, alone, saved, resumed):
    run = f"from{saved}to{resumed}"
    flags = ["--zero"] if saved > 1 else []  # one process does not need the flag
    ranks.run(program.main, saved, folder, [*ranks.FLAGS, *flags, "--run", run, "--stop-at", "5"], name=run + "a")
    first, *_ = ranks.run(program.main, resumed, folder, ["--resume", "--run", run], name=run + "b")
    assert f"changed: processes was {saved} and is {resumed}" in first.text
    assert_same_run(ranks.metrics(folder, run), alone)


# ---- validation, samples, evaluation ----
def test_validation_of_a_whole_split_and_samples_are_shared(folder):
    flags = [
        *ranks.FLAGS,
        *WORDS,
        "--val-batches",
        "0",
        "--sample-every",
        "8",
        "--sample-tokens",
        "5",
        "--samples",
        "3",
    ]
    for size, run in ((1, "events1"), (2, "events2")):
        ranks.run(program.main, size, folder, [*flags, "--run", run], name=run)
    assert_same_run(ranks.metrics(folder, "events2"), ranks.metrics(folder, "events1"))
    texts = [row["sample"] for row in ranks.metrics(folder, "events2") if "sample" in row]
    assert len(set(texts)) == 3
    assert texts == [row["sample"] for row in ranks.metrics(folder, "events1") if "sample" in row]


def evaluated(flags, file):
    """Run evaluate, and write its results to a file."""
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
        ranks.run(evaluated, n, folder, flags, folder / f"{n}.json", name=f"evaluated{n}_")
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


# ---- the parts ----
def test_collectives_of_one_process_return_their_arguments():
    world, x = World(), torch.tensor(3.0)
    world.mean_(x)
    module = torch.nn.Linear(2, 2)
    assert x == 3
    assert world.replicate(module) is module
    assert world.largest(5) == 5
    assert world.totals(1.5, 2) == [1.5, 2.0]
    assert world.all_gather("text") == ["text"]
    assert world.interleave(["a", "b"], 2) == ["a", "b"]


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
        assert world.largest(rank) == 2
        assert world.totals(rank, 0.5) == [3.0, 1.5]
        assert world.all_gather("é" * rank) == ["", "é", "éé"]
        assert world.broadcast(f"of {rank}") == "of 0"
        assert world.interleave([f"{i}" for i in range(rank, 7, 3)], 7) == list("0123456")
        x = torch.tensor(float(rank))
        world.mean_(x)
        assert x == 1
        mine = {f"x{rank}": torch.full((rank, 2), rank), "scalar" * (rank == 2) or f"y{rank}": torch.tensor(0.5)}
        found = world.gather_tensors(mine)
        assert set(found) == ({"x0", "x1", "x2", "y0", "y1", "scalar"} if rank == 0 else set())
        assert rank or torch.equal(found["x2"], torch.full((2, 2), 2))


def test_ddp_adds_into_its_buckets(folder):
    """Gradients are views into DDP's buckets, and the next step adds to them in place: no copy is made."""
    ranks.run(buckets, 2, folder, name="buckets")


def buckets():
    from gpt2fast.model import GPT
    from gpt2fast.ops import OpsConfig, build
    from gpt2fast.training import optim
    from gpt2fast.training.step import TrainingStep

    with joined() as world:
        world = world.on(torch.device("cpu"))
        model = GPT(tiny.MODEL, build(OpsConfig(), "cpu"), 1)
        step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp32", accumulation=2, world=world)
        tokens = torch.randint(100, (2, 2, 17))
        for _ in range(2):  # DDP reorders its buckets after the first
            step(iter([(x[:, :-1], x[:, 1:]) for x in tokens]), 1e-2)
        places = [p.grad.data_ptr() for p in model.parameters()]
        assert all(p.grad.count_nonzero() == 0 for p in model.parameters())
        step(iter([(x[:, :-1], x[:, 1:]) for x in tokens]), 1e-2)
        assert places == [p.grad.data_ptr() for p in model.parameters()]
        storages = {p.grad.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(storages) < len(places)
        assert unwrapped(step.optimizer) is step.optimizer
