"""Faults planted in kernels/loss.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant("counts = target != ignore_index", "counts = target != 0", "wrong ignore index", "test_cross_entropy"),
    Mutant(
        'x = tl.where(offs_v < vocab_size, x, float("-inf"))',
        "x = x",
        "padding counts in the sum",
        "test_cross_entropy",
    ),
    Mutant(
        "dx = tl.where(counts & (offs_v < vocab_size), dx, 0.0)",
        "dx = tl.where(counts, dx, 0.0)",
        "padding has a gradient",
        "test_cross_entropy",
    ),
    Mutant(
        "tl.where(offs_v == target, 1.0, 0.0)",
        "tl.where(offs_v == target + 1, 1.0, 0.0)",
        "neighbour's one-hot",
        "test_cross_entropy",
    ),
    Mutant(
        "(target >= 0) & (target < vocab_size)",
        "(target >= 0) & (target < V)",
        "padding as a target",
        "test_targets_outside_the_vocabulary_make_the_loss_nan",
    ),
    Mutant("log2_l * LN_2", "log2_l", "ln 2 dropped", "test_cross_entropy"),
    Mutant("l = l * tl.exp2((m - base) * LOG2_E) +", "l = l +", "sum not rescaled", "test_rows_wider_than_a_block"),
    Mutant(
        "tl.load(factor_ptr)",
        "tl.load(factor_ptr).to(x_ptr.dtype.element_ty).to(tl.float32)",
        "scale rounded to the gradient's dtype",
        "test_cross_entropy",
    ),
    Mutant("_scale_kernel[(programs,)]", "_scale_kernel[(1,)]", "only some tiles are scaled", "test_cross_entropy"),
    Mutant(
        "if x.dtype == torch.float16 else share",
        "if x.dtype == torch.bfloat16 else share",
        "fp16 gradients underflow",
        "test_tiny_gradients_survive_in_fp16",
    ),
    Mutant(
        "scale = dloss * share",
        "scale = share",
        "gradient scaling forgotten",
        "kernels/test_loss_head.py::test_linear_cross_entropy",
    ),
    Mutant(
        "first=start == 0",
        "first=True",
        "dw of the last chunk only",
        "kernels/test_loss_head.py::test_chunks_change_nothing_but_memory",
    ),
    Mutant(
        "torch.autograd.graph.increment_version(x)",
        "x",
        "saved logits are not marked",
        "test_another_graph_that_saved_the_logits_raises_in_backward",
    ),
    Mutant(
        "torch.autograd.graph.increment_version(dx)",
        "dx",
        "a gradient can be scaled twice",
        "test_a_second_backward_raises_if_the_gradient_was_scaled_in_place",
    ),
    Mutant(
        "torch.is_grad_enabled() and logits.requires_grad",
        "logits.requires_grad",
        "no_grad destroys logits",
        "test_logits_that_are_kept",
    ),
    Mutant(
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        "int32 offsets",
        "kernels/test_offsets.py::test_beyond_2_31_elements",
    ),
]
