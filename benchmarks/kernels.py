"""Single kernels against torch: `python -m benchmarks.kernels`.

Each of our kernels, forward and forward + backward, beside eager torch, torch.compile, Liger's kernels where they are
installed and, for attention, every backend of scaled_dot_product_attention, at GPT-2's shapes for four sizes and, for
attention, at T from 1k to 16k with the same number of tokens. First the results are compared: against fp32 arithmetic
on the same inputs, nobody may be more than twice as wrong as eager torch; who is, is not timed. Then medians over a
tenth of a second, L2 flushed before each call (triton.testing.do_bench), as GB/s of the bytes that must move, or
TFLOP/s of the products that must be made, and as the share of what this device copied and multiplied in the same run.

On a CPU the torch providers run at a small size: the figures say nothing about a GPU, but the program is tried.
"""

import argparse
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

from benchmarks import harness
from gpt2fast import reference
from gpt2fast.command import run_main
from gpt2fast.errors import UserError
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
TIMES_WORSE = 2.0  # than eager torch
COPY_BYTES, MATMUL = 2**32, (8192, 8192, 8192)


@dataclass(frozen=True)
class Case:
    """What is computed, of which tensors, and what it costs at least."""

    op: str
    size: str
    shape: dict[str, int]
    fn: Callable  # in plain torch, of the inputs
    inputs: Callable[[torch.device], list[Tensor]]
    others: tuple = ()  # arguments after the inputs
    elements: tuple[float, float] = (0, 0)  # moved forward, and forward + backward, at least
    flops: tuple[float, float] = (0, 0)


