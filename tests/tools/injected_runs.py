"""What runs in which a fault was injected are held against: the rows and weights of one that nothing disturbed."""

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
    """What an undisturbed run comes to."""
    other = replace(c, run="straight")
    train(other)
    return rows(other), weights(other)


def go_on(c) -> None:
    """As the message says: resume from a checkpoint, or begin again where none is."""
    found = checkpoint.list_checkpoints(c.folder / "checkpoints")
    if found and found[-1][0] == c.steps:
        return  # what failed came behind the last
    if found:
        c = replace(c, resume=True)
    elif (c.folder / "config.json").exists():
        shutil.rmtree(c.folder)
    train(c)


def rubbish(c) -> list[Path]:
    return [path for path in c.folder.rglob(".*") if path.exists()]
