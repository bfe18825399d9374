"""The seven functions that GPT-2 spends its time in, and the one place where their implementation is chosen.

An implementation is a module that defines the seven names: `gpt2fast.reference` in plain PyTorch, `gpt2fast.cpu` in
PyTorch arranged for a CPU (it is what "torch" means there), `gpt2fast.kernels` in Triton; mlp has a second one in
Triton, `gpt2fast.kernels.epilogue`. `OpsConfig` names one for each op, in plain strings (for the command line, the
checkpoint and the results); `build` turns it into an `Ops`, which is passed to the model. Nothing is patched, and
nothing falls back silently.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from gpt2fast import cpu, reference
from gpt2fast.errors import UserError

Implementation = Literal["torch", "compiled", "triton"]  # compiled: torch.compile of each torch op
MLPImplementation = Literal[Implementation, "epilogue"]  # epilogue: bias and GELU in our Triton matmuls
Backend = Literal["auto", "torch", "triton"]
TRITON = "triton", "epilogue"  # implementations that need Triton
HEAD_DIMENSIONS = 16, 256  # of kernels/attention_forward.py
MAX_WIDTH = 16384  # of kernels/layernorm.py


@dataclass(frozen=True, kw_only=True)
class OpsConfig:
    """The implementation of each op. None: the one that --backend names."""

    embedding: Implementation | None = None
    """Token + position embedding."""
    layer_norm: Implementation | None = None
    """LayerNorm."""
    add_layer_norm: Implementation | None = None
    """Residual add + LayerNorm."""
    attention: Implementation | None = None
    """Causal attention."""
    mlp: MLPImplementation | None = None
    """linear(gelu(linear(x)))."""
    linear: Implementation | None = None
    """The remaining projections."""
    linear_cross_entropy: Implementation | None = None
    """Tied head + loss."""

    def with_backend(self, backend: Implementation | Backend) -> "OpsConfig":
        """Set every op that is None to `backend`; with "auto" it stays None, and auto.py chooses."""
        if backend == "auto":
            return self
        return replace(self, **{op: backend for op, name in asdict(self).items() if name is None})


@dataclass(frozen=True, kw_only=True)
class Ops:
    """Seven pure functions, differentiable in every floating-point argument, and specified by `gpt2fast.reference`.

    `cached_attention` is attention for one new token, from the same module as `attention`. It writes to the cache and
    has no gradient.

    Dtypes: outputs have the compute dtype, which is autocast's where autocast is on and the input's elsewhere; the
    output of `embedding` has the dtype that its argument names, and the residual sum of `add_layer_norm` the one that
    x + y promotes to; statistics and losses are fp32.
    """

    embedding: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    attention: Callable[[Tensor, int], Tensor]
    mlp: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    linear: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]
    cached_attention: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


NAMES = tuple(field.name for field in fields(OpsConfig))


def build(config: OpsConfig, device: str = "cpu") -> Ops:
    """Look each op up in its module; torch's if it is None.

    UserError, at start-up, if Triton, a GPU or the op itself is missing.
    """
    chosen = asdict(config.with_backend("torch"))
    modules = {name: _implementation(name, device) for name in sorted(set(chosen.values()))}
    missing = [op for op, name in chosen.items() if not _has(modules[name], name, op)]
    if missing:
        raise UserError(
            f"{chosen[missing[0]]} has no implementation of {', '.join(missing)}: use --ops.{missing[0]} torch"
        )
    functions = {op: getattr(modules[name], op) for op, name in chosen.items()}
    functions = {op: _compiled(fn) if chosen[op] == "compiled" else fn for op, fn in functions.items()}
    return Ops(**functions, cached_attention=modules[chosen["attention"]].cached_attention)


def runnable(config: OpsConfig, device: str) -> tuple[OpsConfig, str]:
    """Return `config` with torch for the ops that cannot run on `device`, and a text that names them and the reason.

    The text is "" if all ops can run.
    """
    lost: dict = {}
    reasons = []
    for op, name in asdict(config.with_backend("torch")).items():
        try:
            build(OpsConfig(**{op: name}), device)
        except UserError as error:
            lost[op] = name
            reasons.append(str(error).partition(": ")[0])
    if not lost:
        return config, ""
    of_all = len(lost) == len(NAMES) and len(set(lost.values())) == 1
    names = f"{lost[NAMES[0]]} ops" if of_all else ", ".join(f"{op}={name}" for op, name in lost.items())
    torch_only: dict = dict.fromkeys(lost, "torch")
    return replace(config, **torch_only), f"{names}, which cannot run here ({reasons[0]})"


def check_sizes(config: OpsConfig, C: int, D: int) -> None:
    """Raise UserError if a kernel of `config` does not support width C or head dimension D."""
    chosen = config.with_backend("torch")
    least, most = HEAD_DIMENSIONS
    if chosen.attention == "triton" and not least <= D <= most:
        raise UserError(
            f"heads have n_embd / n_head = {D} dimensions, and triton's attention supports {least} to {most}: "
            "change --model.n-head, or use --ops.attention torch"
        )
    for name in ("layer_norm", "add_layer_norm"):
        if getattr(chosen, name) == "triton" and C > MAX_WIDTH:
            flag = f"--ops.{name.replace('_', '-')}"
            raise UserError(f"n_embd is {C}, and triton's {name} supports at most {MAX_WIDTH}: use {flag} torch")


def kernels(device: str) -> ModuleType:
    """Return gpt2fast.kernels, for AdamW, which is not one of the ops. UserError if they cannot run on `device`."""
    return _implementation("triton", device, instead="--optimizer torch")


def _implementation(name: str, device: str, instead: str = "--backend torch") -> ModuleType:
    if name in ("torch", "compiled"):
        return cpu if torch.device(device).type == "cpu" else reference
    if name not in TRITON:
        raise UserError(f"unknown implementation {name!r}: use torch, compiled, triton, or for mlp epilogue")
    if find_spec("triton") is None:
        raise UserError(
            f"the triton backend needs the package triton (Linux: pip install triton): install it or use {instead}"
        )
    if not _interpreting() and (torch.device(device).type != "cuda" or torch.version.hip is not None):
        raise UserError(
            f"the triton backend needs a CUDA GPU, and this run is on {device}: use {instead}, "
            "or set TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter"
        )
    kernels = import_module("gpt2fast.kernels")
    if fault := kernels.interpreter_fault():
        raise UserError(fault)
    return kernels if name == "triton" else import_module("gpt2fast.kernels.epilogue")


def _has(module: ModuleType, name: str, op: str) -> bool:
    """Return whether `module` implements `op`: the epilogue's file has only mlp, though it imports other names."""
    return op == "mlp" if name == "epilogue" else hasattr(module, op)


def _compiled(fn: Callable) -> Callable:
    """Return `fn`, compiled where it is differentiated: the shapes of validation and samples would recompile it."""
    fast = torch.compile(fn, dynamic=False)

    @wraps(fn)
    def op(*args):
        return fast(*args) if torch.is_grad_enabled() else fn(*args)

    return op


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(config: OpsConfig, optimizer: str = "torch") -> bool:
    """Return whether an op of `config`, or the optimizer, runs in Triton's interpreter, which computes bf16 wrongly."""
    return _interpreting() and not set(TRITON).isdisjoint([*asdict(config).values(), optimizer])
