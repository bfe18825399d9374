"""How good a model is: `python -m gpt2fast.evaluate out/nano --hellaswag`.

Loss over a whole split: windows of T follow one another, each token but a shard's first is predicted once, and what is
left at a shard's end is a shorter window, padded. So the loss is the exact mean over tokens. A window begins without
memory of the one before it, as in training. HellaSwag: see hellaswag.py.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tqdm import tqdm

from gpt2fast import config, data, hellaswag, machine, ops, pretrained, session
from gpt2fast.allocator import keep_freed_memory
from gpt2fast.config import TrainConfig
from gpt2fast.data import Dataset
from gpt2fast.device import Precision, autocast, device_name, pick_device, pick_precision, use_allowed_cores
from gpt2fast.distributed import ALONE, World, joined, one_complains
from gpt2fast.errors import RunError, UserError, run_main
from gpt2fast.files import write_atomic
from gpt2fast.flags import named_from
from gpt2fast.model import GPT, parameter_count
from gpt2fast.ops import Backend
from gpt2fast.reference import IGNORE

BATCH_TOKENS = {"cuda": 16384}  # logits of it take 5 GB where an op makes them all at once; elsewhere 4096
PART = 2**24  # tokens that are counted at once


@dataclass(frozen=True)
class SplitLoss:
    """Mean loss in nats over `tokens` predicted tokens; `whole` if that is every token of the split."""

    loss: float
    tokens: int
    whole: bool


@torch.no_grad()
def split_loss(
    model: GPT,
    shards: Sequence[np.ndarray],
    B: int,
    T: int,
    precision: Precision,
    *,
    max_batches: int | None = None,
    give_up: Callable[[], bool] = lambda: False,
    progress: bool = False,
    world: World = ALONE,
) -> SplitLoss | None:
    """The exact mean loss over `shards`, or over their first `max_batches` batches of (B, T), which the ranks share.

    None once `give_up`, asked before each batch, says yes to any of them. UserError if there is nothing to predict.
    """
    total = sum(max(0, len(tokens) - 1) for tokens in shards)
    if not total:
        raise UserError("the split holds no two tokens in a row: there is nothing to predict")
    device, losses, done, given_up = model.wte.weight.device, 0.0, 0, False
    expected = total if max_batches is None else min(total, max_batches * B * T)
    with tqdm(
        total=expected // world.size,
        desc="loss",
        unit=" tokens",
        unit_scale=True,
        disable=not progress,
        mininterval=0.5,
    ) as bar:
        for x, y in _batches(
            shards, B, T, model.config.vocab_size, range(world.rank, max_batches or sys.maxsize, world.size)
        ):
            given_up = give_up()
            if given_up:
                break
            n = int((y != IGNORE).sum())
            with autocast(device, precision):
                loss = model(x.to(device), y.to(device)).item()
            losses, done = losses + n * loss, done + n
            bar.update(n)
            bar.set_postfix_str(f"loss {losses / done:.4f}")
    summed, count, gave_up = world.totals(losses, done, given_up)
    return None if gave_up else SplitLoss(summed / count, int(count), count == total)


def _batches(
    shards: Sequence[np.ndarray], B: int, T: int, vocab_size: int, numbers: range
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """x, y of (B, T) int64 in the order of the shards; fewer rows in the last. Behind a shard's end y is IGNORE.

    `numbers`: which of the batches.
    """
    windows = (data.read_tokens(tokens, i, i + T + 1) for tokens in shards for i in range(0, len(tokens) - 1, T))
    for number in itertools.count():
        rows = list(itertools.islice(windows, B))
        if not rows or number >= numbers.stop:
            return
        if number not in numbers:
            continue
        x, y = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), IGNORE, np.int64)
        for i, row in enumerate(rows):
            data.check_tokens(row, vocab_size, f"batch {number}")
            x[i, : len(row) - 1], y[i, : len(row) - 1] = row[:-1], row[1:]
        yield torch.from_numpy(x), torch.from_numpy(y)


def count_all(shards: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """How often each token occurs, (vocab_size,) int64. In parts, since counting makes int64 of them."""
    parts = [tokens[i : i + PART] for tokens in shards for i in range(0, len(tokens), PART)]
    return data.count_tokens(parts, vocab_size, sum(map(len, parts)))


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Validation loss and HellaSwag of a model."""

    source: str
    """A run's folder, for instance out/nano, or weights from elsewhere."""
    data: str | None = None
    """A folder of token shards; stdlib, the source of Python's standard library; or none. None: a run's own data."""
    split: Literal["val", "train"] = "val"
    """Which of its splits."""
    hellaswag: bool = False
    """Score HellaSwag's validation split; its file is downloaded to data/hellaswag where it is not there yet."""
    from_: "Annotated[Path | None, named_from()]" = None
    """Score this copy of HellaSwag: hellaswag_val.jsonl, or llm.c's hellaswag_val.bin."""
    batch_size: int | None = None
    """Sequences at a time. None: 16384 tokens on CUDA, else 4096."""
    seq_len: int | None = None
    """Tokens in a sequence. None: what the run was trained with, or the longest that the model reads."""
    max_batches: int | None = None
    """Only the split's first batches."""
    max_examples: int | None = None
    """Only HellaSwag's first examples."""
    backend: Backend = "auto"
    """Implementation of the seven ops; auto: what the run was trained with, where this device has it; else torch."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As in training."""
    out: Path | None = None
    """Write the results as JSON to this file, which must not exist."""
    tokenizer_file: Path | None = None
    """GPT-2's vocab.bpe, where it can neither be found nor downloaded."""


