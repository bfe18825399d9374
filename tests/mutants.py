"""Seeded faults which tests must catch: `python tests/mutants.py [--only TEXT]`.

A mutant is one replacement in one file of kernels/, or in one of OF_GPT2FAST. For each, the tree is copied, the
replacement made, and the tests of that file run until one fails. A mutant that survives is a hole in the tests: the
exit code is 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    why: str
    tests: str = ""  # the file's own, unless named
    nth: int = 0  # which occurrence of `old`


OFFSETS = "test_offsets.py"
ROUNDED = "test_rounded.py"
EPILOGUE = "test_epilogue.py"
STEP = "test_skipped.py"
OF_GPT2FAST = "cache", "cpu", "decode", "graph", "optim", "rounded"  # files of gpt2fast/; all others are of kernels/
MUTANTS = [
    Mutant("gelu", "x * x * CUBIC", "x * x * THREE_CUBIC", "another cubic term"),
    Mutant("gelu", "tl.sigmoid(-_z(x))", "(1 - s * s)", "derivative of tanh instead of sigmoid"),
    Mutant("gelu", "mask=offs < n)", "mask=offs < n - 1)", "last element not written", nth=0),
    Mutant("gelu", "db += dx", "db += do", "db without GELU's derivative"),
    Mutant("gelu", "for tile in range(part,", "for tile in range(0,", "every program does all tiles"),
    Mutant("gelu", "+ b[None, :]\n        dx", "\n        dx", "backward forgets the bias"),
    Mutant("gelu", "tl.program_id(0).to(tl.int64) * BLOCK", "tl.program_id(0) * BLOCK", "int32 offsets", OFFSETS),
    Mutant("gelu", "(tl.program_id(0) // column_blocks).to(tl.int64)", "(tl.program_id(0) // column_blocks)",
           "int32 offsets", OFFSETS),
    Mutant("gelu", "+ tl.arange(0, BLOCK_M)).to(tl.int64)", "+ tl.arange(0, BLOCK_M))", "int32 offsets", OFFSETS),
    Mutant("layer_norm", "mean + rest, mask", "(mean + rest).to(tl.bfloat16).to(tl.float32), mask", "bf16 mean saved"),
    Mutant("layer_norm", "rstd, mask=mask_m)", "rstd.to(tl.bfloat16).to(tl.float32), mask=mask_m)", "bf16 rstd saved"),
    Mutant("layer_norm", "tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]",
           "padding counts in the variance"),
    Mutant("layer_norm", "rest = tl.sum(x, axis=1) / N", "rest = tl.sum(x, axis=1) * 0",
           "the mean's rounding error stays"),
    Mutant("layer_norm", " - z * mean_gz[:, None]", "", "dx without its second projection"),
    Mutant("layer_norm", "dw += do * z", "dw += g * z", "dw multiplied by w"),
    Mutant("layer_norm", "dx += tl.load(ds_ptr", "dx -= tl.load(ds_ptr", "residual's gradient subtracted"),
    Mutant("layer_norm", "x = s.to(tl.float32)", "x = x", "the sum is not rounded before it is normalised"),
    Mutant("layer_norm", "tl.store(dy_ptr + offs, dx, mask=mask)",
           "tl.store(dy_ptr + offs, dx, mask=mask & (offs > 0))",
           "dy not fully written"),
    Mutant("layer_norm", "offs_m = tl.program_id(0).to(tl.int64)", "offs_m = tl.program_id(0)",
           "int32 offsets", OFFSETS),
    Mutant("layer_norm", "+ tl.arange(0, BLOCK_M)).to(tl.int64)", "+ tl.arange(0, BLOCK_M))", "int32 offsets", OFFSETS),
    Mutant("attention", "scale * LOG2_E", "scale", "log2 e dropped"),
    Mutant("attention_tiles", "end = tl.minimum(tl.maximum(first + BLOCK_M + T_k - T_q, 0), T_k)", "end = T_k",
           "tiles visited that nothing sees"),
    Mutant("attention_tiles", "lo = tl.maximum(first - (T_k - T_q), 0) // BLOCK_M * BLOCK_M", "lo = 0",
           "tiles visited that nothing sees"),
    Mutant("attention_tiles", "offs_n <= offs_m", "offs_n < offs_m", "causal mask off by one"),
    Mutant("attention_tiles", "offs_m + (T_k - T_q)", "offs_m", "causal diagonal at the start"),
    Mutant("attention_tiles", "first + T_k - T_q + 1, 0", "first + T_k - T_q + BLOCK_N, 0",
           "masked tiles taken for full"),
    Mutant("attention_tiles", "visible = offs_n < T_k", "visible = offs_n < T_k + 1", "one key too many"),
    Mutant("attention_tiles", "base = tl.where(m_new == float(\"-inf\"), 0.0, m_new)", "base = m_new",
           "NaN before anything is seen"),
    Mutant("attention_tiles", "acc * alpha[:, None]", "acc", "accumulator not rescaled"),
    Mutant("attention_tiles", "l = l * alpha + tl.sum(p, axis=1)", "l = l + tl.sum(p, axis=1)", "sum not rescaled"),
    Mutant("attention_tiles", "p.to(v.dtype), v", "p.to(tl.bfloat16).to(v.dtype), v", "p rounded more than its dtype"),
    Mutant("attention_tiles", "dk * scale", "dk", "scale missing in dk"),
    Mutant("attention_tiles", "dq * scale", "dq", "scale missing in dq"),
    Mutant("attention_tiles", "ds = p * (dp - delta[:, None])", "ds = p * dp", "delta missing in dq"),
    Mutant("attention_tiles", "ds = p * (dp - delta[None, :])", "ds = p * dp", "delta missing in dk"),
    Mutant("attention_tiles", "// BLOCK_M * BLOCK_M\n        full", "// BLOCK_M * BLOCK_M + BLOCK_M\n        full",
           "backward skips the first tile of queries"),
    Mutant("attention_tiles", "first + BLOCK_N - 1 - (T_k - T_q), 0", "first - (T_k - T_q), 0",
           "diagonal of dk, dv taken for full"),
    Mutant("attention_tiles", "l == 0, 1.0, l", "l == 0, 0.0, l", "division by nothing"),
    Mutant("attention_tiles", "offs_t.to(tl.int64)[:, None] * stride_t", "offs_t[:, None] * stride_t",
           "int32 offsets", OFFSETS),
    Mutant("attention_tiles", "(bh // H).to(tl.int64), (bh % H).to(tl.int64)", "bh // H, bh % H",
           "int32 offsets", OFFSETS),
    Mutant("attention_backward", "mask=first > 0, other=0.0", "mask=first > -1, other=0.0",
           "the scratch is read before it is written"),
    Mutant("attention_backward", "and seen <= first", "and seen < first", "dq stays in the scratch"),
    Mutant("attention_backward", "start + BLOCK_M + T_k - T_q)", "start + BLOCK_M)", "dq of another tile is the last"),
    Mutant("attention_backward", "if first + BLOCK_N >= T_k:", "if first + BLOCK_N == T_k:",
           "the last keys have no mask"),
    Mutant("attention_backward", "permute(2, 5, 3, 1, 0, 4, 6)", "permute(2, 5, 3, 1, 0, 6, 4)", "another way back"),
    Mutant("attention_backward", "and start + BLOCK_M + T_k - T_q <= 0", "and start + BLOCK_M + T_k - T_q < -T_q",
           "dq of queries that see nothing is not written"),
    Mutant("attention_backward", "(dp - delta[None, :])", "dp", "delta missing"),
    Mutant("attention_backward", "dq * scale", "dq", "scale missing in dq"),
    Mutant("attention_backward", "lse = lse_ptr + tl.cast(bh, tl.int64) * T_q", "lse = lse_ptr", "lse of head 0"),
    Mutant("launch", "6 * rounds * programs <= 7 * heads", "programs <= heads", "a second turn for few heads",
           "test_attention_backward.py"),
    Mutant("launch", "4 * scratch <= 3 * l2_cache", "scratch <= l2_cache", "all of L2 for the scratch",
           "test_attention_backward.py"),
    Mutant("attention", "dqkv = qkv.new_empty(qkv.shape)", "dqkv = torch.empty_like(qkv)",
           "strides that the fake does not promise",
           "test_kernels.py"),
    Mutant("cross_entropy", "counts = target != ignore_index", "counts = target != 0", "wrong ignore index"),
    Mutant("cross_entropy", "x = tl.where(offs_v < vocab_size, x, float(\"-inf\"))", "x = x",
           "padding counts in the sum"),
    Mutant("cross_entropy", "dx = tl.where(counts & (offs_v < vocab_size), dx, 0.0)", "dx = tl.where(counts, dx, 0.0)",
           "padding has a gradient"),
    Mutant("cross_entropy", "tl.where(offs_v == target, 1.0, 0.0)",
           "tl.where(offs_v == target + 1, 1.0, 0.0)", "neighbour's one-hot"),
    Mutant("cross_entropy", "(target >= 0) & (target < vocab_size)", "(target >= 0) & (target < V)",
           "padding as a target"),
    Mutant("cross_entropy", "log2_l * LN_2", "log2_l", "ln 2 dropped"),
    Mutant("cross_entropy", "l = l * tl.exp2((m - base) * LOG2_E) +", "l = l +", "sum not rescaled"),
    Mutant("cross_entropy", "tl.load(factor_ptr)", "tl.load(factor_ptr).to(x_ptr.dtype.element_ty).to(tl.float32)",
           "scale rounded to the gradient's dtype"),
    Mutant("cross_entropy", "_scale_kernel[(programs,)]", "_scale_kernel[(1,)]", "only some tiles are scaled"),
    Mutant("cross_entropy", "if x.dtype == torch.float16 else share",
           "if x.dtype == torch.bfloat16 else share", "fp16 gradients underflow"),
    Mutant("cross_entropy", "scale = dloss * share", "scale = share", "gradient scaling forgotten"),
    Mutant("cross_entropy", "first=start == 0", "first=True", "dw of the last chunk only"),
    Mutant("cross_entropy", "torch.autograd.graph.increment_version(x)", "x", "saved logits are not marked"),
    Mutant("cross_entropy", "torch.autograd.graph.increment_version(dx)", "dx", "a gradient can be scaled twice"),
    Mutant("cross_entropy", "torch.is_grad_enabled() and logits.requires_grad", "logits.requires_grad",
           "no_grad destroys logits"),
    Mutant("cross_entropy", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", "int32 offsets", OFFSETS),
    Mutant("mlp", "F.linear(x, fc_w)", "F.linear(x, fc_w, fc_b)", "bias added twice"),
    Mutant("epilogue", "t = tl.where(z >= 0, small, large)", "t = tl.where(z >= 0, large, small)",
           "sigmoid(z) for sigmoid(-z)"),
    Mutant("epilogue", "e = tl.exp(-tl.abs(z))", "e = tl.exp(-z)", "overflow in the left tail"),
    Mutant("epilogue", "_gelu_and_grad(h.to(tl.float32))", "_gelu_and_grad(acc + b.to(tl.float32)[None, :])",
           "GELU of what is not rounded, other than backward's"),
    Mutant("epilogue", "dh = da * grad", "dh = da.to(h_ptr.dtype.element_ty).to(tl.float32) * grad",
           "the product is rounded before its derivative"),
    Mutant("epilogue", "tl.sum(dh, axis=0)", "tl.sum(da, axis=0)", "db without GELU's derivative"),
    Mutant("epilogue", "db_ptr + (row // BLOCK_M).to(tl.int64) * N", "db_ptr", "db of the last rows only"),
    Mutant("epilogue", "row, col + i * PIECE, M, N", "row, col, M, N", "all pieces in the first one's place"),
    Mutant("epilogue", "row, col + i * PIECE, M, N", "row, col, M, N", "all pieces in the first one's place", nth=1),
    Mutant("epilogue", "(shared[\"PROGRAMS\"],)", "(1,)", "only some tiles are made", nth=1),
    Mutant("matmul", "tile % group // rows", "tile % group // GROUP_M", "some columns are left out", EPILOGUE),
    Mutant("matmul", "x.data_ptr() % TMA_BYTES == 0 and ", "", "TMA from addresses that it cannot reach", EPILOGUE),
    Mutant("matmul", "& (offs_c < cols)[None, :], other", "& (offs_c < cols + 1)[None, :], other",
           "a row is read beyond its end", EPILOGUE),
    Mutant("matmul", "offs_r.to(tl.int64)", "offs_r", "int32 offsets of what is loaded", EPILOGUE),
    Mutant("matmul", "offs_r.to(tl.int64)", "offs_r", "int32 offsets of what is stored", EPILOGUE, nth=1),
    Mutant("registration", "tensor.to(torch.get_autocast_dtype(device))", "tensor", "autocast ignored",
           "test_kernels.py"),
    Mutant("adamw", "beta1 * (g - m)", "beta1 * g", "the first moment never decays"),
    Mutant("adamw", "beta2 * (g * g - v)", "beta2 * (g - v)", "the gradient is not squared"),
    Mutant("adamw", "BLOCK, WHOLE) / shorten", "BLOCK, WHOLE)", "gradients are not clipped"),
    Mutant("adamw", "w -= decay * w + rate", "w -= rate", "no weight decay"),
    Mutant("adamw", "if copy_at != 0:", "if copy_at == 1:", "copies stay what they were"),
    Mutant("adamw", "tl.minimum(first + CHUNK, tl.load(row_ptr + SIZE))", "tl.load(row_ptr + SIZE)",
           "chunks overlap"),
    Mutant("adamw", "squares += g * g", "squares = g * g", "a norm of the last blocks"),
    Mutant("adamw", "end = tl.where(shorten < float(\"inf\"), end, first)", "end = end", "NaN gradients are taken",
           STEP),
    Mutant("adamw", "tl.where(counts, 1.0, 0.0)", "1.0", "steps that are left out are counted", STEP),
    Mutant("adamw", "if rows == self._rows:", "if self._rows:", "addresses of the first step"),
    Mutant("adamw", "triton.cdiv(size, launch.adamw_chunk().CHUNK)", "size // launch.adamw_chunk().CHUNK",
           "the last chunk is missing"),
    Mutant("embedding", "other=float(\"nan\")", "other=0.0", "a token that there is not is silent"),
    Mutant("embedding", "(offs_m % T)", "(offs_m // T)", "another position"),
    Mutant("embedding", "dwpe += tl.load", "dwpe = tl.load", "dwpe of the last sequences only"),
    Mutant("embedding", "before == LONG)", "before == LONG + 1)", "a token just long enough is lost"),
    Mutant("embedding", "if n <= MOST:", "if n < MOST:", "a token of the longest short kind is lost"),
    Mutant("embedding", "total += _sum_fixed", "total = _sum_fixed", "the last positions only"),
    Mutant("embedding", "62 + 126 - BITS", "22 + 126 - BITS", "too few bits"),
    Mutant("embedding", "tl.where(largest < INF, dwte, not_finite)", "dwte", "infinity and NaN are forgotten"),
    Mutant("cpu", "p = p.to(qkv.dtype).tril_(begin)", "p = p.to(qkv.dtype)", "the future is seen, by dv"),
    Mutant("cpu", "mul_(p).to(qkv.dtype).tril_(begin)", "mul_(p).to(qkv.dtype)", "the future is seen, by dq and dk"),
    Mutant("cpu", "if dtype == torch.bfloat16:", "if True:", "fp32 products of rounded operands"),
    Mutant("cpu", "lse, 0.0, True)", "lse, 0.0, False)", "torch's backward sees the future"),
    Mutant("cpu", "d[0, h, rows].baddbmm_(ds, k[h, keys], alpha=scale)", "d[0, h, rows].baddbmm_(ds, k[h, keys])",
           "dq without its scale"),
    Mutant("cpu", "s, alpha=scale, out=s)", "s, out=s)", "scores without their scale"),
    Mutant("cpu", "-(do_ * o)", "0 * (do_ * o)", "no delta"),
    Mutant("cpu", ".clamp_(-87, 1)", ".clamp_(-7, 1)", "small probabilities are not that small"),
    Mutant("cpu", "h = slice(start, start + heads)", "h = slice(0, heads)", "the first heads, again and again"),
    Mutant("cpu", "(ds.mT, q[h, rows], alpha=scale)", "(ds.mT, q[h, rows], alpha=scale, beta=int(begin == 0))",
           "dk of the last block only"),
    Mutant("cpu", "s = torch.bmm(q_[h, rows], k_[h, keys].mT)",
           "s = torch.bmm(q_[h, rows].bfloat16(), k_[h, keys].mT.bfloat16()).to(dtype)", "scores rounded to bf16"),
    Mutant("cpu", "logits[:, vocab_size:] = -math.inf", "logits[:, vocab_size:] = 0", "padding has a probability"),
    Mutant("cpu", "torch.expm1(log_p).to(p.dtype)", "torch.exp(log_p).to(p.dtype)", "p and not p - 1 at the target"),
    Mutant("cpu", "copy=True)", "copy=False)", "logits are read after softmax has overwritten them"),
    Mutant("cpu", "if (some_p > TINY).all():", "if True:", "log of a probability that is zero"),
    Mutant("cpu", "if not counted[chunk].all():", "if False:", "ignored targets have gradients"),
    Mutant("cpu", "dw.add_(part)", "part", "dw of the last chunk only"),
    Mutant("cpu", "scale = dloss / (targets != IGNORE).sum().clamp(min=1)", "scale = dloss / len(targets)",
           "ignored targets count in the mean"),
    Mutant("cpu", "dy.sum(0)", "dy[:-1].sum(0)", "the last row is not in db"),
    Mutant("cpu", "zip(a.chunk(2), y.chunk(2))", "zip(a.chunk(2)[:1], y.chunk(2))", "half of the rows is not written"),
    Mutant("graph", "place.copy_(tensor, non_blocking=True)", "pass", "the recorded batch, again and again"),
    Mutant("graph", "\"next\" if i else \"first\"", "\"first\"", "gradients of the last micro-batch only"),
    Mutant("graph", "        self.optimizer.send_numbers()\n", "", "the settings of the recorded step"),
    Mutant("graph", "        self.set_rate(lr)\n", "", "the recorded learning rate"),
    Mutant("optim", "local.found_inf = (~norm.isfinite()).float()", "pass", "NaN gradients are taken", STEP),
    Mutant("optim", "            optimizer.zero_grad(set_to_none=True)\n", "            pass\n",
           "NaN gradients are taken where AdamW is not fused", STEP),
    Mutant("optim", " and not getattr(self, \"found_inf\", None)", "", "NaN gradients of copies are taken", STEP),
    Mutant("optim", "g = g.float() / shorten", "g = g.float()", "gradients are not clipped", ROUNDED),
    Mutant("optim", "1 - lr * group", "1 - 0 * group", "no weight decay", ROUNDED),
    Mutant("optim", "1 - beta2**step", "1 - beta2", "v without its correction", ROUNDED),
    Mutant("optim", "    copy.copy_(w)\n", "", "copies stay what they were", ROUNDED),
    Mutant("optim", "            copy.grad = None", "            pass", "gradients add up from step to step", ROUNDED),
    Mutant("optim", "(*weights, *getattr(optimizer, \"copies\", {}).values())", "weights", "a norm without the copies'",
           ROUNDED),
    Mutant("rounded", "weight.grad.add_(leaf.grad)", "pass", "gradients of the first micro-batch only"),
    Mutant("rounded", "    leaf.grad = None", "    pass", "gradients add up in bf16 as well"),
    Mutant("rounded", "torch._foreach_copy_(leaves, weights)", "pass", "copies stay what they were"),
    Mutant("rounded", "dict(module._parameters)", "module._parameters", "the model itself is rounded"),
    Mutant("attention_decode", "acc * alpha[:, None] + w", "acc + w", "a lane's sum is not rescaled"),
    Mutant("attention_decode", "mask_n = offs_n < position", "mask_n = offs_n <= position", "the new token twice"),
    Mutant("attention_decode", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)", "int32 offsets", OFFSETS),
    Mutant("cache", ":T] = k, v", ":T] = v, k", "values are taken for keys"),
    Mutant("decode", "p.cumsum(-1) - p >=", "p.cumsum(-1) >=", "a nucleus without its last token"),
    Mutant("decode", "self.length += grown", "self.length += 1", "a row that has ended grows"),
    Mutant("decode", "if longest > block_size:", "if longest >= block_size:", "the last position is not used"),
]  # fmt: skip
OWN = {"attention_tiles": "test_attention.py", "launch": "test_attention.py"}


def source(mutant: Mutant) -> Path:
    """Its file, from the checkout's root."""
    return Path("gpt2fast" if mutant.file in OF_GPT2FAST else "kernels") / f"{mutant.file}.py"


