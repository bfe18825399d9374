"""Faults planted in gpt2fast/training/graph.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "buffer.copy_(tensor, non_blocking=True)",
        "pass",
        "the recorded batch, again and again",
        "test_a_recorded_step_is_the_step",
    ),
    Mutant(
        '"next" if i else "first"',
        '"first"',
        "gradients of the last micro-batch only",
        "test_a_recorded_step_is_the_step",
    ),
    Mutant(
        "        self.optimizer.send_numbers()\n",
        "",
        "the settings of the recorded step",
        "test_a_recorded_step_is_the_step",
    ),
    Mutant("        self.set_lr(lr)\n", "", "the recorded learning rate", "test_a_recorded_step_is_the_step"),
]
