"""The mutants can be planted; one is, end to end. All of them: `python tests/mutants.py`, about twenty minutes."""

import mutants
import pytest
from conftest import CHECKOUT


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: f"{m.file}: {m.why}")
def test_each_changes_something_that_is_there(mutant):
    text = (CHECKOUT / mutants.source(mutant)).read_text()
    assert text.count(mutant.old) > mutant.nth
    assert mutant.old != mutant.new


def test_every_kernel_has_some():
    files = {mutant.file for mutant in mutants.MUTANTS}
    assert {
        "gelu",
        "layer_norm",
        "attention",
        "attention_tiles",
        "cross_entropy",
        "mlp",
        "registration",
        "cpu",
    } <= files


def test_the_readme_counts_them():
    assert f"plants {len(mutants.MUTANTS)} faults" in (CHECKOUT / "README.md").read_text()


@pytest.mark.slow
def test_a_fault_is_caught_and_a_harmless_change_survives():
    fault = mutants.Mutant("mlp", "F.linear(x, fc_w)", "F.linear(x, fc_w, fc_b)", "bias added twice")
    assert mutants.survives(fault) is None
    assert "survived test_mlp.py" in mutants.survives(fault._replace(new="F.linear(x, fc_w, None)"))
    assert "has no 'not there'" in mutants.survives(fault._replace(old="not there"))
