"""Every setting of a training run, declared once; the presets; and the checks that need nothing but the settings.

`tyro` turns the dataclasses into the command line, their docstrings into its help; `asdict` goes into config.json,
the checkpoint and the results.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from gpt2fast.data import stdlib
from gpt2fast.errors import UserError
from gpt2fast.files import checked
from gpt2fast.model import SIZES, GPTConfig
from gpt2fast.ops import Backend, OpsConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train GPT-2. Presets: nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl; the default is gpt2 on CUDA, else nano."""

    model: GPTConfig = field(default_factory=GPTConfig)
    """The shape of the model."""
    backend: Backend = "torch"
    """Implementation of the seven ops: plain PyTorch, our Triton kernels, or of each op what is fastest here (auto)."""
    ops: OpsConfig = field(default_factory=OpsConfig)
    """Implementation of single ops, over --backend."""
    init_from: str | None = None
    """Weights to begin with, for fine-tuning: a run's folder, a name on the hub (gpt2), a Hugging Face folder, llm.c's
    .bin, nanoGPT's ckpt.pt, OpenAI's checkpoint. None: drawn from --seed."""

    data: str = stdlib.NAME
    """A folder of token shards, or stdlib: the source of Python's standard library."""
    tokenizer_file: Path | None = None
    """GPT-2's vocab.bpe, where it can neither be found nor downloaded."""
    shuffle: bool = True
    """Another order of the windows in each epoch; else one after the other."""

    batch_size: int | None = None
    """Sequences in a micro-batch, B. None: what the device's memory holds."""
    seq_len: int = 1024
    """Tokens in a sequence, T."""
    total_batch: int = 524288
    """Tokens in an optimizer step: a multiple of B*T; the micro-batches' gradients are accumulated."""
    steps: int = 19073
    """Optimizer steps; the learning rate's cosine ends with the last."""
    lr: float = 6e-4
    """Highest learning rate."""
    lr_floor: float = 0.1
    """Learning rate at the end, as a share of --lr."""
    warmup: int | None = None
    """Steps of linear warm-up. None: 5% of --steps, at most 715 (375 million tokens, as GPT-3's)."""
    weight_decay: float = 0.1
    """On matrices and embeddings only."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.95
    """AdamW."""
    grad_clip: float = 1.0
    """Longest gradient, by norm; 0: not clipped."""
    optimizer: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of AdamW: PyTorch's fused one, or ours, which also rounds the weights for the next step. auto:
    ours on CUDA where Triton has an op to compute or with --cuda-graph, but for fp16."""
    seed: int = 1337
    """Of initial weights, data order and samples."""

    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 autocast where the device is fast at it, fp16 with loss scaling on CUDA without it, else fp32."""
    tf32: bool = True
    """Let CUDA's fp32 matmuls use TF32."""
    residual: Literal["auto", "fp32", "low"] = "auto"
    """The residual stream: in fp32, or in autocast's dtype (low). auto: low under bf16 on CUDA; fp16 might overflow."""
    zero: bool = False
    """ZeRO-1: each of many processes keeps the optimizer's state of its share of the weights only, 8 bytes a weight
    divided by their number. The same bits with torch's AdamW; ours sums up the gradient's norm in another order."""
    recompute: bool = False
    """Activation checkpointing: a block keeps 6 of about 40 bytes a token and unit of width, and runs again in
    backward, a third more of its work."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on CUDA; on a CPU that has a C++ compiler in a run of more than about five minutes."""
    deterministic: bool = False
    """The same bits from every run with the same settings, device and versions, on CUDA at the price of some speed, and
    on a CPU with as many threads; refused where that cannot be promised. Sampled texts on CUDA are not included."""
    cuda_graph: bool = False
    """Record the step as CUDA graphs and replay it: faster where a step is so small that launching takes the time."""

    out: Path = Path("out")
    """Folder of all runs."""
    run: str | None = None
    """Name of this run, a folder in --out. None: the preset's name."""
    resume: bool = False
    """Continue the run from its newest checkpoint, with its own settings where no flag says otherwise."""
    stop_at: int | None = None
    """End after this step with a checkpoint, as Ctrl-C would; the schedule still goes to --steps."""
    log_every: int | None = None
    """Steps between reading losses back. None: on CUDA, where the host then waits, once a second; else each step."""
    val_every: int = 250
    """Steps between validations; 0: never."""
    val_batches: int = 20
    """Micro-batches in a validation; 0: the whole split."""
    hellaswag: Path | None = None
    """HellaSwag's hellaswag_val.jsonl, or llm.c's .bin of it: scored every --hellaswag-every steps."""
    hellaswag_every: int = 250
    """Steps between HellaSwag scores; 0: never."""
    sample_every: int = 250
    """Steps between sampled texts; 0: never."""
    samples: int = 1
    """Texts that are sampled each time; many processes share them."""
    sample_tokens: int = 64
    """Tokens in a sampled text."""
    prompt: str = "Hello, I'm a language model,"
    """What a sampled text begins with."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    skip_limit: int = 10
    """End after so many steps in a row whose loss or gradient is not finite; each is left out of the weights."""
    spike: float = 6.0
    """Say so when a loss is this many standard deviations from the mean of the last 128; 0: never."""
    tensorboard: bool = False
    """Write TensorBoard's event files too (pip install 'gpt2fast[tensorboard]')."""

    @property
    def folder(self) -> Path:
        return self.out / (self.run or "run")

    @property
    def implementations(self) -> OpsConfig:
        """What --backend and --ops come to; with --backend auto, ops stay open until they are measured.

        Not stored as --ops, or a resumed run could not change its --backend.
        """
        return self.ops.with_backend(self.backend)


