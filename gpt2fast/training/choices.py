"""What every "auto" of a run becomes, decided once, before anything is built.

    settle    the device, the precision, the GPU's memory
    choose    compiled or not, the residual stream, ops, optimizer, rounded copies of the weights

The header prints `fields(Choices)`, config.json keeps them, and --deterministic compares them on --resume. So a new
option is a field of TrainConfig, a field of Choices with its line in `choose`, and the code that uses it.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from gpt2fast import auto, ops
from gpt2fast.errors import UserError
from gpt2fast.machine.device import Precision, device_name, pick_device, pick_precision
from gpt2fast.machine.world import ALONE, World
from gpt2fast.measure import Workload
from gpt2fast.ops import OpsConfig
from gpt2fast.training import flops
from gpt2fast.training.config import Resolved, TrainConfig
from gpt2fast.training.memory import out_of_memory
from gpt2fast.training.step import Copies, kind_of_copies

COMPILE_FLOPS = 2e14  # five minutes on two fast cores: compiling costs a twentieth of them, and saves as much


@dataclass(frozen=True)
class Place:
    """The device and precision of a run. `memory` is the GPU's, in bytes; None elsewhere."""

    device: torch.device
    precision: Precision
    memory: int | None


def settle(c: TrainConfig, world: World = ALONE) -> Place:
    """Return the device and precision of this rank. UserError if --device or --precision is not available."""
    device = pick_device(c.device, world)
    precision = pick_precision(c.precision, device, ops.interpreted(c.implementations, c.optimizer))
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return Place(device, precision, memory)


def shown(words: Callable[[Any], str], bits: bool = True) -> dict:
    """Make the metadata of a field of Choices: the words of its value in the header, "" for none, and whether it
    changes the bits of a run."""
    return {"words": words, "bits": bits}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a run computes. `device` includes the GPU's number; `auto` holds the times by which --backend auto chose.

    A field without metadata changes the bits of a run, and the header shows it in another line or not at all.
    """

    device: str = field(metadata={"bits": False})
    device_name: str
    ranks: int
    torch: str
    precision: Precision = field(metadata=shown(lambda name: name if name == "fp32" else f"{name} autocast"))
    tf32: bool | None = field(metadata=shown(lambda on: "" if on is None else f"TF32 {'on' if on else 'off'}"))
    residual: Precision = field(metadata=shown(lambda name: f"residual stream {name}"))
    compile: bool = field(metadata=shown(lambda on: "compiled" if on else "not compiled"))
    deterministic: bool = field(metadata=shown(lambda on: "deterministic" * on, bits=False))
    recompute: bool = field(metadata=shown(lambda on: "blocks recomputed in backward" * on, bits=False))
    cuda_graph: bool = field(metadata=shown(lambda on: "CUDA graph" * on))
    optimizer: str = field(metadata=shown(lambda name: "" if name == "torch" else f"AdamW by {name}"))
    copies: Copies
    ops: OpsConfig
    auto: dict[str, dict] | None = field(metadata={"bits": False})

    def words(self) -> str:
        """Return the header's line about them. `residual` is in it with autocast only: it is fp32 without."""
        found = {f.name: f.metadata["words"](getattr(self, f.name)) for f in fields(self) if "words" in f.metadata}
        if self.precision == "fp32":
            del found["residual"]
        return ", ".join(filter(None, found.values()))


