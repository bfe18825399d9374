"""Run our kernels at small shapes under NVIDIA's compute-sanitizer: `python -m benchmarks.sanitize`.

memcheck finds reads and writes outside of allocated memory (torch's caching allocator, which would hide them, is off);
racecheck finds threads of a block that access shared memory in no defined order. Neither the interpreter nor the
compiler can find these.
"""

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import flags, harness
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least

TOOLS = ("memcheck", "racecheck")
WORK = "from benchmarks.sanitize import work; work()"  # the program that a tool watches
FOUND = 9  # the exit code for "something was found"


@dataclass(frozen=True, kw_only=True)
class SanitizeConfig:
    """Run our kernels at small shapes under NVIDIA's compute-sanitizer."""

    limit: float = 600.0
    """Seconds for both tools."""


def work() -> None:
    """Run each kernel forward and backward at odd shapes, so that every mask is used: part tiles, padded D and V."""
    from gpt2fast import kernels

    def n(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    targets = torch.randint(60, (37,), device="cuda")
    targets[::5] = -100
    calls = {
        "gelu": lambda: kernels.gelu(n(37, 129)),
        "bias_gelu": lambda: kernels.bias_gelu(n(37, 129), n(129)),
        "layer_norm": lambda: kernels.layer_norm(n(37, 129), n(129), n(129)),
        "add_layer_norm": lambda: kernels.add_layer_norm(n(37, 129), n(37, 129), n(129), n(129))[1],
        "attention": lambda: kernels.attention(n(2, 300, 3 * 128), 2),
        "flash_attention": lambda: kernels.flash_attention(n(1, 2, 70, 40), n(1, 2, 200, 40), n(1, 2, 200, 40)),
        "cross_entropy": lambda: kernels.cross_entropy(n(37, 64) * 1, targets, vocab_size=60),
        "linear_cross_entropy": lambda: kernels.linear_cross_entropy(n(37, 32), n(64, 32), targets, 60),
        "mlp": lambda: kernels.mlp(n(37, 32), n(128, 32), n(128), n(32, 128), n(32)),
    }
    for name, call in calls.items():
        call().float().sum().backward()
        torch.cuda.synchronize()
        print(name, flush=True)


def check_all(limit: float, folder: Path) -> list[dict]:
    """Return a row for each tool: {"tool", "status": "ok", "failed" or "timeout", "tail"}; logs go to `folder`."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return [{"tool": tool, "status": "failed", "why": "compute-sanitizer is not on the PATH"} for tool in TOOLS]
    rows = []
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", sys.executable]
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(harness.ROOT)}
        log = folder / f"{tool}.log"
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    [*command, "-c", WORK], stdout=output, stderr=subprocess.STDOUT, env=environment,
                    timeout=None if limit == math.inf else limit / len(TOOLS),
                )  # fmt: skip
                status = "ok" if done.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timeout"
        tail = {} if status == "ok" else {"tail": log.read_text(errors="replace")[-1500:]}
        rows.append({"tool": tool, "status": status, **tail})
    return rows


def run(c: SanitizeConfig) -> list[dict]:
    """Run both tools, and print and return their rows."""
    if not torch.cuda.is_available():
        raise UserError(f"benchmarks.sanitize needs a CUDA GPU, and torch {torch.__version__} sees none")
    check_at_least(c, limit=0)
    with tempfile.TemporaryDirectory() as folder:
        rows = check_all(c.limit, Path(folder))
    for row in rows:
        print(row["tool"], row["status"], row.get("why") or row.get("tail", ""))
    return rows


def main(argv: Sequence[str]) -> int:
    return harness.exit_code(run(flags.parse(SanitizeConfig, argv, "benchmarks.sanitize")))


if __name__ == "__main__":
    run_main(main)
