"""From settings to everything that the first step needs. Reads, compiles, computes; writes nothing.

So whatever cannot work (data, device, memory, a checkpoint that does not fit) is refused before a run has begun.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt2fast import auto, ops
from gpt2fast.data import tokenizer
from gpt2fast.data.dataset import Dataset, count_tokens, open_data, unigram_entropy
from gpt2fast.data.loader import Loader
from gpt2fast.errors import RunError, UserError
from gpt2fast.inference import hellaswag
from gpt2fast.inference.hellaswag import Example
from gpt2fast.machine.device import Precision, device_name, pick_device, pick_precision, set_deterministic, set_tf32
from gpt2fast.machine.world import ALONE, World, unwrapped
from gpt2fast.measure import Workload
from gpt2fast.model import GPT, SIZES, GPTConfig, parameter_count
from gpt2fast.ops import OpsConfig
from gpt2fast.training import config, flops, optim, run
from gpt2fast.training.config import TrainConfig
from gpt2fast.training.graph import GraphedStep
from gpt2fast.training.step import TrainingStep
from gpt2fast.weights import checkpoint
from gpt2fast.weights.foreign import Weights
from gpt2fast.weights.load import read_weights

COMPILE_FLOPS = 2e14  # five minutes on two good cores: a twentieth of it is what compiling costs, and gains


@dataclass(kw_only=True)
class Session:
    """Everything a run works with. `step` counts finished optimizer steps, `seconds` the time they took.

    `ops` names an implementation for every op; `times` is what --backend auto measured for that, None without it.
    """

    config: TrainConfig
    world: World
    device: torch.device
    precision: Precision
    compile: bool
    ops: OpsConfig
    times: dict[str, dict[str, auto.Result]] | None
    dataset: Dataset
    train: Loader
    val: Loader | None
    hellaswag: list[Example]
    entropy: float
    model: GPT
    take_step: TrainingStep
    peak: float | None
    step: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    expected_seconds: float = math.nan

    @property
    def checkpoints(self) -> Path:
        return self.config.folder / "checkpoints"

    @property
    def accumulation(self) -> int:
        """Micro-batches in an optimizer step, of this process."""
        return self.config.accumulation // self.world.size

    @property
    def stream(self) -> Precision:
        """Dtype of the residual stream."""
        return self.precision if self.model.low_stream else "fp32"

    @property
    def resolved(self) -> dict:
        """What "auto" became, and what the data is: recorded beside the settings."""
        return {
            "device": str(self.device),
            "device_name": device_name(self.device),
            "ranks": self.world.size,
            "torch": torch.__version__,
            "precision": self.precision,
            "residual": self.stream,
            "compile": self.compile,
            "cuda_graph": isinstance(self.take_step, GraphedStep),
            "optimizer": "triton" if isinstance(unwrapped(self.take_step.optimizer), optim.TritonAdamW) else "torch",
            "ops": asdict(self.ops),
            "auto": self.times,
            "parameters": parameter_count(self.model),
            "unigram_entropy": self.entropy,
            "data_fingerprint": self.dataset.fingerprint,
        }

    def mfu(self, tokens_per_second: float) -> float | None:
        return flops.mfu(tokens_per_second / self.world.size, self.config.model, self.config.seq_len, self.peak)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this process from `step` on."""
        first = self.step * self.config.accumulation + self.world.rank
        return self.train.batches(first, self.device, self.world.size)


