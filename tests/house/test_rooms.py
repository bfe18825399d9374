"""The layout of the tests: a file for each module, helpers only in tests.tools, and no test imports another."""

import ast

import pytest

from tests.tools.checkout import CHECKOUT
from tests.tools.rooms import FILES, FOLDERS, tests_of

TESTS = CHECKOUT / "tests"


@pytest.mark.parametrize("module", FILES)
def test_each_module_has_a_file_of_tests(module):
    assert (TESTS / tests_of(module)).is_file()


def test_the_folders_of_gpt2fast_are_those_that_rooms_lists():
    found = {path.name for path in (CHECKOUT / "gpt2fast").iterdir() if (path / "__init__.py").exists()}
    assert found == set(FOLDERS)


LARGEST = 300  # lines


def test_no_file_is_longer_than_300_lines():
    tests = (path.relative_to(CHECKOUT).as_posix() for path in TESTS.rglob("*.py"))
    lines = {path: len((CHECKOUT / path).read_text().splitlines()) for path in (*FILES, *tests)}
    assert {path: n for path, n in lines.items() if n > LARGEST} == {}


def imported(path) -> set[str]:
    """Return what a file imports from tests/, as folder.module.name, also in functions."""
    nodes = ast.walk(ast.parse(path.read_text()))
    modules = {(node.module, a.name) for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names}
    # "from tests.tools import tiny" names a module, "from tests.tools.tiny import config" something in one
    names = {module if module.count(".") > 1 else f"{module}.{name}" for module, name in modules if module}
    return {name for name in names if name.startswith("tests.")}


def test_no_test_imports_a_test():
    found = {
        str(path.relative_to(TESTS)): wrong
        for path in TESTS.rglob("*.py")
        if (wrong := {name for name in imported(path) if any(part.startswith("test_") for part in name.split("."))})
    }
    assert found == {}


def test_tools_import_nothing_from_other_folders_of_tests():
    rooms = {path.name for path in TESTS.iterdir() if path.is_dir()} - {"tools", "__pycache__"}
    for path in (TESTS / "tools").glob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[1] in rooms], path.name
