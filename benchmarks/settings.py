"""The launch settings that benchmarks.tune tries.

For each function of gpt2fast.kernels.launch whose result is a guess: other results, and the op that it launches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import kernels
from gpt2fast import reference


class PerProcessor(NamedTuple):
    """A value of launch.persistent: programs for each streaming multiprocessor."""

    n: int


@dataclass(frozen=True)
class Kernel:
    """`values` are what `name` in launch might be, or might return where its arguments include those of `when`."""

    name: str
    op: str  # a name in `cases`
    direction: str  # which is timed: forward, backward or both
    values: Sequence
    when: dict = field(default_factory=dict)

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.when.items())])


def tunables(size: str = "gpt2") -> dict[str, Kernel]:
    """Return {title: kernel}, those that matter most first."""
    from gpt2fast.kernels.launch import Chunk, MatmulTiles, Rows, Tiles

    def tiles(*options: Sequence[int]) -> list[Tiles]:
        rows, columns, warps, stages = options
        return [Tiles(m, n, w, s) for m in rows for n in columns for w in warps for s in stages]

    row = 1 << (kernels.SIZES[size].n_embd - 1).bit_length()  # LayerNorm's tiles hold whole rows
    norms = [Rows(m, row, w) for m in (1, 2, 4, 8) for w in (2, 4, 8, 16)]
    products = [MatmulTiles(m, n, k, pieces, w, s) for m, n, w in ((128, 128, 4), (128, 128, 8), (128, 256, 8),
                (256, 128, 8)) for k, s in ((32, 4), (64, 3), (64, 4)) for pieces in (2, 4)]  # fmt: skip
    found = [
        Kernel("attention_forward", "attention", "forward", tiles((64, 128), (64, 128), (4, 8), (2, 3, 4))),
        Kernel("attention_one_pass", "attention", "backward", (True, False)),
        Kernel("attention_backward", "attention", "backward", tiles((32, 64, 128), (64, 128), (4, 8), (1, 2, 3))),
        Kernel("attention_dkdv", "attention", "backward", tiles((32, 64), (64, 128), (4, 8), (1, 2, 3))),
        Kernel("attention_dq", "attention", "backward", tiles((64, 128), (32, 64), (4, 8), (1, 2, 3))),
        Kernel("matmul_tiles", "mlp", "both", products),
        Kernel("MATMUL_PROGRAMS", "mlp", "both", (1, 2, 3)),
        Kernel("cross_entropy_block", "cross_entropy", "both",
               [(block, warps) for block in (2048, 4096, 8192, 16384) for warps in (8, 16, 32)]),
        Kernel("layer_norm_rows", "add_layer_norm", "backward", norms, {"backward": True}),
        Kernel("persistent", "add_layer_norm", "backward", [PerProcessor(n) for n in (1, 2, 3, 4, 6, 8)],
               {"per_processor": 4}),
        Kernel("LAYER_NORM_STAGES", "add_layer_norm", "backward", (1, 2, 3, 4)),
        Kernel("layer_norm_rows", "add_layer_norm", "forward", norms, {"backward": False}),
        Kernel("elementwise_rows", "bias_gelu", "both",
               [Rows(m, n, w) for m in (4, 8, 16, 32) for n in (128, 256, 512) for w in (4, 8)]),
        Kernel("head_budget", "linear_cross_entropy", "both", [2**n for n in (29, 30, 31, 32, 33)]),
        Kernel("adamw_chunk", "adamw", "forward",
               [Chunk(4096, b, w) for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)], {"norm": False}),
        Kernel("adamw_chunk", "adamw", "forward",
               [Chunk(4096, b, w) for b in (512, 1024, 2048, 4096) for w in (2, 4, 8)], {"norm": True}),
        Kernel("embedding_bucket", "embedding", "backward",
               [Rows(m, n, w) for m in (2, 4, 8) for n in (64, 128, 256) for w in (1, 2)], {"long": False}),
        Kernel("embedding_batch", "embedding", "backward",
               [Rows(m, n, w) for m in (8, 16, 32) for n in (128, 256, 512) for w in (2, 4)]),
    ]  # fmt: skip
    return {kernel.title: kernel for kernel in found}


def cases(tokens: int, T: int, size: str, device: torch.device) -> dict[str, kernels.Case]:
    """Return {op: case}: those of benchmarks.kernels, and three that only this measures."""
    found = {case.op: case for case in kernels.cases([size], tokens, [T], device)}
    C, layers = kernels.SIZES[size].n_embd, kernels.SIZES[size].n_layer
    normal, full = kernels.normal, partial(torch.randn, dtype=torch.float32)

    def each(*makers: Callable) -> Callable[[torch.device], list[Tensor]]:
        return lambda device: [make(device=device) for make in makers]

    def add(op: str, fn: Callable | None, inputs: Callable, others: tuple = ()) -> None:  # AdamW has no fn
        found[op] = kernels.Case(op, size, {"M": tokens, "C": C}, fn, inputs, others)  # type: ignore[arg-type]

    fc, proj = (partial(normal, *shape, scale=C**-0.5) for shape in ((4 * C, C), (C, 4 * C)))
    add("mlp", reference.mlp, each(partial(normal, tokens, C), fc, partial(normal, 4 * C), proj, partial(normal, C)))
    idx = torch.randint(kernels.VOCAB, (tokens // T, T), device=device)
    tables = each(partial(full, kernels.V, C), partial(full, T, C))
    add("embedding", reference.embedding, tables, (idx, torch.bfloat16))
    n = 12 * layers * C * C  # parameters of the blocks
    add("adamw", None, each(partial(normal, n), *[partial(full, n)] * 3))
    return found


def ready(kernel: Kernel, case: kernels.Case, device: torch.device) -> tuple[list[Tensor], Callable]:
    """Return the results of the op as it is launched now, and the call that is to be timed."""
    from gpt2fast import kernels as ours
    from gpt2fast.kernels import epilogue

    torch.manual_seed(0)
    inputs = case.inputs(device)
    if case.op == "adamw":
        return ready_adamw(*inputs)
    fn = epilogue.mlp if case.op == "mlp" else getattr(ours, case.op)
    results = kernels.once(fn, inputs, case.others, backward=True)
    if kernel.direction != "backward":
        return results, partial(kernels.once, fn, inputs, case.others, kernel.direction == "both")
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = fn(*leaves, *case.others)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ones = [torch.ones_like(o) for o in outputs]
    return results, lambda: torch.autograd.grad(outputs, leaves, ones, retain_graph=True)


def ready_adamw(g: Tensor, w: Tensor, m: Tensor, v: Tensor) -> tuple[list[Tensor], Callable]:
    """The same for norm and update of one parameter as large as the blocks, with its copy; m, v, w change in place."""
    from gpt2fast.kernels import ParameterTable, adamw_, gradient_norm

    table, copy, one = ParameterTable(g.device), g.clone(), torch.ones((), device=g.device)
    step = torch.zeros_like(one)
    table.refresh([(g, w, m, v.abs_(), copy, step)])
    table.set_numbers(torch.tensor([[0.1, 0.05, 1e-8, 0.01, 0.01, -0.1, -0.05]]))  # 1 - beta and log2 beta, about

    def call() -> list[Tensor]:
        norm = gradient_norm(table)
        adamw_(table, one)
        return [norm, w, m, v, copy, step, g]  # which must live as long as the table has their addresses

    return [x.clone() for x in call()], call
