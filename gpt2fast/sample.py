"""Write text with a model: `python -m gpt2fast.sample out/nano --prompt "def"`; any GPT-2 may take the run's place."""

import codecs
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TextIO

import tiktoken
from torch import Tensor

from gpt2fast import ops
from gpt2fast.command import parse, run_main
from gpt2fast.data import tokenizer
from gpt2fast.errors import UserError, check_at_least
from gpt2fast.inference.decode import EVERY, Decoder, Sampling
from gpt2fast.inference.text import encode_prompt, until_end
from gpt2fast.machine.device import keep_freed_memory, pick_device, pick_precision, use_allowed_cores
from gpt2fast.machine.joined import joined, one_complains
from gpt2fast.machine.world import World
from gpt2fast.model import GPT, VOCAB_SIZE
from gpt2fast.ops import Backend
from gpt2fast.weights.load import build_model, choose_ops, read_weights

SEPARATOR = re.compile(r"\n?<\|endoftext\|>\n?")
BATCH = 8  # texts that are written at once


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling):
    """Write text with a trained model."""

    source: str
    """The model: a run folder such as out/nano (its newest checkpoint), a checkpoint, or weights from elsewhere."""
    prompt: str | None = None
    """Beginning of the text. None: a new line."""
    prompt_file: str | None = None
    """File of prompts, separated by <|endoftext|>; - reads standard input. None: the text of --prompt."""
    tokens: int = 200
    """Largest number of tokens to write."""
    samples: int = 1
    """Texts to write for each prompt."""
    greedy: bool = False
    """Always take the likeliest token, as with --temperature 0."""
    seed: int = 1337
    """Seed of the first text; each further text adds 1 to it."""
    stop: bool = True
    """End a text before <|endoftext|>; --no-stop continues after it."""
    stream: bool = False
    """Print each token as soon as it is written, one text after another."""
    batch_size: int | None = None
    """Texts to write at once; another number may change them by rounding. None: 8, or 1 with --stream."""
    backend: Backend = "auto"
    """Implementation of the seven ops. auto: that of the run's training where this device has it; else torch."""
    device: str = "auto"
    """Device to compute on: cpu, cuda, cuda:1, mps. auto: CUDA if there is one, else MPS, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute in fp32, or by autocast in bf16 or fp16.
    auto: bf16 where the device is fast at it; else fp16 on CUDA; else fp32."""
    tokenizer_file: Path | None = None
    """Path of GPT-2's vocab.bpe. None: found in a cache or an installed package, or downloaded."""

    def __post_init__(self):
        check_at_least(self, tokens=1, samples=1, temperature=0, top_k=0, seed=0, batch_size=1)
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}: it must be above 0 and at most 1, which takes all tokens")
        if self.prompt is not None and self.prompt_file is not None:
            raise UserError("--prompt and --prompt-file are both given: leave one out")
        if self.stream and self.batch_size not in (None, 1):
            raise UserError(f"--stream prints one text at a time, and --batch-size is {self.batch_size}: leave one out")

    @property
    def sampling(self) -> Sampling:
        """Return how to choose a token, with temperature 0 for --greedy."""
        return Sampling(temperature=0 if self.greedy else self.temperature, top_k=self.top_k, top_p=self.top_p)


def read_prompts(options: SampleConfig) -> list[str]:
    """Return the prompts, at least one. One new line before and after a separator, and at the end, is ignored."""
    if options.prompt_file is None:
        return ["\n" if options.prompt is None else options.prompt]
    name = "standard input" if options.prompt_file == "-" else f"--prompt-file {options.prompt_file}"
    try:
        data = sys.stdin.buffer.read() if options.prompt_file == "-" else Path(options.prompt_file).read_bytes()
        text = data.decode()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): name a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}): convert it") from None
    prompts = [prompt for prompt in SEPARATOR.split(text.removesuffix("\n")) if prompt]
    if not prompts:
        raise UserError(f"{name} holds no text: write a prompt into it, or use --prompt")
    return prompts


def encode_prompts(encoding: tiktoken.Encoding, prompts: Sequence[str], model: GPT) -> list[list[int]]:
    """Return the tokens of each prompt. UserError if the model has another vocabulary, or a prompt is too long."""
    vocab_size, limit = model.config.vocab_size, model.config.block_size
    if vocab_size != VOCAB_SIZE:
        raise UserError(
            f"the model has a vocabulary of {vocab_size}, and GPT-2's tokenizer has {VOCAB_SIZE}: "
            "use a model that was trained with GPT-2's tokenizer"
        )
    rows = [encode_prompt(encoding, prompt) for prompt in prompts]
    for i, row in enumerate(rows, start=1):
        if len(row) > limit:
            raise UserError(
                f"prompt {i} has {len(row)} tokens with <|endoftext|> before it, and the model reads {limit}: cut it"
            )
    return rows


