"""--backend auto: the candidates, and the choice of the fastest. See also test_auto_cache.py, test_auto_runs.py."""

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt2fast import auto, measure, ops
from gpt2fast.auto import NOISE, choose
from gpt2fast.errors import UserError
from gpt2fast.measure import Workload
from gpt2fast.ops import NAMES, OpsConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORK = Workload(B=2, T=8, C=32, H=2, V=64, vocab_size=50, precision="fp32", tf32=False, compiled=False)
ALL, TWO, COMPILED = (
    {op: names.split() for op in NAMES} for names in ("torch compiled triton", "torch compiled", "torch triton")
)
for found in (ALL, COMPILED):
    found["mlp"].append("epilogue")
pytestmark = pytest.mark.usefixtures("cache_home")


# ---- the decision ----
milliseconds = st.floats(1e-3, 1e3)
outcomes = {"torch": milliseconds, "compiled": milliseconds | st.just("wrong")}
outcomes |= dict.fromkeys(("triton", "epilogue"), milliseconds | st.just("raised"))
all_results = st.fixed_dictionaries(
    {op: st.fixed_dictionaries({name: outcomes[name] for name in ALL[op]}) for op in NAMES}
)
configs = st.builds(OpsConfig, **dict.fromkeys(NAMES, st.sampled_from([None, None, "torch", "compiled", "triton"])))


@given(configs, all_results)
def test_no_working_candidate_is_faster_than_the_choice_by_more_than_noise(given_ops, times):
    choice = choose(given_ops, ALL, lambda op, names: {name: times[op][name] for name in names})
    for op, name in asdict(choice.ops).items():
        if getattr(given_ops, op) is None:
            working = {other: ms for other, ms in times[op].items() if not isinstance(ms, str)}
            assert name in working
            assert working[name] * (1 - NOISE) <= min(working.values())
            assert name == "torch" or working[name] == min(working.values()) < working["torch"] * (1 - NOISE)


@given(all_results)
def test_the_sum_is_never_slower_than_a_pure_backend(times):
    chosen = asdict(choose(OpsConfig(), ALL, lambda op, names: times[op]).ops)
    total = sum(times[op][name] for op, name in chosen.items())
    for pure in ("torch", "compiled", "triton"):
        if not any(isinstance(times[op][pure], str) for op in NAMES):
            assert total * (1 - NOISE) <= sum(times[op][pure] for op in NAMES)


@given(configs)
def test_an_op_that_the_user_chose_is_neither_measured_nor_changed(given_ops):
    measured = []
    choice = choose(given_ops, ALL, lambda op, _: measured.append(op) or {"torch": 3.0, "triton": 1.0})
    left_open = [op for op, name in asdict(given_ops).items() if name is None]
    assert measured == left_open == list(choice.results)
    assert asdict(choice.ops) == {op: name or "triton" for op, name in asdict(given_ops).items()}


@pytest.mark.parametrize(("ms", "name"), [(0.97, "triton"), (0.985, "torch"), (1.0, "torch"), (1.5, "torch")])
def test_torch_is_chosen_unless_another_is_faster_by_more_than_noise(ms, name):
    assert auto.fastest({"torch": 1.0, "triton": ms}) == name


def test_a_single_candidate_is_not_measured():
    choice = choose(OpsConfig(), {op: ["torch"] for op in NAMES}, pytest.fail)
    assert choice == auto.Choice(ops=OpsConfig().with_backend("torch"), results={})


# ---- the candidates ----
def test_candidates_on_cuda(kernels):
    assert auto.candidates(WORK, CUDA, pytest.fail) == ALL
    in_a_compiled_step = auto.candidates(replace(WORK, compiled=True), CUDA, pytest.fail)
    assert in_a_compiled_step == COMPILED


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_torch_is_the_only_candidate_without_cuda(kernels, device, cache_home):
    said = []
    cache_home.write_text("a file, not a folder: reading the cache would print a note")
    choice = auto.pick(OpsConfig(mlp="compiled"), WORK, torch.device(device), said.append)
    assert choice.ops == OpsConfig(mlp="compiled").with_backend("torch")
    assert (choice.results, said) == ({}, [])


def test_triton_is_not_a_candidate_where_it_is_interpreted(kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert auto.candidates(WORK, CUDA, print) == TWO


def test_triton_is_not_a_candidate_for_sizes_that_it_does_not_support(kernels):
    said = []
    found = auto.candidates(replace(WORK, H=4), CUDA, said.append)
    assert found == ALL | {"attention": ["torch", "compiled"]}
    assert len(said) == 1
    assert "heads have n_embd / n_head = 8 dimensions" in said[0]


def test_an_mlp_that_cannot_be_built_is_not_a_candidate(kernels, monkeypatch):
    real = ops.build

    def build(config, device):
        if config.mlp == "epilogue":
            raise UserError("there is none")
        return real(config, device)

    monkeypatch.setattr(ops, "build", build)
    said = []
    assert auto.candidates(WORK, CUDA, said.append) == ALL | {"mlp": ALL["mlp"][:-1]}
    assert said == ["note: triton is not measured: there is none"]


def test_triton_that_is_not_installed_is_mentioned_once(kernels, monkeypatch):
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    said = []
    assert auto.candidates(WORK, CUDA, said.append) == TWO
    assert len(said) == 1
    assert said[0].startswith("note: triton is not measured: the triton backend needs the package triton")


def test_a_candidate_that_raises_is_not_used_and_reported(monkeypatch, cache_home):
    def raising(*_):
        raise ValueError("no such\nlayout")

    real = measure.implementation
    monkeypatch.setattr(
        measure, "implementation", lambda op, name, *_: raising if name == "compiled" else real(op, name, *_)
    )
    monkeypatch.setattr(auto, "candidates", lambda *_: TWO)
    said = []
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    for _ in range(2):  # it is tried again the next time
        others = dict.fromkeys(set(NAMES) - {"layer_norm"}, "torch")
        choice = auto.pick(OpsConfig(**others), WORK, CPU, said.append)
        assert choice.ops == OpsConfig().with_backend("torch")
    assert said == 2 * [
        "measuring the ops' implementations, once for this device and these sizes ...",
        "note: layer_norm: compiled is not used: ValueError: no such layout",
    ]
    assert not cache_home.exists()
