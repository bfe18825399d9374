"""The mutants can be planted: each changes a line that exists, has a unique name and a test that exists."""

import ast

import pytest

from tests.tools import mutation
from tests.tools.affected import name_of
from tests.tools.checkout import CHECKOUT

PLANTED = mutation.planted()


@pytest.mark.parametrize("module", PLANTED)
def test_each_changes_a_line_that_exists(module):
    text = (CHECKOUT / module).read_text()
    for mutant in PLANTED[module]:
        assert text.count(mutant.old) > mutant.nth, mutant
        assert mutant.old != mutant.new


@pytest.mark.parametrize("module", PLANTED)
def test_each_has_a_test_that_exists(module):
    for mutant in PLANTED[module]:
        file, _, name = mutation.test_of(module, mutant).partition("::")
        assert name in {getattr(node, "name", "") for node in ast.parse((CHECKOUT / file).read_text()).body}, mutant


def test_each_has_a_unique_name():
    names = [name_of(module, mutant) for module, mutants in PLANTED.items() for mutant in mutants]
    assert len(names) == len(set(names))
    assert not [name for name in names if set(name) & set("[]\n")]  # pytest takes them as names of tests


def test_every_kernel_has_some():
    helpers = {"kernels/projections.py", "kernels/registration.py"}  # with one mutant each
    few = {module for module, mutants in PLANTED.items() if module.startswith("kernels/") and len(mutants) < 2}
    assert few <= helpers | {"kernels/attention_forward.py", "kernels/launch.py"}
    assert {f"kernels/{path.name}" for path in (CHECKOUT / "kernels").glob("*.py")} == {
        module for module in PLANTED if module.startswith("kernels/")
    }