def normal(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(torch.bfloat16)


def cases(sizes: Sequence[str], tokens: int, lengths: Sequence[int], device: torch.device) -> Iterator[Case]:
    """Each op at each width; attention of the smallest size at each length too."""
    targets = torch.randint(VOCAB, (tokens,), device=device)
    for size in sizes:
        C, H = SIZES[size].n_embd, SIZES[size].n_head
        M, wide = tokens, 4 * C
        rows, row = {"M": M, "N": C}, partial(normal, M, C)
        vectors = [partial(normal, C), partial(normal, C)]
        yield Case(
            "gelu",
            size,
            {"M": M, "N": wide},
            partial(F.gelu, approximate="tanh"),
            _each(partial(normal, M, wide)),
            elements=(2 * M * wide, 5 * M * wide),
        )
        yield Case(
            "bias_gelu",
            size,
            {"M": M, "N": wide},
            lambda x, b: F.gelu(x + b, approximate="tanh"),
            _each(partial(normal, M, wide), partial(normal, wide)),
            elements=(2 * M * wide, 5 * M * wide),
        )
        yield Case("layer_norm", size, rows, reference.layer_norm, _each(row, *vectors), (EPS,), (2 * M * C, 5 * M * C))
        yield Case(
            "add_layer_norm",
            size,
            rows,
            reference.add_layer_norm,
            _each(row, row, *vectors),
            (EPS,),
            (4 * M * C, 8 * M * C),
        )
        for T in lengths if size == sizes[0] else lengths[:1]:
            B, products = tokens // T, 2 * tokens * T * C  # q k^T and p v, half of each: causal; 5 more backward
            yield Case(
                "attention",
                size,
                {"B": B, "H": H, "T": T, "D": C // H},
                reference.attention,
                _each(partial(normal, B, T, 3 * C)),
                (H,),
                flops=(products, 3.5 * products),
            )
        if size == sizes[0]:
            yield Case(
                "cross_entropy",
                size,
                {"M": M, "V": V},
                _cross_entropy,
                _each(partial(normal, M, V)),
                (targets, -100, VOCAB),
                (M * V, 2 * M * V),
            )
        yield Case("linear_cross_entropy", size, {"M": M, "C": C, "V": V}, reference.linear_cross_entropy,
                   _each(row, partial(normal, V, C, scale=C**-0.5)), (targets, VOCAB),
                   flops=(2 * M * C * V, 6 * M * C * V))  # fmt: skip


def _each(*makers: Callable) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [make(device=device) for make in makers]


def _cross_entropy(x: Tensor, targets: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return F.cross_entropy(x[:, :vocab_size].float(), targets, ignore_index=ignore_index)


def providers(case: Case, device: torch.device) -> dict[str, Callable]:
    """Who computes it: name -> function of the inputs. eager comes first: the others are judged by it."""
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
    """It knows no padding, so padded logits are made what they count as; and it writes its gradient over x."""
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
    """The outputs, and with `backward` the gradients, for ones as the outputs' gradient."""
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    with nullcontext() if backward else torch.no_grad():
        outputs = fn(*leaves, *others)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not backward:
        return outputs
    return outputs + list(torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs]))


def errors(got: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """|got - truth| / |truth| of each; NaN and infinity come out as they are."""
    return [((g.float() - t).norm() / t.norm().clamp(min=1e-20)).item() for g, t in zip(got, truth)]


def verdict(wrong: Sequence[float], allowed: Sequence[float]) -> str:
    """ "ok", or what is wrong with a provider whose errors these are."""
    for i, (mine, eager) in enumerate(zip(wrong, allowed)):
        if not mine <= TIMES_WORSE * eager + 1e-5:  # written so that NaN fails
            return f"result {i} is wrong by {mine:.2e}, eager torch by {eager:.2e}"
    return "ok"


def time_ms(call: Callable, device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return harness.spread([1e3 * t for t in harness.time_calls(call, device, 5, 2.0)])
    from triton.testing import do_bench

    median, p20, p80 = do_bench(call, warmup=25, rep=100, quantiles=[0.5, 0.2, 0.8])
    return {"median": median, "p20": p20, "p80": p80}


def measure(case: Case, device: torch.device, ceilings: dict[str, float]) -> Iterator[dict]:
    """A row for each provider and direction; a row that says why where there is nothing to time."""
    truth: list[Tensor] = []
    allowed: list[float] = []
    for name, fn in providers(case, device).items():
        torch.manual_seed(0)
        inputs = case.inputs(device)  # each its own, the same: one may write over them
        common = {"op": case.op, "size": case.size, "shape": case.shape, "dtype": "bf16", "provider": name}
        try:
            truth = truth or once(case.fn, [x.float() for x in inputs], case.others, backward=True)
            wrong = errors(once(fn, inputs, case.others, backward=True), truth)
            allowed = allowed or wrong
            status = verdict(wrong, allowed)
            for backward in (False, True) if status == "ok" else ():
                ms = time_ms(partial(once, fn, inputs, case.others, backward), device)
                direction = {"direction": "both" if backward else "forward", "status": "ok", "ms": ms, "errors": wrong}
                yield common | direction | rates(case, backward, ms["median"], ceilings)
        except RuntimeError as error:  # a backend that does not exist here, or no memory
            status = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if status != "ok":
            yield common | {"direction": "both", "status": status}


def rates(case: Case, backward: bool, ms: float, ceilings: dict[str, float]) -> dict:
    """What was moved or multiplied in a second, and its share of what the device can."""
    if flops := case.flops[backward]:
        rate = flops / ms / 1e9
        return {"tflops": rate, "share": rate / ceilings["tflops"]}
    rate = case.elements[backward] * 2 / ms / 1e6  # bf16
    return {"gb_per_s": rate, "share": rate / ceilings["gb_per_s"]}


def describe(row: dict) -> str:
    shape = " ".join(f"{name}={n}" for name, n in row["shape"].items())
    line = f"{row['op']:<21}{row['size']:<12}{shape:<27}{row['direction']:<9}{row['provider']:<16}"
    if row["status"] != "ok":
        return line + row["status"][:120]
    rate = f"{row['tflops']:8,.1f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:8,.0f} GB/s   "
    return f"{line}{row['ms']['median']:9.3f} ms {rate} {row['share']:6.1%}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    sizes = [size for size in SIZES if size != "nano"]
    p.add_argument("--op", nargs="+", help="only these")
    p.add_argument("--size", nargs="+", choices=SIZES, help=f"{' '.join(sizes)} on CUDA, else nano")
    p.add_argument("--tokens", type=int, help="rows, and B * T of attention: 65536 on CUDA, else 1024")
    p.add_argument("--lengths", type=int, nargs="+", help="T of attention: 1024 to 16384 on CUDA, else 256")
    p.add_argument("--device", default="auto")
    p.add_argument("--budget", type=float, default=float("inf"), help="seconds; no case is begun after them")
    p.add_argument("--file", type=Path, help="append the rows to this file instead of a new one of results")
    return p


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    sizes = options.size or ([size for size in SIZES if size != "nano"] if cuda else ["nano"])
    tokens = options.tokens or (65536 if cuda else 1024)
    lengths = options.lengths or (LENGTHS if cuda else (min(256, tokens),))
    if bad := [T for T in lengths if not 0 < T <= tokens]:
        raise UserError(f"--lengths {bad[0]}: it must be between 1 and --tokens {tokens}")
    path = options.file or harness.results_file("kernels")
    end = time.monotonic() + options.budget
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")  # the truth is exact; what is timed is bf16
    copy = harness.copy_bandwidth(device, COPY_BYTES if cuda else 2**26)
    matmul = harness.matmul_rate(device, *(MATMUL if cuda else (1024, 1024, 1024)))
    ceilings = {"gb_per_s": copy["gb_per_s"]["median"], "tflops": matmul["tflops"]["median"]}
    measured = f"copies {ceilings['gb_per_s']:,.0f} GB/s, multiplies {ceilings['tflops']:,.1f} TFLOP/s"
    print(f"{device_name(device)}: {measured}; rows in {path}")
    record, worst = versions.record(), 0
    for case in cases(sizes, tokens, lengths, device):
        if options.op and case.op not in options.op:
            continue
        if time.monotonic() > end:
            print(f"{options.budget:.0f} s are over: {case.op} {case.size} and what follows is left out")
            break
        for row in measure(case, device, ceilings):
            harness.append_row(path, {"suite": "kernels", **row, "ceilings": ceilings, "machine": record})
            print(describe(row), flush=True)
            worst |= row["provider"] == "triton" and row["status"] != "ok"
    return int(worst)


if __name__ == "__main__":
    run_main(main)
