"""--backend auto: the fastest of what is right, by planted times; and the cache. Runs are in test_auto_runs.py."""

import json
from dataclasses import asdict, fields, replace

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
PLANTED = {"torch": 2.0, "compiled": 1.0}  # by the fixture `planted`
pytestmark = pytest.mark.usefixtures("cache_home")


# The decision

milliseconds = st.floats(1e-3, 1e3)
outcomes = {"torch": milliseconds, "compiled": milliseconds | st.just("wrong")}
outcomes |= dict.fromkeys(("triton", "epilogue"), milliseconds | st.just("raised"))
all_results = st.fixed_dictionaries(
    {op: st.fixed_dictionaries({name: outcomes[name] for name in ALL[op]}) for op in NAMES}
)
configs = st.builds(OpsConfig, **dict.fromkeys(NAMES, st.sampled_from([None, None, "torch", "compiled", "triton"])))


@given(configs, all_results)
def test_nothing_that_works_is_faster_than_the_choice_by_more_than_noise(given_ops, times):
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
def test_what_the_user_chose_is_neither_measured_nor_changed(given_ops):
    asked = []
    choice = choose(given_ops, ALL, lambda op, _: asked.append(op) or {"torch": 3.0, "triton": 1.0})
    left_open = [op for op, name in asdict(given_ops).items() if name is None]
    assert asked == left_open == list(choice.results)
    assert asdict(choice.ops) == {op: name or "triton" for op, name in asdict(given_ops).items()}


@pytest.mark.parametrize(("ms", "name"), [(0.97, "triton"), (0.985, "torch"), (1.0, "torch"), (1.5, "torch")])
def test_torch_stays_unless_it_is_beaten_by_more_than_noise(ms, name):
    assert auto.fastest({"torch": 1.0, "triton": ms}) == name


def test_a_lone_candidate_is_not_measured():
    choice = choose(OpsConfig(), {op: ["torch"] for op in NAMES}, pytest.fail)
    assert choice == auto.Choice(ops=OpsConfig().with_backend("torch"), results={})


# The candidates


def test_candidates_on_cuda(kernels):
    assert auto.candidates(WORK, CUDA, pytest.fail) == ALL
    in_a_compiled_step = auto.candidates(replace(WORK, compiled=True), CUDA, pytest.fail)
    assert in_a_compiled_step == COMPILED


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_elsewhere_torch_is_the_only_candidate(kernels, device, cache_home):
    said = []
    cache_home.write_text("no folder: if it were read, it would be said")
    choice = auto.pick(OpsConfig(mlp="compiled"), WORK, torch.device(device), said.append)
    assert choice.ops == OpsConfig(mlp="compiled").with_backend("torch")
    assert (choice.results, said) == ({}, [])


