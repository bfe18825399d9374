"""Every setting of a training run, declared once; the presets; the checks that need only the settings.

`tyro` makes the command line from the dataclasses, and --help from their docstrings, in which it keeps the line breaks:
so a line ends with a sentence. Their `asdict` is stored in config.json, checkpoints and results.
"""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from gpt2fast.data import stdlib
from gpt2fast.errors import UserError, check_at_least
from gpt2fast.files import checked
from gpt2fast.model import SIZES, GPTConfig
from gpt2fast.ops import Backend, OpsConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train GPT-2. Presets: nano, gpt2, gpt2-medium, gpt2-large, gpt2-xl; the default is gpt2 on CUDA, else nano."""

    model: GPTConfig = field(default_factory=GPTConfig)
    """Shape of the model."""
    backend: Backend = "torch"
    """Implementation of the seven ops: PyTorch, this project's Triton kernels, or of each op the fastest (auto)."""
    ops: OpsConfig = field(default_factory=OpsConfig)
    """Implementation of single ops, which overrides --backend. None: as --backend says."""
    init_from: str | None = None
    """Weights to start from, for fine-tuning. None: random weights from --seed.
    Formats: a run, a name on the hub (gpt2), a Hugging Face folder, llm.c's .bin, nanoGPT's ckpt.pt, OpenAI's files."""

    data: str = stdlib.NAME
    """Folder of token shards, or stdlib: the source code of Python's standard library."""
    tokenizer_file: Path | None = None
    """Path of GPT-2's vocab.bpe. None: found in a cache or an installed package, or downloaded."""
    shuffle: bool = True
    """Shuffle the windows in every epoch; --no-shuffle reads them in order."""

    batch_size: int | None = None
    """Sequences in a micro-batch, B. None: as many as fit into the device's memory, at most 64, on a CPU 8."""
    seq_len: int = 1024
    """Tokens in a sequence, T."""
    total_batch: int = 524288
    """Tokens in an optimizer step, a multiple of B*T: the gradients of its micro-batches are accumulated."""
    steps: int = 19073
    """Optimizer steps. The cosine schedule of the learning rate ends with the last one."""
    lr: float = 6e-4
    """Peak learning rate."""
    lr_floor: float = 0.1
    """Final learning rate, as a fraction of --lr."""
    warmup: int | None = None
    """Steps of linear learning-rate warm-up. None: 5% of --steps, at most 715 (375 million tokens, as in GPT-3)."""
    weight_decay: float = 0.1
    """AdamW's weight decay, of matrices and embeddings only."""
    beta1: float = 0.9
    """AdamW's beta1, for the mean of the gradients."""
    beta2: float = 0.95
    """AdamW's beta2, for the mean of their squares."""
    grad_clip: float = 1.0
    """Clip the gradient norm to this; 0 turns clipping off."""
    optimizer: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of AdamW: PyTorch's fused one, or Triton's, which also rounds the weights for the next step.
    auto: triton on CUDA if Triton computes an op or with --cuda-graph, but not with fp16; else torch."""
    seed: int = 1337
    """Seed of the initial weights, the order of the data and the sampled texts."""

    device: str = "auto"
    """Device to compute on: cpu, cuda, cuda:1, mps. auto: CUDA if there is one, else MPS, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute in fp32, or by autocast in bf16 or fp16 (with loss scaling).
    auto: bf16 where the device is fast at it; else fp16 on CUDA; else fp32."""
    tf32: bool = True
    """Allow TF32 in fp32 matmuls on CUDA."""
    residual: Literal["auto", "fp32", "low"] = "auto"
    """Dtype of the residual stream: fp32, or that of autocast (low).
    auto: low with bf16 on CUDA, else fp32; fp16 might overflow."""
    zero: bool = False
    """ZeRO-1: divide the optimizer state, 8 bytes a weight, among the processes.
    The results are the same bits with --optimizer torch; triton sums the gradient norm in another order."""
    recompute: bool = False
    """Activation checkpointing: keep 6 instead of about 40 bytes of a block per token and channel.
    The block runs again in backward, which is a third more work."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile.
    auto: on CUDA, and on a CPU with a C++ compiler if the run takes more than about five minutes."""
    deterministic: bool = False
    """Get the same bits from every run with the same settings, device, versions and, on a CPU, number of threads.
    Costs some speed on CUDA, where sampled texts may still differ. Refused where it cannot be guaranteed."""
    cuda_graph: bool = False
    """Record the step as CUDA graphs and replay them.
    Faster if a step is so small that launching its kernels takes most of the time."""

    out: Path = Path("out")
    """Folder of all runs."""
    run: str | None = None
    """Name of this run, and of its folder in --out. The default is the preset's name."""
    resume: bool = False
    """Continue the run from its newest checkpoint, with its own settings except those given as flags."""
    stop_at: int | None = None
    """Stop after this step with a checkpoint, as Ctrl-C does. None: stop at --steps.
    The learning-rate schedule ends at --steps in any case."""
    log_every: int | None = None
    """Steps between reads of the loss from the device.
    None: once a second on CUDA, where the host waits for it; else every step."""
    val_every: int = 250
    """Steps between validations; 0: never."""
    val_batches: int = 20
    """Micro-batches in a validation; 0: the whole split."""
    hellaswag: Path | None = None
    """The HellaSwag authors' hellaswag_val.jsonl, to be scored every --hellaswag-every steps. None: not scored."""
    hellaswag_every: int = 250
    """Steps between HellaSwag scores; 0: never."""
    sample_every: int = 250
    """Steps between sampled texts; 0: never."""
    samples: int = 1
    """Texts to sample each time; several processes divide them among themselves."""
    sample_tokens: int = 64
    """Tokens in a sampled text."""
    prompt: str = "Hello, I'm a language model,"
    """Beginning of the sampled texts."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    skip_limit: int = 10
    """Stop after this many steps in a row whose loss or gradient is not finite; each of them is skipped."""
    spike: float = 6.0
    """Report a loss that is more than this many standard deviations from the mean of the last 128; 0: never."""
    tensorboard: bool = False
    """Write TensorBoard's event files as well (pip install 'gpt2fast[tensorboard]')."""

    @property
    def folder(self) -> Path:
        return self.out / (self.run or "run")

    @property
    def implementations(self) -> OpsConfig:
        """Return what --backend and --ops mean together; with --backend auto, ops are None until they are measured.

        It is not stored as --ops, or a resumed run could not change its --backend.
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
"""The settings that a resumed run may not change: they fix the model and the tokens that it has seen."""


@dataclass(frozen=True, kw_only=True)
class Resolved(TrainConfig):
    """Settings with a value where None meant "as the other settings demand", made by `resolve`. A None that is left
    means "not asked for"."""

    batch_size: int = field()
    warmup: int = field()

    @property
    def accumulation(self) -> int:
        """Return the micro-batches in an optimizer step, of all processes together."""
        return self.total_batch // (self.batch_size * self.seq_len)


def resolve(config: TrainConfig, memory: int | None, ranks: int = 1) -> Resolved:
    """Replace each None that depends on other settings by its value. `memory`: the GPU's, in bytes; None elsewhere."""
    values = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    if config.batch_size is None:
        values["batch_size"] = default_batch_size(config, memory, ranks)
    if config.warmup is None:
        values["warmup"] = min(715, max(1, config.steps // 20))
    return Resolved(**values)


def check(c: Resolved, ranks: int = 1) -> None:
    """Raise UserError on settings that cannot work, alone or together."""
    check_at_least(
        c, batch_size=1, seq_len=1, total_batch=1, steps=1, samples=1, sample_tokens=1, keep=1, skip_limit=1,
        log_every=1, stop_at=1, lr_floor=0, warmup=0, weight_decay=0, beta1=0, beta2=0, grad_clip=0, seed=0, spike=0,
        val_every=0, val_batches=0, hellaswag_every=0, sample_every=0, checkpoint_every=0,
    )  # fmt: skip
    if not c.lr > 0:  # written so that NaN fails
        raise UserError(f"--lr is {c.lr}: it must be more than 0")
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
            f"--total-batch {c.total_batch} is not a multiple of B*T = {c.batch_size}*{c.seq_len} = "
            f"{c.batch_size * c.seq_len}: change one of --total-batch, --batch-size, --seq-len"
        )
    if c.accumulation % ranks:
        raise UserError(
            f"--total-batch {c.total_batch} is {c.accumulation} micro-batches of B*T = {c.batch_size}*{c.seq_len}, and "
            f"{ranks} processes cannot share them evenly: start a number of processes that divides {c.accumulation}"
            + ("" if c.resume else ", or lower --batch-size")
        )
    if c.deterministic and c.backend == "auto":
        raise UserError(
            "--backend auto picks ops by time, so two runs may differ, which --deterministic rules out: "
            "use --backend torch or triton"
        )
    if c.warmup > c.steps:
        raise UserError(
            f"--warmup {c.warmup} is longer than the run of --steps {c.steps}: lower it, say to {c.steps // 20}"
        )


def default_batch_size(config: TrainConfig, memory: int | None, ranks: int = 1) -> int:
    """Return the largest power of two, up to 64, with which a step fits into 85% of `memory` bytes and --total-batch is
    a multiple of ranks*B*T. Without `memory`: up to 8, and B*T up to 4096.

    Bytes per token: 12 V for the logits (bf16, fp32, and the gradients of both), and about 40 L C for activations, or
    with --recompute 6 L C and 40 C for one block. Bytes per parameter: 18, for the weight, its gradient, two moments
    and a bf16 copy.
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
    """Raise UserError if a changed setting would make it another run. No shape would show it: n_head changes none."""
    for name in FIXED:
        new, old = getattr(config, name), getattr(stored, name)
        if new != old:
            raise UserError(
                f"run {config.folder} was trained with {name} = {old}, not {new}: leave that flag out, "
                "or start a new run with --run NAME"
            )


def to_dict(config: TrainConfig) -> dict:
    """Return the settings as plain JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def from_dict(values: dict) -> TrainConfig:
    """Invert `to_dict`. ValueError, TypeError or KeyError if `values` is not what `to_dict` returns."""
    values = values | {"model": checked.fill(GPTConfig, values["model"])}
    values["ops"] = checked.fill(OpsConfig, values["ops"])
    values["out"] = Path(values["out"])
    for name in ("tokenizer_file", "hellaswag"):
        values[name] = values.get(name) and Path(values[name])
    return checked.fill(TrainConfig, values)
