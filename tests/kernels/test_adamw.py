"""AdamW in one launch: as accurate as torch's fused one, over several steps, and it writes nothing else."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from gpt2fast import kernels
from gpt2fast.kernels import launch
from gpt2fast.kernels.adamw import ALIGNED, CORRECTION, NUMBERS
from gpt2fast.model import GPT
from gpt2fast.ops import OpsConfig, build
from gpt2fast.training import optim
from gpt2fast.weights import checkpoint
from tests.tools import tiny
from tests.tools.accuracy import FEW, assert_as_accurate
from tests.tools.inputs import DTYPES, normal

pytestmark = pytest.mark.kernel
CHUNK, BLOCK, _ = launch.adamw_chunk()
LR = 1e-2
# name -> shape, dtype of the copy, whether the gradient is the copy's. One chunk or less unless the name says more
WEIGHTS = {
    "one": ((1,), None, False),
    "seven": ((7,), "bf16", True),
    "one less than a power of two": ((1023,), None, False),
    "one more": ((1025,), "fp16", True),
    "a block": ((BLOCK,), "bf16", True),
    "a block less one": ((BLOCK - 1,), None, False),
    "a chunk and one": ((CHUNK + 1,), "bf16", True),
    "many chunks": ((50304, 3), None, False),
    "many chunks, bf16": ((3, 50304), "bf16", True),
    "accumulated in fp32": ((40, 30), "bf16", False),
    "empty": ((0, 4), "bf16", True),
    "from zero": ((1000,), None, False),  # weights of zero show the update itself
    "not in every step": ((30, 10), "bf16", True),
}


class Weights:
    """WEIGHTS in `dtype`, with an optimizer of two groups and the same gradients for all; with copies if `rounded`."""

    def __init__(self, make, device, dtype=torch.float32, rounded=False, **options):
        self.device, self.dtype = device, dtype
        self.weights, self.copies = {}, {}
        for name, (shape, half, _) in WEIGHTS.items():
            start = torch.zeros(shape) if name == "from zero" else normal(*shape, seed=1)
            self.weights[name] = nn.Parameter(start.to(device, dtype))
            if rounded and half:
                self.copies[name] = nn.Parameter(start.to(device, DTYPES[half]))
        half = len(WEIGHTS) // 2
        groups = [
            {"params": list(self.weights.values())[:half], "weight_decay": 0.1},
            {"params": list(self.weights.values())[half:], "weight_decay": 0.0},
        ]
        self.optimizer = make(groups, lr=LR, betas=optim.BETAS, eps=optim.EPS, **options)
        if rounded:
            self.optimizer.copies = {self.weights[name]: copy for name, copy in self.copies.items()}

    def give_gradients(self, step: int, scale: float = 1.0) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for name, weight in self.weights.items():
            _, half, from_copy = WEIGHTS[name]
            if name == "not in every step" and step % 2:
                continue
            g = scale * normal(*weight.shape, seed=100 * step + len(name))
            g = (g.to(DTYPES[half]) if from_copy else g).to(self.device)
            if from_copy and name in self.copies:
                self.copies[name].grad = g
            else:
                weight.grad = g.to(self.dtype)

    def step(self, step: int, longest: float, scale: float = 1.0) -> Tensor:
        self.give_gradients(step, scale)
        return optim.clip_and_step(self.optimizer, longest)

    def results(self) -> dict[str, Tensor]:
        """Return weights and moments; those of few numbers are joined."""
        rows = {}
        for name, weight in self.weights.items():
            state = self.optimizer.state[weight]
            for kind, tensor in (("w", weight), ("m", state.get("exp_avg")), ("v", state.get("exp_avg_sq"))):
                if tensor is not None:
                    few = 0 < weight.numel() < FEW
                    rows.setdefault(f"{kind} of {'few' if few else name}", []).append(tensor.detach().flatten())
        return {name: torch.cat(tensors) for name, tensors in rows.items()}


ours_make = partial(optim.TritonAdamW, kernels)
ours = partial(Weights, ours_make, rounded=True, fused=True)
torchs = partial(Weights, torch.optim.AdamW, fused=True)
truth = partial(Weights, torch.optim.AdamW, dtype=torch.float64, foreach=False)


def assert_judged(got: Weights, exact: Weights, base: Weights) -> None:
    rows = zip(got.results().items(), exact.results().values(), base.results().values(), strict=True)
    for (name, g), t, b in rows:
        assert_as_accurate(g, t, b, name=name)
    for name, copy in got.copies.items():
        assert torch.equal(copy, got.weights[name].to(copy.dtype)), name


@pytest.mark.parametrize("longest", [1e9, 0.5], ids=["not clipped", "clipped"])
def test_as_accurate_as_torchs_over_several_steps(longest, device):
    runs = ours(device), truth(device), torchs(device)
    kept = []
    for step in range(5):
        norms = [run.step(step, longest) for run in runs]
        assert (norms[1] > longest) == (longest == 0.5)
        assert_as_accurate(norms[0], norms[1], norms[2].float(), name="norm")
        # kept alive, so that the next gradients have other addresses
        kept += [p.grad for p in (*runs[0].weights.values(), *runs[0].copies.values())]
    assert_judged(*runs)


def test_a_weight_without_a_gradient_is_left_alone(device):
    run = ours(device)
    for step in range(3):
        before = run.weights["not in every step"].detach().clone()
        run.step(step, 1.0)
        assert torch.equal(before, run.weights["not in every step"]) == (step == 1)
    assert {run.optimizer.state[w]["step"].item() for w in run.weights.values()} == {2.0, 3.0}
    run.optimizer.zero_grad()
    assert all(p.grad is None for p in (*run.weights.values(), *run.copies.values()))
    before = [w.detach().clone() for w in run.weights.values()]
    run.optimizer.step()
    assert all(map(torch.equal, before, run.weights.values()))
    assert run.optimizer.gradient_norm() == 0


def test_the_same_bits_every_time(device):
    results = []
    for _ in range(2):
        run = ours(device)
        norms = [run.step(step, 0.5) for step in range(2)]
        results.append([*norms, *run.results().values()])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_norm_shows_a_gradient_that_is_not_finite(value, device):
    run = ours(device)
    run.give_gradients(0)
    run.copies["many chunks, bf16"].grad[2, 50303] = value
    norm = optim.clip_and_step(run.optimizer, 1.0)
    assert norm.isnan() if value != value else norm.isinf()


def at(offset: int, size: int, dtype: torch.dtype, device, guard: float = 7.0) -> tuple[Tensor, Tensor]:
    """Return a tensor that begins `offset` elements after a multiple of 16 bytes, and the buffer around it."""
    around = torch.full((size + 64,), guard, dtype=dtype, device=device)
    return around[16 + offset : 16 + offset + size], around


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, CHUNK + 1, CHUNK + BLOCK - 1])
@pytest.mark.parametrize("part", [None, "weight", "gradient", "copy", "exp_avg"])
def test_any_address_works_and_nothing_around_it_changes(size, part, device):
    """Loads of 16 bytes need an address that is a multiple of 16, which that of a view need not be."""
    offsets = {name: int(name == part) for name in ("weight", "gradient", "exp_avg", "copy")}
    dtypes = {"gradient": torch.bfloat16, "copy": torch.bfloat16}
    tensors, around = {}, {}
    for name, offset in offsets.items():
        tensors[name], around[name] = at(offset, size, dtypes.get(name, torch.float32), device)
        tensors[name].copy_(torch.zeros(size) if name == "exp_avg" else normal(size, seed=len(name)))
    weight, copy = nn.Parameter(tensors["weight"]), nn.Parameter(tensors["copy"])
    start, plain = weight.detach().clone(), nn.Parameter(weight.detach().clone())
    optimizer = ours_make([weight], lr=LR)
    optimizer.copies = {weight: copy}
    optimizer.state[weight] = {
        "step": torch.zeros((), device=device), "exp_avg": tensors["exp_avg"], "exp_avg_sq": torch.zeros_like(weight)
    }  # fmt: skip
    copy.grad, plain.grad = tensors["gradient"], tensors["gradient"].float()
    optimizer.step()
    other = torch.optim.AdamW([plain], lr=LR)
    other.step()
    exact = nn.Parameter(start.double())
    exact.grad = plain.grad.double()
    torch.optim.AdamW([exact], lr=LR).step()
    assert_as_accurate(weight, exact, plain)
    assert torch.equal(copy, weight.bfloat16())
    assert optimizer._table.tensors[0, ALIGNED.value] == (part is None)
    for name, buffer in around.items():
        edge = 16 + offsets[name]
        assert (buffer[:edge] == 7).all(), name
        assert (buffer[edge + size :] == 7).all(), name


def test_gradients_of_any_strides(device):
    weight, other = (nn.Parameter(normal(48, 40, seed=1).to(device)) for _ in range(2))
    weight.grad, other.grad = (normal(40, 48).to(device).t() for _ in range(2))
    ours_make([weight], lr=LR).step()
    torch.optim.AdamW([other], lr=LR).step()
    torch.testing.assert_close(weight, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first", ["ours", "torch's"])
def test_either_resumes_where_the_other_stopped(first, device):
    """It takes over the state_dict after three of five steps."""
    one, other = ours(device), torchs(device)
    if first != "ours":
        one, other = other, one
    exact, base = truth(device), torchs(device)
    for step in range(5):
        (one if step < 3 else other).step(step, 0.5)
        exact.step(step, 0.5), base.step(step, 0.5)
        if step == 2:
            for name, weight in one.weights.items():
                other.weights[name].data.copy_(weight.data)
            other.optimizer.load_state_dict(one.optimizer.state_dict())
            states = [run.optimizer.state_dict()["state"] for run in (one, other)]
            assert [list(state) for state in states[0].values()] == [list(state) for state in states[1].values()]
    if first == "ours":
        other.copies = {}
    assert_judged(other, exact, base)


def test_each_loads_the_checkpoint_of_the_other(tmp_path, device):
    def gpt(seed, kernels=None):
        model = GPT(tiny.MODEL, build(OpsConfig()), seed).to(device)
        optimizer = optim.adamw(model, 0.1, kernels=kernels)
        for group in optimizer.param_groups:
            group["lr"] = LR
        return model, optimizer

    def step(model, optimizer, seed):
        for i, p in enumerate(model.parameters()):
            p.grad = normal(*p.shape, seed=100 * seed + i).to(device)
        optimizer.step()

    for number, (here, there) in enumerate([(kernels, None), (None, kernels)]):
        (model, optimizer), (model_, optimizer_) = gpt(1, here), gpt(2, there)
        step(model, optimizer, 0)
        path = checkpoint.save(tmp_path / str(number), 1, model, optimizer, {}, keep=1)
        checkpoint.load_training(path, model_, optimizer_, checkpoint.read_state(path))
        step(model, optimizer, 1), step(model_, optimizer_, 1)
        rows = model.config.vocab_size  # gradients of the padding are zero in training, but not here
        for p, q in zip(model.parameters(), model_.parameters(), strict=True):
            torch.testing.assert_close(p[:rows], q[:rows], rtol=1e-5, atol=1e-6)


def test_the_numbers_of_each_step_have_the_same_address(device):
    """A captured graph of `update` counts the step and reads the numbers where `send_numbers` has always put them."""
    run, other = ours(device), ours(device)
    table, places = run.optimizer._table, set()
    for step in (0, 2):
        run.give_gradients(step), other.give_gradients(step)
        for group in (*run.optimizer.param_groups, *other.optimizer.param_groups):
            group["lr"] = LR / (1 + step)
        run.optimizer.send_numbers()
        places.add(table.numbers.data_ptr())
        assert len(places) == 1
        assert table.numbers.shape == (len(WEIGHTS), NUMBERS.value)
        run.optimizer.update(), other.optimizer.step()
        assert table.numbers.data_ptr() in places
        expected = (1 - optim.BETAS[1] ** (1 + step // 2)) ** -0.5
        expected = torch.full((len(WEIGHTS),), expected, dtype=torch.float64)
        torch.testing.assert_close(table.numbers[:, CORRECTION.value].cpu(), expected, rtol=1e-13, atol=0)
    assert all(map(torch.equal, run.results().values(), other.results().values()))


@pytest.mark.gpu
def test_a_captured_update_takes_the_numbers_of_its_step(device):
    runs = ours(device), ours(device)
    for run in runs:
        run.step(0, 0.5)
    captured, plain = runs
    captured.give_gradients(2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = captured.optimizer.gradient_norm()
        captured.optimizer.update(optim.clip_divisor(norm, 0.5).float())
    for lr in (1e-2, 1e-3):
        for run in runs:
            for group in run.optimizer.param_groups:
                group["lr"] = lr
        captured.optimizer.send_numbers()
        graph.replay()
        assert torch.equal(norm, plain.step(2, 0.5))
    assert all(map(torch.equal, captured.results().values(), plain.results().values()))


def test_grad_scaler_may_skip_a_step(device):
    """It checks the unscaled gradients on the host: with this optimizer fp16 is slow, not wrong."""
    weight = nn.Parameter(torch.ones(10, device=device))
    optimizer, scaler = ours_make([weight], lr=LR, fused=True), torch.amp.GradScaler(device.type)
    for value in (float("inf"), 1.0):
        weight.grad = torch.full_like(weight, value)
        scaler.scale(torch.ones((), device=device))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert (weight == 1).all() == (value != 1)