def survives(mutant: Mutant) -> str | None:
    """None if a test catches it, else what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("gpt2fast", "kernels", "benchmarks", "tests"):
            shutil.copytree(CHECKOUT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        shutil.copy(CHECKOUT / "pyproject.toml", tree)
        path = tree / source(mutant)
        parts = path.read_text().split(mutant.old)
        if len(parts) < mutant.nth + 2:
            return f"{path.name} has no {mutant.old!r}"
        head, tail = mutant.old.join(parts[: mutant.nth + 1]), mutant.old.join(parts[mutant.nth + 1 :])
        path.write_text(head + mutant.new + tail)
        tests = mutant.tests or OWN.get(mutant.file, f"test_{mutant.file}.py")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            f"tests/{tests}",
        ]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode == 1 and " failed" in done.stdout:
            return None
        return (
            f"survived {tests} (pytest ended with {done.returncode})\n{done.stdout[-300:] if done.returncode else ''}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="those whose file or reason contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in f"{m.file} {m.why}"]
    left = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, problem in zip(chosen, pool.map(survives, chosen)):
            print(f"{'caught  ' if problem is None else 'MISSED  '} {mutant.file:<16} {mutant.why}", flush=True)
            if problem:
                print("         " + problem)
                left += 1
    print(f"{len(chosen) - left} of {len(chosen)} mutants caught")
    return 1 if left or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
