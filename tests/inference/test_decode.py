"""Generating tokens: sampling, rows of different lengths, stopping, texts longer than the block."""

import pytest
import torch
from torch import Tensor

from gpt2fast.inference.decode import Decoder, Sampling, choose_tokens, generate
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig, build
from tests.tools.decoding import GREEDY, PROMPTS, ending, make


@pytest.fixture(scope="module")
def model() -> GPT:
    return make()


@torch.no_grad()
def without_a_cache(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Return the likeliest tokens, each from the last block_size ones. Assert that each is clearly the likeliest."""
    row = list(prompt)
    for _ in range(n):
        logits = model(torch.tensor([row[-model.config.block_size :]]))[0, -1]
        first, second = logits.topk(2).values.tolist()
        assert first - second > 1e-4, "two tokens are equally likely: use other weights"
        row.append(int(logits.argmax()))
    return row[len(prompt) :]


# sampling
def frequencies(logits: Tensor, sampling: Sampling, n: int = 20000) -> Tensor:
    """Return the frequency of each token, (V,), for `n` numbers evenly spread over [0, 1)."""
    tokens = choose_tokens(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, sampling)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / n


def by_hand(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the probability of each token, (V,): temperature, then top-k, then top-p, each by its definition."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept = order[: sampling.top_k or len(order)]
    p = torch.zeros_like(p).index_copy(0, torch.tensor(kept), p[kept])
    p, total, nucleus = p / p.sum(), 0.0, []
    for token in kept:
        if total < sampling.top_p:
            nucleus.append(token)
        total += float(p[token])
    p = torch.zeros_like(p).index_copy(0, torch.tensor(nucleus), p[nucleus])
    return p / p.sum()


CHOICES = [
    Sampling(temperature=1.0, top_k=0), Sampling(temperature=0.5, top_k=0), Sampling(temperature=3.0, top_k=0),
    Sampling(temperature=1.0, top_k=1), Sampling(temperature=0.7, top_k=5), Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_k=0, top_p=0.9), Sampling(temperature=1.0, top_k=0, top_p=1e-9),
    Sampling(temperature=2.0, top_k=6, top_p=0.5), Sampling(temperature=0.3, top_k=3, top_p=0.999),
]  # fmt: skip


@pytest.mark.parametrize("sampling", CHOICES, ids=lambda s: f"{s.temperature},{s.top_k},{s.top_p}")
def test_tokens_are_chosen_with_their_probabilities(sampling):
    """Inverse CDF: the error of n evenly spread numbers is at most 1/n, and excluded tokens are never chosen."""
    logits = 3 * torch.randn(40, generator=torch.Generator().manual_seed(2))
    got, want = frequencies(logits, sampling), by_hand(logits, sampling)
    assert ((got - want).abs() <= 1.5 / 20000).all()
    assert (got[want == 0] == 0).all()


@pytest.mark.parametrize("sampling", CHOICES, ids=lambda s: f"{s.temperature},{s.top_k},{s.top_p}")
def test_the_same_tokens_are_kept_as_by_transformers(sampling):
    transformers = pytest.importorskip("transformers", reason="its logits warpers are the yardstick")
    logits = 3 * torch.randn(1, 40, generator=torch.Generator().manual_seed(2))
    theirs = transformers.TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        theirs = transformers.TopKLogitsWarper(sampling.top_k)(None, theirs)
    if sampling.top_p < 1:
        theirs = transformers.TopPLogitsWarper(sampling.top_p)(None, theirs)
    want = theirs[0].softmax(-1)
    assert ((frequencies(logits[0], sampling) - want).abs() <= 1.5 / 20000).all()


def test_the_ends_of_the_range_of_uniform_numbers():
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert choose_tokens(logits, ends, Sampling(temperature=1.0, top_k=0)).tolist() == [1, 2]
    assert choose_tokens(logits, ends, Sampling(temperature=1.0, top_k=2)).tolist() == [1, 2]
    assert choose_tokens(logits, ends, Sampling(temperature=1.0, top_k=0, top_p=0.5)).tolist() == [1, 1]
    assert choose_tokens(logits, ends, GREEDY).tolist() == [1, 1]


# rows
def test_greedy_takes_the_likeliest_token_each_time(model):
    got = generate(model, PROMPTS, 12, GREEDY).tolist()
    assert got == [without_a_cache(model, prompt, 12) for prompt in PROMPTS]
    assert len({*got[0]}) > 3


@pytest.mark.kernel
def test_the_triton_kernels_generate_the_same_tokens(device):
    if device.type == "cuda":
        want = generate(make(device=device), PROMPTS, 6, GREEDY)
    else:
        want = torch.tensor([without_a_cache(make(), prompt, 6) for prompt in PROMPTS])
    assert torch.equal(generate(make(backend="triton", device=device), PROMPTS, 6, GREEDY), want)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_are_those_of_transformers_generate(precision):
    """Every token is equal, as the second likeliest is never within rounding; for bf16, weights are chosen so."""
    from tests.tools.hf import huggingface_model, in_our_names

    config = GPTConfig(n_layer=2, n_head=4, n_embd=64, block_size=40, vocab_size=300)
    theirs = huggingface_model(config).eval()
    ours = GPT(config, build(OpsConfig()))
    with torch.no_grad():
        theirs.transformer.wte.weight.mul_(4)
        theirs.transformer.wpe.weight.mul_(20)  # or one token would repeat for ever
    ours.load_state_dict(in_our_names(dict(theirs.named_parameters())))
    different = set()
    for prompt in ([5], [7, 200, 31], list(range(40, 60))):
        n = 40 - len(prompt) if precision == "fp32" else 12
        if precision == "fp32":
            without_a_cache(ours, prompt, n)
        options = {"max_new_tokens": n, "do_sample": False, "eos_token_id": 0, "pad_token_id": 0}
        idx = torch.tensor([prompt])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            want = theirs.generate(idx, attention_mask=torch.ones_like(idx), **options)[0, len(prompt) :].tolist()
        assert generate(ours, [prompt], n, GREEDY, precision=precision, stop=0)[0].tolist() == want
        different |= set(want)
    assert len(different) > 5


def test_a_row_is_the_same_alone_and_among_others(model):
    """Also with sampling: each row has its own random numbers, from seed + row."""
    drawn = Sampling(temperature=1.0, top_k=20, top_p=0.9)
    together = generate(model, PROMPTS, 15, drawn, seed=5)
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(generate(model, [prompt], 15, drawn, seed=5 + i)[0], together[i])


def test_the_seed_decides_and_the_global_generator_is_left_alone(model):
    before = torch.get_rng_state()
    hot = Sampling(temperature=2.0)
    first = generate(model, PROMPTS, 10, hot, seed=1)
    torch.manual_seed(7)
    assert torch.equal(first, generate(model, PROMPTS, 10, hot, seed=1))
    assert not torch.equal(first, generate(model, PROMPTS, 10, hot, seed=9))
    torch.set_rng_state(before)
    generate(model, PROMPTS, 3, hot)
    assert torch.equal(before, torch.get_rng_state())


def test_decoding_records_no_gradients(model):
    decoder = Decoder(model, PROMPTS, 3, GREEDY, seeds=range(4), precision="bf16", stop=None)
    for piece in decoder.stream():
        assert torch.is_grad_enabled()  # outside the decoder
        assert not piece.requires_grad
    assert not decoder.cache.k.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_in_bf16_weights_are_rounded_once_and_the_model_is_unchanged(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    decoder = Decoder(model, PROMPTS, 3, GREEDY, seeds=range(4), precision="bf16", stop=None)
    assert decoder.head.dtype == decoder.cache.k.dtype == torch.bfloat16
    assert {p.dtype for p in decoder.model.h[0].mlp.parameters()} == {torch.bfloat16}
    assert decoder.model.wte.weight is model.wte.weight  # looked up in fp32
    list(decoder.stream())
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.named_parameters())
    decoder = Decoder(model, PROMPTS, 3, GREEDY, seeds=range(4), precision="fp32", stop=None)
    assert decoder.model is model
    assert decoder.head is model.wte.weight


# texts longer than the block
@pytest.mark.parametrize("n", [18, 22, 27])
def test_text_may_be_longer_than_the_block(n, model):
    """The longest row, of 7 tokens, has no position left after 17 new ones; the others reach the block's end later."""
    assert generate(model, PROMPTS, n, GREEDY).tolist() == [without_a_cache(model, prompt, n) for prompt in PROMPTS]


def test_a_prompt_may_be_longer_than_the_block(model):
    prompts = [[i % 211 for i in range(30)], [4, 5]]
    assert generate(model, prompts, 3, GREEDY).tolist() == [without_a_cache(model, prompt, 3) for prompt in prompts]


def test_within_the_block_no_token_is_computed_twice(model, monkeypatch):
    calls = []
    read = Decoder._read_window
    monkeypatch.setattr(Decoder, "_read_window", lambda self, T, *rest: calls.append(T) or read(self, T, *rest))
    generate(model, [[1, 2, 3]], 22, GREEDY)  # 24 positions; the last token is not fed
    assert calls == [3]
    generate(model, [[1, 2, 3]], 23, GREEDY)
    assert calls == [3, 3, 24]


# stopping
@pytest.mark.parametrize("every", [1, 3, 16])
def test_a_row_that_has_ended_is_padded_and_the_others_continue(every, model):
    rows, stop = ending(model, 17)
    decoder = Decoder(model, PROMPTS, 17, GREEDY, seeds=range(4), precision="fp32", stop=stop)
    got = torch.cat(list(decoder.stream(every)), 1).tolist()
    for row, text in zip(rows, got, strict=True):
        end = row.index(stop) + 1 if stop in row else 17
        assert text == row[:end] + [stop] * (17 - end)


@pytest.mark.parametrize("every", [1, 3, 16])
def test_when_all_rows_have_ended_decoding_stops(every, model):
    rows, stop = ending(model, 17)
    chosen = [i for i, row in enumerate(rows) if stop in row]
    prompts, longest = [PROMPTS[i] for i in chosen], max(rows[i].index(stop) + 1 for i in chosen)
    decoder = Decoder(model, prompts, 17, GREEDY, seeds=range(len(chosen)), precision="fp32", stop=stop)
    got = torch.cat(list(decoder.stream(every)), 1)
    assert got.shape[1] == longest < 17
    assert (got[:, -1] == stop).all()
    assert generate(model, prompts, 17, GREEDY, stop=stop).tolist() == got.tolist()


def test_pieces_have_the_length_asked_for(model):
    def lengths(n, every):
        decoder = Decoder(model, PROMPTS, n, GREEDY, seeds=range(4), precision="fp32", stop=None)
        return [piece.shape[1] for piece in decoder.stream(every)]

    assert lengths(1, 16) == [1]
    assert lengths(5, 1) == [1] * 5
    assert lengths(11, 4) == [1, 4, 4, 2]
