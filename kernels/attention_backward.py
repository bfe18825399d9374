"""The backward of attention in one pass: dq, dk and dv from the same scores. Equations: attention_forward.py.

A persistent program owns one head at a time. It walks the key tiles, keeping dk and dv in registers, and for each of
them the query tiles that see it, so that s and p are computed once: five matmuls and one exponential per score, where
the two kernels of attention_tiles.py need seven and two. dq is accumulated in fp32 in a scratch that belongs to the
program, one key tile after the other. No other program adds to it: no atomics, and the same bits every time.

Scratch   (PROGRAMS, query tiles, BLOCK_D * BLOCK_M) fp32, 256 kB per program at T=1024, D=64: with a program on each
          processor of sm_90 it takes two thirds of L2, and stays there. Nothing is read from it for the first key tile;
          after the last key tile that a query tile sees, the sum is scaled, rounded and written to dq. Each tile is
          transposed, dq^T = k^T ds: so ds goes from registers to shared memory once and not back, which took 32
          registers per thread.
Traffic   L2, for one head of T=1024, D=64, causal, bf16, with 128 keys per tile. This kernel visits 4608 rows of
          queries: 1.2 MB of q and do, 0.9 MB of scratch read and 0.9 MB written, and 0.3 MB of o and do for delta.
          The two kernels: the same 1.2 MB, and for dq 1.2 MB of k and v and 0.4 MB of q, o and do. So 1.2 times the
          bytes, 5/7 of the matmuls, half of the exponentials, and 446 instead of 624 instructions per warp and tile on
          sm_90 (Triton 3.9). The extra bytes are estimated to cost a quarter of what the rest saves; not measured.
"""

import triton
import triton.language as tl

from gpt2fast.kernels.attention_tiles import is_visible, load_rows, query_range, store_rows


