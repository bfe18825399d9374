"""Our kernels, forward and backward at small shapes, under NVIDIA's compute-sanitizer: `python -m benchmarks.sanitize`.

memcheck finds reads and writes outside of what was allocated (torch's caching allocator would hide them: it is off),
racecheck threads of a block that touch shared memory in no order. Neither the interpreter nor the compiler can tell.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import harness
from gpt2fast.command import run_main
from gpt2fast.errors import UserError

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # the exit code for "something was found"


def work() -> None:
    """Odd shapes, so that every mask is used: tiles in part, D padded, padding in the vocabulary."""
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
    """A row for each tool: {"tool", "status": "ok", "failed" or "timeout", "seconds", "tail"}; logs in `folder`."""
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
                    [*command, "-m", "benchmarks.sanitize", "--work"], stdout=output, stderr=subprocess.STDOUT,
                    env=environment, timeout=limit / len(TOOLS),
                )  # fmt: skip
                status = "ok" if done.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timeout"
        tail = {} if status == "ok" else {"tail": log.read_text(errors="replace")[-1500:]}
        rows.append({"tool": tool, "status": status, **tail})
    return rows


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__.splitlines()[0])
    p.add_argument("--limit", type=float, default=600.0, help="seconds for all tools")
    p.add_argument("--work", action="store_true", help=argparse.SUPPRESS)  # what a tool watches
    options = p.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError(f"benchmarks.sanitize needs a CUDA GPU, and torch {torch.__version__} sees none")
    if options.work:
        work()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = check_all(options.limit, Path(folder))
    for row in rows:
        print(row["tool"], row["status"], row.get("why") or row.get("tail", ""))
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    run_main(main)
