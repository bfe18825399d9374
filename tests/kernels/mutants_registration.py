"""Faults planted in kernels/registration.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant(
        "tensor.to(torch.get_autocast_dtype(device))",
        "tensor",
        "autocast ignored",
        "kernels/test_every_kernel.py::test_autocast",
    ),
]