def prepare(c: TrainConfig, world: World = ALONE) -> Session:
    """UserError on anything that would stop the run later. Every rank calls it."""
    device = pick_device(c.device, world)
    precision = pick_precision(c.precision, device, ops.interpreted(c.implementations, c.optimizer))
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    c = config.resolve(c, memory, world.size)
    config.check(c, world.size)
    world.check_same(config.to_dict(c) | {"torch": torch.__version__, "device": device.type, "precision": precision})
    ops.build(c.implementations, device.type)
    check_optimizer(c, device, precision, world)
    ops.check_sizes(c.implementations, c.model.n_embd, c.model.n_embd // c.model.n_head)
    if c.tensorboard:
        run.check_tensorboard()
    if not c.resume and world.main:
        run.check_free(c.folder)
    if c.sample_every:
        tokenizer.load(c.tokenizer_file)
    weights = initial_weights(c)
    examples = hellaswag.read(c.hellaswag, c.tokenizer_file) if c.hellaswag and c.hellaswag_every else []
    if examples:
        hellaswag.fit(examples, c.model)
    dataset = open_data(c.data, c.model.vocab_size, c.tokenizer_file)
    train = Loader(dataset.train, c.batch_size, c.seq_len, c.model.vocab_size, c.shuffle, c.seed)

    set_tf32(device, c.tf32)
    set_deterministic(device, c.deterministic)
    compiled = compiling_pays(c, device) if c.compile == "auto" else c.compile == "on"
    low = stream_is_low(c, device, precision)
    choice = choose_ops(c, device, precision, compiled, low) if world.main else None
    choice = auto.from_json(world.broadcast(auto.to_json(choice)))  # by the times of one GPU, or roundings would differ
    built = ops.build(choice.ops, device.type)
    model = GPT(c.model, built, c.seed, low_stream=low, recompute=c.recompute)
    if weights:
        model.load_state_dict(weights.tensors)
        del weights
    model.to(device)
    kernels = ops.kernels(device.type) if adamw_is_ours(c, choice.ops, device, precision) else None
    world = world.on(device)
    s = Session(
        config=c,
        world=world,
        device=device,
        precision=precision,
        compile=compiled,
        ops=choice.ops,
        times=choice.results if c.backend == "auto" else None,
        dataset=dataset,
        train=train,
        val=val_loader(c, dataset),
        hellaswag=examples,
        entropy=unigram_entropy(count_tokens(dataset.train, c.model.vocab_size)),
        model=model,
        take_step=(GraphedStep if c.cuda_graph else TrainingStep)(
            model,
            optim.adamw(model, c.weight_decay, (c.beta1, c.beta2), kernels=kernels, world=world if c.zero else ALONE),
            precision=precision,
            accumulation=c.accumulation // world.size,
            grad_clip=c.grad_clip,
            compile=compiled,
            world=world,
        ),
        peak=flops.peak_flops(device_name(device), precision, c.tf32),
    )
    if c.resume:
        load_checkpoint(s)
        check_same_bits(s)
    world.check_same({"step": s.step, "data_fingerprint": dataset.fingerprint})
    rehearse(s)
    return s


def initial_weights(c: TrainConfig) -> Weights | None:
    """What --init-from names, if anything; UserError if the model is of another shape. A checkpoint has its own."""
    if c.init_from is None or c.resume:
        return None
    weights = read_weights(c.init_from)
    if weights.config != c.model:
        given, needed = asdict(c.model), asdict(weights.config)
        differ = [name for name in needed if needed[name] != given[name]]
        preset = next((name for name, size in SIZES.items() if size == weights.config), None)
        flags = " ".join(f"--model.{name.replace('_', '-')} {needed[name]}" for name in differ)
        raise UserError(
            f"{weights.where} does not fit the model: "
            + ", ".join(f"{name} is {needed[name]}, not {given[name]}" for name in differ)
            + (f": train the preset {preset}" if preset else f": add {flags}")
        )
    return weights


def compiling_pays(c: TrainConfig, device: torch.device) -> bool:
    """On CUDA always; on a CPU in a long run, by its length from first to last step, so that a resumed one agrees."""
    if device.type != "cpu":
        return device.type == "cuda"
    work = c.steps * c.total_batch * flops.flops_per_token(c.model, c.seq_len)
    return work > COMPILE_FLOPS and any(map(shutil.which, ("g++", "clang++")))


def stream_is_low(c: TrainConfig, device: torch.device, precision: Precision) -> bool:
    """Whether the residual stream is in autocast's dtype. A sum of 2 n_layer branches may pass fp16's 65504."""
    if c.residual == "auto":
        return device.type == "cuda" and precision == "bf16"
    return c.residual == "low" and precision != "fp32"


def check_optimizer(c: TrainConfig, device: torch.device, precision: Precision, world: World = ALONE) -> None:
    """UserError if --optimizer triton or --cuda-graph was asked for and cannot be had."""
    if c.cuda_graph and device.type != "cuda":
        raise UserError(f"--cuda-graph needs a CUDA GPU, and this run is on {device}: leave it out")
    if c.cuda_graph and world.size > 1:
        raise UserError(f"--cuda-graph records a step of one process, and these are {world.size}: leave it out")
    if c.cuda_graph and (c.optimizer == "torch" or precision == "fp16"):
        what = "fp16" if precision == "fp16" else "--optimizer torch"
        raise UserError(f"--cuda-graph records our own AdamW, which is not that of {what}: leave one of them out")
    if c.optimizer == "triton" and precision == "fp16":
        raise UserError("--optimizer triton knows no loss scaling, which fp16 needs: use --optimizer torch")
    if c.optimizer == "triton" or c.cuda_graph:
        ops.kernels(device.type)


def adamw_is_ours(c: TrainConfig, chosen: OpsConfig, device: torch.device, precision: Precision) -> bool:
    """What --optimizer says; auto follows the ops, since who avoids Triton for all of them has a reason."""
    if c.optimizer == "auto":
        some = not set(ops.TRITON).isdisjoint(asdict(chosen).values())
        return (some or c.cuda_graph) and device.type == "cuda" and precision != "fp16"
    return c.optimizer == "triton"


def choose_ops(c: TrainConfig, device: torch.device, precision: Precision, compiled: bool, low: bool) -> auto.Choice:
    """What --backend and --ops say; what they leave open is measured, or on --resume taken as it was."""
    if c.backend != "auto":
        return auto.Choice(ops=c.implementations, results={})
    if c.resume and (choice := resumed_choice(c, device, precision, compiled, low)):
        return choice
    m = c.model
    sizes: dict = {"B": c.batch_size, "T": c.seq_len, "C": m.n_embd, "H": m.n_head, "V": m.padded_vocab_size}
    how: dict = {"precision": precision, "tf32": c.tf32, "compiled": compiled, "low_stream": low}
    work = Workload(**sizes, vocab_size=m.vocab_size, **how)
    try:
        return auto.pick(c.ops, work, device)
    except torch.OutOfMemoryError:
        raise out_of_memory(c) from None


def resumed_choice(
    c: TrainConfig, device: torch.device, precision: Precision, compiled: bool, low: bool
) -> auto.Choice | None:
    """The choice in config.json, so that the run goes on as it began; None if it was made for something else."""
    before, resolved = config.read_record(c.folder)
    resolved = {"residual": "fp32"} | resolved  # as it was before there was a choice
    now = {"device_name": device_name(device), "precision": precision, "compile": compiled}
    now["residual"] = precision if low else "fp32"
    same = before.backend == "auto" and before.tf32 == c.tf32 and all(resolved.get(name) == now[name] for name in now)
    left_open = [op for op, given in asdict(c.ops).items() if given is None]
    if not same or any(getattr(before.ops, op) for op in left_open):
        return None
    found = auto.recall(c.ops, resolved["ops"], device.type)
    times = {op: results for op, results in resolved["auto"].items() if op in left_open}
    return auto.Choice(ops=found, results=times) if found else None


def val_loader(c: TrainConfig, dataset: Dataset) -> Loader | None:
    """Windows of the validation split, the same ones each time and from all over it; None without a split.

    Where the split is too short for B, in smaller batches.
    """
    windows = sum(max(0, len(tokens) - 1) // c.seq_len for tokens in dataset.val)
    if not c.val_every or not windows:
        return None
    return Loader(dataset.val, min(c.batch_size, windows), c.seq_len, c.model.vocab_size, shuffle=True)


def load_checkpoint(s: Session) -> None:
    """Put the run's newest checkpoint into the session; UserError if it is damaged, or of other data."""
    found = checkpoint.list_checkpoints(s.checkpoints)
    if not found:
        raise UserError(f"{s.config.folder} holds no checkpoint yet: delete it, and begin again without --resume")
    step, path = found[-1]
    state = checkpoint.read_state(path)
    if state["data_fingerprint"] != s.dataset.fingerprint:
        raise UserError(
            f"data {s.config.data} has fingerprint {s.dataset.fingerprint}, and {path} was trained on "
            f"{state['data_fingerprint']}: restore that data, or begin a new run with --run NAME"
        )
    if step >= s.config.steps:
        raise UserError(f"run {s.config.folder} is complete at step {step}: raise --steps above {step} to train on")
    checkpoint.load_training(path, s.model, s.take_step.optimizer, state)
    if s.take_step.scaler.is_enabled() and state["scaler"]:
        s.take_step.scaler.load_state_dict(state["scaler"])
    s.step, s.seconds = step, state["seconds"]


def check_same_bits(s: Session) -> None:
    """UserError where --deterministic would go on with other bits than the run began with."""
    before, was = config.read_record(s.config.folder)
    if not (s.config.deterministic and before.deterministic):
        return
    now = s.resolved
    for name in ("device_name", "ranks", "torch", "precision", "residual", "compile", "cuda_graph", "optimizer", "ops"):
        if was[name] != now[name]:
            raise UserError(
                f"run {s.config.folder} had {name} = {was[name]}, and now it is {now[name]}: its bits would change, "
                "which --deterministic rules out: go back (OMP_NUM_THREADS sets threads), or add --no-deterministic"
            )


def rehearse(s: Session) -> None:
    """Compile the step, see that it fits into memory, time it, and look at the loss; the model stays as it is."""
    if s.compile:
        print("compiling the training step, which takes up to a minute ...", flush=True)
    try:
        s.first_loss, seconds = s.take_step.rehearse(next(s.batches()))
    except torch.OutOfMemoryError:
        raise out_of_memory(s.config) from None
    s.expected_seconds = (s.config.steps - s.step) * s.accumulation * seconds
    if not math.isfinite(s.first_loss):
        raise UserError(f"the loss is {s.first_loss} at step {s.step + 1}: look at the data, or try --precision fp32")


def out_of_memory(c: TrainConfig, begun: bool = False) -> RunError:
    """What to lower, and by how much. `begun`: a run, which goes on from its last checkpoint with its own batches."""
    halves = [b for b in range(c.batch_size // 2, 0, -1) if c.total_batch % (b * c.seq_len) == 0]
    smaller = [name for name, size in SIZES.items() if parameters(size) < parameters(c.model)]
    if begun or c.resume:
        remedy = "free the memory that others hold, then continue with --resume"
        remedy += "" if c.recompute else ", and with --recompute, which keeps less"
    elif halves:
        remedy = f"take --batch-size {halves[0]}; a step stays the same, in more micro-batches"
    elif not c.recompute:
        remedy = "take --recompute, which keeps less of each block"
    elif c.seq_len > 1 and c.seq_len % 2 == 0:
        remedy = f"take --seq-len {c.seq_len // 2}"
    else:
        remedy = f"train the preset {smaller[-1]}" if smaller else "take a smaller model"
    return RunError(f"out of memory with --batch-size {c.batch_size} and --seq-len {c.seq_len}{gpu_memory()}: {remedy}")


def parameters(m: GPTConfig) -> int:
    """Of the matrices, about: enough to say which model is the smaller."""
    return 12 * m.n_layer * m.n_embd**2 + m.vocab_size * m.n_embd


def gpu_memory() -> str:
    """What this run held at most, and what its GPU has and had left, if CUDA tells."""
    try:
        free, total = torch.cuda.mem_get_info()
        most = torch.cuda.max_memory_allocated()
    except (RuntimeError, AssertionError):  # no CUDA, or a context that is no more
        return ""
    gigabytes = [f"{number / 1e9:.1f}" for number in (most, total, free)]
    return " (this run held up to {} GB of the device's {}, and {} are free)".format(*gigabytes)
