"""--backend auto: the cache of times, by device, sizes, versions and sources."""

import json
from dataclasses import asdict, fields, replace

import pytest
import torch

from gpt2fast import auto
from gpt2fast.measure import Workload
from gpt2fast.ops import NAMES, OpsConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORK = Workload(B=2, T=8, C=32, H=2, V=64, vocab_size=50, precision="fp32", tf32=False, compiled=False)
ALL, TWO = ({op: names.split() for op in NAMES} for names in ("torch compiled triton", "torch compiled"))
ALL["mlp"].append("epilogue")
PLANTED = {"torch": 2.0, "compiled": 1.0}  # by the fixture of this name
pytestmark = pytest.mark.usefixtures("cache_home")


def pick(config=OpsConfig(), work=WORK):  # noqa: B008
    said = []
    return auto.pick(config, work, CPU, said.append), said


def test_cached_times_are_not_measured_again(planted):
    first, said = pick()
    assert planted["measured"] == list(NAMES)
    assert len(said) == 1
    planted["measured"].clear()
    planted |= {op: {"torch": 1.0, "compiled": 2.0} for op in NAMES}
    assert pick() == (first, [])
    assert planted["measured"] == []


def test_only_missing_ops_are_measured(planted):
    pick(OpsConfig(mlp="torch", linear="torch"))
    planted["measured"].clear()
    choice, _ = pick()
    assert planted["measured"] == ["mlp", "linear"]
    pick()
    assert planted["measured"] == ["mlp", "linear"]
    assert choice.results == dict.fromkeys(NAMES, PLANTED)


def test_a_candidate_that_is_not_in_the_cache_is_measured(planted, monkeypatch):
    pick()
    planted["measured"].clear()
    for op in NAMES:
        planted[op]["triton"] = 0.1
    planted["mlp"]["epilogue"] = 0.2
    monkeypatch.setattr(auto, "candidates", lambda *_: ALL)
    assert set(asdict(pick()[0].ops).values()) == {"triton"}
    assert planted["measured"] == list(NAMES)
    monkeypatch.setattr(auto, "candidates", lambda *_: TWO)
    choice, said = pick()  # triton is gone: the cache says that it is fastest, and it is not chosen
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
    monkeypatch.setattr(auto, "installed", lambda package: f"{package} 3.99")
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
    "not text": b"\xff\xfe\x00",
    "a list": "[1]",
    "no times": '{"key": {"mlp": 3}}',
    "text": '{"key": {"mlp": {"torch": "fast"}}}',
    "negative": '{"key": {"mlp": {"torch": -1.0}}}',
    "NaN": '{"key": {"mlp": {"torch": NaN}}}',
    "nothing": "",
}


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_replaced_and_reported_in_one_line(content, planted):
    file = auto.cache_file()
    file.parent.mkdir(parents=True)
    data = DAMAGED[content]
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    choice, said = pick()
    assert set(asdict(choice.ops).values()) == {"compiled"}
    assert planted["measured"] == list(NAMES)
    assert len(said) == 2
    assert said[0].startswith(f"note: {file} is damaged and will be replaced (")
    assert pick()[1] == []


def test_a_cache_that_cannot_be_written_is_reported_and_not_needed(planted, cache_home):
    cache_home.write_text("a file, not a folder")
    choice, said = pick()
    assert set(asdict(choice.ops).values()) == {"compiled"}
    assert len(said) == 3
    assert "cannot be read (NotADirectoryError" in said[0]
    assert "cannot be written (" in said[2]
    assert not any("\n" in line for line in said)


def test_a_missing_home_directory_is_not_an_error(planted, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(auto.Path, "home", no_home)
    choice, said = pick()
    assert set(asdict(choice.ops).values()) == {"compiled"}
    assert "cannot be written (RuntimeError" in said[-1]


@pytest.mark.parametrize("value", [None, "", "relative"])
def test_the_cache_is_in_the_home_directory_unless_xdg_cache_home_is_absolute(value, monkeypatch, tmp_path):
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
