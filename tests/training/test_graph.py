"""The recorded step: on a CPU with a recording that runs its functions again, on a GPU with CUDA graphs."""

import pytest
import torch

from gpt2fast import ops
from gpt2fast.errors import UserError
from gpt2fast.model import GPT, GPTConfig
from gpt2fast.ops import OpsConfig
from gpt2fast.training import graph, optim, session
from gpt2fast.training.graph import UNRECORDED, GraphedStep
from gpt2fast.training.step import TrainingStep
from tests.tools import tiny
from tests.tools.accuracy import assert_as_accurate
from tests.tools.recording import played_by_hand

CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=100)
STEPS = UNRECORDED + 2


def train(kind: type[TrainingStep], device, accumulation: int = 1, made: list | None = None, precision: str = "fp32"):
    """Take STEPS steps, each with another learning rate. Return losses and norms, and the weights."""
    model = GPT(CONFIG, ops.build(OpsConfig(), device.type)).to(device)
    if precision == "fp64":
        model = model.double()
    kernels = None if precision == "fp64" else ops.kernels(device.type)
    optimizer = optim.adamw(model, 0.1, kernels=kernels)
    precision = "fp32" if precision == "fp64" else precision
    step = kind(model, optimizer, precision=precision, accumulation=accumulation, grad_clip=0.5)
    if made is not None:
        made.append(step)
    tokens = torch.randint(100, (STEPS * accumulation, 2, 17), generator=torch.Generator().manual_seed(0)).to(device)
    batches = iter([(rows[:, :-1], rows[:, 1:]) for rows in tokens])
    results = [step(batches, 1e-3 * (i + 1)) for i in range(STEPS)]
    return torch.tensor(results, dtype=torch.float64).T, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.kernel
@pytest.mark.parametrize(("precision", "accumulation"), [("fp32", 1), ("bf16", 3)])
def test_a_recorded_step_has_the_bits_of_the_step(precision, accumulation, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("the test below records CUDA graphs")
    made = []
    monkeypatch.setattr(graph, "record_graph", played_by_hand(made))
    want, weights = train(TrainingStep, device, accumulation, precision=precision)
    got, ours = train(GraphedStep, device, accumulation, made, precision=precision)
    assert torch.equal(got, want)
    assert all(torch.equal(ours[name], weight) for name, weight in weights.items())
    assert set(made[0]._graphs) == ({"first", "update"} if accumulation == 1 else {"first", "next", "update"})


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_as_accurate_on_a_gpu(accumulation, precision, device):
    truth, base = (train(TrainingStep, device, accumulation, precision=name)[0] for name in ("fp64", precision))
    got, _ = train(GraphedStep, device, accumulation, precision=precision)
    for name, i in (("losses", 0), ("norms", 1)):
        assert_as_accurate(got[i].float(), truth[i], base[i].float(), name=name)


@pytest.mark.kernel
def test_a_step_that_is_given_up_leaves_no_trace(device, monkeypatch):
    """Its micro-batches change neither the weights nor the gradients of the next step."""
    if device.type == "cuda":
        pytest.skip("its recordings are not CUDA graphs")
    made = []
    monkeypatch.setattr(graph, "record_graph", played_by_hand(made))
    train(GraphedStep, device, 2, made)
    step = made[0]
    batch = torch.zeros(2, 16, dtype=torch.long), torch.ones(2, 16, dtype=torch.long)
    weights = [p.detach().clone() for p in step.model.parameters()]
    answers = iter([False, True])
    assert step(iter([batch] * 2), 1e-3, lambda: next(answers)) is None
    assert all(torch.equal(p, w) for p, w in zip(step.model.parameters(), weights))
    loss, norm = step(iter([batch] * 2), 0.0)
    again, norm_again = step(iter([batch] * 2), 0.0)
    assert (loss, norm) == (again, norm_again)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({}, "--cuda-graph needs a CUDA GPU, and this run is on cpu: leave it out"),
        ({"optimizer": "torch"}, "--cuda-graph needs a CUDA GPU"),
    ],
    ids=str,
)
def test_refused_without_a_gpu(changes, error, tmp_path):
    with pytest.raises(UserError, match=error):
        session.start_session(tiny.config(tmp_path, cuda_graph=True, **changes))
    assert not (tmp_path / "out").exists()
