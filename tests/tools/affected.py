"""The long tests that a change may break: `python -m tests.tools.affected [BASE]` prints them, for pytest's @FILE.

A change to a module affects the long tests in its own test file, its mutants, and the test files that LEANS lists for
it; a change to a test file, its own long tests and the mutants that it must catch; a change to tests/tools or to
settings, everything; a change to a document or a result, nothing. BASE is the commit before the change; by default the
last commit that origin/main has too, and if it has all of them, the last one of the day before.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from tests.tools.checkout import CHECKOUT
from tests.tools.mutation import Mutant, planted, test_of
from tests.tools.rooms import FILES, tests_of

EVERYTHING = "tests"
CONCERNS_ALL = ("tests/tools/", "tests/conftest.py", "pyproject.toml", ".ci/")
MUTANTS = "tests/long/test_mutants.py"
LEANS = {  # file of tests: what it depends on, beside the module that it is named after
    "tests/kernels/test_every_kernel.py": "kernels/*.py",
    "tests/model/test_model_options.py": "gpt2fast/model.py gpt2fast/training/step.py",
    "tests/model/test_backends.py": "kernels/*.py gpt2fast/ops.py gpt2fast/kernels.py",
    "tests/benchmarks/test_aot.py": "kernels/*.py",
    "tests/training/test_exact.py": "gpt2fast/train.py gpt2fast/training/session.py gpt2fast/training/step.py "
    "gpt2fast/weights/checkpoint.py",
    "tests/house/test_readme.py": "README.md docs/*.md benchmarks/README.md",
    "tests/house/test_packaging.py": "gpt2fast/kernels.py",
    "tests/long/test_kills.py": "gpt2fast/weights/checkpoint.py gpt2fast/files/*.py gpt2fast/training/run.py "
    "gpt2fast/train.py tests/long/process.py",
    "tests/long/test_soak.py": "gpt2fast/train.py gpt2fast/training/*.py tests/long/process.py",
    "tests/long/test_hosts.py": "gpt2fast/machine/*.py",
    "tests/machine/test_world.py": "gpt2fast/machine/*.py gpt2fast/training/step.py gpt2fast/training/optim.py "
    "gpt2fast/training/graph.py gpt2fast/rounded.py",
    "tests/long/test_fuzz.py": "gpt2fast/training/config.py gpt2fast/inference/hellaswag.py gpt2fast/data/*.py "
    "gpt2fast/weights/*.py gpt2fast/files/*.py",
    "tests/long/test_options.py": "gpt2fast/training/step.py gpt2fast/training/optim.py gpt2fast/model.py "
    "gpt2fast/training/session.py",
}


def changed(base: str) -> list[str]:
    """Return the changed paths, from the checkout's root, including those of deleted files."""
    return git("diff", "--name-only", "--no-renames", base).splitlines()


def base_of() -> str:
    """Return the commit before the change, by the rule above."""
    head = git("rev-parse", "HEAD")
    common = git("merge-base", "HEAD", "origin/main", check=False)
    if common not in ("", head):
        return common
    day = git("show", "-s", "--format=%cs", "HEAD")
    before = git("rev-list", "-1", "--first-parent", f"--before={day}T00:00:00", "HEAD")
    return before or git("rev-list", "--max-parents=0", "HEAD").splitlines()[0]


def git(*words: str, check: bool = True) -> str:
    done = subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True, check=check)
    return done.stdout.strip()


def affected(paths: Iterable[str]) -> list[str]:
    """Return the arguments for `pytest -m long`; none if no long test is affected."""
    paths = list(paths)
    if any(path.startswith(CONCERNS_ALL) for path in paths):
        return [EVERYTHING]
    found = {test for path in paths for test in of_one(path)}
    return sorted(test for test in found if (CHECKOUT / test.partition("::")[0]).exists())


def of_one(path: str) -> Iterator[str]:
    yield from (test for test, patterns in LEANS.items() if any(fnmatch(path, each) for each in patterns.split()))
    if path in FILES:
        yield f"tests/{tests_of(path)}"
        yield from mutants(lambda module, mutant: module == path)
    elif path.startswith("tests/long/") and path != MUTANTS:
        yield f"tests/long/test_{Path(path).stem.removeprefix('test_')}.py"
    elif path.startswith("tests/") and Path(path).name.startswith("mutants_"):
        yield from mutants(lambda module, mutant: path == beside(module))
    elif path.startswith("tests/") and path.endswith("/conftest.py"):
        yield path.removesuffix("/conftest.py")
    elif path.startswith("tests/") and path.endswith(".py"):
        yield path
        yield from mutants(lambda module, mutant: test_of(module, mutant).startswith(f"{path}::"))


def beside(module: str) -> str:
    """Return the file of a module's mutants."""
    return f"tests/{tests_of(module)}".replace("/test_", "/mutants_")


def mutants(wanted) -> Iterator[str]:
    """Yield the mutants for which wanted(module, mutant) is true, as pytest names them."""
    for module, of_module in planted().items():
        for mutant in of_module:
            if wanted(module, mutant):
                yield f"{MUTANTS}::test_it_is_caught[{name_of(module, mutant)}]"


def name_of(module: str, mutant: Mutant) -> str:
    return f"{module}: {mutant.why}"


if __name__ == "__main__":
    print("\n".join(affected(changed(sys.argv[1] if sys.argv[1:] else base_of()))))
