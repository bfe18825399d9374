"""Faults planted in gpt2fast/rounded.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "weight.grad.add_(rounded.grad)",
        "pass",
        "only the first micro-batch's gradients are kept",
        "test_accumulated_steps_are_autocasts_bit_for_bit",
    ),
    Mutant(
        "    rounded.grad = None",
        "    pass",
        "gradients are also added in bf16",
        "test_accumulated_steps_are_autocasts_bit_for_bit",
    ),
    Mutant(
        "torch._foreach_copy_(list(self.copies.values()), list(self.copies))",
        "pass",
        "copies are not refreshed",
        "test_accumulated_steps_are_autocasts_bit_for_bit",
    ),
    Mutant(
        "dict(module._parameters)",
        "module._parameters",
        "the model's own weights are rounded",
        "test_accumulated_steps_are_autocasts_bit_for_bit",
    ),
]
