"""A finished run as tests compare it: its rows without times, its weights and moments."""

import torch
from safetensors.torch import load_file

from gpt2fast.training import run
from gpt2fast.weights import checkpoint


def metrics(c):
    """Return the rows of a run, without times."""
    rows = run.read_metrics(c.folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ("tokens_per_s", "mfu")} for row in rows]


def tensors(c):
    """Return weights and moments of a run's newest checkpoint."""
    _, path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1]
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
