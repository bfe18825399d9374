"""--backend auto in a run: the choice is printed, stored, and used to train, resume and sample."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch

from gpt2fast import auto
from gpt2fast.errors import RunError, UserError
from gpt2fast.inference.decode import generate
from gpt2fast.ops import NAMES, OpsConfig
from gpt2fast.train import train
from gpt2fast.training import screen
from gpt2fast.training.record import read_record
from gpt2fast.training.session import start_session
from gpt2fast.weights import load
from tests.tools import tiny
from tests.tools.runs import assert_same_run, metrics

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("cache_home")


def record(c):
    return json.loads((c.folder / "config.json").read_text())


def test_on_a_cpu_every_op_is_torch(tmp_path, capsys):
    with_torch, with_auto = (tiny.config(tmp_path, run=name, backend=name) for name in ("torch", "auto"))
    train(with_torch)
    train(with_auto)
    assert_same_run(with_torch, with_auto)
    assert "ops         auto: torch\n" in capsys.readouterr().out
    assert record(with_auto)["resolved"]["ops"] == dict.fromkeys(NAMES, "torch")
    assert record(with_auto)["resolved"]["auto"] == {}
    assert record(with_auto)["config"]["ops"] == dict.fromkeys(NAMES)
    assert record(with_torch)["resolved"]["auto"] is None
    assert not auto.cache_file().exists()


def test_the_choice_is_stored_and_shown_and_a_resumed_run_keeps_it(tmp_path, capsys, planted):
    straight, parts = (
        tiny.config(tmp_path, run=name, backend="auto", ops=OpsConfig(mlp="torch")) for name in ("straight", "parts")
    )
    train(straight)
    shown = capsys.readouterr().out
    assert "measuring the ops" in shown
    assert "ops         auto, forward + backward\n            embedding=compiled 1.00 ms (torch 2.00)\n" in shown
    assert "            mlp=torch, given by --ops\n" in shown
    chosen = record(straight)["resolved"]
    assert chosen["ops"] == dict.fromkeys(NAMES, "compiled") | {"mlp": "torch"}
    assert chosen["auto"] == {op: {"torch": 2.0, "compiled": 1.0} for op in NAMES if op != "mlp"}

    train(replace(parts, stop_at=10))
    auto.cache_file().unlink()
    planted |= {op: {"torch": 1.0, "compiled": 2.0} for op in NAMES}
    planted["measured"].clear()
    train(replace(parts, resume=True))
    assert planted["measured"] == []
    assert_same_run(straight, parts)
    assert record(parts)["resolved"] == chosen
    assert record(parts)["resumes"][0]["changed"] == {}


CHANGES = {
    "device": ({}, {"device_name": "another"}),
    "precision": ({"precision": "bf16"}, {}),
    "compile": ({}, {"compile": True}),
    "tf32": ({"tf32": False}, {}),
    "an op is open again": ({"ops": OpsConfig()}, {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_choice_made_for_other_settings_is_made_again_on_resume(change, tmp_path, capsys, planted):
    flags, resolved = CHANGES[change]
    c = tiny.config(tmp_path, backend="auto", ops=OpsConfig(mlp="torch"), stop_at=10)
    train(c)
    (c.folder / "config.json").write_text(json.dumps(record(c) | {"resolved": record(c)["resolved"] | resolved}))
    auto.cache_file().unlink()
    planted |= {op: {"torch": 1.0, "compiled": 2.0} for op in NAMES}
    planted["measured"].clear()
    train(replace(c, resume=True, stop_at=11, **flags))
    assert set(planted["measured"]) >= set(NAMES) - {"mlp"}
    assert set(record(c)["resolved"]["ops"].values()) == {"torch"}
    assert "changed: auto was {'embedding': 'compiled'" in capsys.readouterr().out


def test_the_model_computes_with_the_choice(tmp_path, planted):
    planted["attention"]["torch"] = 0.5
    s = start_session(tiny.config(tmp_path, backend="auto", ops=OpsConfig(mlp="torch")))
    compiled = {op for op in NAMES if isinstance(getattr(s.model.ops, op), partial)}
    assert compiled == set(NAMES) - {"attention", "mlp"}
    assert compiled == {op for op, name in asdict(s.choices.ops).items() if name != "torch"}


def test_a_resumed_run_may_name_an_op_or_another_backend(tmp_path, capsys, planted):
    c = tiny.config(tmp_path, backend="auto", stop_at=10)
    train(c)
    planted["measured"].clear()
    train(replace(c, resume=True, stop_at=11, ops=OpsConfig(linear="torch")))
    assert record(c)["resolved"]["ops"] == dict.fromkeys(NAMES, "compiled") | {"linear": "torch"}
    assert set(record(c)["resolved"]["auto"]) == set(NAMES) - {"linear"}
    train(replace(c, resume=True, stop_at=12, backend="torch"))
    assert record(c)["resolved"]["ops"] == dict.fromkeys(NAMES, "torch")
    assert planted["measured"] == []
    train(replace(c, resume=True, stop_at=13))  # a run with torch, resumed with auto
    assert set(record(c)["resolved"]["ops"].values()) == {"compiled"}


def test_out_of_memory_in_torchs_own_op_is_one_line(tmp_path, planted, monkeypatch):
    def measure_op(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(auto, "measure_op", measure_op)
    with pytest.raises(RunError, match=r"out of memory with --batch-size 2 .*: use --batch-size 1"):
        start_session(tiny.config(tmp_path, backend="auto"))


def test_a_named_op_that_cannot_be_built_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=r"needs a CUDA GPU, and this run is on cpu"):
        start_session(tiny.config(tmp_path, backend="auto", ops=OpsConfig(mlp="triton")))


def test_refused_candidates_are_shown():
    text = screen._ops_text({"mlp": "torch"}, {"mlp": {"torch": 1.0, "triton": "ValueError: a long story"}})
    assert text.endswith("mlp=torch 1.00 ms (triton refused)")


@pytest.mark.parametrize(
    ("chosen", "device", "interpret", "expected"),
    [
        ("compiled", "cpu", False, "compiled"),
        ("triton", "cuda", False, "triton"),
        ("triton", "cpu", False, None),
        ("triton", "cpu", True, None),
        ("an unknown name", "cpu", False, None),
    ],
)
def test_a_choice_is_recalled_where_it_can_be_built(chosen, device, interpret, expected, kernels, monkeypatch):
    if interpret:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = auto.recall(OpsConfig(mlp="torch"), dict.fromkeys(NAMES, chosen), device)
    assert found == (expected and OpsConfig(mlp="torch").with_backend(expected))


def test_a_run_is_sampled_with_the_ops_that_were_chosen(tmp_path, planted):
    c = tiny.config(tmp_path, backend="auto", steps=2, warmup=1)
    train(c)
    weights = load.read_weights(c.folder)
    assert set(asdict(weights.state["ops"]).values()) == {"compiled"}
    model = load.load_model(c.folder, CPU)
    assert all(isinstance(getattr(model.ops, op), partial) for op in NAMES)  # `planted` replaces compilation by partial
    assert generate(model, torch.zeros(1, 2, dtype=torch.long), 3).shape == (1, 3)


def test_the_command_line_where_triton_is_not_installed(tmp_path, run_python, cache_home):
    pytest.importorskip("tyro", reason="needs tyro for the command line")
    tiny.write_data(tmp_path / "data")
    code = """