def test_triton_is_no_candidate_where_it_is_interpreted(kernels, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert auto.candidates(WORK, CUDA, print) == TWO


def test_triton_is_no_candidate_for_sizes_that_it_cannot_take(kernels):
    said = []
    found = auto.candidates(replace(WORK, H=4), CUDA, said.append)
    assert found == ALL | {"attention": ["torch", "compiled"]}
    assert len(said) == 1
    assert "heads have n_embd / n_head = 8 dimensions" in said[0]


def test_an_mlp_that_cannot_be_built_is_no_candidate(kernels, monkeypatch):
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


def test_a_candidate_that_raises_is_skipped_and_reported(monkeypatch, cache_home):
    def raising(*_):
        raise ValueError("no such\nlayout")

    real = measure.implementation
    monkeypatch.setattr(
        measure, "implementation", lambda op, name, *_: raising if name == "compiled" else real(op, name, *_)
    )
    monkeypatch.setattr(auto, "candidates", lambda *_: TWO)
    said = []
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    for _ in range(2):  # and is tried again
        others = dict.fromkeys(set(NAMES) - {"layer_norm"}, "torch")
        choice = auto.pick(OpsConfig(**others), WORK, CPU, said.append)
        assert choice.ops == OpsConfig().with_backend("torch")
    assert said == 2 * [
        "measuring the ops' implementations, once for this device and these sizes ...",
        "note: layer_norm: compiled is not taken: ValueError: no such layout",
    ]
    assert not cache_home.exists()


# The cache


def pick(config=OpsConfig(), work=WORK):  # noqa: B008
    said = []
    return auto.pick(config, work, CPU, said.append), said


def test_what_was_measured_is_not_measured_again(planted):
    first, said = pick()
    assert planted["measured"] == list(NAMES)
    assert len(said) == 1
    planted["measured"].clear()
    planted |= {op: {"torch": 1.0, "compiled": 2.0} for op in NAMES}
    assert pick() == (first, [])
    assert planted["measured"] == []


def test_only_what_is_missing_is_measured(planted):
    pick(OpsConfig(mlp="torch", linear="torch"))
    planted["measured"].clear()
    choice, _ = pick()
    assert planted["measured"] == ["mlp", "linear"]
    pick()
    assert planted["measured"] == ["mlp", "linear"]
    assert choice.results == dict.fromkeys(NAMES, PLANTED)


def test_a_candidate_that_the_cache_does_not_know_is_measured(planted, monkeypatch):
    pick()
    planted["measured"].clear()
    for op in NAMES:
        planted[op]["triton"] = 0.1
    planted["mlp"]["epilogue"] = 0.2
    monkeypatch.setattr(auto, "candidates", lambda *_: ALL)
    assert set(asdict(pick()[0].ops).values()) == {"triton"}
    assert planted["measured"] == list(NAMES)
    monkeypatch.setattr(auto, "candidates", lambda *_: TWO)
    choice, said = pick()  # triton is gone: it is known to be fastest, and not taken
    assert set(asdict(choice.ops).values()) == {"compiled"}
    assert said == []


ENVIRONMENT = auto.environment(CPU)


@pytest.mark.parametrize("name", [field.name for field in fields(Workload)])
def test_another_workload_has_another_key(name, planted):
    value = getattr(WORK, name)
    other = replace(WORK, **{name: not value if isinstance(value, bool) else value * 2})
    assert auto.cache_key(WORK, ENVIRONMENT) != auto.cache_key(other, ENVIRONMENT)
    pick()
    planted["measured"].clear()
    pick(work=other)
    assert planted["measured"] == list(NAMES)


@pytest.mark.parametrize("name", ["device", "capability", "torch", "triton", "gpt2fast", "sources"])
def test_another_environment_has_another_key(name):
    assert set(ENVIRONMENT) == {"device", "capability", "torch", "triton", "gpt2fast", "sources"}
    assert auto.cache_key(WORK, ENVIRONMENT) != auto.cache_key(WORK, ENVIRONMENT | {name: "another"})


def test_the_environment_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(auto, "device_name", lambda device: f"NVIDIA Toy on {device.type}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch, "__version__", "2.99")
    monkeypatch.setattr(auto, "version", lambda package: f"{package} 3.99")
    monkeypatch.setattr(auto, "_sources", list)
    found = auto.environment(CUDA)
    assert (found["device"], found["capability"]) == ("NVIDIA Toy on cuda", "9.0")
    assert (found["torch"], found["triton"]) == ("2.99", "triton 3.99")
    assert found["sources"] != ENVIRONMENT["sources"]


def test_the_sources_are_hashed(tmp_path):
    assert {"loss.py", "registration.py", "reference.py", "measure.py"} <= {path.name for path in auto._sources()}
    file = tmp_path / "gelu.py"
    hashes = set()
    for text in ("a", "b"):
        file.write_text(text)
        hashes.add(auto._hash([file]))
    hashes.add(auto._hash([file.rename(tmp_path / "mlp.py")]))
    assert len(hashes) == 3


DAMAGED = {
    "cut off": '{"device',
    "no text": b"\xff\xfe\x00",
    "a list": "[1]",
    "no times": '{"key": {"mlp": 3}}',
    "text": '{"key": {"mlp": {"torch": "fast"}}}',
    "negative": '{"key": {"mlp": {"torch": -1.0}}}',
    "NaN": '{"key": {"mlp": {"torch": NaN}}}',
    "nothing": "",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_replaced_with_one_line(content, planted):
    file = auto.cache_file()
    file.parent.mkdir(parents=True)
    data = DAMAGED[content]
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    choice, said = pick()
    assert set(asdict(choice.ops).values()) == {"compiled"}
    assert planted["measured"] == list(NAMES)
    assert len(said) == 2
    assert said[0].startswith(f"note: {file} is damaged and is written anew (")
    assert pick()[1] == []


def test_a_cache_that_cannot_be_written_is_done_without(planted, cache_home):
    cache_home.write_text("a file, not a folder")
    choice, said = pick()
    assert set(asdict(choice.ops).values()) == {"compiled"}
    assert len(said) == 3
    assert "cannot be read (NotADirectoryError" in said[0]
    assert "cannot be written (" in said[2]
    assert not any("\n" in line for line in said)


def test_no_home_is_no_error(planted, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(auto.Path, "home", nobody)
    choice, said = pick()
    assert set(asdict(choice.ops).values()) == {"compiled"}
    assert "cannot be written (RuntimeError" in said[-1]


@pytest.mark.parametrize("value", [None, "", "relative"])
def test_the_cache_lies_at_home_unless_told_otherwise(value, monkeypatch, tmp_path):
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setattr(auto.Path, "home", lambda: tmp_path)
    assert auto.cache_file() == tmp_path / ".cache" / "gpt2fast" / "auto.json"


def test_the_cache_keeps_the_newest_entries(planted, monkeypatch):
    monkeypatch.setattr(auto, "KEPT", 2)
    for B, given_ops in ((1, OpsConfig(mlp="torch")), (2, OpsConfig()), (1, OpsConfig()), (4, OpsConfig())):
        pick(given_ops, replace(WORK, B=B))
    kept = json.loads(auto.cache_file().read_text())
    assert list(kept) == [auto.cache_key(replace(WORK, B=B), auto.environment(CPU)) for B in (1, 4)]
    assert [path.name for path in auto.cache_file().parent.iterdir()] == ["auto.json"]
