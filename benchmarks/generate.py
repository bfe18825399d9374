"""Time our `sample` and transformers' `generate`, same weights, same prompt: `python -m benchmarks.generate`.

Both choose the most likely token, so both must write the same text. Each runs in a process of its own; they take turns.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import flags, harness, textbook
from benchmarks.ladder import why
from gpt2fast import ops
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least
from gpt2fast.inference.decode import Sampling, generate
from gpt2fast.machine import versions
from gpt2fast.machine.device import (
    DTYPES,
    Precision,
    autocast,
    device_name,
    keep_freed_memory,
    pick_device,
    pick_precision,
    synchronize,
)
from gpt2fast.model import GPT, SIZES

OURS = "gpt2fast sample"
ROUNDED = "transformers generate, rounded weights"  # in bf16 or fp16 throughout, sums and norms included
NAMES = (OURS, "transformers generate", ROUNDED)
TIMED = 3  # texts that a process is timed for


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Time our sample and transformers' generate, with the same weights and the same prompt."""

    size: flags.Size = "gpt2"
    """Model."""
    batch_size: int = 1
    """Texts that are written at once."""
    prompt: int = 32
    """Tokens in the prompt."""
    tokens: int = 64
    """Tokens to write."""
    precision: flags.AnyPrecision = "auto"
    """auto: bf16 where the device is fast at it, fp16 on CUDA without it, else fp32."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    repetitions: int = 3
    """Turns of all programs."""
    limit: float = 300.0
    """Seconds for a process."""
    out: Path = harness.RESULTS
    """Folder of results."""
    file: Path | None = None
    """Append the rows to this file instead of a new one in --out."""


@dataclass(frozen=True)
class Work:
    """The texts that all programs write."""

    size: str
    B: int  # texts at once
    prompt: int  # tokens
    tokens: int  # to write
    precision: Precision
    device: str


@dataclass(frozen=True)
class Job:
    """What the process of a program gets."""

    name: str
    work: Work


def writer(name: str, model: GPT, work: Work, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function (B, prompt) -> (B, tokens)."""
    if name == OURS:
        greedy = Sampling(temperature=0)
        return lambda idx: generate(model, idx, work.tokens, greedy, precision=work.precision)
    theirs = textbook.hugging_face(model, cache=True).to(device).model.eval()
    if name == ROUNDED:
        theirs = theirs.to(DTYPES[work.precision])
    options: dict = {"max_new_tokens": work.tokens, "do_sample": False, "use_cache": True, "eos_token_id": None}
    padding = list(range(model.config.vocab_size, model.config.padded_vocab_size))  # never written
    options |= {"pad_token_id": 0, **({"suppress_tokens": padding} if padding else {})}

    def write(idx: Tensor) -> Tensor:
        with autocast(device, "fp32" if name == ROUNDED else work.precision):
            return theirs.generate(idx, attention_mask=torch.ones_like(idx), **options)[:, work.prompt :]

    return write


def measure(job: Job) -> dict:
    """Write a text to warm up, then time TIMED more."""
    name, work, device = job.name, job.work, torch.device(job.work.device)
    keep_freed_memory()
    model = GPT(SIZES[work.size], ops.build(ops.OpsConfig(), device.type)).to(device)
    try:
        write = writer(name, model, work, device)
    except ImportError as error:
        return {"status": "skipped", "why": str(error)}
    idx = torch.randint(model.config.vocab_size, (work.B, work.prompt), generator=torch.Generator().manual_seed(0))
    idx, times = idx.to(device), []
    with torch.no_grad():
        text = write(idx)
        for _ in range(TIMED):
            synchronize(device)
            start = time.perf_counter()
            write(idx)
            synchronize(device)
            times.append(time.perf_counter() - start)
    return {
        "status": "ok",
        "tokens_per_s": harness.spread([work.B * work.tokens / t for t in times]),
        "ms_per_token": 1e3 * median(times) / work.tokens,
        "peak_memory": harness.peak_memory(device),
        "text": text[0].tolist(),
    }


def compare(c: GenerateConfig) -> list[dict]:
    """Run each program in its own process, all of them in turn. The rows are on the disk at once."""
    check_at_least(c, batch_size=1, prompt=1, tokens=1, repetitions=1, limit=0)
    block = SIZES[c.size].block_size
    if c.prompt + c.tokens > block:
        raise UserError(f"--prompt {c.prompt} and --tokens {c.tokens} are more than {block} positions: lower one")
    device = pick_device(c.device)
    precision = pick_precision(c.precision, device)
    work = Work(c.size, c.batch_size, c.prompt, c.tokens, precision, str(device))
    path = c.file or harness.results_file("generate", c.out)
    print(f"{work.size}, {work.B} x {work.tokens} tokens, {precision}, on {device_name(device)}; rows in {path}")
    names = NAMES[: 2 if precision == "fp32" else 3]
    record = versions.record()
    rows: list[dict] = []
    for repetition in range(c.repetitions):
        results = harness.each_apart(measure, [Job(name, work) for name in names], limit=c.limit)
        for name, result in zip(names, results):
            common = {"suite": "generate", "name": name, "ours": name == OURS, "repetition": repetition}
            row = common | result | {"config": asdict(work), "machine": record}
            row["agrees"] = agreement(row, rows)
            harness.append_row(path, row)
            rows.append(row)
            print(f"{repetition + 1}/{c.repetitions}  {name}: {describe(row)}", flush=True)
    return rows


def agreement(row: dict, before: Sequence[dict]) -> float | None:
    """Return the share of tokens that the first text has too; below 1 where rounding changed the most likely token."""
    first = next((other["text"] for other in before if "text" in other), None)
    if first is None or "text" not in row:
        return None
    return sum(a == b for a, b in zip(row["text"], first)) / len(first)


def describe(row: dict) -> str:
    """Return a row's speed, or why it has none."""
    if row["status"] != "ok":
        return f"{row['status']}: {why(row)}"
    return f"{row['tokens_per_s']['median']:,.0f} tokens/s, {row['ms_per_token']:.1f} ms a token"


def main(argv: Sequence[str]) -> int:
    return harness.exit_code(compare(flags.parse(GenerateConfig, argv, "benchmarks.generate")))


if __name__ == "__main__":
    run_main(main)
