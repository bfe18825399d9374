"""Mutants: planted faults, changes to the code that tests must detect. A mutant that survives is a gap in the tests.

Mutants are listed in `tests/<folder>/mutants_<module>.py`, beside the tests that must catch them.
tests/long/test_mutants.py plants them one by one, each in a copy of the tree.
"""

import importlib
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.tools import programs
from tests.tools.checkout import CHECKOUT
from tests.tools.rooms import FILES, tests_of


class Mutant(NamedTuple):
    """A replacement of `old`, its occurrence number `nth`, by `new`, after which `test` must fail.

    `test` is a name in the module's own test file, or FILE::NAME below tests/.
    """

    old: str
    new: str
    why: str
    test: str
    nth: int = 0


def planted() -> dict[str, list[Mutant]]:
    """Return {path of the module, from the checkout's root: its mutants}."""
    found = {}
    for file in sorted((CHECKOUT / "tests").glob("*/mutants_*.py")):
        (module,) = (path for path in FILES if tests_of(path) == f"{file.parent.name}/test_{file.stem[8:]}.py")
        found[module] = importlib.import_module(f"tests.{file.parent.name}.{file.stem}").MUTANTS
    return found


def test_of(module: str, mutant: Mutant) -> str:
    """Return the test that must fail, as pytest names it."""
    return f"tests/{mutant.test if '::' in mutant.test else f'{tests_of(module)}::{mutant.test}'}"


def survives(module: str, mutant: Mutant) -> str:
    """Return "" if the mutant's test catches it, else what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("gpt2fast", "kernels", "benchmarks", "tests"):
            shutil.copytree(CHECKOUT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(CHECKOUT / "pyproject.toml", tree)
        path = tree / module
        parts = path.read_text().split(mutant.old)
        if len(parts) < mutant.nth + 2:
            return f"{module} has no {mutant.old!r}"
        path.write_text(
            mutant.old.join(parts[: mutant.nth + 1]) + mutant.new + mutant.old.join(parts[mutant.nth + 1 :])
        )
        test = test_of(module, mutant)
        options = ["-x", "-q", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", folder]
        environment = {"PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
        done = programs.run("-m", "pytest", *options, test, cwd=tree, env=environment)
    if (done.returncode == 1 and " failed" in done.stdout) or done.returncode < 0:  # or the fault crashed the process
        return ""
    end = done.stdout[-2000:] + done.stderr[-2000:] if done.returncode else ""
    return f"survived {test} (pytest ended with {done.returncode})\n{end}"
