"""Score HellaSwag: each text has four endings, one of them true; the model chooses the ending that it finds likeliest.

    tokens    encode(ctx) + encode(" " + ending), without <|endoftext|> before it
    loss      -sum ln p(token | all tokens before it) over the ending's tokens
    acc       share of examples in which the true ending has the smallest loss
    acc_norm  the same with the loss per token, of equal ones the first; this is the number usually quoted

This is the "completion style" of llm.c and build-nanogpt, where GPT-2 124M has acc 0.2859 and acc_norm 0.2955. Only the
hidden states that predict an ending's token go through the head, a chunk at a time, so that memory stays bounded.

The file is the authors' validation split, hellaswag_val.jsonl: a JSON object per line, with ctx, endings and label.

Source: Zellers et al. 2019, arXiv:1905.07830.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from gpt2fast.data import tokenizer
from gpt2fast.errors import RunError, UserError
from gpt2fast.files import checked
from gpt2fast.files.download import download
from gpt2fast.machine.device import Precision, autocast
from gpt2fast.machine.world import ALONE, World
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.reference import IGNORE

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"  # 10,042 examples
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
CACHED = Path("data/hellaswag/hellaswag_val.jsonl")
LARGEST = 2**26  # bytes of a file; the validation split has 12 million
ENDINGS = 4
LLMC_MAGIC = (20240522).to_bytes(4, "little")  # first bytes of llm.c's hellaswag_val.bin
WIDTHS = 16  # rows are padded to a multiple of this, so that few shapes occur
ROWS = 1024  # rows of logits at a time: 206 MB of fp32 at GPT-2's vocabulary


@dataclass(frozen=True)
class Example:
    """The tokens of a context and its four endings; `label` is the number of the true ending."""

    context: list[int]
    endings: list[list[int]]
    label: int

    @property
    def longest(self) -> int:
        """The number of tokens in the longest ending."""
        return max(map(len, self.endings))


@dataclass(frozen=True)
class Score:
    """Accuracies from 0 to 1; `stderr` is the standard error of acc_norm; `cut` counts shortened contexts."""

    examples: int
    acc: float
    acc_norm: float
    stderr: float
    cut: int


def fetch(path: Path = CACHED) -> Path:
    """Download the validation split to `path` unless it exists, and return `path`. RunError if that fails."""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download(URL, path, SHA256, f"Get it elsewhere, and name it with --from, or put it at {path}")
        except OSError as error:
            raise RunError(f"cannot write {path} ({error.strerror}): name a copy with --from") from None
    return path


def read_examples(path: Path, vocab_file: Path | None = None) -> list[Example]:
    """Read the examples of a hellaswag_val.jsonl. UserError, which names the line, if it is damaged."""
    try:
        with checked.open_file(path) as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name {CACHED.name}") from None
    if content.startswith(LLMC_MAGIC):
        raise UserError(f"{path} is llm.c's binary copy, which is not read: name the authors' {CACHED.name}")
    if len(content) > LARGEST:
        raise UserError(f"{path} has more than {LARGEST:,} bytes: name {CACHED.name}")
    lines = [(i, line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no example: name {CACHED.name}")
    rows = [_row(line, f"{path}, line {i}") for i, line in lines]
    encode = tokenizer.load(vocab_file).encode_ordinary_batch
    contexts = encode([ctx for ctx, _, _ in rows])
    endings = encode([f" {ending}" for _, four, _ in rows for ending in four])
    return [
        Example(context, endings[ENDINGS * i : ENDINGS * (i + 1)], label)
        for i, (context, (_, _, label)) in enumerate(zip(contexts, rows))
    ]


def _row(line: bytes, where: str) -> tuple[str, list[str], int]:
    """Parse a line: context, endings and label."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}): the file is damaged, get it again") from None
    missing = [name for name in ("ctx", "endings", "label") if not isinstance(row, dict) or name not in row]
    if missing:
        raise UserError(f"{where} has no {missing[0]!r}: a HellaSwag example has ctx, endings and label")
    ctx, endings, label = row["ctx"], row["endings"], row["label"]
    if not isinstance(ctx, str) or not ctx:
        raise UserError(f"{where}: ctx is {ctx!r}: it must be text, or nothing predicts an ending's first token")
    if not isinstance(endings, list) or len(endings) != ENDINGS:
        raise UserError(f"{where}: endings is {str(endings)[:60]!r}: it must be a list of {ENDINGS} texts")
    if not all(isinstance(ending, str) and ending for ending in endings):
        raise UserError(f"{where}: an ending is empty or not text: the file is damaged, get it again")
    if type(label) is not int or not 0 <= label < ENDINGS:
        raise UserError(f"{where}: label is {label!r}: it must be 0 to 3 (the test split has none: use {CACHED.name})")
    return ctx, endings, label