def choose(c: Resolved, place: Place, world: World = ALONE, before: tuple[TrainConfig, dict] | None = None) -> Choices:
    """Decide what the settings leave open. Rank 0 chooses the ops for all ranks, whose rounding must not differ.

    `before`: the settings and the choices of the run that is resumed.
    """
    device, precision = place.device, place.precision
    compiled = compiling_pays(c, device) if c.compile == "auto" else c.compile == "on"
    residual = residual_dtype(c, place)
    chosen = choose_training_ops(c, place, compiled, residual, before) if world.main else None
    chosen = auto.from_json(world.broadcast(auto.to_json(chosen)))
    optimizer = "triton" if adamw_is_ours(c, chosen.ops, place) else "torch"
    return Choices(
        device=str(device),
        device_name=device_name(device),
        ranks=world.size,
        torch=torch.__version__,
        precision=precision,
        tf32=c.tf32 if device.type == "cuda" else None,
        residual=residual,
        compile=compiled,
        deterministic=c.deterministic,
        recompute=c.recompute,
        cuda_graph=c.cuda_graph,
        optimizer=optimizer,
        copies=kind_of_copies(precision, device, c.accumulation // world.size, compiled, optimizer, world.size),
        ops=chosen.ops,
        auto=chosen.results if c.backend == "auto" else None,
    )


def runnable_settings(c: TrainConfig, device: torch.device) -> tuple[TrainConfig, str]:
    """Return the settings of a run to be resumed, with torch in place of what cannot run on `device`, and a text that
    names it and the reason; "" if all of it can run.
    """
    runnable, why = ops.runnable(c.implementations, device.type)
    if why:
        kept = {op: name if name == getattr(runnable, op) else None for op, name in asdict(c.ops).items()}
        c = replace(c, backend="auto" if c.backend == "auto" else "torch", ops=OpsConfig(**kept))
    if c.optimizer == "triton" or c.cuda_graph:
        try:
            ops.kernels(device.type)
            graph = c.cuda_graph and device.type == "cuda"
        except UserError as error:
            why = why or f"AdamW by triton, which cannot run here ({str(error).partition(': ')[0]})"
            c, graph = replace(c, optimizer="auto"), False
        c = replace(c, cuda_graph=graph)
    return c, why


def check_possible(c: Resolved, place: Place, world: World = ALONE) -> None:
    """Raise UserError if the ops, --optimizer or --cuda-graph asked for are not available on this device."""
    ops.build(c.implementations, place.device.type)
    check_optimizer(c, place, world)
    ops.check_sizes(c.implementations, c.model.n_embd, c.model.n_embd // c.model.n_head)


def check_optimizer(c: TrainConfig, place: Place, world: World = ALONE) -> None:
    """Raise UserError if --optimizer triton or --cuda-graph was asked for and is not available."""
    fp16 = place.precision == "fp16"
    if c.cuda_graph and place.device.type != "cuda":
        raise UserError(f"--cuda-graph needs a CUDA GPU, and this run is on {place.device}: leave it out")
    if c.cuda_graph and world.size > 1:
        raise UserError(f"--cuda-graph works with one process, and this run has {world.size}: leave it out")
    if c.cuda_graph and (c.optimizer == "torch" or fp16):
        what = "fp16" if fp16 else "--optimizer torch"
        raise UserError(f"--cuda-graph needs Triton's AdamW, which does not work with {what}: leave one of them out")
    if c.optimizer == "triton" and fp16:
        raise UserError("--optimizer triton does not support the loss scaling of fp16: use --optimizer torch")
    if c.optimizer == "triton" or c.cuda_graph:
        ops.kernels(place.device.type)


def compiling_pays(c: TrainConfig, device: torch.device) -> bool:
    """Return whether to compile: always on CUDA; on a CPU if the run is long and there is a C++ compiler.

    A run's length is that of all its steps, so that the answer is the same after --resume.
    """
    if device.type != "cpu":
        return device.type == "cuda"
    work = c.steps * c.total_batch * flops.flops_per_token(c.model, c.seq_len)
    return work > COMPILE_FLOPS and any(map(shutil.which, ("g++", "clang++")))


def residual_dtype(c: TrainConfig, place: Place) -> Precision:
    """Return the dtype of the residual stream: fp32, or that of autocast.

    auto does not take fp16, since a sum of 2 n_layer branches may exceed its 65504.
    """
    if c.residual == "auto":
        return "bf16" if place.device.type == "cuda" and place.precision == "bf16" else "fp32"
    return place.precision if c.residual == "low" else "fp32"


def adamw_is_ours(c: TrainConfig, chosen: OpsConfig, place: Place) -> bool:
    """Return whether Triton's AdamW is used. auto: on CUDA without fp16, if some op is Triton's or for --cuda-graph."""
    if c.optimizer == "auto":
        some = not set(ops.TRITON).isdisjoint(asdict(chosen).values())
        return (some or c.cuda_graph) and place.device.type == "cuda" and place.precision != "fp16"
    return c.optimizer == "triton"


def choose_training_ops(
    c: Resolved, place: Place, compiled: bool, residual: Precision, before: tuple[TrainConfig, dict] | None
) -> auto.Choice:
    """Return the ops of --backend and --ops. Those left open are measured, or on --resume taken from the record."""
    if c.backend != "auto":
        return auto.Choice(ops=c.implementations, results={})
    if before and (again := resumed_choice(c, place, compiled, residual, *before)):
        return again
    m = c.model
    work = Workload(
        B=c.batch_size, T=c.seq_len, C=m.n_embd, H=m.n_head, V=m.padded_vocab_size, vocab_size=m.vocab_size,
        precision=place.precision, tf32=c.tf32, compiled=compiled, residual=residual,
    )  # fmt: skip
    try:
        return auto.pick(c.ops, work, place.device)
    except torch.OutOfMemoryError:
        raise out_of_memory(c) from None


def resumed_choice(
    c: Resolved, place: Place, compiled: bool, residual: Precision, before: TrainConfig, was: dict
) -> auto.Choice | None:
    """Return the earlier choice, so that the run continues with its ops; None if it was made for something else."""
    now = {
        "device_name": device_name(place.device), "precision": place.precision, "compile": compiled,
        "residual": residual,
    }  # fmt: skip
    same = before.backend == "auto" and before.tf32 == c.tf32 and all(was[name] == now[name] for name in now)
    left_open = [op for op, given in asdict(c.ops).items() if given is None]
    if not same or any(getattr(before.ops, op) for op in left_open):
        return None
    found = auto.recall(c.ops, was["ops"], place.device.type)
    times = {op: results for op, results in was["auto"].items() if op in left_open}
    return auto.Choice(ops=found, results=times) if found else None
