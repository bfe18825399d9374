"""The rungs of the ladder: the settings of a training step, from plain PyTorch in fp32 to all of our kernels.

climb    each adds one thing to the one before: fp32, allocator settings (CPU only), TF32 (CUDA only), bf16 autocast,
         torch.compile, fused AdamW, our kernels
options  our own, on top of our kernels: each alone (+name), all, all but one (all_but_name)
more     all of them and one thing that is not always faster: a CUDA graph, activation checkpointing
swaps    torch's fastest rung with one op of ours
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import step_parts
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
    swapped: str = ""  # the one op that is triton's, whatever the backend is
    embedding: Implementation | None = None  # None: the backend's
    mlp: Implementation | None = None
    residual: Residual = "fp32"
    optimizer: str = "torch"
    cuda_graph: bool = False
    recompute: bool = False

    @property
    def ops(self) -> OpsConfig:
        named = {"embedding": self.embedding, "mlp": self.mlp} | ({self.swapped: "triton"} if self.swapped else {})
        return OpsConfig(**{op: name for op, name in named.items() if name}).with_backend(self.backend)

    @property
    def counted(self) -> step_parts.Options:
        """The settings that change the work, for the floor's table."""
        ops = self.ops
        return step_parts.Options(
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
OPTIONS: dict[str, dict[str, Any]] = {  # our own: a new one is a line
    "embedding": {"embedding": "triton"},
    "residual": {"residual": "low"},
    "epilogue": {"mlp": "epilogue"},
    "adamw": {"optimizer": "triton"},
}
ALL = replace(TRITON, name="all", **{field: value for change in OPTIONS.values() for field, value in change.items()})
MORE = {
    "graph": replace(ALL, name="graph", cuda_graph=True),
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
    """Return why this rung cannot be measured on this device, or None."""
    if rung.name == "tf32" and device.type != "cuda":
        return f"{device.type} has no TF32"
    if rung.name == "allocator" and device.type != "cpu":
        return f"computation on {device.type} does not use the C library's allocator"
    if rung.cuda_graph and device.type != "cuda":
        return f"{device.type} has no CUDA graphs"
    if ops.interpreted(rung.ops, rung.optimizer):
        return "times of Triton's interpreter mean nothing: unset TRITON_INTERPRET"
    return None


def training_step(rung: Rung, size: str, T: int, device: torch.device) -> TrainingStep:
    """Return the step that this rung trains with. Raise UserError if this device cannot run it."""
    chosen = ops.build(rung.ops, device.type)
    if rung.allocator and device.type == "cpu":
        keep_freed_memory()
    config = replace(SIZES[size], block_size=max(T, SIZES[size].block_size))
    set_tf32(device, rung.tf32)
    model = GPT(config, chosen, residual=rung.residual, recompute=rung.recompute).to(device)
    kernels = ops.kernels(device.type) if rung.optimizer == "triton" else None
    optimizer = optim.adamw(model, 0.1, fused=rung.fused, kernels=kernels)
    kind = GraphedStep if rung.cuda_graph else TrainingStep
    return kind(model, optimizer, precision=rung.precision, compile=rung.compile)
