"""Token + position embedding against torch, forward and backward, and sums that have the same bits in any order."""

import pytest
import torch
from torch import Tensor

from gpt2fast import reference
from gpt2fast.kernels import embedding, launch
from gpt2fast.kernels.embeddings import LONG, embedding_bwd, embedding_fwd
from tests.tools.accuracy import Results, assert_as_accurate, assert_kernel_is_as_accurate, outputs_and_gradients
from tests.tools.inputs import DTYPES, LAYOUTS, normal

pytestmark = pytest.mark.kernel

INF, NAN = float("inf"), float("nan")

# B, T, V, C, block_size: GPT-2's width; XL's, not a power of two; primes; one token; one word, more often than one warp
# adds; a mostly unseen vocabulary; more sequences than are added at a time; nothing
SHAPES = [
    (2, 9, 50, 768, 16), (1, 3, 7, 1600, 3), (3, 7, 11, 37, 13), (1, 1, 5, 1, 1), (2, LONG, 1, 48, LONG),
    (2, 5, 3000, 33, 8), (37, 2, 4, 24, 2), (0, 5, 7, 16, 5), (2, 0, 7, 16, 5),
]  # fmt: skip


def tokens(B: int, T: int, V: int, device="cpu", seed: int = 0) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed)).to(device)


def weights(V: int, block_size: int, C: int, device, dtype=torch.float32) -> list[Tensor]:
    return [normal(V, C, device=device, dtype=dtype), normal(block_size, C, device=device, dtype=dtype, seed=1)]


