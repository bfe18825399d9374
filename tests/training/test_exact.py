"""The same bits: from two runs with --deterministic, and from a run that was stopped and one that was not."""

import os
import random
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt2fast import train
from gpt2fast.data import shards
from gpt2fast.errors import UserError
from gpt2fast.machine import device
from gpt2fast.training.session import start_session
from gpt2fast.training.step import TrainingStep
from gpt2fast.weights import checkpoint
from tests.tools import tiny

STEPS = 12
FILES = "model.safetensors", "optimizer.safetensors"


@pytest.fixture(autouse=True)
def determinism_is_turned_off_again():
    yield
    torch.use_deterministic_algorithms(False)


def settings(folder, **changes):
    """Return settings of 12 steps with validations, samples and checkpoints between them."""
    common = {
        "steps": STEPS,
        "val_every": 5,
        "sample_every": 4,
        "sample_tokens": 3,
        "checkpoint_every": 5,
        "model": tiny.GPT2_WORDS,
    }
    return tiny.config(folder, **common | changes)


def bits(c) -> dict[str, bytes | list[str]]:
    """Return weights and moments as bytes, and the lines of metrics.jsonl without what depends on the clock."""
    _, path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1]
    lines = (c.folder / "metrics.jsonl").read_text().splitlines()
    return {name: (path / name).read_bytes() for name in FILES} | {
        "lines": [re.sub(r', "tokens_per_s".*', "", line) for line in lines]
    }


def assert_same_bits(a, b):
    left, right = bits(a), bits(b)
    assert left["lines"] == right["lines"]
    assert [name for name in FILES if left[name] != right[name]] == []
    assert any('"sample"' in line for line in left["lines"]) == bool(a.sample_every)


def run_in_parts(c, *stops):
    """Run `c`, stopped after each of these steps, and resumed with other random states, as in another process."""
    for n, stop in enumerate([*stops, None]):
        torch.rand(3), random.random(), np.random.rand()
        assert train.train(replace(c, resume=n > 0, stop_at=stop)) == 0


# tiny's data has 31 batches of 2 in an epoch: with 3 in a step, the 11th step begins in the first epoch and ends in
# the second
@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({"total_batch": 96}, (4,)),
        ({"total_batch": 96}, (10,)),
        ({"total_batch": 96}, (11,)),
        ({"total_batch": 96, "shuffle": False}, (10, 11)),
        ({"batch_size": 1, "total_batch": 62 * 16, "steps": 3}, (1,)),  # a step is an epoch
        ({"precision": "bf16", "total_batch": 96}, (7,)),
        ({}, range(1, STEPS)),
    ],
    ids=["in an epoch", "before its end", "after it", "sequential", "at its end", "bf16", "at every step"],
)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(tmp_path, capsys, changes, stops):
    straight, parts = (settings(tmp_path, run=name, **changes) for name in ("straight", "parts"))
    assert straight.total_batch != 96 or start_session(straight).inputs.train.batches_per_epoch == 31
    assert train.train(straight) == 0
    run_in_parts(parts, *stops)
    assert_same_bits(straight, parts)


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "sequential"])
def test_so_it_does_where_the_rows_of_a_batch_are_from_several_shards(tmp_path, capsys, shuffle):
    tiny.write_data(tmp_path / "data", n=60)
    for i in range(5):  # 3, 4, 5, 6 and 7 windows; train.bin has 3
        tokens = np.random.default_rng(i).integers(0, 50257, 16 * (3 + i) + 9)
        shards.write_shard(tmp_path / "data" / f"train_{i}.bin", tokens.astype(np.uint16))
    changes = {"batch_size": 4, "total_batch": 128, "shuffle": shuffle}  # 7 batches an epoch
    straight, parts = (settings(tmp_path, run=name, **changes) for name in ("straight", "parts"))
    assert train.train(straight) == 0
    run_in_parts(parts, 2, 3, 9)
    assert_same_bits(straight, parts)


