"""The ladder's rungs differ in what they say, and each trains with that."""

import dataclasses
import itertools

import torch

from benchmarks import gpu_stages, rungs, step_parts

CPU = torch.device("cpu")


def changed(a, b):
    """What two rungs differ in, but for their names and for the op that our kernels would bring along."""
    return [
        name
        for name, value in dataclasses.asdict(a).items()
        if name != "name" and value != getattr(b, name) and (name, a.backend) != ("embedding", "torch")
    ]


def test_each_rung_adds_one_thing():
    for a, b in itertools.pairwise(rungs.CLIMB.values()):
        assert len(changed(a, b)) == 1
    for rung in rungs.ADDED.values():
        assert len(changed(rungs.TRITON, rung)) == 1
    for rung in (*rungs.MORE.values(), *rungs.WITHOUT.values()):
        assert len(changed(rungs.ALL, rung)) == 1
    assert len(changed(rungs.TRITON, rungs.ALL)) == len(rungs.OPTIONS) == 4
    assert {name for name, rung in rungs.RUNGS.items() if name != rung.name} == set()
    assert set(gpu_stages.RUNGS) <= set(rungs.RUNGS)


def test_a_rung_trains_with_what_it_names(monkeypatch):
    """The model, the optimizer and the step get the option; nothing needs a GPU."""
    monkeypatch.setattr(rungs, "GPT", lambda *args, **options: seen.append(options) or torch.nn.Linear(2, 2))
    monkeypatch.setattr(rungs.optim, "adamw", lambda *args, **options: seen.append(options))
    monkeypatch.setattr(rungs.ops, "build", lambda *args: None)
    monkeypatch.setattr(rungs.ops, "kernels", lambda device: "kernels")
    monkeypatch.setattr(rungs, "TrainingStep", lambda *args, **options: ("plain", options["compile"]))
    monkeypatch.setattr(rungs, "GraphedStep", lambda *args, **options: ("graph", options["compile"]))
    found = {}
    for name in ("triton", "all", *rungs.MORE):
        seen: list = []
        found[name] = rungs.training_step(rungs.RUNGS[name], "nano", 16, CPU), seen
    plain, low = {"residual": "fp32", "recompute": False}, {"residual": "low", "recompute": False}
    ours = {"fused": True, "kernels": "kernels"}
    assert found == {
        "triton": (("plain", True), [plain, ours | {"kernels": None}]),
        "all": (("plain", True), [low, ours]),
        "graph": (("graph", True), [low, ours]),
        "recompute": (("plain", True), [low | {"recompute": True}, ours]),
    }


def test_the_floor_is_told_what_a_rung_does():
    assert rungs.RUNGS["all_but_epilogue"].counted == dataclasses.replace(step_parts.ALL, epilogue=False)
    assert rungs.TRITON.counted == step_parts.Options()
    assert rungs.RUNGS["recompute"].counted.recompute
