"""Faults planted in gpt2fast/cpu.py, each with the test that must catch it."""

from tests.tools.mutation import Mutant

MUTANTS = [
    Mutant("p = p.to(qkv.dtype).tril_(begin)", "p = p.to(qkv.dtype)", "dv is not causal", "test_attention"),
    Mutant(
        "mul_(p).to(qkv.dtype).tril_(begin)",
        "mul_(p).to(qkv.dtype)",
        "dq and dk are not causal",
        "test_attention",
    ),
    Mutant("if dtype == torch.bfloat16:", "if True:", "fp32 operands are rounded to bf16", "test_attention"),
    Mutant("lse, 0.0, True)", "lse, 0.0, False)", "torch's backward is not causal", "test_attention"),
    Mutant(
        "d[0, h, rows].baddbmm_(ds, k[h, keys], alpha=scale)",
        "d[0, h, rows].baddbmm_(ds, k[h, keys])",
        "dq is not scaled",
        "test_attention",
    ),
    Mutant("s, alpha=scale, out=s)", "s, out=s)", "scores are not scaled", "test_attention"),
    Mutant("-(do_ * o)", "0 * (do_ * o)", "delta is left out", "test_attention"),
    Mutant(".clamp_(-87, 1)", ".clamp_(-7, 1)", "small probabilities are clamped too high", "test_attention"),
    Mutant(
        "h = slice(start, start + heads)",
        "h = slice(0, heads)",
        "every block computes the first heads",
        "test_attention",
    ),
    Mutant(
        "(ds.mT, q[h, rows], alpha=scale)",
        "(ds.mT, q[h, rows], alpha=scale, beta=int(begin == 0))",
        "dk has the last block only",
        "test_attention",
    ),
    Mutant(
        "s = torch.bmm(q_[h, rows], k_[h, keys].mT)",
        "s = torch.bmm(q_[h, rows].bfloat16(), k_[h, keys].mT.bfloat16()).to(dtype)",
        "scores rounded to bf16",
        "test_attention",
    ),
    Mutant(
        "logits[:, vocab_size:] = -math.inf",
        "logits[:, vocab_size:] = 0",
        "padding has a nonzero probability",
        "test_linear_cross_entropy",
    ),
    Mutant(
        "torch.expm1(log_p).to(p.dtype)",
        "torch.exp(log_p).to(p.dtype)",
        "the gradient at the target is p, not p - 1",
        "test_linear_cross_entropy",
    ),
    Mutant(
        "copy=True)", "copy=False)", "logits are read after softmax has overwritten them", "test_linear_cross_entropy"
    ),
    Mutant(
        "(target[:, None] - some + some_p.log()).mean(1)",
        "target - (some - some_p.log()).mean(1)",
        "the loss has logsumexp's rounding",
        "test_a_large_offset_of_all_logits_is_not_rounded_into_the_loss",
    ),
    Mutant(
        ".log_softmax(1).gather(1, targets[:, None])[:, 0]",
        ".logsumexp(1).sub(target).neg()",
        "the loss has logsumexp's rounding where a sampled probability is nearly zero",
        "test_a_large_offset_of_all_logits_is_not_rounded_into_the_loss",
    ),
    Mutant(
        "if (some_p > TINY).all():",
        "if True:",
        "the log of a probability of zero",
        "test_a_sampled_probability_of_nearly_zero_takes_the_full_logsumexp",
    ),
    Mutant("if not counted[chunk].all():", "if False:", "ignored targets have gradients", "test_linear_cross_entropy"),
    Mutant("dw.add_(part)", "part", "dw has the last chunk only", "test_linear_cross_entropy"),
    Mutant(
        "scale = dloss / (targets != IGNORE).sum().clamp(min=1)",
        "scale = dloss / len(targets)",
        "ignored targets count in the mean",
        "test_linear_cross_entropy",
    ),
    Mutant("dy.sum(0)", "dy[:-1].sum(0)", "db leaves out the last row", "test_linear"),
    Mutant(
        "zip(a.chunk(2), y.chunk(2))",
        "zip(a.chunk(2)[:1], y.chunk(2))",
        "half of the rows are not written",
        "test_linear",
    ),
]
