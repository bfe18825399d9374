"""Three kernels of attention: forward, dq (and delta), dk and dv. Equations: attention_forward.py.

A program owns a tile of queries (forward, dq) or of keys (dk, dv) of one head and walks the other side. Tiles of one
head are neighbours in the grid, since they share its keys and values in L2; those with the most work come first, so
that the last ones to finish are short. Offsets inside a tile have 64 bits, like everything that a stride multiplies: T
times the stride of a packed projection exceeds 2^31.

    visible(i, j) = j < T_k and (not CAUSAL or j <= i + T_k - T_q)
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(ptr, offs_t, stride_t, T, D: tl.constexpr, MASK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows offs_t of a head: (BLOCK, BLOCK_D), zero beyond T (if MASK_T) and beyond D."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    if D < BLOCK_D:
        return tl.load(ptrs, mask=(offs_t < T)[:, None] & (offs_d < D)[None, :], other=0.0)
    if MASK_T:
        return tl.load(ptrs, mask=(offs_t < T)[:, None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def store_rows(ptr, value, offs_t, stride_t, T, D: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_t < T)[:, None]
    if D < BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    ptrs = ptr + offs_t.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def is_visible(offs_m, offs_n, T_q, T_k, CAUSAL: tl.constexpr):
    """Whether queries offs_m see keys offs_n, both shaped to broadcast."""
    visible = offs_n < T_k
    if CAUSAL:
        visible = visible & (offs_n <= offs_m + (T_k - T_q))
    return visible


@triton.jit
def _key_range(first, T_q, T_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return full, end for queries first .. first + BLOCK_M - 1: all of them see the tiles of keys [0, full), some of
    them see a part of the tiles of keys [full, end)."""
    full = T_k
    end = T_k
    if CAUSAL:
        full = tl.minimum(tl.maximum(first + T_k - T_q + 1, 0), T_k)
        end = tl.minimum(tl.maximum(first + BLOCK_M + T_k - T_q, 0), T_k)
    return full // BLOCK_N * BLOCK_N, end


