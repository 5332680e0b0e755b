"""Triton kernels with the large tiles that libraries choose, which fill a Turing SM's registers."""

import triton
import triton.language as tl


@triton.jit
def gemm(a, b, c, K, stride_am, stride_bk, stride_bn, stride_cm, OUT: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of 128 x 128, of operands whose strides of 1 are constants of the signature."""
    m = tl.program_id(0) * 128 + tl.arange(0, 128)
    n = tl.program_id(1) * 128 + tl.arange(0, 128)
    k = tl.arange(0, BLOCK)
    total = tl.zeros((128, 128), OUT)
    for start in range(0, K, BLOCK):
        x = tl.load(a + m[:, None] * stride_am + (start + k)[None, :])
        y = tl.load(b + (start + k)[:, None] * stride_bk + n[None, :] * stride_bn)
        total = tl.dot(x, y, total, out_dtype=OUT)
    tl.store(c + m[:, None] * stride_cm + n[None, :], total)


@triton.jit
def scaled_gemm(a, b, scale_a, scale_b, c, M, N, K, stride_am, stride_bn, stride_cm, BLOCK: tl.constexpr):
    """int8 with a scale a row and a scale a column, every edge masked; b is transposed."""
    m = tl.program_id(0) * 128 + tl.arange(0, 128)
    n = tl.program_id(1) * 128 + tl.arange(0, 128)
    k = tl.arange(0, BLOCK)
    left = a + m[:, None] * stride_am + k[None, :]
    right = b + k[:, None] + n[None, :] * stride_bn
    total = tl.zeros((128, 128), tl.int32)
    for start in range(0, K, BLOCK):
        inside = start + k < K
        x = tl.load(left, mask=(m < M)[:, None] & inside[None, :], other=0)
        y = tl.load(right, mask=inside[:, None] & (n < N)[None, :], other=0)
        total = tl.dot(x, y, total, out_dtype=tl.int32)
        left += BLOCK
        right += BLOCK
    scaled = total.to(tl.float32) * tl.load(scale_a + m, mask=m < M, other=0)[:, None]
    scaled *= tl.load(scale_b + n, mask=n < N, other=0)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(c + m[:, None] * stride_cm + n[None, :], scaled.to(tl.float16), mask=inside)


@triton.jit
def forward(q, k, v, out, lse, seqlen, scale, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr):
    """Attention of one head: rows of D, a tile of M queries on tiles of N keys."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns, d = tl.arange(0, N), tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * D + d[None, :], mask=(rows < seqlen)[:, None], other=0)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, D), tl.float32)
    end = tl.minimum(seqlen, (tl.program_id(0) + 1) * M) if CAUSAL else seqlen
    for start in range(0, end, N):
        inside = start + columns < seqlen
        keys = tl.load(k + (start + columns)[None, :] * D + d[:, None], mask=inside[None, :], other=0)
        scores = tl.dot(queries, keys) * scale
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (rows[:, None] >= (start + columns)[None, :])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(weights, 1)
        values = tl.load(v + (start + columns)[:, None] * D + d[None, :], mask=inside[:, None], other=0)
        sums = tl.dot(weights.to(tl.float16), values, sums * alpha[:, None])
        top = new_top
    tl.store(
        out + rows[:, None] * D + d[None, :], (sums / total[:, None]).to(tl.float16), mask=(rows < seqlen)[:, None]
    )
    tl.store(lse + rows, top + tl.log2(total), mask=rows < seqlen)


@triton.jit
def paged_forward(
    q, k_cache, v_cache, k, v, pages, out, context, seqlen, page_size, scale,
    stride_q, stride_page, stride_row, stride_k, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Attention of new queries on a context in pages, then on their own keys, causally."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns, d = tl.arange(0, N), tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * stride_q + d[None, :], mask=(rows < seqlen)[:, None], other=0)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, D), tl.float32)
    for start in range(0, context, N):
        inside = start + columns < context
        page = tl.load(pages + (start + columns) // page_size, mask=inside, other=0)
        at = page * stride_page + (start + columns) % page_size * stride_row
        keys = tl.load(k_cache + at[None, :] + d[:, None], mask=inside[None, :], other=0)
        scores = tl.where(inside[None, :], tl.dot(queries, keys) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(weights, 1)
        values = tl.load(v_cache + at[:, None] + d[None, :], mask=inside[:, None], other=0)
        sums = tl.dot(weights.to(tl.float16), values, sums * alpha[:, None])
        top = new_top
    for start in range(0, tl.minimum((tl.program_id(0) + 1) * M, seqlen), N):
        inside = start + columns < seqlen
        keys = tl.load(k + (start + columns)[None, :] * stride_k + d[:, None], mask=inside[None, :], other=0)
        seen = rows[:, None] >= (start + columns)[None, :]
        scores = tl.where(seen, tl.dot(queries, keys) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        alpha = tl.exp2(top - new_top)
        total = total * alpha + tl.sum(weights, 1)
        values = tl.load(v + (start + columns)[:, None] * stride_k + d[None, :], mask=inside[:, None], other=0)
        sums = tl.dot(weights.to(tl.float16), values, sums * alpha[:, None])
        top = new_top
    out += rows[:, None] * stride_q + d[None, :]
    tl.store(out, (sums / total[:, None]).to(tl.float16), mask=(rows < seqlen)[:, None])


@triton.jit
def twice(q, k, out, seqlen, D: tl.constexpr):
    """(q k^T) k, as a backward pass has it: a tile of keys, and the same transposed."""
    rows, d = tl.arange(0, 32), tl.arange(0, D)
    queries = tl.load(q + rows[:, None] * D + d[None, :])
    sums = tl.zeros((32, D), tl.float32)
    for start in range(0, seqlen, 32):
        turned = tl.load(k + (start + rows)[None, :] * D + d[:, None], mask=(start + rows)[None, :] < seqlen, other=0)
        scores = tl.dot(queries, turned)
        sums = tl.dot(scores.to(tl.float16), tl.trans(turned), sums)
    tl.store(out + rows[:, None] * D + d[None, :], sums)