def test_so_it_does_when_sigterm_comes_at_random_steps(tmp_path, capsys, monkeypatch):
    straight, parts = (settings(tmp_path, run=name, total_batch=96) for name in ("straight", "parts"))
    assert train.train(straight) == 0
    ends = sorted(random.Random(0).sample(range(1, STEPS), 4))
    micro_batch = TrainingStep.micro_batch
    calls = []

    def interrupted(step, x, y):
        calls.append(len(calls))
        if ends and len(calls) == 3 * ends[0] - 1:  # within a step, which has three
            os.kill(os.getpid(), signal.SIGTERM)
        return micro_batch(step, x, y)

    monkeypatch.setattr(TrainingStep, "micro_batch", interrupted)
    for n, end in enumerate(list(ends)):
        assert train.train(replace(parts, resume=n > 0)) == 128 + signal.SIGTERM
        assert checkpoint.list_checkpoints(parts.folder / "checkpoints")[-1][0] == end
        ends.pop(0)
    assert train.train(replace(parts, resume=True)) == 0
    assert_same_bits(straight, parts)


@pytest.mark.long
def test_so_it_does_compiled_in_bf16_with_deterministic_algorithms(tmp_path, capsys):
    changes = {"compile": "on", "deterministic": True, "precision": "bf16", "total_batch": 96, "steps": 8}
    first, second, parts = (settings(tmp_path, run=name, **changes) for name in ("first", "second", "parts"))
    for c in (first, second):
        assert train.train(c) == 0
    run_in_parts(parts, 5)
    assert_same_bits(first, second)
    assert_same_bits(first, parts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_deterministic_runs_have_the_same_bits(tmp_path, capsys, precision, accumulation):
    changes = {"deterministic": True, "precision": precision, "total_batch": 32 * accumulation, "steps": 8}
    runs = [settings(tmp_path, run=name, **changes) for name in ("first", "second")]
    for c in runs:
        torch.rand(5)
        assert train.train(c) == 0
    assert_same_bits(*runs)
    assert "deterministic" in capsys.readouterr().out


@pytest.mark.long
def test_two_deterministic_runs_of_our_kernels_have_the_same_bits(tmp_path, capsys):
    changes = {"model": replace(tiny.MODEL, n_embd=32), "backend": "triton", "optimizer": "triton", "sample_every": 0}
    changes |= {"steps": 2, "warmup": 1, "val_every": 0, "deterministic": True, "batch_size": 1, "total_batch": 16}
    runs = [settings(tmp_path, run=name, **changes) for name in ("first", "second")]
    for c in runs:
        assert train.train(c) == 0
    assert_same_bits(*runs)


def test_deterministic_is_refused_where_ops_are_picked_by_time(tmp_path):
    with pytest.raises(UserError, match="picks ops by time.*use --backend torch or triton"):
        start_session(settings(tmp_path, deterministic=True, backend="auto"))


def test_deterministic_is_refused_where_torch_has_no_such_gradient():
    with pytest.raises(UserError, match="no deterministic gradient on MPS"):
        device.set_deterministic(torch.device("mps"), True)
    device.set_deterministic(torch.device("mps"), False)


@pytest.mark.parametrize(("given", "left"), [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", None)])
def test_cublas_gets_a_deterministic_workspace(monkeypatch, given, left):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    if left is None:
        with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG is :0:0: --deterministic needs :4096:8 or :16:8"):
            device.set_deterministic(torch.device("cuda"), True)
    else:
        device.set_deterministic(torch.device("cuda"), True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == left


def test_torch_and_inductor_are_set_and_reset_by_the_next_run():
    import torch._inductor.config as inductor

    for on in (True, False):
        device.set_deterministic(torch.device("cpu"), on)
        assert torch.are_deterministic_algorithms_enabled() is on
        assert inductor.deterministic is on  # no candidates are timed
        assert not torch.utils.deterministic.fill_uninitialized_memory
        with device.any_algorithm():
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled() is on


def test_another_number_of_threads_is_refused_unless_deterministic_is_turned_off(tmp_path, capsys):
    c = settings(tmp_path, deterministic=True, stop_at=2)
    train.train(c)
    torch.set_num_threads(2)
    resumed = replace(c, resume=True, stop_at=3)
    with pytest.raises(
        UserError, match=r"had device_name = .*1 threads, and now it is .*2 threads.*--no-deterministic"
    ):
        train.train(resumed)
    assert train.train(replace(resumed, deterministic=False)) == 0
    assert "changed: deterministic was True and is False" in capsys.readouterr().out


def test_another_precision_is_refused_too(tmp_path, capsys):
    c = settings(tmp_path, deterministic=True, stop_at=2)
    train.train(c)
    with pytest.raises(UserError, match="had precision = fp32, and now it is bf16, which would change its bits"):
        start_session(replace(c, resume=True, precision="bf16", stop_at=None))