@triton.jit
def _softmax_tiles(
    acc, l, m, q, k_ptr, v_ptr, stride_kt, stride_vt, lo, hi, offs_m, T_q, T_k, qk_scale,
    D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax over keys lo .. hi - 1: return acc (BLOCK_M, BLOCK_D), l and m (BLOCK_M,)."""
    for start in range(lo, hi, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, stride_kt, T_k, D, MASKED, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            s = tl.where(is_visible(offs_m[:, None], offs_n[None, :], T_q, T_k, CAUSAL), s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * qk_scale)
        base = m_new
        if MASKED:  # a row that has seen nothing yet: -inf - -inf would be NaN
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(tl.fma(s, qk_scale, -base[:, None]))
        alpha = tl.exp2(m - base)
        l = l * alpha + tl.sum(p, axis=1)
        v = load_rows(v_ptr, offs_n, stride_vt, T_k, D, MASKED, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m = m_new
    return acc, l, m


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot, H, T_q, T_k, qk_scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T_q, BLOCK_M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M  # the last queries see the most keys
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    offs_m = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qt, T_q, D, True, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    l = tl.zeros((BLOCK_M,), dtype=tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    full, end = _key_range(first, T_q, T_k, CAUSAL, BLOCK_M, BLOCK_N)
    acc, l, m = _softmax_tiles(
        acc, l, m, q, k_ptr, v_ptr, stride_kt, stride_vt, 0, full, offs_m, T_q, T_k, qk_scale,
        D, False, CAUSAL, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, l, m = _softmax_tiles(
        acc, l, m, q, k_ptr, v_ptr, stride_kt, stride_vt, full, end, offs_m, T_q, T_k, qk_scale,
        D, True, CAUSAL, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    o = acc / tl.where(l == 0, 1.0, l)[:, None]  # l is 0 only where nothing was visible
    store_rows(o_ptr + b * stride_ob + h * stride_oh, o, offs_m, stride_ot, T_q, D, BLOCK_D)
    tl.store(lse_ptr + bh.to(tl.int64) * T_q + offs_m, m + tl.log2(l), mask=offs_m < T_q)


@triton.jit
def _dq_tiles(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, lo, hi, offs_m, T_q, T_k, qk_scale,
    D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what keys lo .. hi - 1 contribute to dq / scale (BLOCK_M, BLOCK_D)."""
    for start in range(lo, hi, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, offs_n, stride_kt, T_k, D, MASKED, BLOCK_D)
        v = load_rows(v_ptr, offs_n, stride_vt, T_k, D, MASKED, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        p = tl.exp2(tl.fma(s, qk_scale, -lse[:, None]))
        if MASKED:
            p = tl.where(is_visible(offs_m[:, None], offs_n[None, :], T_q, T_k, CAUSAL), p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_ob, stride_oh, stride_ot, stride_dqb, stride_dqh, stride_dqt,
    H, T_q, T_k, qk_scale, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T_q, BLOCK_M)
    first = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    offs_m = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qt, T_q, D, True, BLOCK_D)
    do = load_rows(do_ptr + b * stride_dob + h * stride_doh, offs_m, stride_dot, T_q, D, True, BLOCK_D)
    o = load_rows(o_ptr + b * stride_ob + h * stride_oh, offs_m, stride_ot, T_q, D, True, BLOCK_D)
    row = bh.to(tl.int64) * T_q + offs_m
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    tl.store(delta_ptr + row, delta, mask=offs_m < T_q)
    lse = tl.load(lse_ptr + row, mask=offs_m < T_q, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    full, end = _key_range(first, T_q, T_k, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _dq_tiles(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, 0, full, offs_m, T_q, T_k, qk_scale,
        D, False, CAUSAL, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, full, end, offs_m, T_q, T_k, qk_scale,
        D, True, CAUSAL, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_rows(dq_ptr + b * stride_dqb + h * stride_dqh, dq * scale, offs_m, stride_dqt, T_q, D, BLOCK_D)


@triton.jit
def query_range(first, T_q, T_k, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return lo, full for keys first .. first + BLOCK_N - 1: queries [lo, full) are in tiles with a mask, [full, T_q)
    see all of the keys. Keys beyond T_k are zeros whose gradients are not stored: they need no mask."""
    lo = 0
    full = 0
    if CAUSAL:
        lo = tl.maximum(first - (T_k - T_q), 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(first + BLOCK_N - 1 - (T_k - T_q), 0), BLOCK_M) * BLOCK_M
    return lo, tl.minimum(full, tl.cdiv(T_q, BLOCK_M) * BLOCK_M)


@triton.jit
def _dkdv_tiles(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_dot, lo, hi, offs_n, T_q, T_k, qk_scale,
    D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what queries lo .. hi - 1 contribute to dk / scale and dv (BLOCK_N, BLOCK_D). Queries beyond T_q and their do
    are zeros: they contribute nothing."""
    for start in range(lo, hi, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, offs_m, stride_qt, T_q, D, True, BLOCK_D)
        do = load_rows(do_ptr, offs_m, stride_dot, T_q, D, True, BLOCK_D)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < T_q, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < T_q, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M): transposed, as the dots need it
        p = tl.exp2(tl.fma(s, qk_scale, -lse[None, :]))
        if MASKED:
            p = tl.where(is_visible(offs_m[None, :], offs_n[:, None], T_q, T_k, CAUSAL), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_dob, stride_doh, stride_dot, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
    H, T_q, T_k, qk_scale, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T_k, BLOCK_N)
    first = tl.program_id(0) % tiles * BLOCK_N  # the first keys are seen by the most queries
    bh = tl.program_id(0) // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    q_ptr += b * stride_qb + h * stride_qh
    do_ptr += b * stride_dob + h * stride_doh
    lse_ptr += bh.to(tl.int64) * T_q
    delta_ptr += bh.to(tl.int64) * T_q
    offs_n = first + tl.arange(0, BLOCK_N)
    k = load_rows(k_ptr + b * stride_kb + h * stride_kh, offs_n, stride_kt, T_k, D, True, BLOCK_D)
    v = load_rows(v_ptr + b * stride_vb + h * stride_vh, offs_n, stride_vt, T_k, D, True, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    lo, full = query_range(first, T_q, T_k, CAUSAL, BLOCK_M, BLOCK_N)
    dk, dv = _dkdv_tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_dot, lo, full, offs_n, T_q, T_k,
        qk_scale, D, True, CAUSAL, PRECISION, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dk, dv = _dkdv_tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, stride_qt, stride_dot, full, T_q, offs_n, T_q, T_k,
        qk_scale, D, False, CAUSAL, PRECISION, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    store_rows(dk_ptr + b * stride_dkb + h * stride_dkh, dk * scale, offs_n, stride_dkt, T_k, D, BLOCK_D)
    store_rows(dv_ptr + b * stride_dvb + h * stride_dvh, dv, offs_n, stride_dvt, T_k, D, BLOCK_D)
