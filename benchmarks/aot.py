"""Every kernel launch at GPT-2's shapes, compiled for cards that need not be here: `python -m benchmarks.aot`.

Why: registers that spill, a block that asks for more shared memory than the card has, a `tl.dot` that misses the
tensor cores: all this is the compiler's doing, and the compiler needs no GPU. So our own public functions are called
on CPU tensors (never touched, so real sizes cost no memory), Triton is told that its device is of the wanted
architecture, and a launch compiles instead of running. What is compiled is therefore what training would launch: the
real launch settings, specialised by Triton's own rules. What this cannot tell: speed, races, failing launches.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from benchmarks import harness
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
from gpt2fast.files.atomic import write_atomic
from gpt2fast.kernels import launch, registration
from gpt2fast.kernels.adamw import ParameterTable, adamw_, gradient_norm
from gpt2fast.kernels.attention_decode import cached_attention_
from gpt2fast.kernels.attention_forward import attention_bwd, attention_fwd
from gpt2fast.kernels.embeddings import embedding_bwd, embedding_fwd
from gpt2fast.kernels.epilogue import linear_gelu_bwd, linear_gelu_fwd
from gpt2fast.kernels.layernorm import add_layer_norm_bwd, add_layer_norm_fwd, layer_norm_bwd, layer_norm_fwd
from gpt2fast.kernels.loss import cross_entropy_fwd, cross_entropy_fwd_grad_, scale_, scaled
from gpt2fast.kernels.tanh_gelu import bias_gelu_bwd, bias_gelu_fwd, gelu_bwd, gelu_fwd

MAX_SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # bytes a block
PROCESSORS = 128  # about what such cards have
L2_CACHE = 50 << 20  # bytes, of sm_90 and more; what it decides, older ones are not asked
PTX_MMA = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
TENSOR_CORES = ("HGMMA", "HMMA", "UTCHMMA")  # the same three, as instructions
INSTRUCTIONS = re.findall(
    r"\S+", "HGMMA HMMA UTCHMMA MUFU LDGSTS UTMALDG LDG LDG.128 STG STG.128 ATOMG RED REDG LDL STL"
)
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
HEADER = f"{'kernel':<32}{'case':<32}{'sm':>4}{'warps':>6}{'stages':>7}{'regs':>5}{'spilled':>8}{'shared':>8}  mma"


@dataclass(frozen=True)
class Case:
    """`call` makes the launches; kernels whose name contains one of `tensor_cores` must do every tl.dot on them."""

    call: Callable[[], object]
    tensor_cores: tuple[str, ...] = ()


def _attention(C: int, H: int, dtype: torch.dtype, B: int = 64) -> None:
    qkv, o, lse = torch.empty(B, T, 3 * C, dtype=dtype), torch.empty(B, T, C, dtype=dtype), torch.empty(B, H, T)
    attention_fwd(qkv, H, 0.125)
    attention_bwd(o, qkv, o, lse, H, 0.125)


def _attention_tf32(C: int, H: int) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        _attention(C, H, torch.float32)
    finally:
        torch.set_float32_matmul_precision("highest")


def _decoding(C: int, H: int, dtype: torch.dtype) -> None:
    qkv, cache = torch.empty(8, 3 * C, dtype=dtype), torch.empty(8, H, T, C // H, dtype=dtype)
    cached_attention_(qkv, cache, cache, torch.zeros(8, dtype=torch.long), H)


def _embedding(C: int, stream: torch.dtype) -> None:
    wte, wpe, idx = torch.empty(V, C), torch.empty(T, C), torch.zeros(B, T, dtype=torch.long)
    embedding_bwd(embedding_fwd(wte, wpe, idx, stream), idx, V, T, torch.float32)


def _layer_norm(C: int, stream: torch.dtype) -> None:
    """As under bf16 autocast: the stream in its own dtype, branches in bf16, weights in fp32."""
    x, y, w = torch.empty(B * T, C, dtype=stream), torch.empty(B * T, C, dtype=torch.bfloat16), torch.empty(C)
    mean = torch.empty(B * T)
    layer_norm_fwd(x, w, w, 1e-5, torch.bfloat16)
    layer_norm_bwd(y, x, w, mean, mean)
    add_layer_norm_fwd(x, y, w, w, 1e-5, torch.bfloat16)
    add_layer_norm_bwd(x, y, x, w, mean, mean, torch.bfloat16)


def _gelu(C: int) -> None:
    x, b = torch.empty(B * T, 4 * C, dtype=torch.bfloat16), torch.empty(4 * C, dtype=torch.bfloat16)
    gelu_fwd(x)
    gelu_bwd(x, x)
    bias_gelu_fwd(x, b)
    bias_gelu_bwd(x, x, b)


def _epilogue(C: int, dtype: torch.dtype) -> None:
    x, w = torch.empty(B * T, C, dtype=dtype), torch.empty(4 * C, C, dtype=dtype)
    h, _ = linear_gelu_fwd(x, w, torch.empty(4 * C, dtype=dtype))
    linear_gelu_bwd(x, w.view(C, 4 * C), h)


def _cross_entropy() -> None:
    """A chunk of the head."""
    x, targets = torch.empty(9472, V, dtype=torch.bfloat16), torch.zeros(9472, dtype=torch.long)
    cross_entropy_fwd(x, targets, 50257, -100)
    cross_entropy_fwd_grad_(x, targets, 50257, -100)
    scale_(x, torch.empty(()))
    scaled(torch.empty(V, 768), torch.empty(()), torch.float32)


def _adamw(C: int) -> None:
    """A matrix of the blocks with its copy, an embedding, a bias: the kernel learns what they are at run time."""
    table, half = ParameterTable(torch.device("cpu")), torch.empty(4 * C, C, dtype=torch.bfloat16)
    one = torch.ones(())
    matrix, embedding, bias = torch.empty(4 * C, C), torch.empty(V, C), torch.empty(C)
    table.refresh([(half, *[matrix] * 3, half, one), (*[embedding] * 4, None, one), (*[bias] * 4, None, one)])
    table.set_numbers(torch.zeros(3, 7))
    gradient_norm(table)
    adamw_(table, one)


B, T, V = 64, 1024, 50304
WIDTHS = {"124M": (768, 12), "355M": (1024, 16), "774M": (1280, 20), "1.5B": (1600, 25)}  # C, H
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = {"124M attention bf16": Case(partial(_attention, 768, 12, torch.bfloat16), ("attention",))}
few = partial(_attention, 768, 12, torch.bfloat16, B=4)  # heads for a device: backward is two kernels, not one
CASES |= {"124M attention bf16, B=4": Case(few, ("attention",))}
CASES |= {"1.5B attention bf16": Case(partial(_attention, 1600, 25, torch.bfloat16), ("attention",))}
CASES |= {"124M attention fp32": Case(partial(_attention, 768, 12, torch.float32))}  # exact: no tensor cores
CASES |= {"124M attention tf32": Case(partial(_attention_tf32, 768, 12), ("attention",))}
CASES |= {f"124M decoding {name}": Case(partial(_decoding, 768, 12, DTYPES[name])) for name in DTYPES}
CASES |= {
    f"{size} layer norm, {name} stream": Case(partial(_layer_norm, WIDTHS[size][0], DTYPES[name]))
    for size in WIDTHS
    for name in DTYPES
}
CASES |= {
    f"{size} embedding, {name} stream": Case(partial(_embedding, WIDTHS[size][0], DTYPES[name]))
    for size in ("124M", "1.5B")
    for name in DTYPES
}
CASES |= {f"{size} gelu": Case(partial(_gelu, WIDTHS[size][0])) for size in ("124M", "1.5B")}
CASES |= {
    f"{size} epilogue bf16": Case(partial(_epilogue, WIDTHS[size][0], torch.bfloat16), ("linear_gelu",))
    for size in ("124M", "1.5B")
}
CASES |= {"124M epilogue fp32": Case(partial(_epilogue, 768, torch.float32))}  # exact: no tensor cores
CASES |= {"124M cross-entropy": Case(_cross_entropy)}
CASES |= {"124M adamw": Case(partial(_adamw, 768))}


@dataclass(frozen=True)
class Compiled:
    """What a launch would have run. `shared`: bytes that a block asks for; `metadata`: Triton's, all options in it."""

    kernel: str
    asm: dict[str, Any]  # stages in text, and the cubin's bytes
    shared: int
    num_warps: int
    num_stages: int
    metadata: tuple


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list[Compiled]]:
    """While this lasts, each launch of a Triton kernel compiles it for `arch`, and is added to the list."""
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
    """What to replace, and by what, so that CPU tensors are accepted and get a GPU's launch settings."""
    yield torch, "mm", lambda a, b, out=None, **_: a.new_empty(len(a), b.shape[1]) if out is None else out
    yield registration, "INTERPRETED", True  # who is interpreted may have CPU tensors
    yield launch, "capability", lambda device: divmod(arch, 10)
    yield launch, "processors", lambda device: PROCESSORS
    yield launch, "l2_cache", lambda device: L2_CACHE


