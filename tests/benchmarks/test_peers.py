"""The opponents do our work: the same losses, the same tokens. And their rows say what happened."""

import json

import pytest
import torch

from benchmarks import generate, harness, peers
from gpt2fast import ops
from gpt2fast.errors import UserError
from gpt2fast.model import GPTConfig

CPU = torch.device("cpu")
WORK = peers.Work("tiny", 2, 16, "fp32", "cpu")
MODEL = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=300)  # 20 more words are padding


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    monkeypatch.setitem(peers.SIZES, "tiny", MODEL)


def measure(name: str, work: peers.Work = WORK) -> dict:
    return peers.measure(peers.Job(name=name, work=work, warmup=3, steps=3, seconds=0.01))


def test_names_are_unique_and_say_whose_they_are():
    assert len(peers.ALL) == len(peers.OPPONENTS) + len(peers.ALLOCATED) + len(peers.OURS)
    assert {name for name, peer in peers.ALL.items() if peer.ours} == {
        "torch eager", "torch compiled", "torch max-autotune", "triton eager", "triton compiled", "auto",
    }  # fmt: skip
    assert "textbook eager, our allocator" in peers.ALL


@pytest.mark.parametrize(
    ("name", "device", "low", "ours"),
    [
        ("triton compiled", "cuda", True, True),
        ("torch compiled", "cuda", True, False),
        ("torch eager", "cpu", False, False),
    ],
)
def test_ours_have_the_stream_and_the_optimizer_that_training_takes(name, device, low, ours, monkeypatch):
    """Nothing computes: the model, the optimizer and the step are what they are asked for with."""
    seen = {}

    class Stop(Exception):
        pass

    def step(model, optimizer, **settings):
        seen.update(settings)
        raise Stop

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(peers, "set_tf32", lambda *args: None)
    monkeypatch.setattr(peers, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(peers, "use_allowed_cores", lambda: None)
    monkeypatch.setattr(peers.ops, "build", lambda *args: None)
    monkeypatch.setattr(peers.ops, "kernels", lambda device: "kernels")
    monkeypatch.setattr(peers, "GPT", lambda *args, **settings: seen.update(settings) or torch.nn.Identity())
    monkeypatch.setattr(peers.optim, "adamw", lambda *args, **settings: seen.update(settings))
    monkeypatch.setattr(peers, "TrainingStep", step)
    monkeypatch.setattr(torch.nn.Identity, "to", lambda self, device: self)
    work = peers.Work("tiny", 2, 16, "bf16", device)
    with pytest.raises(Stop):
        measure(name, work)
    assert (seen["residual"] == "low", seen["kernels"] == "kernels") == (low, ours)


def test_every_eager_step_makes_the_same_losses():
    pytest.importorskip("transformers", reason="one of the opponents")
    rows = {name: measure(name) for name in ("textbook eager", "transformers eager", "torch eager")}
    assert {row["status"] for row in rows.values()} == {"ok"}
    ours = rows["torch eager"]["losses"]
    padding = torch.log(torch.tensor(320 / 300)).item()  # theirs can be predicted; it has learned little in 3 steps
    for name in ("textbook eager", "transformers eager"):
        assert rows[name]["losses"] == pytest.approx([loss + padding for loss in ours], abs=2e-2)
    assert rows["textbook eager"]["losses"] == pytest.approx(rows["transformers eager"]["losses"], abs=1e-5)
    row = rows["torch eager"]
    assert row["tokens_per_s"]["p20"] <= row["tokens_per_s"]["median"] <= row["tokens_per_s"]["p80"]
    assert row["peak_memory"] > 2**20
    assert row["mfu"] is None


def test_what_cannot_run_here_says_why():
    assert "GPU" in measure("liger eager")["why"]
    assert measure("triton eager")["status"] == "skipped"
    cuda = torch.device("cuda")
    assert "allocator" in peers.refusal(peers.ALL["textbook eager, our allocator"], cuda)
    assert peers.refusal(peers.ALL["liger eager"], cuda) is None


def test_auto_is_torch_on_a_cpu():
    choice, row = peers.chosen(MODEL, WORK, CPU)
    assert choice == ops.OpsConfig().with_backend("torch")
    assert set(row.values()) == {"torch"}


def row(speed: float, losses=(5.0, 4.0, 3.0)) -> dict:
    spread = {"median": speed, "p20": speed, "p80": speed}
    ok = {"tokens_per_s": spread, "ms": spread, "peak_memory": 10**9, "mfu": None, "losses": list(losses)}
    return {"status": "ok", "seconds": 1.0, **ok}


def test_all_take_turns_and_the_table_has_medians(monkeypatch, tmp_path):
    speeds = {"textbook eager": [10, 30, 20], "torch eager": [60, 40, 50]}
    asked = []

    def apart(function, job, *, limit):
        assert (function, limit) == (peers.measure, 10.0 + harness.SHORTEST)
        asked.append(job.name)
        if job.name == "liger eager":
            return {"status": "skipped", "why": "no GPU"}
        losses = (5.0, 4.0, 3.2 if job.name == "torch eager" else 3.0)
        return row(speeds[job.name][asked.count(job.name) - 1], losses)

    monkeypatch.setattr(harness, "apart", apart)
    names = ["liger eager", "textbook eager", "torch eager"]
    rows = peers.compare(
        peers.PeersConfig(
            size="nano", device="cpu", peers=tuple(names), limit=10.0 + harness.SHORTEST, file=tmp_path / "rows.jsonl"
        )
    )
    assert asked == [*names, *names[1:], *names[1:]]  # what was refused once is not asked again
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    assert [r["repetition"] for r in rows] == [0, 0, 0, 1, 1, 2, 2]
    assert rows[2]["agrees"] is False
    lines = {line[:36].strip(): line[36:].split() for line in peers.table(rows).splitlines()}
    assert lines["textbook eager"][:3] == ["20", "10", "30"]
    assert lines["torch eager"][:3] == ["50", "40", "60"]
    assert lines["torch eager"][5] == "2.50"
    assert "differ" in lines["torch eager"]
    assert "no GPU" in " ".join(lines["liger eager"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"repetitions": 0}, "--repetitions is 0: it must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0: it must be at least 1"),
        ({"peers": ("liger",)}, "--peers 'liger': there are 'textbook eager', "),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        peers.compare(peers.PeersConfig(**settings))


@pytest.mark.long
def test_the_programs_from_the_command_line(run_module, tmp_path):
    pytest.importorskip("transformers", reason="one of the opponents")
    arguments = ["--size", "nano", "--batch-size", "1", "--seq-len", "32", "--steps", "1", "--warmup", "1"]
    arguments += ["--seconds", "0.1", "--repetitions", "1", "--device", "cpu", "--file", "rows.jsonl"]
    done = run_module("benchmarks.peers", *arguments, "--peers", "textbook eager", "torch eager", "auto")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["textbook eager", "torch eager", "auto"]
    assert {row["status"] for row in rows} == {"ok"}, rows
    assert not any(row["agrees"] is False for row in rows)
    flags = ["--size", "nano", "--tokens", "4", "--prompt", "4", "--repetitions", "1", "--file", "texts.jsonl"]
    done = run_module("benchmarks.generate", *flags, "--device", "cpu", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == list(generate.NAMES[:2])
    assert rows[1]["agrees"] == 1.0
