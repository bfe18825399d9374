"""Measure how good a model is: `python -m gpt2fast.evaluate out/nano --hellaswag`.

It computes the loss over a whole split (inference/loss.py) and the accuracy on HellaSwag (inference/hellaswag.py).
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from gpt2fast import ops
from gpt2fast.command import named_from, parse, run_main
from gpt2fast.data.dataset import Dataset, count_all, open_data, unigram_entropy
from gpt2fast.errors import RunError, UserError, check_at_least, describe_error
from gpt2fast.files.atomic import check_new, write_atomic
from gpt2fast.inference import hellaswag
from gpt2fast.inference.loss import split_loss
from gpt2fast.machine import versions
from gpt2fast.machine.device import (
    Precision,
    device_name,
    keep_freed_memory,
    pick_device,
    pick_precision,
    use_allowed_cores,
)
from gpt2fast.machine.joined import joined, one_complains
from gpt2fast.machine.world import ALONE, World
from gpt2fast.model import GPT, parameter_count
from gpt2fast.ops import Backend
from gpt2fast.training import config
from gpt2fast.training.config import TrainConfig
from gpt2fast.weights.foreign import Weights
from gpt2fast.weights.load import build_model, choose_ops, read_weights

BATCH_TOKENS = {"cuda": 16384}  # their logits take 5 GB if an op computes all at once; 4096 on other devices


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compute the validation loss of a model, and its accuracy on HellaSwag."""

    source: str
    """The model: a run folder such as out/nano (its newest checkpoint), a checkpoint, or weights from elsewhere."""
    data: str | None = None
    """Folder of token shards; stdlib, the source of Python's standard library; or none, for no loss.
    None: the data of the run."""
    split: Literal["val", "train"] = "val"
    """Split of the data."""
    hellaswag: bool = False
    """Score HellaSwag's validation split, whose file is downloaded to data/hellaswag if it is not there."""
    from_: "Annotated[Path | None, named_from()]" = None
    """Score this copy of the HellaSwag authors' hellaswag_val.jsonl. None: the file of --hellaswag."""
    batch_size: int | None = None
    """Sequences to compute at once. None: 16384 tokens on CUDA, else 4096."""
    seq_len: int | None = None
    """Tokens in a sequence. None: that of the run's training, or the longest that the model reads."""
    max_batches: int | None = None
    """Number of first batches of the split to use. None: all."""
    max_examples: int | None = None
    """Number of first examples of HellaSwag to use. None: all."""
    backend: Backend = "auto"
    """Implementation of the seven ops. auto: that of the run's training where this device has it; else torch."""
    device: str = "auto"
    """Device to compute on: cpu, cuda, cuda:1, mps. auto: CUDA if there is one, else MPS, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute in fp32, or by autocast in bf16 or fp16.
    auto: bf16 where the device is fast at it; else fp16 on CUDA; else fp32."""
    out: Path | None = None
    """Write the results as JSON to this file, which must not exist. None: only print them."""
    tokenizer_file: Path | None = None
    """Path of GPT-2's vocab.bpe. None: found in a cache or an installed package, or downloaded."""


def evaluate(c: EvaluateConfig, world: World = ALONE) -> dict:
    """Return the results as plain JSON, on every rank. UserError, before any computation, if something cannot work."""
    start = time.perf_counter()
    check_at_least(c, batch_size=1, seq_len=1, max_batches=1, max_examples=1)
    if c.out:
        check_new(c.out)
    weights = read_weights(c.source)
    trained = trained_with(weights)
    wanted = c.data or (trained.data if trained else "none")
    scored = c.hellaswag or c.from_ is not None
    if wanted == "none" and not scored:
        known = "" if trained else f", since {c.source} is not a run with data of its own"
        raise UserError(f"nothing to evaluate{known}: name a folder of shards with --data, or add --hellaswag")

    device = pick_device(c.device, world)
    chosen = choose_ops(weights, device, c.backend, print)
    precision = pick_precision(c.precision, device, ops.interpreted(chosen))
    examples = []
    if scored:
        if world.main and c.from_ is None:
            hellaswag.fetch()
        world.barrier()
        path = c.from_ or hellaswag.fetch()
        examples = hellaswag.read_examples(path, c.tokenizer_file)[: c.max_examples]
    model = build_model(weights, chosen, device)
    if examples:
        hellaswag.fit(examples, model.config)
    T = c.seq_len or (trained.seq_len if trained else model.config.block_size)
    if model.config.block_size < T:
        raise UserError(f"--seq-len {T} is longer than the model's block size {model.config.block_size}: lower it")
    B = c.batch_size or max(1, BATCH_TOKENS.get(device.type, 4096) // T)
    dataset = None
    if wanted != "none":
        vocabulary = c.tokenizer_file or (trained.tokenizer_file if trained else None)
        dataset = open_data(wanted, model.config.vocab_size, vocabulary)

    result = {
        "source": c.source,
        "model": weights.where,
        **asdict(model.config),
        "parameters": parameter_count(model),
        "backend": c.backend,
        "ops": {name: getattr(model.ops, name).__module__ for name in ops.NAMES},
        "device": device_name(device),
        "precision": precision,
    }
    try:
        if dataset:
            result |= evaluate_split(model, dataset, c, B, T, precision, world)
            result["trained_on"] = weights.state and weights.state.get("data_fingerprint")
        if examples:
            found = hellaswag.score(model, examples, precision, tokens=B * T, progress=world.main, world=world)
            assert found, "only give_up makes it None"
            result["hellaswag"] = {"file": str(path), **asdict(found)}
    except torch.OutOfMemoryError:
        raise RunError(f"out of memory with --batch-size {B} and --seq-len {T}: lower --batch-size") from None
    return result | {"seconds": round(time.perf_counter() - start, 3), "versions": versions.record()}


def trained_with(weights: Weights) -> TrainConfig | None:
    """Return the settings of the run that a checkpoint is from; None for weights in other formats."""
    if weights.state is None:
        return None
    try:
        return config.from_dict(weights.state["config"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{weights.where}/state.json is damaged or of another version ({describe_error(error)}): "
            "name another checkpoint, or export this one and evaluate that"
        ) from None


def evaluate_split(
    model: GPT, dataset: Dataset, c: EvaluateConfig, B: int, T: int, precision: Precision, world: World
) -> dict:
    """Return the loss over a split, and what it was computed from."""
    shards = dataset.train if c.split == "train" else dataset.val
    if not shards:
        raise UserError(f"{dataset.name} has no {c.split} split: prepare more text, or use --split train")
    found = split_loss(model, shards, B, T, precision, max_batches=c.max_batches, progress=world.main, world=world)
    assert found, "only give_up makes it None"
    if not math.isfinite(found.loss):
        raise RunError(f"the loss is {found.loss}: check the weights and the data, or try --precision fp32")
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
        "unigram_entropy": unigram_entropy(counts),
    }


def results_table(result: dict) -> str:
    """Return the results as lines to print."""
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
        text += f"\nnote: the run was trained on other data (fingerprint {result['trained_on']})"
    return text


def main(argv: Sequence[str]) -> None:
    keep_freed_memory()
    use_allowed_cores()
    with joined() as world:
        with one_complains(world):
            c = parse(EvaluateConfig, argv, "gpt2fast.evaluate")
        result = evaluate(c, world)
        print(results_table(result))
        if c.out and world.main:
            write_results(c.out, result)


def write_results(path: Path, result: dict) -> None:
    """Write the results as JSON."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(result, indent=1))
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({error.strerror}): free some space, or copy the results printed above"
        ) from None


if __name__ == "__main__":
    run_main(main)
