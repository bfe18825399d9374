"""What runs in which a fault was injected are held against: the rows and weights of one that nothing disturbed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from gpt2fast.train import train
from gpt2fast.weights import checkpoint

SHORT = {"steps": 6, "checkpoint_every": 2, "val_every": 3}
TIMES = ("tokens_per_s", "mfu")


def rows(c) -> list[dict]:
    """Of metrics.jsonl, every line of which must be JSON; without what takes a clock."""
    lines = (c.folder / "metrics.jsonl").read_text().splitlines()
    return [{name: x for name, x in json.loads(line).items() if name not in TIMES} for line in lines]


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