def inspect(compiled: Compiled, arch: int) -> dict:
    """Registers, spilled, stack and shared bytes, and counts of instructions, from the tools in Triton's wheel."""
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
    """What `ptxas -v` says. Triton calls it, again: other options than its own would spill differently."""
    backend = CUDABackend(GPUTarget("cuda", arch, 32))
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(compiled.asm["ptx"], {}, compiled.metadata, arch)
    return log.getvalue()


def faults(row: dict) -> list[str]:
    """Each rule that this row breaks, in words."""
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
    """A row for each different kernel that the case launches, and one with "error" for each thing that went wrong."""
    case, errors, rows = CASES[name], [], {}
    common = {"triton": triton.__version__, "case": name, "arch": arch}
    with compiling_for(arch) as compiled:
        try:
            case.call()
        except Exception as error:  # whatever it is, the other cases are worth having
            traceback.print_exc()
            errors.append(f"{type(error).__name__}: {' '.join(str(error).split())[-800:]}")
    for one in compiled:
        if one.asm["cubin"] not in rows:
            settings = {"kernel": one.kernel, "num_warps": one.num_warps, "num_stages": one.num_stages, "launches": 0}
            cores = {"tensor_cores": any(part in one.kernel for part in case.tensor_cores)}
            rows[one.asm["cubin"]] = common | settings | cores | inspect(one, arch)
        rows[one.asm["cubin"]]["launches"] += 1
    wanted = case.tensor_cores or ("",)
    errors += [f"launched no *{part}* kernel" for part in wanted if not any(part in one.kernel for one in compiled)]
    return [*rows.values(), *(common | {"kernel": None, "error": error} for error in errors)]


