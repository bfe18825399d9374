"""Faults planted in kernels/attention_forward.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant("scale * LOG2_E", "scale", "log2 e dropped", "test_flash_attention"),
    Mutant(
        "dqkv = qkv.new_empty(qkv.shape)",
        "dqkv = torch.empty_like(qkv)",
        "strides that the fake does not promise",
        "kernels/test_every_kernel.py::test_torchs_own_checks_of_schema_and_fake",
    ),
]
