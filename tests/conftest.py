"""A device, a fixed number of threads, and programs run from elsewhere. Triton is interpreted where there is no GPU."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

# Before torch, whose OpenMP reads it once: two test processes of two threads each spin on two cores while they wait,
# and the suite takes half as long again.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

CHECKOUT = Path(__file__).resolve().parent.parent
CUDA = torch.cuda.is_available()
THREADS = 2  # fixed, since sums over 1 and over 2 threads differ in their last bits

torch.set_num_threads(THREADS)
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch has not done yet
    import interpreter

    interpreter.repair()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not CUDA:
        pytest.skip(f"needs a CUDA GPU, and torch {torch.__version__} sees none")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def run_python(tmp_path):
    """run_python(*args, cwd=, env=, check=, timeout=): `python *args` in an empty folder, the checkout importable.

    The program gets a user's environment: what the tests set for themselves is taken out of it.
    """

    def run(*args, cwd=tmp_path, env=None, check=False, timeout=300) -> subprocess.CompletedProcess:
        outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        defaults = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": str(THREADS)}
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(
            command, cwd=cwd, env=outside | defaults | (env or {}), capture_output=True, text=True, timeout=timeout
        )
        if check:
            assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def run_module(run_python):
    """run_module("gpt2fast.train", "--steps", "3"): `python -m ...`, with the options of run_python."""
    return lambda module, *args, **options: run_python("-m", module, *args, **options)


@pytest.fixture
def cache_home(tmp_path, monkeypatch) -> Path:
    """An empty folder in the place of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def planted(monkeypatch) -> dict[str, dict]:
    """For --backend auto: two candidates of each op on a CPU, and their times, which a test may change.

    torch.compile compiles nothing.
    """
    from gpt2fast import auto, ops

    times = {op: {"torch": 2.0, "compiled": 1.0} for op in ops.NAMES}
    times["measured"] = []

    def measure_op(op, names, work, device):
        times["measured"].append(op)
        return {name: times[op][name] for name in names}

    monkeypatch.setattr(auto, "candidates", lambda *_: {op: ["torch", "compiled"] for op in ops.NAMES})
    monkeypatch.setattr(auto, "measure_op", measure_op)
    monkeypatch.setattr(ops, "_compiled", partial)
    return times


@pytest.fixture
def kernels(monkeypatch) -> ModuleType:
    """A GPU, and modules in the places of gpt2fast.kernels and gpt2fast.kernels.epilogue."""
    from gpt2fast import ops

    module, epilogue = ModuleType("gpt2fast.kernels"), ModuleType("gpt2fast.kernels.epilogue")
    monkeypatch.setitem(sys.modules, "gpt2fast.kernels.epilogue", epilogue)
    epilogue.mlp = lambda *args: args
    for name in (*ops.NAMES, "cached_attention"):
        setattr(module, name, lambda *args: args)
    module.interpreter_fault = lambda: None
    monkeypatch.setitem(sys.modules, "gpt2fast.kernels", module)
    monkeypatch.setattr(ops, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return module
