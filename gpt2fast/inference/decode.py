"""Generate tokens: one per row at a time, entirely on the device.

    prefill   the prompts, padded at the end to one length, fill the cache
    step      the newest token of each row against the cache: fixed shapes and no number from the host, so on CUDA it is
              recorded as a graph and replayed
    window    a row longer than block_size has no position left. From then on each token takes a pass over the last
              block_size tokens of every row, as in nanoGPT: exact, and some hundred times as slow

A token is a function of its row's logits and one uniform number, which the row's own generator drew in advance on the
CPU. So a seed gives the same text on every device and with any other rows, up to rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gpt2fast.inference.cache import Cache
from gpt2fast.machine.device import Precision, autocast, record_graph
from gpt2fast.model import GPT, Linear
from gpt2fast.reference import compute_dtype
from gpt2fast.rounded import Rounded

WARM = 2  # steps before recording, which compile kernels and choose algorithms
EVERY = 16  # tokens between the host's checks whether all rows have ended


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose a token, in this order, as Hugging Face's generate does."""

    temperature: float = 0.8
    """Divide the logits by this; 0 takes the likeliest token."""
    top_k: int = 50
    """Choose among this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the fewest likeliest tokens whose probabilities add up to at least this; 1: all."""


def choose_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Choose tokens, (B,) int64, from fp32 logits (B, V) and uniform numbers (B,) in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits, tokens = logits / sampling.temperature, None
    if sampling.top_k or sampling.top_p < 1:
        logits, tokens = logits.topk(min(sampling.top_k or logits.shape[1], logits.shape[1]))  # the likeliest first
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        p = logits.masked_fill(p.cumsum(-1) - p >= sampling.top_p, -torch.inf).softmax(-1)
    sums = p.cumsum(-1)
    # the first sum above the number; with rounding, there may be none
    i = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[1] - 1)
    return (i if tokens is None else tokens.gather(1, i))[:, 0]


class Decoder:
    """Generate up to `n` tokens for each prompt, of at least one token; `seeds` has one seed per row.

    A row that has generated the token `stop` has ended and is padded with `stop`. Weights are rounded to the compute
    dtype once. `record`: on CUDA, record the step as a graph, whose memory is kept as long as the decoder lives.
    """

    @torch.no_grad()
    def __init__(
        self, model: GPT, prompts: Sequence[Sequence[int]] | Tensor, n: int, sampling: Sampling, *,
        seeds: Sequence[int], precision: Precision, stop: int | None, record: bool = True,
    ):  # fmt: skip
        self.device, self.precision, self.n, self.sampling, self.stop = (
            model.wte.weight.device, precision, n, sampling, stop,
        )  # fmt: skip
        self.recorded = record and self.device.type == "cuda"
        self.longest = max(map(len, prompts))
        padding = [stop or 0]
        rows = [[*map(int, prompt), *padding * (self.longest + n - len(prompt))] for prompt in prompts]
        self.tokens = torch.tensor(rows, device=self.device)  # (B, longest + n)
        self.prompt = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.length = self.prompt.clone()  # the tokens of each row so far
        self.ended = torch.zeros_like(self.length, dtype=torch.bool)
        draws = [torch.rand(n, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.uniform = torch.stack(draws).to(self.device)  # (B, n)
        with autocast(self.device, precision):
            dtype = compute_dtype(model.wte.weight)
        self.model, self.head = _rounded(model, dtype), model.wte.weight.to(dtype)
        self.cache = Cache(model, len(rows), min(model.config.block_size, self.longest + n - 1), dtype)
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def stream(self, every: int = EVERY) -> Iterator[Tensor]:
        """Yield new tokens (B, m) int64 on the CPU: first m = 1, then m = `every`, to n or until all rows have ended.

        A row that has ended is padded with `stop`.
        """
        done = 0
        for i in range(self.n):
            with autocast(self.device, self.precision):
                self._write(self.longest + i)
            if i in (0, self.n - 1) or i + 1 - done == every:
                all_ended = bool(self.ended.all())
                until = int((self.length - self.prompt).max()) if all_ended else i + 1
                yield self.tokens.gather(1, self.prompt[:, None] + self._range(done, until)).cpu()
                if all_ended:
                    return
                done = until

    def _write(self, longest: int) -> None:
        """Generate a token for each row; `longest` is the number of tokens of the longest row."""
        block_size = self.model.config.block_size
        if longest > block_size:
            self._read_window(block_size)
        elif longest == self.longest:
            self._read_window(longest, self.cache.filling())
        elif not self.recorded or self._steps < WARM:
            self._steps += 1
            self._step()
        else:
            self._graph = self._graph or record_graph(self._step)
            self._graph.replay()

    def _read_window(self, T: int, attends: list | None = None) -> None:
        """Run the last T tokens of each row, from position 0 on; a shorter row is padded."""
        start = (self.length - T).clamp(min=0)
        h = self.model.hidden(self.tokens.gather(1, start[:, None] + self._range(0, T)), attends=attends)
        self._append(h[self._range(0, len(h)), self.length - start - 1])

    def _step(self) -> None:
        position = self.length - 1
        newest = self.tokens.gather(1, position[:, None]).T  # one sequence of B tokens with positions of their own
        h = self.model.hidden(newest, self.model.wpe.weight[position], self.cache.reading(position))
        self._append(h[0])

    def _append(self, h: Tensor) -> None:
        """Append a token to each row that has not ended, from the final LayerNorm's output (B, C)."""
        logits = self.model.ops.linear(h, self.head)[:, : self.model.config.vocab_size].float()
        i = self.length - self.prompt
        token = choose_tokens(logits, self.uniform.gather(1, i[:, None])[:, 0], self.sampling)
        grown = ~self.ended
        if self.stop is not None:
            token = token.masked_fill(self.ended, self.stop)
            self.ended |= token == self.stop
        self.tokens.scatter_(1, self.length[:, None], token[:, None])
        self.length += grown

    def _range(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.device)


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    n: int,
    sampling: Sampling | None = None,
    *,
    seed: int = 0,
    precision: Precision = "fp32",
    stop: int | None = None,
    record: bool = True,
) -> Tensor:
    """Generate up to `n` tokens for each prompt: (B, n) int64 on the CPU, or fewer columns if all rows have ended.

    A prompt has at least one token. Row i draws with seed + i. A row ends with the token `stop` and is padded with it.
    `record`: see Decoder.
    """
    seeds = range(seed, seed + len(prompts))
    decoder = Decoder(
        model, prompts, n, sampling or Sampling(), seeds=seeds, precision=precision, stop=stop, record=record
    )  # fmt: skip
    return torch.cat(list(decoder.stream()), dim=1)


def _rounded(model: GPT, dtype: torch.dtype) -> GPT:
    """Return the model with its blocks' matrices and biases in `dtype`, to which each product would round them."""
    if dtype == model.wte.weight.dtype:
        return model
    twin = Rounded(model, dtype, keep_gradients=True).model
    for module in twin.modules():
        if isinstance(module, Linear):
            module.bias = nn.Parameter(module.bias.to(dtype))
    return twin
