"""Text from a model: `python -m gpt2fast.sample out/nano --prompt "def"`, or with anybody's GPT-2 in place of a run."""

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
from gpt2fast.inference.text import encode, until_end
from gpt2fast.machine.device import keep_freed_memory, pick_device, pick_precision, use_allowed_cores
from gpt2fast.machine.joined import joined, one_complains
from gpt2fast.machine.world import World
from gpt2fast.model import GPT, VOCAB_SIZE
from gpt2fast.ops import Backend
from gpt2fast.weights.load import build_model, choose_ops, read_weights

SEPARATOR = re.compile(r"\n?<\|endoftext\|>\n?")
BATCH = 8  # texts at once


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Sampling):
    """Write text with a trained model."""

    source: str
    """A run's folder, for instance out/nano, whose newest checkpoint is taken; or weights from elsewhere."""
    prompt: str | None = None
    """What the text begins with; the default is a new line."""
    prompt_file: str | None = None
    """A file with it, or - for what comes in; <|endoftext|> separates several prompts."""
    tokens: int = 200
    """Tokens to write, at most."""
    samples: int = 1
    """Texts to write for each prompt."""
    greedy: bool = False
    """Take the likeliest token each time, as with temperature 0."""
    seed: int = 1337
    """Of the first text; the next ones count up."""
    stop: bool = True
    """End a text with <|endoftext|>."""
    stream: bool = False
    """Show each token when it is there, one text after the other."""
    batch_size: int | None = None
    """Texts written at once: 8, and 1 with --stream. Changes the speed only, but for rounding."""
    backend: Backend = "auto"
    """auto: what the run was trained with, else torch."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As in training."""
    tokenizer_file: Path | None = None
    """GPT-2's vocab.bpe, where it can neither be found nor downloaded."""

    def __post_init__(self):
        check_at_least(self, tokens=1, samples=1, temperature=0, top_k=0, seed=0, batch_size=1)
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p}: it must be above 0 and at most 1, which is all tokens")
        if self.prompt is not None and self.prompt_file is not None:
            raise UserError("--prompt and --prompt-file are both given: leave one out")
        if self.stream and self.batch_size not in (None, 1):
            raise UserError(f"--stream shows one text at a time, and --batch-size is {self.batch_size}: leave one out")

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=0 if self.greedy else self.temperature, top_k=self.top_k, top_p=self.top_p)


def read_prompts(options: SampleConfig) -> list[str]:
    """At least one. Of a file: without the new lines around a separator, and without the last one."""
    if options.prompt_file is None:
        return ["\n" if options.prompt is None else options.prompt]
    name = "what came in" if options.prompt_file == "-" else f"--prompt-file {options.prompt_file}"
    try:
        data = sys.stdin.buffer.read() if options.prompt_file == "-" else Path(options.prompt_file).read_bytes()
        text = data.decode()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): name a file of text") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}): convert it") from None
    prompts = [prompt for prompt in SEPARATOR.split(text.removesuffix("\n")) if prompt]
    if not prompts:
        raise UserError(f"{name} holds no text: write a prompt into it, or use --prompt")
    return prompts


def encode_prompts(encoding: tiktoken.Encoding, prompts: Sequence[str], model: GPT) -> list[list[int]]:
    """UserError if they are no tokens of this model, or too many."""
    vocab_size, limit = model.config.vocab_size, model.config.block_size
    if vocab_size != VOCAB_SIZE:
        raise UserError(
            f"the model has a vocabulary of {vocab_size}, and GPT-2's tokenizer has {VOCAB_SIZE}: "
            "another tokenizer made its tokens, with which this program cannot write"
        )
    rows = [encode(encoding, prompt) for prompt in prompts]
    for i, row in enumerate(rows, start=1):
        if len(row) > limit:
            raise UserError(
                f"prompt {i} has {len(row)} tokens with <|endoftext|> before it, and the model sees {limit}: shorten it"
            )
    return rows


class TextStream:
    """Bytes of tokens as text, as soon as they are whole characters."""

    def __init__(self, encoding: tiktoken.Encoding, out: TextIO):
        self._encoding, self._out = encoding, out
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, tokens: Sequence[int], final: bool = False) -> None:
        data = b"".join(map(self._encoding.decode_single_token_bytes, tokens))
        self._out.write(self._decoder.decode(data, final))
        self._out.flush()


def timed_pieces(decoder: Decoder, seconds: dict[str, float], every: int) -> Iterator[Tensor]:
    """What the decoder writes; `seconds` of the first token, with which the prompt is read, and of all others."""
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
    """Print the texts, of which each rank writes some batches."""
    if options.stream and world.size > 1:
        raise UserError(f"--stream shows one text at a time, and {world.size} processes write: leave it out")
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
    """Text i, up to where the model goes on."""
    print(f"--- {i + 1}/{len(prompts)} ---\n{prompts[i]}", end="", flush=True)


if __name__ == "__main__":
    run_main(main)