PRESETS = {
    "nano": TrainConfig(
        model=SIZES["nano"], seq_len=128, total_batch=1024, steps=340, lr=3e-3, run="nano",
        val_every=100, val_batches=8, sample_every=100, checkpoint_every=100, prompt="def",
    ),
    "gpt2": TrainConfig(model=SIZES["gpt2"], run="gpt2"),
    "gpt2-medium": TrainConfig(model=SIZES["gpt2-medium"], lr=3e-4, run="gpt2-medium"),
    "gpt2-large": TrainConfig(model=SIZES["gpt2-large"], lr=2.5e-4, run="gpt2-large"),
    "gpt2-xl": TrainConfig(model=SIZES["gpt2-xl"], lr=2e-4, run="gpt2-xl"),
}  # fmt: skip

FIXED = ("model", "init_from", "data", "shuffle", "batch_size", "seq_len", "total_batch", "seed")
"""What a resumed run may not change: which tokens it has seen, and which model it is."""


@dataclass(frozen=True, kw_only=True)
class Resolved(TrainConfig):
    """Settings of which none follows from others any more: made by `resolve`. What is None still was not asked for."""

    batch_size: int = field()
    warmup: int = field()

    @property
    def accumulation(self) -> int:
        """Micro-batches in an optimizer step, of all processes together."""
        return self.total_batch // (self.batch_size * self.seq_len)


