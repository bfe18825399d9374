"""Every mutant is caught by the test that it names. For one module: `-m long -k gelu`."""

import pytest

from tests.tools import mutation
from tests.tools.affected import name_of
from tests.tools.mutation import Mutant

pytestmark = pytest.mark.long

ALL = [
    pytest.param(module, mutant, id=name_of(module, mutant))
    for module, mutants in mutation.planted().items()
    for mutant in mutants
]


@pytest.mark.parametrize(("module", "mutant"), ALL)
def test_it_is_caught(module, mutant):
    assert mutation.survives(module, mutant) == ""


def test_a_harmless_change_survives_and_a_missing_line_is_reported():
    harmless = Mutant("F.linear(x, fc_w)", "F.linear(x, fc_w, None)", "nothing", "test_as_accurate_as_torch")
    path = "kernels/projections.py"
    assert "survived tests/kernels/test_projections.py::test_as" in mutation.survives(path, harmless)
    assert "has no 'not there'" in mutation.survives(path, harmless._replace(old="not there"))
