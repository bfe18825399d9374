"""Runs with an injected fault, compared with an undisturbed run by their rows and weights."""

import shutil
from dataclasses import replace
from pathlib import Path

from gpt2fast.train import train
from gpt2fast.weights import checkpoint
from tests.tools.runs import metrics as rows

SHORT = {"steps": 6, "checkpoint_every": 2, "val_every": 3}


def weights(c) -> list[bytes]:
    path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1][1]
    return [(path / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


def straight(c) -> tuple[list[dict], list[bytes]]:
    """Return the rows and weights of an undisturbed run."""
    other = replace(c, run="straight")
    train(other)
    return rows(other), weights(other)


def resume_or_restart(c) -> None:
    """Do what the message says: resume from a checkpoint, or start again if there is none."""
    found = checkpoint.list_checkpoints(c.folder / "checkpoints")
    if found and found[-1][0] == c.steps:
        return  # the fault came after the last checkpoint
    if found:
        c = replace(c, resume=True)
    elif (c.folder / "config.json").exists():
        shutil.rmtree(c.folder)
    train(c)


def rubbish(c) -> list[Path]:
    """Return the temporary files that the run has left."""
    return [path for path in c.folder.rglob(".*") if path.exists()]