def judge(idx: Tensor, inputs: list[Tensor], dtype: torch.dtype, **options) -> None:
    """Compare with float64, and with fp32 whose results are rounded once."""

    def theirs(wte, wpe):
        return reference.embedding(wte, wpe, idx, wte.dtype)

    def base(inputs, cotangents) -> Results:
        o, d, c = outputs_and_gradients(theirs, [x.float() for x in inputs], [x.float() for x in cotangents])
        return Results([x.to(dtype) for x in o], d, c)

    def ours(wte, wpe):
        return embedding(wte, wpe, idx, dtype)

    assert_kernel_is_as_accurate(ours, theirs, inputs, base=base, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding(shape, dtype, device):
    B, T, V, C, block_size = shape
    judge(tokens(B, T, V, device), weights(V, block_size, C, device), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_another_dtype(dtype, device):
    judge(tokens(2, 7, 5, device), weights(5, 9, 40, device, DTYPES[dtype]), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    idx = LAYOUTS[layout](tokens(4, 6, 12, device))
    inputs = [LAYOUTS[layout](x) for x in weights(12, 6, 40, device)]
    do = LAYOUTS[layout](normal(4, 6, 40, device=device))
    judge(idx, inputs, torch.float32, cotangents=[do])
    judge(tokens(4, 7, 12, device)[:, :-1], inputs, torch.float32)  # the strides of a batch


def rows_of(do: Tensor, idx: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Return dwte in float64, and as the kernel computes it."""
    truth = torch.zeros(V, do.shape[-1], dtype=torch.float64)
    truth.index_add_(0, idx.flatten().cpu(), do.double().flatten(0, 1).cpu())
    return truth, embedding_bwd(do, idx, V, idx.shape[1], torch.float32)[0].cpu()


@pytest.mark.parametrize("n", [1, 8, 9, LONG, LONG + 1, 3 * LONG + 5], ids=str)
def test_the_gradient_of_a_word_is_the_sum_rounded_once(n, device):
    """As many positions as a tile or a warp takes, and one more; columns from 1e-30 to 1e30, one that cancels."""
    do = normal(1, n + 2, 40, device=device) * torch.logspace(-30, 30, 40, device=device)
    idx = torch.full((1, n + 2), 2, device=device)
    idx[0, n // 2], idx[0, -1] = 0, 4
    do[0, idx[0] == 2, 39] = 1e30
    if n > 1:
        do[0, (idx[0] == 2).nonzero()[0], 39] = 1e30 * (1 - n)
    truth, dwte = rows_of(do, idx, 6)
    assert torch.equal(dwte, truth.float())


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 2e37], ids=str)
def test_the_ends_of_fp32(scale, device):
    """Denormal gradients, and sums close to the largest fp32 number and beyond it."""
    do = normal(1, 50, 16, device=device).mul(4).round() * scale
    do[0, ::2] = do[0, 1::2].abs()
    idx = torch.zeros(1, 50, dtype=torch.long, device=device)
    truth, dwte = rows_of(do, idx, 1)
    assert torch.equal(dwte, truth.float())
    assert truth.float().isinf().any() == (scale == 2e37)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from numpy, in the interpreter
@pytest.mark.parametrize("n", [3, LONG + 30], ids=str)
def test_infinity_and_nan_stay_in_their_word_and_column(n, device):
    do = normal(1, n + 1, 6, device=device)
    idx = torch.ones(1, n + 1, dtype=torch.long, device=device)
    idx[0, -1] = 0
    for column, values in enumerate([[INF], [-INF], [NAN], [INF, -INF], [INF, 3e38]]):
        do[0, n - len(values) : n, column] = torch.tensor(values, device=device)
    dwte, dwpe = embedding_bwd(do, idx, 3, n + 1, torch.float32)
    assert torch.equal(dwte[0], do[0, -1])
    assert dwte[1, :5].tolist()[:2] == [INF, -INF]
    assert dwte[1].isnan().tolist() == [False, False, True, True, False, False]
    assert dwte[1].isfinite().tolist() == [False] * 5 + [True]
    assert dwte[2].count_nonzero() == 0
    assert torch.equal(dwpe.isfinite(), do[0].isfinite())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_same_bits_in_any_order_of_the_batch(dtype, device):
    """The order fills buckets differently here; on a GPU, chance does. dwte must not depend on it, bit for bit."""
    idx, do = tokens(40, 6, 3, device), normal(40, 6, 24, device=device, dtype=DTYPES[dtype])
    first = embedding_bwd(do, idx, 3, 6, torch.float32)
    for seed in range(3):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).to(device)
        assert torch.equal(embedding_bwd(do[order], idx[order], 3, 6, torch.float32)[0], first[0])
    for _ in range(3):
        assert all(map(torch.equal, embedding_bwd(do, idx, 3, 6, torch.float32), first))


def test_words_and_positions_that_do_not_occur_have_gradient_zero(device):
    idx = tokens(3, 5, 50, device) * 2
    dwte, dwpe = embedding_bwd(normal(3, 5, 24, device=device), idx, 128, 9, torch.float32)
    occur = torch.zeros(128, dtype=torch.bool)
    occur[idx.flatten().cpu()] = True
    assert torch.equal((dwte != 0).any(1).cpu(), occur)
    assert (dwpe != 0).any(1).tolist() == [True] * 5 + [False] * 4


@pytest.mark.parametrize("token", [-1, 6, -(2**40), 2**40], ids=str)
def test_a_token_outside_the_vocabulary_gives_nan_and_is_never_an_address(token, device):
    """torch raises on a CPU, and asserts on a GPU, which ends CUDA; here the loss becomes NaN, which ends a run."""
    idx = torch.tensor([[3, token, 5]], device=device)
    wte, wpe = weights(6, 4, 16, device)
    before, o = wte.clone(), embedding_fwd(wte, wpe, idx, torch.float32)
    assert o.isnan().all(-1).tolist() == [[False, True, False]]
    assert torch.equal(o[0, ::2], wte[idx[0, ::2]] + wpe[:3:2])
    do = normal(1, 3, 16, device=device)
    dwte, dwpe = embedding_bwd(do, idx, 6, 4, torch.float32)
    assert torch.equal(dwte[[3, 5]], do[0, ::2])
    assert (dwte != 0).any(1).tolist() == [False, False, False, True, False, True]
    assert torch.equal(dwpe[:3], do[0])
    assert torch.equal(wte, before)


def test_each_word_is_listed_once_and_each_position_is_in_its_bucket(device, monkeypatch):
    """Several programs count and scatter."""
    monkeypatch.setattr(launch, "elementwise", lambda: 64)
    idx = tokens(5, 77, 9, device) // 4
    do = normal(5, 77, 16, device=device)
    truth, dwte = rows_of(do, idx, 20)
    assert (idx.flatten().bincount() > LONG).sum() > 1
    assert torch.equal(dwte, truth.float())


def test_dwpe_is_as_accurate_as_torchs_sum(device):
    do, idx = normal(200, 3, 16, device=device, values="offset"), tokens(200, 3, 5, device)
    dwpe = embedding_bwd(do, idx, 5, 3, torch.float32)[1]
    assert_as_accurate(dwpe, do.double().sum(0).cpu(), do.sum(0).cpu(), name="dwpe")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("words", [50257, 1], ids=["many words", "one word"])
def test_sizes_of_gpt2(words, dtype, device):
    idx = (torch.rand(64, 1024, device=device) ** 6 * words).long()  # a few are frequent
    judge(idx, weights(50304, 1024, 768, device), DTYPES[dtype])


def test_bad_arguments_are_refused(device):
    (wte, wpe), idx, fp32 = weights(6, 4, 8, device), tokens(2, 3, 6, device), torch.float32
    with pytest.raises(ValueError, match=r"embedding: wpe has shape \(4, 7\): it must be \(4, 8\)"):
        embedding(wte, wpe[:, :7], idx, fp32)
    with pytest.raises(ValueError, match=r"embedding: wte has shape \(8,\): it must have two dimensions"):
        embedding(wte[0], wpe, idx, fp32)
    with pytest.raises(ValueError, match=r"embedding: idx has 5 positions, and wpe 4: shorten the sequences"):
        embedding(wte, wpe, tokens(2, 5, 6, device), fp32)
    with pytest.raises(TypeError, match=r"embedding: idx is torch.int32 \(2, 3\): it must be int64 of two dimensions"):
        embedding(wte, wpe, idx.int(), fp32)
    with pytest.raises(TypeError, match=r"embedding: idx is torch.int64 \(3,\): it must be int64 of two dimensions"):
        embedding(wte, wpe, idx[0], fp32)
    with pytest.raises(TypeError, match=r"embedding: wte is torch.float32 and wpe is torch.float16: convert"):
        embedding(wte, wpe.half(), idx, fp32)
    with pytest.raises(TypeError, match=r"embedding: dtype is torch.float64: it must be"):
        embedding(wte, wpe, idx, torch.float64)
    with pytest.raises(ValueError, match=r"embedding: wte is on .* and idx on meta"):
        embedding(wte, wpe, idx.to("meta"), fp32)