def resolve(config: TrainConfig, memory: int | None, ranks: int = 1) -> Resolved:
    """Put a value where None stands for one that follows from others; `memory` is the device's, None for a CPU."""
    values = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    if config.batch_size is None:
        values["batch_size"] = default_batch_size(config, memory, ranks)
    if config.warmup is None:
        values["warmup"] = min(715, max(1, config.steps // 20))
    return Resolved(**values)


def check(c: Resolved, ranks: int = 1) -> None:
    """UserError on settings that cannot work together."""
    positive = ["batch_size", "seq_len", "total_batch", "steps", "lr", "samples", "sample_tokens", "keep", "skip_limit"]
    natural = ["lr_floor", "warmup", "weight_decay", "beta1", "beta2", "grad_clip", "seed"]
    natural += ["val_every", "val_batches", "hellaswag_every", "sample_every", "checkpoint_every", "spike"]
    positive += [name for name in ("log_every", "stop_at") if getattr(c, name) is not None]
    for name in positive + natural:
        value, least = getattr(c, name), "more than 0" if name in positive else "at least 0"
        if not (value > 0 if name in positive else value >= 0):  # written so that NaN fails
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {least}")
    if c.run is not None and Path(c.run).name != c.run:
        raise UserError(f"--run is {c.run!r}: it must be a plain name; --out chooses the folder of all runs")
    for name in ("beta1", "beta2"):
        if getattr(c, name) >= 1:
            raise UserError(f"--{name} is {getattr(c, name)}: it must be below 1")
    if c.seq_len > c.model.block_size:
        raise UserError(
            f"--seq-len {c.seq_len} is longer than the model's block size {c.model.block_size}: "
            f"lower it, or raise --model.block-size"
        )
    if c.total_batch % (c.batch_size * c.seq_len):
        raise UserError(
            f"--total-batch {c.total_batch} is no multiple of B*T = {c.batch_size}*{c.seq_len} = "
            f"{c.batch_size * c.seq_len}: change one of --total-batch, --batch-size, --seq-len"
        )
    if c.accumulation % ranks:
        raise UserError(
            f"--total-batch {c.total_batch} is {c.accumulation} micro-batches of B*T = {c.batch_size}*{c.seq_len}, and "
            f"{ranks} processes cannot share them evenly: start a number that divides {c.accumulation}"
            + ("" if c.resume else ", or lower --batch-size")
        )
    if c.deterministic and c.backend == "auto":
        raise UserError(
            "--backend auto picks ops by time, so two runs may differ, and --deterministic promises that they do not: "
            "name --backend torch or triton"
        )
    if c.warmup > c.steps:
        raise UserError(
            f"--warmup {c.warmup} is longer than the run of --steps {c.steps}: lower it, say to {c.steps // 20}"
        )


def default_batch_size(config: TrainConfig, memory: int | None, ranks: int = 1) -> int:
    """Largest power of two up to 64 whose step fits into `memory` bytes (None: a CPU, up to 8, and 4096 tokens), and
    that divides each rank's share of the total.

    Counted per token: the logits chain (bf16, fp32, and the gradients of both: 12 V) and about 40 L C bytes of
    activations, with --recompute 6 L C and one block's 40 C; per parameter: weight, gradient, two moments and a bf16
    copy (18).
    """
    m, T = config.model, config.seq_len
    size, limit = (8, 4096 // T) if memory is None else (64, 64)
    blocks = 6 * m.n_layer + 40 if config.recompute else 40 * m.n_layer
    token = 12 * m.padded_vocab_size + blocks * m.n_embd
    fixed = 18 * (12 * m.n_layer * m.n_embd**2 + m.padded_vocab_size * m.n_embd)
    while size > 1 and (
        size > limit or config.total_batch % (size * T * ranks) or (memory and fixed + size * T * token > 0.85 * memory)
    ):
        size //= 2
    return size


def check_resumable(config: TrainConfig, stored: TrainConfig) -> None:
    """UserError if what was changed would make it another run; n_head, for one, changes no tensor's shape."""
    for name in FIXED:
        new, old = getattr(config, name), getattr(stored, name)
        if new != old:
            raise UserError(
                f"run {config.folder} was trained with {name} = {old}, not {new}: leave that flag out, "
                "or begin a new run with --run NAME"
            )


def to_dict(config: TrainConfig) -> dict:
    """Plain JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def from_dict(values: dict) -> TrainConfig:
    """The inverse of `to_dict`; ValueError, TypeError or KeyError on what is no such dictionary."""
    values = values | {"model": checked.fill(GPTConfig, values["model"])}
    values["ops"] = checked.fill(OpsConfig, values["ops"])
    values["out"] = Path(values["out"])
    for name in ("tokenizer_file", "hellaswag"):
        values[name] = values.get(name) and Path(values[name])
    return checked.fill(TrainConfig, values)