@triton.jit
def _to_scratch(dq, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Flatten dq^T (BLOCK_D, BLOCK_M) in the order in which 8 warps hold a 64 x 64 result of wgmma: each thread writes
    4 adjacent numbers at a time, and none pass through shared memory. For other results any order would do."""
    dq = dq.reshape(BLOCK_D // 16, 2, 8, 2, BLOCK_M // 16, 4, 2).permute(4, 3, 0, 2, 5, 1, 6)
    return dq.reshape(BLOCK_D * BLOCK_M)


@triton.jit
def _from_scratch(dq, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Invert _to_scratch."""
    dq = dq.reshape(BLOCK_M // 16, 2, BLOCK_D // 16, 8, 4, 2, 2).permute(2, 5, 3, 1, 0, 4, 6)
    return dq.reshape(BLOCK_D, BLOCK_M)


@triton.jit
def _query_tiles(
    dk, dv, k, v, q_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, sum_ptr,
    stride_qt, stride_dot, stride_dqt, lo, hi, first, T_q, T_k, qk_scale, scale,
    D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what queries lo .. hi - 1 contribute to dk / scale and dv (BLOCK_N, BLOCK_D), and what keys first .. first +
    BLOCK_N - 1 contribute to dq of those queries. Queries beyond T_q and their do are zeros: they contribute nothing.
    """
    offs_n = first + tl.arange(0, BLOCK_N)
    for start in tl.range(lo, hi, BLOCK_M, disable_licm=True):
        offs_m = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, stride_qt, T_q, D, True, BLOCK_D)
        do = load_rows(do_ptr, offs_m, stride_dot, T_q, D, True, BLOCK_D)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < T_q, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M): transposed, as the dots need it
        p = tl.exp2(tl.fma(s, qk_scale, -lse[None, :]))
        if MASKED:
            p = tl.where(is_visible(offs_m[None, :], offs_n[:, None], T_q, T_k, CAUSAL), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < T_q, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        # p and dp are dead by now, so dq fits in their registers; dk is computed while dq is loaded. .cg bypasses L1,
        # which is coherent here (only this block stores), but too small to keep a tile until the next key tile
        sum_ptrs = sum_ptr + start * BLOCK_D + tl.arange(0, BLOCK_D * BLOCK_M)
        dq = _from_scratch(tl.load(sum_ptrs, mask=first > 0, other=0.0, cache_modifier=".cg"), BLOCK_M, BLOCK_D)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        dq = tl.dot(tl.trans(k), ds, dq, input_precision=PRECISION)
        seen = T_k  # one beyond the last key that the query tile sees
        if CAUSAL:
            seen = tl.minimum(T_k, start + BLOCK_M + T_k - T_q)
        if MASKED and seen <= first + BLOCK_N:
            store_rows(dq_ptr, tl.trans(dq * scale), offs_m, stride_dqt, T_q, D, BLOCK_D)
        else:
            tl.store(sum_ptrs, _to_scratch(dq, BLOCK_M, BLOCK_D), cache_modifier=".cg")
    return dk, dv


@triton.jit
def _rows_alone(
    o_ptr, do_ptr, dq_ptr, delta_ptr, stride_ot, stride_dot, stride_dqt, T_q, T_k,
    D: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write what needs no keys: delta, and dq = 0 for query tiles that see no key, since no key tile visits them."""
    for start in tl.range(0, T_q, BLOCK_M, disable_licm=True):
        offs_m = start + tl.arange(0, BLOCK_M)
        o = load_rows(o_ptr, offs_m, stride_ot, T_q, D, True, BLOCK_D)
        do = load_rows(do_ptr, offs_m, stride_dot, T_q, D, True, BLOCK_D)
        tl.store(delta_ptr + offs_m, tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1), mask=offs_m < T_q)
        if CAUSAL and start + BLOCK_M + T_k - T_q <= 0:
            none = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
            store_rows(dq_ptr, none, offs_m, stride_dqt, T_q, D, BLOCK_D)


@triton.jit
def _attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, sum_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot, stride_dqb, stride_dqh, stride_dqt,
    stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    HEADS, H, T_q, T_k, qk_scale, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # disable_licm: what the compiler would move out of a loop occupies 30 to 70 registers there, and spills
    sum_ptr += tl.program_id(0).to(tl.int64) * tl.cdiv(T_q, BLOCK_M) * BLOCK_M * BLOCK_D
    for bh in tl.range(tl.program_id(0), HEADS, tl.num_programs(0), disable_licm=True):
        b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
        q = q_ptr + b * stride_qb + h * stride_qh
        do = do_ptr + b * stride_dob + h * stride_doh
        dq = dq_ptr + b * stride_dqb + h * stride_dqh
        lse = lse_ptr + tl.cast(bh, tl.int64) * T_q  # not bh.to: in the interpreter bh is a Python int
        delta = delta_ptr + tl.cast(bh, tl.int64) * T_q
        _rows_alone(
            o_ptr + b * stride_ob + h * stride_oh, do, dq, delta, stride_ot, stride_dot, stride_dqt, T_q, T_k,
            D, CAUSAL, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        for first in tl.range(0, T_k, BLOCK_N, disable_licm=True):
            tl.debug_barrier()  # other threads read delta and the scratch than those that wrote them
            offs_n = first + tl.arange(0, BLOCK_N)
            k = load_rows(k_ptr + b * stride_kb + h * stride_kh, offs_n, stride_kt, T_k, D, True, BLOCK_D)
            v = load_rows(v_ptr + b * stride_vb + h * stride_vh, offs_n, stride_vt, T_k, D, True, BLOCK_D)
            dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            lo, full = query_range(first, T_q, T_k, CAUSAL, BLOCK_M, BLOCK_N)
            if first + BLOCK_N >= T_k:  # masked: p of absent keys is exp(-lse), which may be inf: 0 * inf = NaN in dq
                full = tl.cdiv(T_q, BLOCK_M) * BLOCK_M
            dk, dv = _query_tiles(
                dk, dv, k, v, q, do, dq, lse, delta, sum_ptr, stride_qt, stride_dot, stride_dqt,
                lo, full, first, T_q, T_k, qk_scale, scale,
                D, True, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dk, dv = _query_tiles(
                dk, dv, k, v, q, do, dq, lse, delta, sum_ptr, stride_qt, stride_dot, stride_dqt,
                full, T_q, first, T_q, T_k, qk_scale, scale,
                D, False, CAUSAL, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dk_rows, dv_rows = dk_ptr + b * stride_dkb + h * stride_dkh, dv_ptr + b * stride_dvb + h * stride_dvh
            store_rows(dk_rows, dk * scale, offs_n, stride_dkt, T_k, D, BLOCK_D)
            store_rows(dv_rows, dv, offs_n, stride_dvt, T_k, D, BLOCK_D)
        tl.debug_barrier()  # the next head overwrites the scratch that was just read
