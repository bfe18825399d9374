"""Faults planted in gpt2fast/rounded.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "weight.grad.add_(rounded.grad)",
        "pass",
        "gradients of the first micro-batch only",
        "test_accumulated_steps_are_autocasts_bit_for_bit",
    ),
    Mutant(
        "    rounded.grad = None",
        "    pass",
        "gradients add up in bf16 as well",
        "test_accumulated_steps_are_autocasts_bit_for_bit",
    ),
    Mutant(
        "torch._foreach_copy_(list(self.copies.values()), list(self.copies))",
        "pass",
        "copies stay what they were",
        "test_accumulated_steps_are_autocasts_bit_for_bit",
    ),
    Mutant(
        "dict(module._parameters)",
        "module._parameters",
        "the model itself is rounded",
        "test_accumulated_steps_are_autocasts_bit_for_bit",
    ),
]
