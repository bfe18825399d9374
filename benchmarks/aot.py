"""Compile every kernel launch at GPT-2's shapes for GPUs that need not be here: `python -m benchmarks.aot`.

Registers that spill, a block that asks for more shared memory than the card has, a `tl.dot` that misses the tensor
cores: all this is decided by the compiler, which needs no GPU. So our own ops are called on CPU tensors (never touched,
so real sizes cost no memory), Triton is told that its device has the wanted architecture, and a launch compiles instead
of running. What is compiled is therefore what training would launch: the real launch settings, specialised by Triton's
own rules. This cannot show speed, races or launches that fail.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from benchmarks import flags, harness
from benchmarks.aot_cases import CASES
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least, one_line
from gpt2fast.files.atomic import write_atomic
from gpt2fast.kernels import launch, registration

MAX_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a block
PROCESSORS = 128  # about what such cards have
L2_CACHE = 50 << 20  # bytes, on sm_90 and newer; older ones do not use it
PTX_MMA = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA")  # the same three, as instructions
INSTRUCTIONS = re.findall(
    r"\S+", "HGMMA HMMA UTCHMMA MUFU LDGSTS UTMALDG LDG LDG.128 STG STG.128 ATOMG RED REDG LDL STL"
)
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
HEADER = f"{'kernel':<32}{'case':<32}{'sm':>4}{'warps':>6}{'stages':>7}{'regs':>5}{'spilled':>8}{'shared':>8}  mma"


@dataclass(frozen=True, kw_only=True)
class AotConfig:
    """Compile every kernel launch at GPT-2's shapes for GPUs that need not be here."""

    arch: tuple[int, ...] = tuple(MAX_SHARED)
    """Architectures: 90 is sm_90."""
    case: tuple[str, ...] = ()
    """Cases of benchmarks/aot_cases.py, by name: '124M gelu', for one. None named: all."""
    out: Path = harness.RESULTS / "aot.jsonl"
    """File of rows. Rows of the same cases and architectures are replaced."""
    jobs: int = os.cpu_count() or 1
    """Architectures that are compiled at a time."""


@dataclass(frozen=True)
class Job:
    """What a process that compiles gets: an architecture, its cases, and the file for their rows."""

    arch: int
    cases: tuple[str, ...]
    out: Path


@dataclass(frozen=True)
class Compiled:
    """The kernel of a launch. `shared`: bytes that a block asks for; `metadata`: Triton's, with all options."""

    kernel: str
    asm: dict[str, Any]  # stages in text, and the cubin's bytes
    shared: int
    num_warps: int
    num_stages: int
    metadata: tuple


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """Make each launch of a Triton kernel compile it for `arch` and append it to the list, instead of running it."""
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    launched: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        data = kernel.metadata
        launched.append(Compiled(self.__name__, kernel.asm, data.shared, data.num_warps, data.num_stages, data))
        return kernel

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # a device of its own: kernels remember by device what they compiled
        get_current_stream=lambda device: 0,
    )
    ours = [(triton.runtime.driver, "_active", driver), (JITFunction, "run", compile_only)]
    with contextlib.ExitStack() as patches:
        for place, name, new in (*ours, *gpu_instead(arch)):
            patches.enter_context(mock.patch.object(place, name, new))
        yield launched


def gpu_instead(arch: int) -> Iterator[tuple[object, str, object]]:
    """Yield (module, name, replacement), so that CPU tensors are accepted and get a GPU's launch settings."""
    yield torch, "mm", lambda a, b, out=None, **_: a.new_empty(len(a), b.shape[1]) if out is None else out
    yield registration, "INTERPRETED", True  # interpreted kernels accept CPU tensors
    yield launch, "capability", lambda device: divmod(arch, 10)
    yield launch, "processors", lambda device: PROCESSORS
    yield launch, "l2_cache", lambda device: L2_CACHE


