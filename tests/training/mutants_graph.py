"""Faults planted in gpt2fast/training/graph.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "buffer.copy_(tensor, non_blocking=True)",
        "pass",
        "each step reads the recorded batch",
        "test_a_recorded_step_has_the_bits_of_the_step",
    ),
    Mutant(
        '"next" if i else "first"',
        '"first"',
        "only the gradients of the last micro-batch count",
        "test_a_recorded_step_has_the_bits_of_the_step",
    ),
    Mutant(
        "        self.optimizer.send_numbers()\n",
        "",
        "each step has the settings of the recorded one",
        "test_a_recorded_step_has_the_bits_of_the_step",
    ),
    Mutant(
        "        self.set_lr(lr)\n",
        "",
        "each step has the recorded learning rate",
        "test_a_recorded_step_has_the_bits_of_the_step",
    ),
]
