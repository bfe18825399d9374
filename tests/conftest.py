"""Fixtures and settings for all tests. Without a GPU, Triton's kernels run in its interpreter."""

import contextlib
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

# Set before NumPy and torch read them: threads of two test processes would wait for each other on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Inductor's cache ignores which instructions ATen is limited to, and its code for others computes wrong numbers.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    f"{tempfile.gettempdir()}/gpt2fast-tests-inductor-{getattr(os, 'getuid', int)()}-"
    f"{os.environ.get('ATEN_CPU_CAPABILITY', 'all')}",
)

from tests.tools import accounts, programs
from tests.tools.accounts import (  # noqa: F401  # pytest finds its hooks here
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from tests.tools.checkout import THREADS


def pytest_configure(config: pytest.Config) -> None:
    accounts.pytest_configure(config)
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        prepare()  # not xdist's controller, which runs no test and would take 0.4 GB for torch


def prepare() -> None:
    """Set up torch, and Triton's interpreter, before test files are imported."""
    import torch

    from gpt2fast.machine import device
    from tests.tools.gpu import CUDA

    torch.set_num_threads(THREADS)
    device.keep_freed_memory = lambda: False  # this process would keep the memory of all its tests
    if not CUDA:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which torch has not done yet
        from tests.tools import interpreter

        interpreter.repair()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip(f"needs a CUDA GPU, and torch {torch.__version__} sees none")


@pytest.fixture(scope="module", autouse=True)
def freed_memory_goes_back():
    """Return freed memory to the system after each file, where glibc's heap has it in one piece."""
    yield
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@pytest.fixture(scope="session")
def device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def run_python(tmp_path):
    """run_python(*args, cwd=, env=, check=) runs `python *args` in an empty folder, with the checkout importable.

    The program gets a user's environment, without the variables that the tests set for themselves.
    """
    return partial(programs.run, cwd=tmp_path)


@pytest.fixture
def run_module(run_python):
    """run_module("gpt2fast.train", "--steps", "3") runs `python -m ...`, with the options of run_python."""
    return partial(run_python, "-m")


@pytest.fixture
def fresh_python(tmp_path):
    """run_python in a new interpreter, for tests of imports, or of variables that are read at start-up."""

    def run(*args, cwd=tmp_path, env=None, check=False) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, args)]
        done = subprocess.run(command, cwd=cwd, env=programs.environment(env), capture_output=True, text=True)
        assert not check or done.returncode == 0, (
            f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with nothing but data in it."""
    from tests.tools import tiny

    monkeypatch.chdir(tmp_path)
    tiny.write_data(tmp_path / "data")
    return tmp_path


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch) -> None:
    """Turn loss.png off for training in this process, unless `picture` is used: it takes longer than the steps."""
    train = sys.modules.get("gpt2fast.train")
    if train and "picture" not in request.fixturenames:
        monkeypatch.setattr(train, "draw_loss_curve", lambda s: None)


@pytest.fixture(scope="session")
def picture() -> None:
    """Requested by tests that need loss.png."""


@pytest.fixture
def cache_home(tmp_path, monkeypatch) -> Path:
    """The folder that replaces the user's cache; it does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def planted(monkeypatch) -> dict[str, dict]:
    """For --backend auto: two candidates for each op on a CPU, and their times, which a test may change.

    Compiled ops are replaced by functools.partial.
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
    """Stand-ins for gpt2fast.kernels and gpt2fast.kernels.epilogue, which can be built for CUDA without a GPU."""
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
