"""What a run reads before its first step: data, weights, examples. Input that cannot be used is refused here."""

from dataclasses import asdict, dataclass

from gpt2fast.data import tokenizer
from gpt2fast.data.dataset import Dataset, count_tokens, open_data, unigram_entropy
from gpt2fast.data.loader import Loader
from gpt2fast.errors import UserError
from gpt2fast.inference import hellaswag
from gpt2fast.inference.hellaswag import Example
from gpt2fast.machine.world import ALONE, World
from gpt2fast.model import SIZES
from gpt2fast.training import run
from gpt2fast.training.config import Resolved, TrainConfig
from gpt2fast.training.record import read_record
from gpt2fast.weights.foreign import Weights
from gpt2fast.weights.load import read_weights


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads. `val` is None without a validation split, and `weights` without --init-from.

    `entropy` is the unigram entropy of the training tokens in nats. `before` is None without --resume, else the
    settings and the choices of the run that is resumed.
    """

    dataset: Dataset
    train: Loader
    val: Loader | None
    hellaswag: list[Example]
    entropy: float
    weights: Weights | None
    before: tuple[TrainConfig, dict] | None


def read_inputs(c: Resolved, world: World = ALONE) -> Inputs:
    """Read all inputs. UserError if one is missing, damaged, or does not fit the settings."""
    if c.tensorboard:
        run.check_tensorboard()
    if not c.resume and world.main:
        run.check_unused(c.folder)
    if c.resume and world.main:
        for _ in run.iter_metrics(c.folder / "metrics.jsonl"):
            pass  # a damaged line is found before config.json gets its entry of this resume
    if c.sample_every:
        tokenizer.load(c.tokenizer_file)
    weights = initial_weights(c)
    examples = hellaswag.read_examples(c.hellaswag, c.tokenizer_file) if c.hellaswag and c.hellaswag_every else []
    if examples:
        hellaswag.fit(examples, c.model)
    dataset = open_data(c.data, c.model.vocab_size, c.tokenizer_file)
    return Inputs(
        dataset=dataset,
        train=Loader(dataset.train, c.batch_size, c.seq_len, c.model.vocab_size, c.shuffle, c.seed),
        val=val_loader(c, dataset),
        hellaswag=examples,
        entropy=unigram_entropy(count_tokens(dataset.train, c.model.vocab_size)),
        weights=weights,
        before=read_record(c.folder) if c.resume else None,
    )


def initial_weights(c: TrainConfig) -> Weights | None:
    """Read the weights of --init-from, if given; UserError if their shape is not that of the model.

    None with --resume: the checkpoint has the weights.
    """
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


def val_loader(c: Resolved, dataset: Dataset) -> Loader | None:
    """Return a loader of the validation split, in smaller batches if it is too short for B; None without a split.

    Each validation reads the same windows, which are spread over the whole split.
    """
    windows = sum(max(0, len(tokens) - 1) // c.seq_len for tokens in dataset.val)
    if not c.val_every or not windows:
        return None
    return Loader(dataset.val, min(c.batch_size, windows), c.seq_len, c.model.vocab_size, shuffle=True)
