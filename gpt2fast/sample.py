"""Text from a trained model: `python -m gpt2fast.sample out/nano --prompt "def"`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gpt2fast import pretrained, tokenizer
from gpt2fast.allocator import keep_freed_memory
from gpt2fast.device import autocast, pick_device, pick_precision, use_allowed_cores
from gpt2fast.errors import UserError, run_main
from gpt2fast.model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    n: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append `n` tokens to each row of idx (B, T) -> (B, T + n). Temperature 0 takes the likeliest token.

    `generator` must be on the CPU: logits come there, so that one seed gives one text whatever the device. Each token
    is predicted from the last `block_size` ones.
    """
    for _ in range(n):
        h = model.hidden(idx[:, -model.config.block_size :])  # (B, T, C)
        logits = model.logits(h[:, -1]).float().cpu()  # (B, V)
        if temperature == 0:
            token = logits.argmax(-1, keepdim=True)
        else:
            values, tokens = (logits / temperature).topk(min(top_k or logits.shape[-1], logits.shape[-1]))
            token = tokens.gather(1, torch.multinomial(values.softmax(-1), 1, generator=generator))
        idx = torch.cat([idx, token.to(idx.device)], dim=1)
    return idx


def sample_text(
    model: GPT, prompt: str, n: int, *, precision: str, seed: int, vocab_file: Path | None = None, **options
) -> str:
    """The prompt and `n` tokens after it. It begins behind <|endoftext|>, as every document in training did."""
    encoding = tokenizer.load(vocab_file)
    device = model.wte.weight.device
    idx = torch.tensor([[tokenizer.EOT, *encoding.encode_ordinary(prompt)]], device=device)
    generator = torch.Generator().manual_seed(seed)
    with autocast(device, precision):
        tokens = generate(model, idx, n, generator=generator, **options)[0, 1:].tolist()
    return encoding.decode(tokens)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Write text with a run's newest checkpoint."""

    run: Path
    """The run's folder, for instance out/nano."""
    prompt: str = "\n"
    """What the text begins with."""
    tokens: int = 200
    """Tokens to write."""
    samples: int = 1
    """Texts to write."""
    temperature: float = 0.8
    """Below 1 likely tokens become likelier; 0 always takes the likeliest."""
    top_k: int = 50
    """Choose among this many tokens; 0: all."""
    seed: int = 1337
    """Of the first text; the next ones count up."""
    device: str = "auto"
    """auto: CUDA, else MPS, else CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As in training."""
    tokenizer_file: Path | None = None
    """GPT-2's vocab.bpe, where it can neither be found nor downloaded."""


def main(argv: Sequence[str]) -> None:
    import tyro

    options = tyro.cli(
        SampleConfig, args=argv, prog="python -m gpt2fast.sample", config=(tyro.conf.PositionalRequiredArgs,)
    )
    for name, least in (("tokens", 1), ("samples", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not getattr(options, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be at least {least}")
    keep_freed_memory()
    use_allowed_cores()
    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    model, path = pretrained.load(options.run, device)
    print(f"{path} on {device}, {precision}")
    for i in range(options.samples):
        text = sample_text(
            model, options.prompt, options.tokens, precision=precision, seed=options.seed + i,
            vocab_file=options.tokenizer_file, temperature=options.temperature, top_k=options.top_k,
        )  # fmt: skip
        print(f"--- {i + 1}/{options.samples} ---\n{text}")


if __name__ == "__main__":
    run_main(main)
