"""Faults planted in gpt2fast/training/optim.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "local.found_inf = (~norm.isfinite()).float()",
        "pass",
        "NaN gradients are applied",
        "training/test_step.py::test_weights_moments_and_step_counts_stay_bit_for_bit",
    ),
    Mutant(
        "            optimizer.zero_grad(set_to_none=True)\n",
        "            pass\n",
        "NaN gradients are applied where AdamW is not fused",
        "training/test_step.py::test_weights_moments_and_step_counts_stay_bit_for_bit",
    ),
    Mutant(
        " and not self.found_inf",
        "",
        "NaN gradients of copies are applied",
        "training/test_step.py::test_bad_gradients_of_copies_on_a_cpu_are_skipped",
    ),
    Mutant(
        "g = g.float() / divisor",
        "g = g.float()",
        "gradients are not clipped",
        "model/test_rounded.py::test_adamw_that_writes_the_copies_is_torchs",
    ),
    Mutant(
        "1 - lr * group",
        "1 - 0 * group",
        "no weight decay",
        "model/test_rounded.py::test_adamw_that_writes_the_copies_is_torchs",
    ),
    Mutant(
        "1 - beta2**step",
        "1 - beta2",
        "v without its correction",
        "model/test_rounded.py::test_adamw_that_writes_the_copies_is_torchs",
    ),
    Mutant(
        "    copy.copy_(w)\n",
        "",
        "copies stay what they were",
        "model/test_rounded.py::test_adamw_that_writes_the_copies_is_torchs",
    ),
    Mutant(
        "            copy.grad = None",
        "            pass",
        "gradients add up from step to step",
        "model/test_rounded.py::test_adamw_that_writes_the_copies_is_torchs",
    ),
    Mutant(
        '(*weights, *getattr(optimizer, "copies", {}).values())',
        "weights",
        "a norm without the copies'",
        "model/test_rounded.py::test_adamw_that_writes_the_copies_is_torchs",
    ),
]
