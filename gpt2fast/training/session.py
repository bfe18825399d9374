"""The way from settings to everything that the first step needs. It reads, compiles and computes, and writes nothing.

    place     device, precision, memory                                   choices.settle
    config    a value for each setting that depends on others             config.resolve
    inputs    weights, data, examples                                     inputs.read_inputs
    choices   what every "auto" became                                    choices.choose
    session   the model and its step: built, resumed and rehearsed        start_session

Each stage runs once. So anything that cannot work (data, device, memory, a checkpoint that does not fit) is refused
before the run begins.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gpt2fast import ops
from gpt2fast.errors import UserError
from gpt2fast.machine.device import set_deterministic, set_tf32
from gpt2fast.machine.world import ALONE, World
from gpt2fast.model import GPT, parameter_count
from gpt2fast.training import config, flops, optim
from gpt2fast.training.choices import Choices, Place, check_possible, choose, settle
from gpt2fast.training.config import Resolved, TrainConfig
from gpt2fast.training.graph import GraphedStep
from gpt2fast.training.inputs import Inputs, read_inputs
from gpt2fast.training.memory import out_of_memory
from gpt2fast.training.record import changed_choice, choices_and_facts
from gpt2fast.training.step import TrainingStep
from gpt2fast.weights import checkpoint
from gpt2fast.weights.foreign import Weights


@dataclass(kw_only=True)
class Session:
    """Everything a run works with. `step` counts finished optimizer steps, `seconds` the time they took."""

    config: Resolved
    world: World
    place: Place
    inputs: Inputs
    choices: Choices
    model: GPT
    take_step: TrainingStep
    step: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    expected_seconds: float = math.nan

    @property
    def checkpoints(self) -> Path:
        return self.config.folder / "checkpoints"

    @property
    def accumulation(self) -> int:
        """Return the micro-batches of an optimizer step in this process."""
        return self.config.accumulation // self.world.size

    @property
    def choices_and_facts(self) -> dict:
        """Return what config.json keeps beside the settings."""
        return choices_and_facts(
            self.choices,
            parameters=parameter_count(self.model),
            unigram_entropy=self.inputs.entropy,
            data_fingerprint=self.inputs.dataset.fingerprint,
        )

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the model FLOPs utilisation of one process; None if the device's peak is unknown."""
        c = self.config
        peak = flops.peak_flops(self.choices.device_name, self.choices.precision, c.tf32)
        return flops.mfu(tokens_per_second / self.world.size, c.model, c.seq_len, peak)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches of this process from `step` on."""
        first = self.step * self.config.accumulation + self.world.rank
        return self.inputs.train.batches(first, self.place.device, self.world.size)


def start_session(settings: TrainConfig, world: World = ALONE) -> Session:
    """Prepare a run. UserError on anything that would stop it later. Every rank must call it."""
    place = settle(settings, world)
    c = config.resolve(settings, place.memory, world.size)
    config.check(c, world.size)
    here = {"torch": torch.__version__, "device": place.device.type, "precision": place.precision}
    world.check_same(config.to_dict(c) | here)
    check_possible(c, place, world)
    inputs = read_inputs(c, world)
    set_tf32(place.device, c.tf32)
    set_deterministic(place.device, c.deterministic)
    choices = choose(c, place, world, inputs.before)
    world = world.on(place.device)
    model = initial_model(c, place, choices, inputs.weights)
    inputs = replace(inputs, weights=None)  # the model has copied them
    take_step = build_step(c, choices, model, world)
    s = Session(
        config=c, world=world, place=place, inputs=inputs, choices=choices, model=model, take_step=take_step
    )  # fmt: skip
    if inputs.before:
        load_checkpoint(s)
        check_same_bits(s, *inputs.before)
    world.check_same({"step": s.step, "data_fingerprint": inputs.dataset.fingerprint})
    rehearse(s)
    return s


def initial_model(c: Resolved, place: Place, choices: Choices, weights: Weights | None) -> GPT:
    """Build the model on its device, with `weights` if given, else with random ones."""
    built = ops.build(choices.ops, place.device.type)
    low = choices.residual != "fp32"
    model = GPT(c.model, built, c.seed, residual="low" if low else "fp32", recompute=choices.recompute)
    if weights:
        model.load_state_dict(weights.tensors)
    return model.to(place.device)


def build_step(c: Resolved, choices: Choices, model: GPT, world: World) -> TrainingStep:
    """Build the training step with its optimizer."""
    kernels = ops.kernels(model.wte.weight.device.type) if choices.optimizer == "triton" else None
    zero = world if c.zero else ALONE
    kind = GraphedStep if choices.cuda_graph else TrainingStep
    return kind(
        model,
        optim.adamw(model, c.weight_decay, (c.beta1, c.beta2), kernels=kernels, world=zero),
        precision=choices.precision,
        accumulation=c.accumulation // world.size,
        grad_clip=c.grad_clip,
        compile=choices.compile,
        copies=choices.copies,
        world=world,
    )


def load_checkpoint(s: Session) -> None:
    """Load the run's newest checkpoint into the session. UserError if it is damaged, or was trained on other data."""
    found = checkpoint.list_checkpoints(s.checkpoints)
    if not found:
        raise UserError(f"{s.config.folder} holds no checkpoint yet: delete it, and start again without --resume")
    step, path = found[-1]
    state = checkpoint.read_state(path)
    fingerprint = s.inputs.dataset.fingerprint
    if state["data_fingerprint"] != fingerprint:
        raise UserError(
            f"data {s.config.data} has fingerprint {fingerprint}, and {path} was trained on "
            f"{state['data_fingerprint']}: restore that data, or start a new run with --run NAME"
        )
    if step >= s.config.steps:
        raise UserError(f"run {s.config.folder} is complete at step {step}: raise --steps above {step} to train on")
    checkpoint.load_training(path, s.model, s.take_step.optimizer, state)
    if s.take_step.scaler.is_enabled() and state["scaler"]:
        s.take_step.scaler.load_state_dict(state["scaler"])
    s.step, s.seconds = step, state["seconds"]


def check_same_bits(s: Session, before: TrainConfig, was: dict) -> None:
    """Raise UserError if both the run and its resume are --deterministic, and a choice would change the bits."""
    if not (s.config.deterministic and before.deterministic):
        return
    if found := changed_choice(s.choices, was):
        name, old, new = found
        raise UserError(
            f"run {s.config.folder} had {name} = {old}, and now it is {new}, which would change its bits, and it is "
            "--deterministic: restore that (OMP_NUM_THREADS sets threads), or add --no-deterministic"
        )


def rehearse(s: Session) -> None:
    """Compile the step, and check that it fits into memory, its time and its loss. The model is not changed."""
    if s.choices.compile:
        print("compiling the training step, which takes up to a minute ...", flush=True)
    try:
        s.first_loss, seconds = s.take_step.rehearse(next(s.batches()))
    except torch.OutOfMemoryError:
        raise out_of_memory(s.config) from None
    s.expected_seconds = (s.config.steps - s.step) * s.accumulation * seconds
    if not math.isfinite(s.first_loss):
        raise UserError(f"the loss is {s.first_loss} at step {s.step + 1}: check the data, or try --precision fp32")
