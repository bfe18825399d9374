"""Tokens/s of our `sample` and of transformers' `generate`, same weights, same prompt: `python -m benchmarks.generate`.

Both take the likeliest token, so both must write the same text. Each runs in a process of its own; they take turns.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import harness, textbook
from gpt2fast import ops
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
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
ROUNDED = "transformers generate, rounded weights"  # which we compute with too; its sums and norms are not in fp32
NAMES = (OURS, "transformers generate", ROUNDED)
TIMED = 3  # texts a process


@dataclass(frozen=True)
class Work:
    size: str
    B: int  # texts at once
    prompt: int  # tokens
    tokens: int  # to write
    precision: Precision
    device: str


def writer(name: str, model: GPT, work: Work, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function (B, prompt) -> (B, tokens)."""
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


def measure(name: str, work: Work, device: torch.device) -> dict:
    """Write one text to warm up, then time some."""
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


def run_all(work: Work, options: argparse.Namespace, path: Path) -> list[dict]:
    record = versions.record()
    rows: list[dict] = []
    for repetition in range(options.repetitions):
        for name in NAMES[: 2 if work.precision == "fp32" else 3]:
            print(f"{repetition + 1}/{options.repetitions}  {name} ...", end=" ", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                out, log = Path(folder) / "row.json", Path(folder) / "log"
                arguments = ["--size", work.size, "--batch-size", work.B, "--prompt", work.prompt]
                arguments += ["--tokens", work.tokens, "--precision", work.precision, "--device", work.device]
                result = harness.run_apart(
                    "benchmarks.generate", *arguments, "--only", name, out, limit=options.limit, log=log
                )
                result = json.loads(out.read_text()) if out.exists() else result
            common = {"suite": "generate", "name": name, "ours": name == OURS, "repetition": repetition}
            row = common | result | {"config": asdict(work), "machine": record}
            row["agrees"] = agreement(row, rows)
            harness.append_row(path, row)
            rows.append(row)
            print(describe(row), flush=True)
    return rows


def agreement(row: dict, before: Sequence[dict]) -> float | None:
    """The share of tokens that the first text has too. Below 1: rounding chose another of two likeliest tokens."""
    first = next((other["text"] for other in before if "text" in other), None)
    if first is None or "text" not in row:
        return None
    return sum(a == b for a, b in zip(row["text"], first)) / len(first)


def describe(row: dict) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row.get('why') or row['tail'].strip().splitlines()[-1]}"
    return f"{row['tokens_per_s']['median']:,.0f} tokens/s, {row['ms_per_token']:.1f} ms a token"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.splitlines()[0])
    p.add_argument("--size", choices=SIZES, default="gpt2")
    p.add_argument("--batch-size", type=int, default=1, help="texts at once")
    p.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    p.add_argument("--tokens", type=int, default=64, help="tokens to write")
    p.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    p.add_argument("--device", default="auto")
    p.add_argument("--repetitions", type=int, default=3)
    p.add_argument("--limit", type=float, default=300.0, help="seconds for a process")
    p.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of results")
    p.add_argument("--file", type=Path, help="append the rows to this file instead")
    p.add_argument("--only", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)  # what a process gets
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    for name in ("batch_size", "prompt", "tokens", "repetitions"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be at least 1")
    block = SIZES[options.size].block_size
    if options.prompt + options.tokens > block:
        raise UserError(f"--prompt {options.prompt} and --tokens {options.tokens} are more than {block} positions")
    work = Work(options.size, options.batch_size, options.prompt, options.tokens, precision, str(device))
    if options.only:
        Path(options.only[1]).write_text(json.dumps(measure(options.only[0], work, device)))
        return 0
    path = options.file or harness.results_file("generate", options.out)
    print(f"{work.size}, {work.B} x {work.tokens} tokens, {precision}, on {device_name(device)}; rows in {path}")
    rows = run_all(work, options, path)
    return 0 if all(row["status"] in ("ok", "skipped") for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
