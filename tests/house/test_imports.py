"""The law: which folder may import which."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.tools.checkout import CHECKOUT
from tests.tools.rooms import FILES, FOLDERS, PROGRAMS

LAW = """
files      -> errors
machine    -> files errors
model      -> machine files errors
data       -> model files errors
inference  -> model data machine files errors
weights    -> model machine files errors
training   -> files machine model data inference weights errors
programs   -> files machine model data inference weights training errors command
"""
MAY = {
    "errors": set(), "command": {"errors"}, "kernels": set(),
    **{line.split(" -> ")[0].strip(): set(line.split(" -> ")[1].split()) for line in LAW.strip().splitlines()},
}  # fmt: skip

KERNELS = {
    # file of kernels/: the files of kernels/ that it imports
    "adamw": "launch registration",
    "attention_backward": "attention_tiles",
    "attention_decode": "attention_forward launch registration",
    "attention_forward": "attention_backward attention_tiles launch registration",
    "attention_tiles": "",
    "embeddings": "launch registration",
    "epilogue": "launch matmul registration tanh_gelu",
    "launch": "",
    "layernorm": "launch registration",
    "loss": "launch registration",
    "matmul": "",
    "projections": "tanh_gelu",
    "registration": "launch",
    "tanh_gelu": "launch registration",
}

EXTERNAL = {"reference": {"torch"}, "ops": {"torch"}, "model": {"torch"}, "errors": set()}  # third-party packages
HEAVY = {  # imported only when needed
    "tyro", "triton", "transformers", "matplotlib", "tensorboard", "pyarrow", "datasets", "huggingface_hub",
}  # fmt: skip
OURS = [path for path in FILES if path.startswith("gpt2fast/")]


def folder_of(name: str) -> str:
    """Return the folder of a module's name or path; at the top of gpt2fast/: model, programs, or the file's name."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    if parts[1] in (*FOLDERS, "errors", "command", "kernels"):
        return parts[1]
    return "programs" if parts[1] in PROGRAMS else "model"


def parse(path: str) -> ast.Module:
    return ast.parse((CHECKOUT / path).read_text())


def imports(tree: ast.AST, package: str) -> set[str]:
    """Return the full names of all that a module of `package` imports, also in functions and by import_module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = [package.rsplit(".", node.level - 1)[0]] if node.level else []
            base = ".".join(parent + ([node.module] if node.module else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            assert isinstance(node.args[0], ast.Constant), f"{ast.unparse(node)}: the name must be a constant"
            names.add(node.args[0].value)
    return names


def ours(path: str) -> set[str]:
    """Return the modules of gpt2fast that a file of gpt2fast imports, as paths."""
    found = set()
    for name in imports(parse(path), ".".join(Path(path).parent.parts)):
        parts = name.split(".")
        if parts[0] != "gpt2fast" or name == "gpt2fast.__version__":
            continue
        if parts[1] == "kernels":
            found.add("gpt2fast/kernels.py")
            continue
        candidates = ("/".join(parts[:end]) + ".py" for end in (3, 2))
        found.add(next((path for path in candidates if path in OURS), f"no such module: {name}"))
    return found


def stems(folder: str) -> set[str]:
    return {path.stem for path in (CHECKOUT / folder).glob("*.py")} - {"__init__"}


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"gpt2fast"}


@pytest.mark.parametrize("path", OURS)
def test_each_module_imports_what_the_law_allows(path):
    arrows = {folder_of(other) for other in ours(path)} - {"kernels"}
    folder = folder_of(path)
    assert arrows <= MAY[folder] | ({folder} if folder not in ("programs", "errors", "command") else set())
    if "/" not in path.removeprefix("gpt2fast/") and Path(path).stem in EXTERNAL:
        assert third_party(imports(parse(path), "gpt2fast")) == EXTERNAL[Path(path).stem]


def test_imports_have_no_cycle():
    TopologicalSorter({path: ours(path) - {path} for path in OURS}).prepare()
    TopologicalSorter({module: arrows.split() for module, arrows in KERNELS.items()}).prepare()


def test_every_kernel_file_declares_its_imports():
    assert set(KERNELS) == stems("kernels")


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_import_torch_triton_and_each_other(module):
    names = imports(parse(f"kernels/{module}.py"), "gpt2fast.kernels")
    package = "gpt2fast.kernels."
    assert {name.removeprefix(package).split(".")[0] for name in names if name.startswith(package)} == set(
        KERNELS[module].split()
    )
    assert {name for name in names if f"{name}.".startswith("gpt2fast.") and package not in name} == set()
    assert third_party(names) <= {"torch", "triton"}


@pytest.mark.parametrize("folder", ["gpt2fast", "kernels", "benchmarks"])
def test_no_module_imports_tests_and_only_benchmarks_import_benchmarks(folder):
    forbidden = {"tests"} | ({"benchmarks"} if folder != "benchmarks" else set())
    for path in FILES:
        if path.startswith(f"{folder}/"):
            assert not {name.split(".")[0] for name in imports(parse(path), folder)} & forbidden, path


def test_only_ops_imports_kernels_and_in_one_function():
    users = [path for path in OURS if "gpt2fast/kernels.py" in ours(path)]
    assert users == ["gpt2fast/kernels.py", "gpt2fast/ops.py"]
    places = [
        getattr(statement, "name", "at the top")
        for statement in parse("gpt2fast/ops.py").body
        if any(name.startswith("gpt2fast.kernels") for name in imports(statement, "gpt2fast"))
    ]
    assert places == ["_implementation"]


def test_importing_a_program_imports_nothing_heavy(fresh_python):
    """Each program in a fork of one new interpreter, which has imported torch."""
    code = f"""
import os, sys, torch
for program in {sorted(PROGRAMS)!r}:
    if os.fork() == 0:
        __import__("gpt2fast." + program)
        print(program, *sorted({HEAVY!r} & set(sys.modules)), flush=True)
        os._exit(0)
    os.wait()
"""
    assert fresh_python("-c", code, check=True).stdout.splitlines() == sorted(PROGRAMS)


def test_the_torch_path_works_where_triton_is_not_installed(fresh_python):
    code = """
import sys
sys.modules["triton"] = sys.modules["gpt2fast.kernels"] = None  # importing either is now an ImportError
import torch
from gpt2fast import model, ops
from gpt2fast.training import optim
gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=64), ops.build(ops.OpsConfig()))
idx = torch.arange(8)[None]
gpt(idx, idx).backward()
optim.adamw(gpt, 0.1).step()
print("trained")
"""
    assert fresh_python("-c", code, check=True).stdout == "trained\n"


def test_transformers_imports_with_the_checkout_as_current_folder(run_python):
    pytest.importorskip("transformers", reason="transformers looks for a package named kernels")
    done = run_python("-c", "from transformers import GPT2LMHeadModel as m; print(m)", cwd=CHECKOUT, check=True)
    assert "GPT2LMHeadModel" in done.stdout