def compile_apart(arch: int, names: Sequence[str]) -> list[dict]:
    """All rows for `arch`, printed as they come, from a process of its own: a compiler that dies costs one case."""
    left, rows = list(names), []
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    while left:
        command = [sys.executable, "-m", "benchmarks.aot", "--only", str(arch), "--case", *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=harness.ROOT) as process:
            assert process.stdout, "a pipe"
            for line in process.stdout:  # a case
                left.pop(0)
                rows += json.loads(line)
                print("".join(describe(row) for row in json.loads(line)), end="", flush=True)
        if left:
            error = f"the process that compiled it ended with {process.returncode}"
            row = {"triton": triton.__version__, "case": left.pop(0), "arch": arch, "kernel": None, "error": error}
            rows.append(row)
            print(describe(row), end="", flush=True)
    return rows


def describe(row: dict) -> str:
    """A line of the table, and a line for each fault."""
    line = f"{row['kernel'] or '-':<31} {row['case']:<31} {row['arch']:>4}"
    if "error" not in row:
        line += f"{row['num_warps']:>6}{row['num_stages']:>7}{row['registers']:>5}{row['spilled']:>8}{row['shared']:>8}"
        line += f"  {' '.join(row['ptx_mma']) or '-'}"
    return "\n    FAULT: ".join([line, *faults(row)]) + "\n"


def save(path: Path, rows: Sequence[dict]) -> None:
    """In place of this Triton's rows for the same cases and architectures, and for cases that are no more."""
    done = {(row["case"], row["arch"]) for row in rows}
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    keep = [(row["case"], row["arch"]) not in done and row["case"] in CASES for row in old]
    rows = [*rows, *(row for row, kept in zip(old, keep) if kept or row["triton"] != triton.__version__)]
    rows.sort(key=lambda row: (row["triton"], row["case"], row["arch"]))  # and, within a case, as launched
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    p.add_argument("--arch", type=int, nargs="+", choices=MAX_SHARED, default=list(MAX_SHARED), help="90 is sm_90")
    p.add_argument("--case", nargs="+", metavar="NAME", help="the default is all")
    p.add_argument("--out", type=Path, default=harness.RESULTS / "aot.jsonl")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="architectures at a time")
    p.add_argument("--only", type=int, help=argparse.SUPPRESS)  # what an architecture's process gets
    options = p.parse_args(argv)
    names = options.case or list(CASES)
    if unknown := set(names) - set(CASES):
        raise UserError(f"--case {min(unknown)!r}: there are {', '.join(map(repr, CASES)) or 'none'}")
    if options.only:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # when ptxas fails, Triton prints the whole program: not among the rows
        for name in names:
            print(json.dumps(case_rows(name, options.only)), file=out, flush=True)
        return 0
    start = time.monotonic()
    print(HEADER)
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        rows = [row for rows in pool.map(lambda arch: compile_apart(arch, names), options.arch) for row in rows]
    save(options.out, rows)
    bad = [f"{row['kernel'] or '-'}, {row['case']}, sm_{row['arch']}: {text}" for row in rows for text in faults(row)]
    print(f"{len(rows)} rows in {options.out}, {time.monotonic() - start:.0f} s, {len(bad)} faults", *bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    run_main(main)
