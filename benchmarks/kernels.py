"""Time single kernels against torch: `python -m benchmarks.kernels`.

Each of our kernels, forward and forward + backward, beside eager torch, torch.compile, Liger's kernels where they are
installed and, for attention, every backend of scaled_dot_product_attention. The shapes are those of GPT-2 in four sizes
and, for attention, T from 1k to 16k with the same number of tokens. Results are compared first: against fp32 arithmetic
on the same inputs, an error may be at most twice that of eager torch; what is less accurate is not timed. Times are
medians over a tenth of a second, L2 flushed before each call (triton.testing.do_bench), given as GB/s of the bytes that
must move, or TFLOP/s of the products that must be computed, and as a share of the rate at which this device copied and
multiplied in the same run.

On a CPU the torch providers run at a small size: that tries the program, and says nothing about a GPU.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import flags, harness
from gpt2fast import measure as judge
from gpt2fast import reference
from gpt2fast.command import run_main
from gpt2fast.errors import UserError, check_at_least
from gpt2fast.errors import describe_error as describe_error
from gpt2fast.machine import versions
from gpt2fast.machine.device import device_name, pick_device
from gpt2fast.model import EPS, SIZES
from gpt2fast.ops import OpsConfig, build

LENGTHS = (1024, 2048, 4096, 8192, 16384)
V, VOCAB = 50304, 50257
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLOOR = 1e-5  # of relative errors, where eager torch happens to make none


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Time single kernels against torch."""

    op: tuple[str, ...] = ()
    """Ops. None named: all."""
    size: tuple[flags.Size, ...] = ()
    """Models whose shapes are taken. None named: gpt2 to gpt2-xl on CUDA, else nano."""
    tokens: int | None = None
    """Rows, and B * T of attention. None: 65536 on CUDA, else 1024."""
    lengths: tuple[int, ...] = ()
    """T of attention. None named: 1024 to 16384 on CUDA, else 256."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    budget: float = math.inf
    """Seconds; no case starts after them."""
    file: Path | None = None
    """Append the rows to this file instead of a new one among the results."""


@dataclass(frozen=True)
class Case:
    """One computation: its function, its tensors, and what it costs at least."""

    op: str
    size: str
    shape: dict[str, int]
    fn: Callable  # of the inputs, in plain torch
    inputs: Callable[[torch.device], list[Tensor]]
    others: tuple = ()  # arguments after the inputs
    elements: tuple[float, float] = (0, 0)  # moved at least: forward, forward + backward
    flops: tuple[float, float] = (0, 0)


def normal(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(torch.bfloat16)


def cases(sizes: Sequence[str], tokens: int, lengths: Sequence[int], device: torch.device) -> Iterator[Case]:
    """Yield each op at each width, what matters most first; attention of the first size at each length too."""
    targets = torch.randint(VOCAB, (tokens,), device=device)
    for size in sizes:
        C, M = SIZES[size].n_embd, tokens
        wide, wide_shape = partial(normal, M, 4 * C), {"M": M, "N": 4 * C}
        rows, shape = partial(normal, M, C), {"M": M, "N": C}
        vectors = [partial(normal, C), partial(normal, C)]
        moved = (8 * M * C, 20 * M * C)
        gelu = partial(F.gelu, approximate="tanh")
        yield Case("gelu", size, wide_shape, gelu, _each(wide), elements=moved)
        inputs = _each(wide, partial(normal, 4 * C))
        yield Case("bias_gelu", size, wide_shape, _bias_gelu, inputs, elements=moved)
        inputs = _each(rows, *vectors)
        yield Case("layer_norm", size, shape, reference.layer_norm, inputs, (EPS,), (2 * M * C, 5 * M * C))
        inputs = _each(rows, rows, *vectors)
        yield Case("add_layer_norm", size, shape, reference.add_layer_norm, inputs, (EPS,), (4 * M * C, 8 * M * C))
        yield attention(size, tokens, lengths[0])
        if size == sizes[0]:
            inputs, moved = _each(partial(normal, M, V)), (M * V, 2 * M * V)
            yield Case(
                "cross_entropy", size, {"M": M, "V": V}, _cross_entropy, inputs, (targets, -100, VOCAB), moved
            )  # fmt: skip
        inputs = _each(rows, partial(normal, V, C, scale=C**-0.5))
        yield Case(
            "linear_cross_entropy", size, {"M": M, "C": C, "V": V}, reference.linear_cross_entropy, inputs,
            (targets, VOCAB), flops=(2 * M * C * V, 6 * M * C * V),
        )  # fmt: skip
        if size == sizes[0]:
            yield from (attention(size, tokens, T) for T in lengths[1:])


def attention(size: str, tokens: int, T: int) -> Case:
    """Causal attention: half of q k^T and half of p v forward, five such products backward."""
    B, C, H = tokens // T, SIZES[size].n_embd, SIZES[size].n_head
    products = 2 * tokens * T * C
    return Case(
        "attention", size, {"B": B, "H": H, "T": T, "D": C // H}, reference.attention,
        _each(partial(normal, B, T, 3 * C)), (H,), flops=(products, 3.5 * products),
    )  # fmt: skip


def _each(*makers: Callable) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [make(device=device) for make in makers]


def _bias_gelu(x: Tensor, b: Tensor) -> Tensor:
    return F.gelu(x + b, approximate="tanh")


def _cross_entropy(x: Tensor, targets: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return F.cross_entropy(x[:, :vocab_size].float(), targets, ignore_index=ignore_index)


def providers(case: Case, device: torch.device) -> dict[str, Callable]:
    """Return {name: function of the inputs}. eager comes first: the others are judged by it."""
    found: dict[str, Callable] = {"eager": case.fn, "compile": torch.compile(case.fn, dynamic=False)}
    if case.op == "attention":
        found |= {f"sdpa {name}": partial(_sdpa, backend) for name, backend in SDPA.items() if device.type == "cuda"}
    if device.type == "cuda" and find_spec("liger_kernel") and case.op in LIGER:
        found["liger"] = LIGER[case.op]
    try:
        build(OpsConfig().with_backend("triton"), device.type)
    except UserError:
        return found
    from gpt2fast import kernels

    return found | {"triton": getattr(kernels, case.op)}


def _liger_layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(x, w, b, eps)


def _liger_cross_entropy(x: Tensor, targets: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    """Liger has no padding, so padded logits are set to minus infinity; and it writes its gradient over x."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    x.detach()[:, vocab_size:] = float("-inf")
    return liger_cross_entropy(x, targets, ignore_index=ignore_index)