def fit(examples: Sequence[Example], config: GPTConfig) -> tuple[list[Example], int]:
    """Shorten contexts to fit the model. Return the examples, and how many contexts lost their beginning.

    A context is the same for all four endings. GPT-2's 1024 positions hold every example without loss. UserError if an
    ending alone is too long, or the vocabulary is too small.
    """
    if config.vocab_size <= tokenizer.EOT:
        raise UserError(f"the model's vocabulary is {config.vocab_size}: HellaSwag needs GPT-2's {tokenizer.EOT + 1}")
    fitting = []
    for i, example in enumerate(examples):
        room = config.block_size + 1 - example.longest  # an ending's last token is predicted, but never an input
        if room < 1:
            raise UserError(
                f"example {i} has an ending of {example.longest} tokens, but the model reads {config.block_size}: "
                "use a model with a larger block size"
            )
        fitting.append(Example(example.context[-room:], example.endings, example.label))
    return fitting, sum(new.context != old.context for new, old in zip(fitting, examples))


@torch.no_grad()
def score(
    model: GPT,
    examples: Sequence[Example],
    precision: Precision,
    *,
    tokens: int = 16384,
    give_up: Callable[[], bool] = lambda: False,
    progress: bool = False,
    world: World = ALONE,
) -> Score | None:
    """Compute the accuracy over `examples`, divided among the ranks, in batches of about `tokens` tokens.

    None if `give_up`, called before each batch, returns True on any rank. The longest examples come first, so that a
    lack of memory shows at once. RunError if a loss is not finite.
    """
    examples, cut = fit(examples, model.config)
    examples.sort(key=lambda example: -len(example.context) - example.longest)
    examples = examples[world.rank :: world.size]
    right, right_norm, done, given_up = 0, 0, 0, False
    with tqdm(total=len(examples), desc="HellaSwag", unit=" examples", disable=not progress, mininterval=0.5) as bar:
        while done < len(examples):
            given_up = give_up()
            if given_up:
                break
            width = len(examples[done].context) + examples[done].longest
            batch = examples[done : done + max(1, tokens // (ENDINGS * width))]
            losses = ending_losses(model, batch, precision)
            if not losses.isfinite().all():
                raise RunError("HellaSwag: a loss is not finite: check the weights, or try --precision fp32")
            per_token = losses / torch.tensor([[len(ending) for ending in example.endings] for example in batch])
            labels = torch.tensor([example.label for example in batch])
            right += int((losses.argmin(1) == labels).sum())
            right_norm += int((per_token.argmin(1) == labels).sum())
            done += len(batch)
            bar.update(len(batch))
            bar.set_postfix_str(f"acc_norm {right_norm / done:.4f}")
    right_of_all, norm_of_all, count, gave_up = world.totals(right, right_norm, done, given_up)
    if gave_up:
        return None
    acc, acc_norm = right_of_all / count, norm_of_all / count
    return Score(int(count), acc, acc_norm, (acc_norm * (1 - acc_norm) / count) ** 0.5, cut)


@torch.no_grad()
def ending_losses(model: GPT, batch: Sequence[Example], precision: Precision) -> Tensor:
    """Return the loss of each ending in nats, summed over its tokens: (examples, 4) float64 on the CPU."""
    rows = [(example.context, ending) for example in batch for ending in example.endings]
    longest = max(len(context) + len(ending) - 1 for context, ending in rows)
    width = min(model.config.block_size, -(-longest // WIDTHS) * WIDTHS)
    x = torch.zeros(len(rows), width, dtype=torch.int64)  # padding after a row's end changes nothing before it
    y = torch.full_like(x, IGNORE)
    for i, (context, ending) in enumerate(rows):
        end = len(context) + len(ending) - 1
        x[i, :end] = torch.tensor([*context, *ending][:-1])
        y[i, len(context) - 1 : end] = torch.tensor(ending)
    device = model.wte.weight.device
    places = (y.flatten() != IGNORE).nonzero().squeeze(1)
    targets = y.flatten()[places].to(device)
    with autocast(device, precision):
        h = model.hidden(x.to(device)).flatten(0, 1)[places.to(device)]  # (tokens of endings, C)
        losses = [_losses(model.logits(part), t) for part, t in zip(h.split(ROWS), targets.split(ROWS))]
    sums = torch.zeros(len(rows), dtype=torch.float64)
    return sums.index_add_(0, places // width, torch.cat(losses).cpu().double()).view(-1, ENDINGS)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)  # float64 stays: it is the truth in tests
    return F.cross_entropy(logits.to(dtype), targets, reduction="none")
