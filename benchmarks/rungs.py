"""The rungs of the ladder: what a training step is made of, from plain PyTorch in fp32 to everything of ours.

climb    each is the one before plus one thing: fp32, allocator settings (a CPU only), TF32 (CUDA only), bf16
         autocast, torch.compile, fused AdamW, our kernels
options  of ours, on top of our kernels: each alone (+name), all, all but one (all_but_name)
more     all of them and one thing that is not always faster: a CUDA graph, visible ops, activation checkpointing
swaps    torch's best with a single op of ours
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import floor
from gpt2fast import ops
from gpt2fast.machine.device import Precision, keep_freed_memory, set_tf32
from gpt2fast.model import GPT, SIZES, Residual
from gpt2fast.ops import NAMES, Implementation, OpsConfig
from gpt2fast.training import optim
from gpt2fast.training.graph import GraphedStep
from gpt2fast.training.step import TrainingStep


@dataclass(frozen=True)
class Rung:
    name: str
    allocator: bool = False
    precision: Precision = "fp32"
    tf32: bool = False
    compile: bool = False
    fused: bool = False
    backend: Implementation = "torch"
    swapped: str = ""  # the one op that is triton's, whatever the backend
    embedding: Implementation | None = None  # None: as the backend
    mlp: Implementation | None = None
    residual: Residual = "fp32"
    optimizer: str = "torch"
    cuda_graph: bool = False
    visible: bool = False  # benchmarks/visible.py
    recompute: bool = False

    @property
    def ops(self) -> OpsConfig:
        named = {"embedding": self.embedding, "mlp": self.mlp} | ({self.swapped: "triton"} if self.swapped else {})
        return OpsConfig(**{op: name for op, name in named.items() if name}).with_backend(self.backend)

    @property
    def counted(self) -> floor.Options:
        """What of it changes the work, for the floor's table."""
        ops = self.ops
        return floor.Options(
            residual=self.residual == "low", epilogue=ops.mlp == "epilogue", embedding=ops.embedding == "triton",
            adamw=self.optimizer == "triton", recompute=self.recompute,
        )  # fmt: skip


FP32 = Rung("fp32")
ALLOCATOR = replace(FP32, name="allocator", allocator=True)
TF32 = replace(ALLOCATOR, name="tf32", tf32=True)
BF16 = replace(TF32, name="bf16", precision="bf16")
COMPILE = replace(BF16, name="compile", compile=True)
FUSED = replace(COMPILE, name="fused", fused=True)
TRITON = replace(FUSED, name="triton", backend="triton", embedding="torch")
CLIMB = {rung.name: rung for rung in (FP32, ALLOCATOR, TF32, BF16, COMPILE, FUSED, TRITON)}
OPTIONS: dict[str, dict[str, Any]] = {  # of ours: a new one is a line
    "embedding": {"embedding": "triton"},
    "residual": {"residual": "low"},
    "epilogue": {"mlp": "epilogue"},
    "adamw": {"optimizer": "triton"},
}
ALL = replace(TRITON, name="all", **{field: value for change in OPTIONS.values() for field, value in change.items()})
MORE = {
    "graph": replace(ALL, name="graph", cuda_graph=True),
    "visible": replace(ALL, name="visible", visible=True),
    "recompute": replace(ALL, name="recompute", recompute=True),
}
ADDED = {f"+{name}": replace(TRITON, name=f"+{name}", **change) for name, change in OPTIONS.items()}
WITHOUT = {
    f"all_but_{name}": replace(ALL, name=f"all_but_{name}", **{field: getattr(TRITON, field) for field in change})
    for name, change in OPTIONS.items()
}
SWAPS = {name: replace(FUSED, name=name, swapped=name) for name in NAMES}  # "fused" with one op of ours each
RUNGS = CLIMB | {"all": ALL} | MORE | ADDED | WITHOUT | SWAPS


def refusal(rung: Rung, device: torch.device) -> str | None:
    """Why this rung makes no sense on this device."""
    if rung.name == "tf32" and device.type != "cuda":
        return f"{device.type} has no TF32"
    if rung.name == "allocator" and device.type != "cpu":
        return f"what is computed on {device.type} does not use the C library's allocator"
    if rung.cuda_graph and device.type != "cuda":
        return f"{device.type} has no CUDA graphs"
    if ops.interpreted(rung.ops, rung.optimizer):
        return "the speed of Triton's interpreter says nothing: unset TRITON_INTERPRET"
    return None


def training_step(rung: Rung, size: str, T: int, device: torch.device) -> TrainingStep:
    """What this rung trains with; UserError on what this device cannot do. `visible` is for the rest of the process."""
    chosen = ops.build(rung.ops, device.type)
    if rung.visible:
        from benchmarks.visible import make_visible  # imports Triton

        make_visible()
    if rung.allocator and device.type == "cpu":
        keep_freed_memory()
    config = replace(SIZES[size], block_size=max(T, SIZES[size].block_size))
    set_tf32(device, rung.tf32)
    model = GPT(config, chosen, residual=rung.residual, recompute=rung.recompute).to(device)
    kernels = ops.kernels(device.type) if rung.optimizer == "triton" else None
    optimizer = optim.adamw(model, 0.1, fused=rung.fused, kernels=kernels)
    kind = GraphedStep if rung.cuda_graph else TrainingStep
    return kind(model, optimizer, precision=rung.precision, compile=rung.compile)
