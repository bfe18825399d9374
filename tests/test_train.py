"""Training: it learns, it accumulates, and it continues bit for bit."""

import json
import math
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from gpt2fast import checkpoint, optim, run, screen, session
from gpt2fast.config import PRESETS
from gpt2fast.model import GPT
from gpt2fast.ops import OpsConfig, build
from gpt2fast.session import prepare
from gpt2fast.step import TrainingStep
from gpt2fast.train import train


@pytest.fixture(autouse=True)
def one_thread():
    """Sums over threads are ordered differently with another number of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def metrics(c):
    """The rows of a run, without the clock's part."""
    rows = run.read_metrics(c.folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in ("tokens_per_s", "mfu")} for row in rows]


def tensors(c):
    """Weights and moments of a run's newest checkpoint."""
    _, path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1]
    return load_file(path / "model.safetensors") | load_file(path / "optimizer.safetensors")


def assert_same_run(a, b):
    assert metrics(a) == metrics(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_learns_more_than_token_frequencies(tmp_path, capsys):
    c = tiny.config(tmp_path, steps=150, model=replace(tiny.MODEL, n_embd=32), lr=3e-2, val_every=50)
    assert train(c) == 0
    rows = metrics(c)
    entropy = json.loads((c.folder / "config.json").read_text())["resolved"]["unigram_entropy"]
    assert abs(rows[0]["loss"] - math.log(50257)) < 0.5
    assert rows[-2]["loss"] < entropy
    assert rows[-1]["val_loss"] < entropy


def test_leaves_what_it_promises(tmp_path, capsys):
    c = tiny.config(tmp_path)
    train(c)
    assert {path.name for path in c.folder.iterdir()} >= {"metrics.jsonl", "config.json", "loss.png", "checkpoints"}
    assert (c.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in checkpoint.list_checkpoints(c.folder / "checkpoints")] == [10, 20]
    stored = json.loads((c.folder / "config.json").read_text())
    assert stored["config"]["model"]["n_embd"] == 16
    assert set(stored["resolved"]["ops"].values()) == {"torch"}
    assert stored["machine"]["torch"] == torch.__version__
    assert "commit" in stored["machine"]
    assert [row["step"] for row in metrics(c) if "loss" in row] == list(range(1, 21))
    assert [row["step"] for row in metrics(c) if "val_loss" in row] == [5, 10, 15, 20]


def test_the_learning_rate_is_the_schedule(tmp_path, capsys):
    c = tiny.config(tmp_path)
    train(c)
    rates = [row["lr"] for row in metrics(c) if "lr" in row]
    expected = [optim.learning_rate(i, peak=1e-2, floor=1e-3, warmup=2, total=20) for i in range(20)]
    assert rates == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"total_batch": 96, "steps": 12, "stop_at": 7},  # 3 micro-batches a step, 31 in an epoch: resumes inside one
        {"shuffle": False, "log_every": 7},
        {"checkpoint_every": 4, "steps": 13, "stop_at": 9, "keep": 1},
    ],
    ids=["plain", "bf16", "accumulated", "sequential", "odd"],
)
def test_interrupted_and_resumed_equals_straight(tmp_path, capsys, changes):
    stop = changes.pop("stop_at", 10)
    straight, parts = (tiny.config(tmp_path, run=name, **changes) for name in ("straight", "parts"))
    train(straight)
    train(replace(parts, stop_at=stop))
    torch.rand(7)  # a resumed process has other random states
    train(replace(parts, resume=True))
    assert_same_run(straight, parts)