def _liger_linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, w[:vocab_size], targets)


LIGER: dict[str, Callable] = {
    "layer_norm": _liger_layer_norm,
    "cross_entropy": _liger_cross_entropy,
    "linear_cross_entropy": _liger_linear_cross_entropy,
}


def _sdpa(backend: SDPBackend, qkv: Tensor, n_head: int) -> Tensor:
    with sdpa_kernel(backend):
        return reference.attention(qkv, n_head)


def once(fn: Callable, inputs: Sequence[Tensor], others: tuple, backward: bool) -> list[Tensor]:
    """Return the outputs, and with `backward` the gradients too, where the outputs' gradients are ones."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    with nullcontext() if backward else torch.no_grad():
        outputs = fn(*leaves, *others)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not backward:
        return outputs
    return outputs + list(torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs]))


def verdict(results: list[Tensor], wrong: Sequence[float], allowed: Sequence[float], whose: str) -> str:
    """Return "ok", or what is wrong with results of these relative errors; `allowed` are those of `whose`."""
    like = [judge.Call([], (), results)]  # dtypes are not judged: opponents may return a loss in bf16
    return judge.verdict(results, like, wrong, allowed, FLOOR, whose) or "ok"


def time_ms(call: Callable, device: torch.device) -> dict[str, float]:
    """Return the median, p20 and p80 of the milliseconds of a call."""
    if device.type != "cuda":
        return harness.spread([1e3 * t for t in harness.time_calls(call, device, 5, 2.0)])
    from triton.testing import do_bench

    median, p20, p80 = do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    return {"median": median, "p20": p20, "p80": p80}


def measure(case: Case, device: torch.device, ceilings: dict[str, float]) -> Iterator[dict]:
    """Yield a row for each provider and direction, or one that says why there is nothing to time."""
    truth: list[Tensor] = []
    allowed: list[float] = []
    for name, fn in providers(case, device).items():
        torch.manual_seed(0)
        inputs = case.inputs(device)  # the same for all, but new: a provider may write over them
        common = {"op": case.op, "size": case.size, "shape": case.shape, "dtype": "bf16", "provider": name}
        try:
            truth = truth or once(case.fn, [x.float() for x in inputs], case.others, backward=True)
            results = once(fn, inputs, case.others, backward=True)
            wrong = judge.errors(results, truth)
            allowed = allowed or wrong
            status = verdict(results, wrong, allowed, "eager torch's")
            del results
            for backward in (False, True) if status == "ok" else ():
                ms = time_ms(partial(once, fn, inputs, case.others, backward), device)
                direction = {"direction": "both" if backward else "forward", "status": "ok", "ms": ms, "errors": wrong}
                yield common | direction | rates(case, backward, ms["median"], ceilings)
        except RuntimeError as error:  # a backend that does not exist here, or no memory
            status = describe_error(error, 300)
        if status != "ok":
            yield common | {"direction": "both", "status": status}


def rates(case: Case, backward: bool, ms: float, ceilings: dict[str, float]) -> dict:
    """Return what was moved or multiplied in a second, and its share of the device's own rate."""
    if flops := case.flops[backward]:
        rate = flops / ms / 1e9
        return {"tflops": rate, "share": rate / ceilings["tflops"]}
    rate = case.elements[backward] * 2 / ms / 1e6  # bf16
    return {"gb_per_s": rate, "share": rate / ceilings["gb_per_s"]}


