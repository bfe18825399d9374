"""Who may import whom. The table is exact: a new file, and a new arrow, must be written down here."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest

from tests.tools.checkout import CHECKOUT

ARROWS = {
    # module of gpt2fast: modules of gpt2fast that it imports
    "allocator": "",
    "auto": "device errors files measure ops",
    "cache": "model",
    "checkpoint": "containers distributed errors files model records",
    "config": "corpus errors model ops records",
    "containers": "errors records",
    "corpora": "download errors sources",
    "corpus": "errors tokenizer",
    "cpu": "reference",
    "data": "containers errors records",
    "decode": "cache device graph model reference rounded",
    "device": "distributed errors",
    "encoding": "sources tokenizer",
    "distributed": "errors",
    "errors": "",
    "download": "errors",
    "evaluate": "allocator config data device distributed errors files flags hellaswag machine model ops pretrained "
    "reference session",
    "export": "errors files huggingface layout llmc model pretrained run tokenizer weights",
    "files": "",
    "flags": "",
    "flops": "model",
    "graph": "model optim step",
    "hellaswag": "data device distributed download errors model records reference tokenizer",
    "huggingface": "containers errors model records",
    "inspect": "checkpoint config errors evaluate pictures plot pretrained session weights",
    "kernels": "kernels",  # its own files
    "layout": "model",
    "llmc": "errors layout model",
    "machine": "device",
    "measure": "device errors model ops step",
    "model": "errors ops reference",
    "nanogpt": "containers errors layout model records",
    "openai": "containers errors model records",
    "ops": "cpu errors kernels reference",
    "optim": "distributed",
    "pictures": "model",
    "plot": "files",
    "prepare": "corpora encoding errors files flags model shards tokenizer",
    "pretrained": "auto checkpoint config containers errors model ops records weights",
    "records": "",
    "reference": "",
    "rounded": "model",
    "run": "errors files",
    "sample": "allocator decode device distributed errors model ops pretrained tokenizer",
    "screen": "device model session",
    "session": "auto checkpoint config corpus data device distributed errors flops graph hellaswag measure model ops "
    "optim pretrained run step tokenizer weights",
    "shards": "containers data errors files model records sources",
    "sources": "errors",
    "spikes": "",
    "step": "device distributed model optim rounded",
    "tokenizer": "errors",
    "train": "allocator checkpoint config device distributed errors evaluate files hellaswag machine optim plot run "
    "sample screen session spikes",
    "weights": "containers errors huggingface layout llmc model nanogpt openai records",
}

KERNELS = {
    # file of kernels/: files of kernels/ that it imports
    "adamw": "launch registration",
    "attention": "attention_backward attention_tiles launch registration",
    "attention_backward": "attention_tiles",
    "attention_decode": "attention launch registration",
    "attention_tiles": "",
    "cross_entropy": "launch registration",
    "embedding": "launch registration",
    "epilogue": "gelu launch matmul registration",
    "gelu": "launch registration",
    "launch": "",
    "layer_norm": "launch registration",
    "matmul": "",
    "mlp": "gelu",
    "registration": "launch",
}

# nothing but a program imports one of these
PROGRAMS = {"evaluate", "export", "inspect", "prepare", "sample", "screen", "session", "train"}
EXTERNAL = {"reference": {"torch"}, "ops": {"torch"}, "model": {"torch"}, "errors": set()}  # where that matters
HEAVY = {  # imported when needed, if ever
    "tyro", "triton", "transformers", "matplotlib", "tensorboard", "pyarrow", "datasets", "huggingface_hub",
}  # fmt: skip


def parse(folder: str, module: str) -> ast.Module:
    return ast.parse((CHECKOUT / folder / f"{module}.py").read_text())


def imports(tree: ast.AST, package: str) -> set[str]:
    """Full names of all that a member of `package` imports, also inside functions, also through import_module."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = [package.rsplit(".", node.level - 1)[0]] if node.level else []
            base = ".".join(parent + ([node.module] if node.module else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            assert isinstance(node.args[0], ast.Constant), f"{ast.unparse(node)} imports what cannot be told"
            names.add(node.args[0].value)
    return names


def ours(names: set[str], package: str, modules: set[str]) -> set[str]:
    """The members of `package` among full names: of gpt2fast, "model" for "gpt2fast.model.GPT"."""
    rests = {name.removeprefix(f"{package}.").split(".")[0] for name in names if name.startswith(f"{package}.")}
    return rests & modules


def stems(folder: str) -> set[str]:
    return {path.stem for path in (CHECKOUT / folder).glob("*.py")} - {"__init__"}


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"gpt2fast"}


def test_every_module_declares_its_arrows():
    assert set(ARROWS) == stems("gpt2fast")
    assert set(KERNELS) == stems("kernels")


@pytest.mark.parametrize("module", ARROWS)
def test_gpt2fast_imports_what_the_table_says(module):
    names = imports(parse("gpt2fast", module), "gpt2fast")
    assert ours(names, "gpt2fast", set(ARROWS)) == set(ARROWS[module].split())
    if module in EXTERNAL:
        assert third_party(names) == EXTERNAL[module]


@pytest.mark.parametrize("module", KERNELS)
def test_kernels_import_torch_triton_and_each_other(module):
    names = imports(parse("kernels", module), "gpt2fast.kernels")
    assert ours(names, "gpt2fast.kernels", set(KERNELS)) == set(KERNELS[module].split())
    assert {name for name in names if f"{name}.".startswith("gpt2fast.") and "gpt2fast.kernels." not in name} == set()
    assert third_party(names) <= {"torch", "triton"}


def test_no_arrow_leads_back():
    TopologicalSorter({module: set(arrows.split()) - {module} for module, arrows in ARROWS.items()}).prepare()
    TopologicalSorter({module: arrows.split() for module, arrows in KERNELS.items()}).prepare()


def test_only_programs_import_programs():
    assert {module for module, arrows in ARROWS.items() if PROGRAMS & set(arrows.split())} <= PROGRAMS


@pytest.mark.parametrize("folder", ["gpt2fast", "kernels", "benchmarks"])
def test_nothing_imports_tests_and_only_benchmarks_import_benchmarks(folder):
    forbidden = {"tests", *stems("tests")} | ({"benchmarks"} if folder != "benchmarks" else set())
    for module in stems(folder):
        assert not {name.split(".")[0] for name in imports(parse(folder, module), folder)} & forbidden, module


def test_ops_alone_chooses_kernels_and_inside_a_function():
    assert [module for module, arrows in ARROWS.items() if "kernels" in arrows.split()] == ["kernels", "ops"]
    places = [
        getattr(statement, "name", "at the top")
        for statement in parse("gpt2fast", "ops").body
        if ours(imports(statement, "gpt2fast"), "gpt2fast", {"kernels"})
    ]
    assert places == ["_implementation"]


def test_importing_a_program_imports_nothing_heavy(fresh_python):
    """Each in a fork of one new interpreter, which has imported what all of them need."""
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
from gpt2fast import model, ops, optim
gpt = model.GPT(model.GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=64), ops.build(ops.OpsConfig()))
idx = torch.arange(8)[None]
gpt(idx, idx).backward()
optim.adamw(gpt, 0.1).step()
print("trained")
"""
    assert fresh_python("-c", code, check=True).stdout == "trained\n"


def test_transformers_imports_with_the_checkout_as_current_folder(run_python):
    pytest.importorskip("transformers", reason="it is transformers that looks for a package named kernels")
    done = run_python("-c", "from transformers import GPT2LMHeadModel as m; print(m)", cwd=CHECKOUT, check=True)
    assert "GPT2LMHeadModel" in done.stdout