def evaluate(c: EvaluateConfig, world: World = ALONE) -> dict:
    """The results, plain JSON, on every rank. UserError on what cannot work, found before anything is computed."""
    start = time.perf_counter()
    for name in ("batch_size", "seq_len", "max_batches", "max_examples"):
        if getattr(c, name) is not None and getattr(c, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(c, name)}: it must be at least 1")
    check_free(c.out)
    folder = run_folder(c.source)
    settings, resolved = config.read_record(folder) if folder else (None, {})
    wanted = c.data or (settings.data if settings else "none")
    scored = c.hellaswag or c.from_ is not None
    if wanted == "none" and not scored:
        known = "" if folder else f", since {c.source} is no run, which would have its own data"
        raise UserError(f"nothing to evaluate{known}: name a folder of shards with --data, or add --hellaswag")

    device = pick_device(c.device, world)
    as_trained = settings.implementations if settings and c.backend == "auto" else None
    chosen = as_trained or ops.OpsConfig().with_backend(c.backend)
    precision = pick_precision(c.precision, device, ops.interpreted(chosen))
    examples = []
    if scored:
        if world.main and c.from_ is None:
            hellaswag.fetch()
        world.wait()
        path = c.from_ or hellaswag.fetch()
        examples = hellaswag.read(path, c.tokenizer_file)[: c.max_examples]
    model, description = pretrained.load(c.source, device, c.backend)
    if examples:
        hellaswag.fit(examples, model.config)
    T = c.seq_len or (settings.seq_len if settings else model.config.block_size)
    if model.config.block_size < T:
        raise UserError(f"--seq-len {T} is longer than the model's block size {model.config.block_size}: lower it")
    B = c.batch_size or max(1, BATCH_TOKENS.get(device.type, 4096) // T)
    dataset = None
    if wanted != "none":
        opened = replace(settings or TrainConfig(), model=model.config, data=wanted)
        dataset = session.open_data(replace(opened, tokenizer_file=c.tokenizer_file or opened.tokenizer_file))

    result = {
        "source": c.source,
        "model": description,
        **asdict(model.config),
        "parameters": parameter_count(model),
        "backend": c.backend,
        "ops": {name: getattr(model.ops, name).__module__ for name in ops.NAMES},
        "device": device_name(device),
        "precision": precision,
    }
    try:
        if dataset:
            result |= _loss(model, dataset, c, B, T, precision, world) | {
                "trained_on": resolved.get("data_fingerprint")
            }
        if examples:
            found = hellaswag.score(model, examples, precision, tokens=B * T, progress=world.main, world=world)
            assert found, "nobody gives up"
            result["hellaswag"] = {"file": str(path), **asdict(found)}
    except torch.OutOfMemoryError:
        raise RunError(f"out of memory with --batch-size {B} and --seq-len {T}: lower --batch-size") from None
    return result | {"seconds": round(time.perf_counter() - start, 3), "versions": machine.record()}


def run_folder(source: str) -> Path | None:
    """The run that a source is, or a checkpoint of which it is; None of weights from elsewhere."""
    path = Path(source)
    above = path.parents[1] if path.parent.name == "checkpoints" and len(path.parents) > 1 else path
    found = (folder for folder in (path, above) if (folder / "metrics.jsonl").exists())
    return next(found, None)


def _loss(model: GPT, dataset: Dataset, c: EvaluateConfig, B: int, T: int, precision: Precision, world: World) -> dict:
    shards = dataset.train if c.split == "train" else dataset.val
    if not shards:
        raise UserError(f"{dataset.name} has no {c.split} split: prepare more text, or take --split train")
    found = split_loss(model, shards, B, T, precision, max_batches=c.max_batches, progress=world.main, world=world)
    assert found, "nobody gives up"
    if not math.isfinite(found.loss):
        raise RunError(f"the loss is {found.loss}: look at the weights and the data, or try --precision fp32")
    counts = count_all(shards, model.config.vocab_size)
    return {
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "split": c.split,
        "batch_size": B,
        "seq_len": T,
        "tokens": found.tokens,
        "whole_split": found.whole,
        "loss": found.loss,
        "perplexity": math.exp(min(found.loss, 700.0)),
        "unigram_entropy": data.unigram_entropy(counts),
    }


def check_free(path: Path | None) -> None:
    """UserError if results cannot be written there: better before an hour of work than after it."""
    if path is None:
        return
    if path.exists():
        raise UserError(f"{path} exists already: choose another file with --out")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {path}, since {folder} is no folder to write to: choose another with --out")


def table(result: dict) -> str:
    """What a person wants to read of the results."""
    rows = {
        "model": f"{result['model']}: {result['parameters']:,} parameters",
        "device": f"{result['device']}, {result['precision']}",
    }
    if "loss" in result:
        part = "whole split" if result["whole_split"] else "beginning of the split"
        rows |= {
            "data": f"{result['data']} ({result['fingerprint']}), {result['split']}",
            "tokens": f"{result['tokens']:,}, the {part}, in windows of {result['seq_len']}",
            "loss": f"{result['loss']:.4f} nats per token; unigram entropy {result['unigram_entropy']:.4f}",
            "perplexity": f"{result['perplexity']:.2f}",
        }
    if found := result.get("hellaswag"):
        cut = f", {found['cut']:,} with a shortened context" if found["cut"] else ""
        rows |= {
            "hellaswag": f"acc_norm {found['acc_norm']:.4f} +- {found['stderr']:.4f}, acc {found['acc']:.4f} "
            f"(guessing: 0.25); {found['examples']:,} examples{cut}"
        }
    rows["time"] = f"{result['seconds']:.1f} s"
    text = "\n".join(f"{name:<10}  {value}" for name, value in rows.items())
    if result.get("trained_on") not in (None, result.get("fingerprint")):
        text += f"\nnote: the run was trained on other data, of fingerprint {result['trained_on']}"
    return text


def main(argv: Sequence[str]) -> None:
    import tyro

    keep_freed_memory()
    use_allowed_cores()
    with joined() as world:
        with one_complains(world):
            c = tyro.cli(
                EvaluateConfig, args=argv, prog="python -m gpt2fast.evaluate",
                config=(tyro.conf.PositionalRequiredArgs,),
            )  # fmt: skip
        result = evaluate(c, world)
        print(table(result))
        if c.out and world.main:
            write(c.out, result)


def write(path: Path, result: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(result, indent=1))
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror}): the results are those above") from None


if __name__ == "__main__":
    run_main(main)