class TextStream:
    """Print tokens as text. A character of several tokens is printed when all its bytes are there."""

    def __init__(self, encoding: tiktoken.Encoding, out: TextIO):
        self._encoding, self._out = encoding, out
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, tokens: Sequence[int], final: bool = False) -> None:
        data = b"".join(map(self._encoding.decode_single_token_bytes, tokens))
        self._out.write(self._decoder.decode(data, final))
        self._out.flush()


def timed_pieces(decoder: Decoder, seconds: dict[str, float], every: int) -> Iterator[Tensor]:
    """Yield what the decoder writes, up to `every` tokens of each row at a time.

    Add the time of the first piece, which reads the prompt, to seconds["prefill"], and of the others to "decode".
    """
    start = time.perf_counter()
    for i, piece in enumerate(decoder.stream(every)):
        now = time.perf_counter()
        seconds["decode" if i else "prefill"] += now - start
        yield piece
        start = time.perf_counter()


def main(argv: Sequence[str]) -> None:
    keep_freed_memory()
    use_allowed_cores()
    with joined() as world:
        with one_complains(world):
            options = parse(SampleConfig, argv, "gpt2fast.sample")
        write_texts(options, world)


def write_texts(options: SampleConfig, world: World) -> None:
    """Write and print the texts; each rank writes some of the batches."""
    if options.stream and world.size > 1:
        raise UserError(f"--stream prints one text at a time, and {world.size} processes write: leave it out")
    prompts = json.loads(world.broadcast(json.dumps(read_prompts(options) if world.main else None)))
    encoding = tokenizer.load(options.tokenizer_file)
    device = pick_device(options.device, world)
    say = partial(print, file=sys.stderr if options.stream else sys.stdout, flush=True)
    weights = read_weights(options.source)
    chosen = choose_ops(weights, device, options.backend, say)
    precision = pick_precision(options.precision, device, ops.interpreted(chosen))
    model = build_model(weights, chosen, device)
    rows = [row for row in encode_prompts(encoding, prompts, model) for _ in range(options.samples)]
    prompts = [prompt for prompt in prompts for _ in range(options.samples)]
    say(f"{weights.where} on {device}, {precision}")

    seconds, written = {"prefill": 0.0, "decode": 0.0}, 0
    batch_size = options.batch_size or (1 if options.stream else BATCH)
    for first in range(0, len(rows), batch_size * world.size):
        batch = range(len(rows))[first + world.rank * batch_size :][:batch_size]
        texts: list[list[int]] = [[] for _ in batch]
        if batch:
            decoder = Decoder(
                model, rows[batch.start : batch.stop], options.tokens, options.sampling, precision=precision,
                seeds=[options.seed + i for i in batch], stop=tokenizer.EOT if options.stop else None,
            )  # fmt: skip
            if options.stream:
                print_prompt(first, prompts)
            writer = TextStream(encoding, sys.stdout) if options.stream else None
            for piece in timed_pieces(decoder, seconds, 1 if writer else EVERY):
                for text, new in zip(texts, piece.tolist()):
                    text += new
                    if writer:
                        writer.write(until_end(new) if options.stop else new)
            if writer:
                writer.write([], final=True)
                print()
        hands = map(json.loads, world.all_gather(json.dumps(texts)))
        for i, text in enumerate(itertools.chain.from_iterable(hands), first):
            text = until_end(text) if options.stop else text
            written += len(text)
            if not options.stream:
                print_prompt(i, prompts)
                print(encoding.decode(text))
    read = sum(map(len, rows))
    say(
        f"read {read:,} tokens at {read / seconds['prefill']:,.0f} tokens/s, wrote {written:,} at "
        f"{max(0, written - len(rows)) / max(seconds['decode'], 1e-9):,.0f} tokens/s"
    )


def print_prompt(i: int, prompts: Sequence[str]) -> None:
    """Print the number of text i and its prompt, which the model's text follows."""
    print(f"--- {i + 1}/{len(prompts)} ---\n{prompts[i]}", end="", flush=True)


if __name__ == "__main__":
    run_main(main)
