"""Generate text: continue a prompt."""

from pathlib import Path

import tiktoken

from gpt2fast.data import tokenizer
from gpt2fast.inference.decode import Sampling, generate
from gpt2fast.machine.device import Precision
from gpt2fast.model import GPT


def sample_text(
    model: GPT,
    prompt: str,
    n: int,
    *,
    precision: Precision,
    seed: int,
    vocab_file: Path | None = None,
    sampling: Sampling | None = None,
) -> str:
    """Return the prompt and up to `n` tokens after it.

    The prompt follows <|endoftext|>, as every document in training does, and the text ends at the next one. No CUDA
    graph is recorded: a training run needs its memory itself, and has graphs of its own.
    """
    encoding = tokenizer.load(vocab_file)
    tokens = generate(
        model, [encode_prompt(encoding, prompt)], n, sampling, seed=seed, precision=precision, stop=tokenizer.EOT,
        record=False,
    )  # fmt: skip
    return prompt + encoding.decode(until_end(tokens[0].tolist()))


def encode_prompt(encoding: tiktoken.Encoding, prompt: str) -> list[int]:
    """Return <|endoftext|> and the tokens of `prompt`."""
    return [tokenizer.EOT, *encoding.encode_ordinary(prompt)]


def until_end(tokens: list[int]) -> list[int]:
    """Return `tokens` without the first <|endoftext|> and what follows it."""
    return tokens[: tokens.index(tokenizer.EOT)] if tokenizer.EOT in tokens else tokens
