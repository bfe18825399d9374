"""Which long tests a change can have broken: `python -m tests.tools.affected [BASE]` prints them, for pytest's @FILE.

The rule. A module's change concerns the long tests of its own file, its mutants, and what LEANS on it; a test file's,
its own long tests and the mutants that it must catch; that of a helper, of the settings or of this rule, everything; a
document's or a result's, nothing. BASE: where the change began; else the last commit that origin/main has too, and
where that is all of them, the last one of the day before.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.tools.checkout import CHECKOUT
from tests.tools.mutation import Mutant, planted, test_of
from tests.tools.rooms import FILES, ROOMS, tests_of

EVERYTHING = "tests"
MUTANTS = "tests/long/test_mutants.py"
LEAN = {  # files of tests/long: modules of gpt2fast, or all of a room
    "kills": "checkpoint files run session train",
    "soak": "train session run checkpoint step data screen plot",
    "hosts": "distributed",
    "ranks": "distributed step optim graph rounded",
    "fuzz": "data weights files config hellaswag pretrained flags",
    "options": "step optim rounded model cpu session",
}
CONCERNS_ALL = ("tests/tools/", "tests/conftest.py", "pyproject.toml", ".ci/")


def changed(base: str) -> list[str]:
    """Paths from the checkout's root, those of files that are gone too."""
    return git("diff", "--name-only", base).splitlines()


def base_of() -> str:
    """Where the change began."""
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
    """What `pytest -m long` is to be given; nothing: no long test is concerned."""
    paths = list(paths)
    if any(path.startswith(CONCERNS_ALL) for path in paths):
        return [EVERYTHING]
    found = {test for path in paths for test in of_one(path)}
    return sorted(test for test in found if (CHECKOUT / test.partition("::")[0]).exists())


def of_one(path: str) -> Iterator[str]:
    if path in FILES:
        yield f"tests/{tests_of(path)}"
        yield from (f"tests/long/test_{name}.py" for name, modules in LEAN.items() if leans(modules, path))
        yield from mutants(lambda module, mutant: module == path)
    elif path.startswith("tests/long/"):
        yield f"tests/long/test_{Path(path).stem.removeprefix('test_')}.py"
    elif path.startswith("tests/") and Path(path).name.startswith("mutants_"):
        yield from mutants(lambda module, mutant: path == beside(module))
    elif path.startswith("tests/") and path.endswith(".py"):
        yield path
        yield from mutants(lambda module, mutant: test_of(module, mutant).startswith(f"{path}::"))


def leans(modules: str, path: str) -> bool:
    whole = [module for name in modules.split() for module in ROOMS.get(name, name).split()]
    return path.startswith("gpt2fast/") and Path(path).stem in whole


def beside(module: str) -> str:
    """The file of a module's mutants."""
    return f"tests/{tests_of(module)}".replace("/test_", "/mutants_")


def mutants(wanted) -> Iterator[str]:
    """Those of which wanted(module, mutant) is true, as pytest names them."""
    for module, all_of_it in planted().items():
        for mutant in all_of_it:
            if wanted(module, mutant):
                yield f"{MUTANTS}::test_it_is_caught[{name_of(module, mutant)}]"


def name_of(module: str, mutant: Mutant) -> str:
    return f"{module}: {mutant.why}"


if __name__ == "__main__":
    print("\n".join(affected(changed(sys.argv[1] if sys.argv[1:] else base_of()))))