import sys
sys.modules["triton"] = sys.modules["gpt2fast.kernels"] = None  # importing either is now an ImportError
from gpt2fast import sample, train
train.main(sys.argv[1:])
sample.main(["out/tiny", "--tokens", "3", "--device", "cpu"])
"""
    environment, words = {"XDG_CACHE_HOME": str(cache_home)}, ["--model.vocab-size", "50257", "--steps", "2"]
    done = run_python("-c", code, *tiny.FLAGS, *words, "--backend", "auto", check=True, env=environment)
    assert "ops         auto: torch\n" in done.stdout
    assert "step_00000002 on cpu" in done.stdout
    stored, resolved = read_record(tmp_path / "out" / "tiny")
    assert (stored.backend, set(resolved["ops"].values())) == ("auto", {"torch"})


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_gpu_is_measured_once(compile, tmp_path, capsys):
    for name in ("first", "second"):
        c = tiny.config(tmp_path, device="cuda", precision="bf16", compile=compile, backend="auto", run=name, steps=5)
        assert train(replace(c, model=replace(c.model, n_embd=32))) == 0
        assert ("measuring the ops" in capsys.readouterr().out) == (name == "first")
        assert set(record(c)["resolved"]["auto"]) == set(NAMES)
        assert len(metrics(c)) > 4
