"""What every "auto" becomes: compilation, optimizer, copies; what is recorded, compared and printed."""

import json
from dataclasses import fields, replace

import pytest
import torch

from gpt2fast.errors import UserError
from gpt2fast.training import choices
from gpt2fast.training.choices import Choices, Place
from gpt2fast.training.config import PRESETS
from gpt2fast.training.record import changed_choice
from gpt2fast.training.screen import header
from gpt2fast.training.session import start_session
from gpt2fast.training.step import kind_of_copies
from tests.tools import tiny


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
def test_compiling_pays_on_cuda_and_for_long_runs_on_a_cpu(preset, steps, device, pays, monkeypatch):
    monkeypatch.setattr(choices.shutil, "which", lambda name: f"/bin/{name}" if name == "g++" else None)
    c = replace(PRESETS[preset], steps=steps)
    assert choices.compiling_pays(c, torch.device(device)) is pays
    monkeypatch.setattr(choices.shutil, "which", lambda name: None)
    assert choices.compiling_pays(c, torch.device("cpu")) is False


@pytest.mark.parametrize(
    ("optimizer", "precision", "named"), [("torch", "bf16", "--optimizer torch"), ("auto", "fp16", "fp16")]
)
def test_a_cuda_graph_needs_our_optimizer(optimizer, precision, named, tmp_path, monkeypatch):
    monkeypatch.setattr(choices.ops, "kernels", lambda device: None)
    config = tiny.config(tmp_path, cuda_graph=True, optimizer=optimizer)
    message = f"--cuda-graph needs Triton's AdamW, which does not work with {named}: leave one of them out"
    with pytest.raises(UserError, match=message):
        choices.check_optimizer(config, Place(torch.device("cuda"), precision, None))


def test_each_choice_is_recorded_and_compared_and_those_with_words_are_in_the_header(tmp_path):
    s = start_session(tiny.config(tmp_path))
    names = [f.name for f in fields(Choices)]
    assert list(s.choices_and_facts)[: len(names)] == names
    assert json.loads(json.dumps(s.choices_and_facts)) == s.choices_and_facts
    assert changed_choice(s.choices, s.choices_and_facts) is None
    ignored = {
        f.name for f in fields(Choices) if changed_choice(s.choices, s.choices_and_facts | {f.name: "another"}) is None
    }
    assert ignored == {"device", "deterministic", "recompute", "auto"}
    assert f"precision   {s.choices.words()}\n" in header(s, "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "fp32, not compiled"),
        ({"residual": "fp32", "tf32": True}, "fp32, TF32 on, not compiled"),
        (
            {"precision": "bf16", "residual": "bf16", "compile": True, "recompute": True, "deterministic": True},
            "bf16 autocast, residual stream bf16, compiled, deterministic, blocks recomputed in backward",
        ),
        (
            {"precision": "fp16", "cuda_graph": True, "optimizer": "triton"},
            "fp16 autocast, residual stream fp32, not compiled, CUDA graph, AdamW by triton",
        ),
    ],
)
def test_the_words_of_the_header(changes, words):
    assert tiny.choices(**changes).words() == words


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "device", "accumulation", "compiled", "optimizer", "ranks", "copies"),
    [
        ("fp32", CPU, 4, True, "torch", 1, "autocast"),
        ("bf16", CUDA, 4, True, "triton", 2, "autocast"),  # DDP must see the gradients
        ("bf16", CUDA, 1, True, "torch", 1, "autocast"),  # copies would cost memory and save nothing
        ("bf16", CUDA, 2, True, "torch", 1, "rounded"),
        ("fp16", CPU, 2, False, "another", 1, "rounded"),
        ("bf16", CUDA, 1, False, "triton", 1, "written"),
        ("bf16", CUDA, 2, True, "triton", 1, "written"),
        ("bf16", CPU, 1, True, "torch", 1, "written"),
        ("bf16", CPU, 1, False, "torch", 1, "autocast"),
        ("fp16", CPU, 1, True, "torch", 1, "autocast"),
        ("bf16", CPU, 1, True, "another", 1, "autocast"),
    ],
)
def test_who_rounds_the_weights(precision, device, accumulation, compiled, optimizer, ranks, copies):
    assert kind_of_copies(precision, device, accumulation, compiled, optimizer, ranks) == copies