def inspect(compiled: Compiled, arch: int) -> dict:
    """Return registers, spilled, stack and shared bytes, and counts of instructions, by the tools in Triton's wheel."""
    log, ptx = assembler_log(compiled, arch), compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        opcodes = OPCODE.findall(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    names = {name: re.compile(name.replace(".128", r"\..*(128|256)") + r"\b") for name in INSTRUCTIONS}  # or wider

    def said(pattern: str) -> list[int]:
        return [int(n) for n in re.findall(pattern, log)]

    return {
        "registers": max(said(r"Used (\d+) registers")),
        "spilled": sum(said(r"(\d+) bytes spill (?:stores|loads)")),
        "stack": max(said(r"(\d+) bytes stack frame")),
        "shared": compiled.shared + sum(said(r"(\d+) bytes smem")),
        "ptx_mma": [name for name in PTX_MMA if name in ptx],
        "plain_dots": len(re.findall(r"= tt\.dot .*-> tensor<[^>]*#blocked", compiled.asm["ttgir"])),  # no tensor cores
        "instructions": {name: sum(bool(p.match(code)) for code in opcodes) for name, p in names.items()},
    }


def assembler_log(compiled: Compiled, arch: int) -> str:
    """Return the output of `ptxas -v`, called by Triton again: options other than its own would spill differently."""
    backend = CUDABackend(GPUTarget("cuda", arch, 32))
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(compiled.asm["ptx"], {}, compiled.metadata, arch)
    return log.getvalue()


def faults(row: dict) -> list[str]:
    """Return each rule that this row breaks, in words."""
    if "error" in row:
        return [row["error"]]
    plain, limit, found = row["plain_dots"], MAX_SHARED[row["arch"]], []
    if row["spilled"]:
        found.append(f"spills {row['spilled']} bytes")
    if row["shared"] > limit:
        found.append(f"needs {row['shared']} bytes of shared memory, and a block gets {limit}")
    if row["tensor_cores"] and (plain or not any(row["instructions"][name] for name in TENSOR_CORES)):
        found.append(f"does not use the tensor cores ({plain} tl.dot without)")
    return found


def case_rows(name: str, arch: int) -> list[dict]:
    """Return a row for each different kernel that the case launches, and one with "error" for each error."""
    case, errors, rows = CASES[name], [], {}
    common = {"triton": triton.__version__, "case": name, "arch": arch}
    with compiling_for(arch) as compiled:
        try:
            case.call()
        except Exception as error:  # whatever it is, the other cases are worth having
            traceback.print_exc()
            errors.append(f"{type(error).__name__}: {one_line(error)[-800:]}")  # a compiler names its reason last
    for one in compiled:
        if one.asm["cubin"] not in rows:
            settings = {"kernel": one.kernel, "num_warps": one.num_warps, "num_stages": one.num_stages, "launches": 0}
            cores = {"tensor_cores": any(part in one.kernel for part in case.tensor_cores)}
            rows[one.asm["cubin"]] = common | settings | cores | inspect(one, arch)
        rows[one.asm["cubin"]]["launches"] += 1
    wanted = case.tensor_cores or ("",)
    errors += [f"launched no *{part}* kernel" for part in wanted if not any(part in one.kernel for one in compiled)]
    return [*rows.values(), *(common | {"kernel": None, "error": error} for error in errors)]


def compile_here(job: Job) -> None:
    """Compile the cases of a job, and append {"rows"} for each."""
    for name in job.cases:
        harness.append_row(job.out, {"rows": case_rows(name, job.arch)})


def compile_apart(arch: int, names: Sequence[str]) -> list[dict]:
    """Return all rows for `arch`, and print them, from a process of its own: a compiler that dies costs one case."""

    def job(left: Sequence[str], out: Path) -> Job:
        return Job(arch, tuple(left), out)

    rows = []
    for name, done in harness.work_through(compile_here, names, job, environment={"TRITON_INTERPRET": "0"}):
        error = f"the process that compiled it {done.get('status')}: {one_line(done.get('tail', ''))[-300:]}"
        died = {"triton": triton.__version__, "case": name, "arch": arch, "kernel": None, "error": error}
        rows += done.get("rows", [died])
    print("".join(map(describe, rows)), end="", flush=True)
    return rows


def describe(row: dict) -> str:
    """Return a line of the table, and a line for each fault."""
    line = f"{row['kernel'] or '-':<31} {row['case']:<31} {row['arch']:>4}"
    if "error" not in row:
        line += f"{row['num_warps']:>6}{row['num_stages']:>7}{row['registers']:>5}{row['spilled']:>8}{row['shared']:>8}"
        line += f"  {' '.join(row['ptx_mma']) or '-'}"
    return "\n    FAULT: ".join([line, *faults(row)]) + "\n"


def save(path: Path, rows: Sequence[dict]) -> None:
    """Write the rows in place of this Triton's for the same cases and architectures, and for cases that are gone."""
    done = {(row["case"], row["arch"]) for row in rows}
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keep = [(row["case"], row["arch"]) not in done and row["case"] in CASES for row in old]
    rows = [*rows, *(row for row, kept in zip(old, keep) if kept or row["triton"] != triton.__version__)]
    rows.sort(key=lambda row: (row["triton"], row["case"], row["arch"]))  # and, within a case, as launched
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def run(c: AotConfig) -> int:
    """Compile, print and save everything, and return 1 if a row breaks a rule, else 0."""
    if unknown := set(c.case) - set(CASES):
        raise UserError(f"--case {min(unknown)!r}: there are {', '.join(map(repr, CASES))}")
    if unsupported := set(c.arch) - set(MAX_SHARED):
        raise UserError(f"--arch {min(unsupported)}: there are {', '.join(map(str, MAX_SHARED))}")
    check_at_least(c, jobs=1)
    start, names = time.monotonic(), c.case or tuple(CASES)
    print(HEADER)
    with ThreadPoolExecutor(c.jobs) as pool:
        rows = [row for rows in pool.map(lambda arch: compile_apart(arch, names), c.arch) for row in rows]
    save(c.out, rows)
    bad = [f"{row['kernel'] or '-'}, {row['case']}, sm_{row['arch']}: {text}" for row in rows for text in faults(row)]
    print(f"{len(rows)} rows in {c.out}, {time.monotonic() - start:.0f} s, {len(bad)} faults", *bad, sep="\n")
    return 1 if bad else 0


def main(argv: Sequence[str]) -> int:
    return run(flags.parse(AotConfig, argv, "benchmarks.aot"))


if __name__ == "__main__":
    run_main(main)