def describe(row: dict) -> str:
    """Return a line of the table."""
    shape = " ".join(f"{name}={n}" for name, n in row["shape"].items())
    line = f"{row['op']:<21}{row['size']:<12}{shape:<27}{row['direction']:<9}{row['provider']:<16}"
    if row["status"] != "ok":
        return line + row["status"][:120]
    rate = f"{row['tflops']:8,.1f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:8,.0f} GB/s   "
    return f"{line}{row['ms']['median']:9.3f} ms {rate} {row['share']:6.1%}"


def run(c: KernelsConfig) -> int:
    """Measure all cases, and return 1 if a kernel of ours is wrong or does not run, else 0."""
    device = pick_device(c.device)
    cuda = device.type == "cuda"
    sizes = c.size or ([size for size in SIZES if size != "nano"] if cuda else ["nano"])
    check_at_least(c, tokens=1, budget=0)
    tokens = c.tokens or (65536 if cuda else 1024)
    lengths = c.lengths or (LENGTHS if cuda else (min(256, tokens),))
    if bad := [T for T in lengths if not 0 < T <= tokens]:
        raise UserError(f"--lengths {bad[0]}: it must be between 1 and --tokens {tokens}")
    path = c.file or harness.results_file("kernels")
    end = time.monotonic() + c.budget
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # the truth is exact; what is timed is bf16
    ceilings = harness.yardsticks(device)
    measured = f"copies {ceilings['gb_per_s']:,.0f} GB/s, multiplies {ceilings['tflops']:,.1f} TFLOP/s"
    print(f"{device_name(device)}: {measured}; rows in {path}")
    record, worst = versions.record(), 0
    for case in cases(sizes, tokens, lengths, device):
        if c.op and case.op not in c.op:
            continue
        if time.monotonic() > end:
            print(f"--budget {c.budget:.0f} s is used up: {case.op} {case.size} and all after it are left out")
            break
        for row in measure(case, device, ceilings):
            harness.append_row(path, {"suite": "kernels", **row, "ceilings": ceilings, "machine": record})
            print(describe(row), flush=True)
            worst |= row["provider"] == "triton" and row["status"] != "ok"
    return int(worst)


def main(argv: Sequence[str]) -> int:
    return run(flags.parse(KernelsConfig, argv, "benchmarks.kernels"))


if __name__ == "__main__":
    run_main(main)
