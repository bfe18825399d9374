"""Random command lines of our programs. The files that they name do not exist, so no program may start its work."""

import contextlib
import json
import os
from pathlib import Path
from random import Random

from gpt2fast import evaluate, export, inspect, prepare, sample, train
from gpt2fast.errors import UserError
from tests.tools.damage import Files, Target

PROGRAMS = {
    "train": (train.main, ["nano", "--data", "nowhere", "--device", "cpu"]),
    "prepare": (prepare.main, ["nowhere"]),
    "sample": (sample.main, ["nowhere", "--device", "cpu"]),
    "evaluate": (evaluate.main, ["nowhere", "--device", "cpu"]),
    "export": (export.main, ["nowhere", "--out", "out"]),
    "inspect": (inspect.main, ["nowhere"]),
}
FLAGS = (
    "--steps", "--lr", "--batch-size", "--seq-len", "--total-batch", "--model.n-layer", "--model.n-embd", "--run",
    "--model.n-head", "--model.block-size", "--model.vocab-size", "--warmup", "--seed", "--keep", "--out", "--resume",
    "--backend", "--ops.mlp", "--precision", "--device", "--init-from", "--hellaswag", "--tokenizer-file", "--dtype",
    "--prompt", "--tokens", "--temperature", "--top-k", "--top-p", "--samples", "--stream", "--max-batches", "--help",
    "--from", "--field", "--suffixes", "--val-fraction", "--shard-tokens", "--max-tokens", "--threads", "--format",
    "--compile", "--residual", "--log-every", "--stop-at", "--grad-clip", "--beta1", "--split", "--hellaswag-every",
)  # fmt: skip
WORDS = ("0", "-1", "1", "7", "nan", "inf", "1e400", "9" * 30, "none", "None", "", "..", "/dev/null", "/dev/null/x",
         "../x", "a/b", "nano", "auto", "triton", "cpu", "cuda:99", "--", "-", "x" * 300, "\u0663", "\u00e9", "True",
         "shakespeare", "fp16", "0.5")  # fmt: skip


class CommandLine(Target):
    """A target whose damaged file is the command line."""

    def case(self, random: Random) -> Files:
        name = random.choice(sorted(PROGRAMS))
        argv = list(PROGRAMS[name][1])
        for _ in range(random.randrange(5)):
            new = [random.choice(FLAGS), random.choice(WORDS)][: random.choice((1, 2, 2, 2, 2))]
            argv[:] = [*argv, *new] if name != "train" else [argv[0], *new, *argv[1:]]
        if random.random() < 0.1:
            argv[random.randrange(len(argv))] = random.choice(WORDS)
        return {"argv.json": json.dumps([name, *argv]).encode()}


def run_program(folder: Path) -> object:
    name, *argv = json.loads((folder / "argv.json").read_text())
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        try:
            return PROGRAMS[name][0](argv)
        except SystemExit as error:
            if error.code == 2:  # tyro's
                raise UserError("usage") from None
            if error.code:
                raise RuntimeError(f"exit code {error.code}") from None