def test_same_seed_same_run_other_seed_another(tmp_path, capsys):
    runs = [tiny.config(tmp_path, run=name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    for c in runs:
        train(c)
    assert_same_run(runs[0], runs[1])
    assert metrics(runs[0]) != metrics(runs[2])


def test_when_losses_are_read_does_not_change_them(tmp_path, capsys):
    often, rarely = (tiny.config(tmp_path, run=f"every{n}", log_every=n) for n in (1, 7))
    train(often)
    train(rarely)
    by_step = [{row["step"]: row["loss"] for row in metrics(c) if "loss" in row} for c in (often, rarely)]
    assert by_step[0] == by_step[1]


def test_resume_keeps_the_runs_own_settings_and_records_itself(tmp_path, capsys):
    c = tiny.config(tmp_path)
    train(replace(c, stop_at=10))
    train(replace(c, resume=True, steps=24, keep=3))
    stored = json.loads((c.folder / "config.json").read_text())
    assert stored["resumes"][0]["step"] == 10
    assert stored["resumes"][0]["changed"] == {"steps": [20, 24], "keep": [2, 3]}
    assert "steps was 20 and is 24" in capsys.readouterr().out


def test_all_random_generators_are_restored(tmp_path, capsys):
    import random

    import numpy as np

    c = tiny.config(tmp_path, stop_at=10)
    train(c)
    draws = []
    for _ in range(2):
        random.random(), np.random.rand(), torch.rand(1)
        _, path = checkpoint.list_checkpoints(c.folder / "checkpoints")[-1]
        s = prepare(replace(c, resume=True, stop_at=None))
        assert checkpoint.read_state(path)["position"] == s.step == 10
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def batches(n, B, T=8):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50257, (n, B, T), generator=generator)
    return [(x, x.roll(-1, 1)) for x in tokens]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Four micro-batches of one sequence make the step that one batch of four makes, but for summation order."""
    whole = batches(1, 4)
    parts = [(x[None], y[None]) for x, y in zip(*whole[0])]
    results = []
    for stream, accumulation in ((whole, 1), (parts, 4)):
        model = GPT(tiny.MODEL, build(OpsConfig()))
        step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp32", accumulation=accumulation, grad_clip=1.0)
        loss, norm = step(iter(stream), lr=1e-3)
        results.append([loss, norm, *model.state_dict().values()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_gradients_are_clipped_and_the_norm_is_the_one_before():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    seen = []
    optimizer = optim.adamw(model, 0.0)
    optimizer.register_step_post_hook(lambda *_: seen.append([p.grad.clone() for p in model.parameters()]))
    step = TrainingStep(model, optimizer, precision="fp32", grad_clip=0.01)
    _, norm = step(iter(batches(1, 2)), lr=1e-3)
    assert norm > 0.02
    clipped = torch.stack([g.norm() for g in seen[0]]).norm()
    assert clipped.item() == pytest.approx(0.01, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())  # set_to_none


def test_giving_up_inside_a_step_changes_nothing():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp32", accumulation=3)
    answers = iter([False, False, True])
    assert step(iter(batches(3, 2)), lr=1.0, give_up=lambda: next(answers)) is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_fp16_scales_the_loss_and_skips_what_overflows():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    step = TrainingStep(model, optim.adamw(model, 0.1), precision="fp16")
    assert step.scaler.is_enabled()
    assert not TrainingStep(model, step.optimizer, precision="bf16").scaler.is_enabled()
    (batch,) = batches(1, 2)
    losses = [step(iter([batch]), lr=1e-2)[0].item() for _ in range(30)]
    assert losses[-1] < losses[0] - 2
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)  # no fp16 gradient survives that
    before = model.wte.weight.clone()
    loss, norm = step(iter([batch]), lr=1e-2)
    assert loss.isfinite()
    assert not norm.isfinite()
    assert torch.equal(model.wte.weight, before)
    assert step.scaler.get_scale() == 2.0**59


def test_rehearsal_changes_nothing(tmp_path):
    c = tiny.config(tmp_path)
    fresh = GPT(c.model, build(OpsConfig()), c.seed).state_dict()
    s = prepare(c)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in s.model.state_dict().items())
    assert not s.take_step.optimizer.state
    assert not c.folder.exists()


def test_an_implausible_first_loss_is_reported(tmp_path):
    s = prepare(tiny.config(tmp_path))
    assert "warning" not in screen.header(s, "")
    s.first_loss = 14.0
    assert "an untrained model should lose about 10.82, and this one loses 14.00" in screen.header(s, "")


def test_the_header_says_what_matters(tmp_path):
    s = prepare(tiny.config(tmp_path))
    text = screen.header(s, "preset nano")
    for part in (
        "cpu",
        "fp32",
        "not compiled",
        "807,680 parameters",
        "saves 804,112",
        "1,000 training tokens",
        "20 = 640 tokens",
    ):
        assert part in text


def test_decay_is_for_matrices_only():
    model = GPT(tiny.MODEL, build(OpsConfig()))
    decayed, plain = optim.decay_groups(model, 0.1)
    assert [decayed["weight_decay"], plain["weight_decay"]] == [0.1, 0.0]
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    group = optim.adamw(model, 0.1).param_groups[0]
    assert group["betas"] == (0.9, 0.95)
    assert group["fused"]


def test_schedule():
    def rate(step):
        return optim.learning_rate(step, peak=1.0, floor=0.1, warmup=10, total=101)

    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == rate(10) == 1.0
    assert rate(55) == pytest.approx(0.55)
    assert rate(100) == pytest.approx(0.1)
    assert rate(1000) == pytest.approx(0.1)
    assert all(rate(i) > rate(i + 1) for i in range(10, 100))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_trains_on_cuda_in_every_precision(tmp_path, capsys, precision):
    c = tiny.config(
        tmp_path, device="cuda", precision=precision, steps=60, compile="on" if precision == "bf16" else "off"
    )
    assert train(c) == 0
    losses = [row["loss"] for row in metrics(c) if "loss" in row]
    assert losses[-1] < losses[0] - 2


@pytest.mark.gpu
def test_a_step_on_cuda_does_not_wait_for_the_device(tmp_path):
    s = prepare(tiny.config(tmp_path, device="cuda", precision="bf16", compile="off"))
    stream = s.train.batches(0, s.device)
    s.take_step(stream, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        s.take_step(stream, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_metrics_are_json_even_when_a_norm_is_infinite_or_a_loss_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with run.Metrics(path, last_step=0) as rows:
        rows.write({"step": 1, "loss": 2.5, "grad_norm": math.inf, "mfu": None})
        rows.write({"step": 2, "loss": math.nan})
    assert [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.5, "grad_norm": None, "mfu": None},
        {"step": 2, "loss": None},
    ]


def test_metrics_after_the_checkpoint_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val_loss": 3}\n{"step": 3}\n{"st')
    with run.Metrics(path, last_step=2) as rows:
        rows.write({"step": 3, "loss": 1.0})
    assert [row["step"] for row in run.read_metrics(path)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("preset", "steps", "device", "pays"),
    [
        ("nano", 340, "cpu", False),
        ("nano", 100_000, "cpu", True),
        ("gpt2", 19073, "cpu", True),
        ("nano", 1, "cuda", True),
        ("gpt2", 19073, "mps", False),
    ],
)
def test_compiling_is_for_cuda_and_for_long_runs_on_a_cpu(preset, steps, device, pays, monkeypatch):
    monkeypatch.setattr(session.shutil, "which", lambda name: f"/bin/{name}" if name == "g++" else None)
    c = replace(PRESETS[preset], steps=steps)
    assert session.compiling_pays(c, torch.device(device)) is pays
    monkeypatch.setattr(session.shutil, "which", lambda name: None)
    assert session.compiling_pays(c, torch.device("cpu")) is False
