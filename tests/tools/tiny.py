"""A training run small enough for tests: one block of width 16 on 256 words, about 4 ms a step on one core."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from gpt2fast.data import shards
from gpt2fast.model import GPTConfig
from gpt2fast.ops import OpsConfig
from gpt2fast.training.choices import Choices
from gpt2fast.training.config import TrainConfig

MODEL = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=256)
GPT2_WORDS = replace(MODEL, vocab_size=50257)  # for tests with text, 20 ms a step
FLAGS = [
    "nano", "--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "16", "--model.block-size", "16",
    "--model.vocab-size", "256",
    "--batch-size", "2", "--seq-len", "16", "--total-batch", "32", "--steps", "20", "--warmup", "2", "--lr", "1e-2",
    "--device", "cpu", "--precision", "fp32", "--val-every", "5", "--val-batches", "2", "--sample-every", "0",
    "--checkpoint-every", "10", "--data", "data", "--run", "tiny",
]  # fmt: skip


def write_data(folder: Path, seed: int = 0, n: int = 1000) -> Path:
    """Write a train and a val shard of token pairs: 2k + 1 follows 2k, so there is something to learn."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("train", n), ("val", 200)):
        first = 2 * random.integers(0, 100, size // 2)
        shards.write_shard(folder / f"{name}.bin", np.stack([first, first + 1], 1).ravel().astype(np.uint16))
    return folder


def choices(**changes) -> Choices:
    """Return the choices that FLAGS lead to."""
    base = Choices(
        device="cpu", device_name="a CPU, 1 threads", ranks=1, torch="2.11.0", precision="fp32", tf32=None,
        residual="fp32", compile=False, deterministic=False, recompute=False, cuda_graph=False, optimizer="torch",
        copies="autocast", ops=OpsConfig().with_backend("torch"), auto=None,
    )  # fmt: skip
    return replace(base, **changes)


def config(folder: Path, **changes) -> TrainConfig:
    """Return the config that FLAGS give, for the run folder/out/tiny on folder/data, which is written if missing."""
    if not (folder / "data").exists():
        write_data(folder / "data")
    base = TrainConfig(
        model=MODEL, batch_size=2, seq_len=16, total_batch=32, steps=20, warmup=2, lr=1e-2, device="cpu",
        precision="fp32", val_every=5, val_batches=2, sample_every=0, checkpoint_every=10, data=str(folder / "data"),
        out=folder / "out", run="tiny",
    )  # fmt: skip
    return replace(base, **changes)
