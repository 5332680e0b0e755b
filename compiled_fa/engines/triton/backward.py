"""The backward kernels: dq and delta of a tile of queries, then dk and dv of a tile of keys.

FlashAttention-2 (arXiv 2307.08691), Algorithm 2, as two kernels, so that nothing is added up by two programs: the same
inputs give the same bits. Dropout is decided anew for each probability. delta is what the second kernel needs of out:
rowsum(dout * out), less the gradient of lse where it has one.

Triton code: loading.py makes a module of it for each set of terms, with the score program's functions in place of the
names below.
"""

from typing import Any

import triton
import triton.language as tl

from .tiles import LOG2E, clear_rest, integers, load_rows, reals, rows_of_sequence, store_rows, tiles_between

of_head: Any
of_rows: Any
score: Any
seen: Any
keep: Any
product_gradient: Any
keys_of_tile: Any
positions_of_tile: Any


@triton.jit
def load_statistics(lse, delta, row, seqlen_q, WHOLE: tl.constexpr):
    """lse in base 2, and delta. Rows that do not exist have an lse of inf, and probabilities of 0; so have those
    without keys, whose scores are all -inf, from an lse that is finite."""
    if WHOLE:
        lse_of_rows = tl.load(lse + row)
        delta_of_rows = tl.load(delta + row)
    else:
        lse_of_rows = tl.load(lse + row, mask=row < seqlen_q, other=float("inf"))
        delta_of_rows = tl.load(delta + row, mask=row < seqlen_q, other=0.0)
    return tl.where(lse_of_rows == float("-inf"), 0.0, lse_of_rows) * LOG2E, delta_of_rows


@triton.jit
def over_keys(
    dq, q_tile, dout_tile, k, v, lse, delta, first, count, before, behind, seqlen_k, stride_k_row, stride_v_row, kept,
    head_values, row_values, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, with `count` tiles of keys more, from `first` on; masked ones: `before` of them, the others from `behind` on.
    lse and delta: (BLOCK_M, 1)."""
    for tile in tl.range(0, count):
        key = first + tile * BLOCK_N
        if MASKED:
            key = tl.where(tile < before, key, behind + (tile - before) * BLOCK_N)
        kv_idx = (key + tl.arange(0, BLOCK_N))[None, :]
        k_tile = load_rows(k, key, seqlen_k, stride_k_row, BLOCK_N, HEAD_DIM, COLUMNS, not MASKED)
        product = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores = score(product, kv_idx, head_values, row_values)
        if MASKED:
            scores = tl.where(seen(kv_idx, head_values, row_values), scores, float("-inf"))
        probabilities = tl.exp2(scores * LOG2E - lse)
        v_tile = load_rows(v, key, seqlen_k, stride_v_row, BLOCK_N, HEAD_DIM_V, COLUMNS_V, not MASKED)
        dprobabilities = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        if DROPOUT:
            dprobabilities = tl.where(keep(kv_idx, head_values, row_values), dprobabilities * (1.0 / kept), 0.0)
        dproduct = product_gradient(probabilities * (dprobabilities - delta), product, head_values, row_values)
        dq = tl.dot(dproduct.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(
    do_not_specialize=[
        "seqlen_q",
        "seqlen_k",
        "window_left",
        "window_right",
        "threshold",
        "nheads",
        "group",
        "tiles",
        "batches",
        "rows",
    ]
)
def attention_backward_queries(
    q, k, v, dout, out, lse, dlse, dq, delta, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, seqlen_q, seqlen_k,
    softmax_scale, softcap, window_left, window_right, threshold, kept, nheads, group, tiles, batches, rows,
    stride_q_batch, stride_q_row, stride_q_head, stride_k_batch, stride_k_row, stride_k_head, stride_v_batch,
    stride_v_row, stride_v_head, stride_dout_batch, stride_dout_row, stride_dout_head, stride_out_batch, stride_out_row,
    stride_out_head, stride_lse_batch, stride_lse_head, stride_dq_batch, stride_dq_row, stride_dq_head,
    alibi_slopes_stride_0, alibi_slopes_stride_1,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program is a tile of queries of one head of one sequence; arguments as forward.py's. delta, and dlse where it
    is given, are laid out as lse."""
    seqlen_q, seqlen_k, window_left, window_right, threshold, nheads, group, tiles, batches, rows = integers(
        seqlen_q, seqlen_k, window_left, window_right, threshold, nheads, group, tiles, batches, rows
    )
    softmax_scale, softcap, kept = reals(softmax_scale, softcap, kept)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    first = tile * BLOCK_M
    head = program // tiles % nheads
    batch = program // tiles // nheads
    seqlen_q, offset_q = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_q_batch, stride_q_row)
    if cu_seqlens_q is not None:
        dq_of_head = dq + head.to(tl.int64) * stride_dq_head
        clear_rest(
            dq_of_head, cu_seqlens_q, batch, batches, rows, tile, tiles, stride_dq_row, BLOCK_M, HEAD_DIM, COLUMNS
        )
    if first >= seqlen_q:
        return
    seqlen_k, offset_k = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, stride_k_batch, stride_k_row)
    _, offset_v = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, stride_v_batch, stride_v_row)
    _, offset_dout = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_dout_batch, stride_dout_row)
    _, offset_out = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_out_batch, stride_out_row)
    _, offset_dq = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_dq_batch, stride_dq_row)
    _, offset_lse = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_lse_batch, 1)
    offset_lse += head.to(tl.int64) * stride_lse_head
    q += offset_q + head.to(tl.int64) * stride_q_head
    k += offset_k + (head // group).to(tl.int64) * stride_k_head
    v += offset_v + (head // group).to(tl.int64) * stride_v_head
    dout += offset_dout + head.to(tl.int64) * stride_dout_head
    out += offset_out + head.to(tl.int64) * stride_out_head
    dq += offset_dq + head.to(tl.int64) * stride_dq_head

    row = first + tl.arange(0, BLOCK_M)
    dout_tile = load_rows(dout, first, seqlen_q, stride_dout_row, BLOCK_M, HEAD_DIM_V, COLUMNS_V, False)
    out_tile = load_rows(out, first, seqlen_q, stride_out_row, BLOCK_M, HEAD_DIM_V, COLUMNS_V, False)
    of_out = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        of_out -= tl.load(dlse + offset_lse + row, mask=row < seqlen_q, other=0.0)
    tl.store(delta + offset_lse + row, of_out, mask=row < seqlen_q)
    lse_of_rows = tl.load(lse + offset_lse + row, mask=row < seqlen_q, other=0.0)
    lse_of_rows = tl.where(lse_of_rows == float("-inf"), 0.0, lse_of_rows) * LOG2E

    head_values = of_head(
        batch, head, seqlen_q, seqlen_k, window_left, window_right, softmax_scale, softcap, threshold, alibi_slopes,
        seed, alibi_slopes_stride_0, alibi_slopes_stride_1,
    )  # fmt: skip
    row_values = of_rows(row[:, None], head_values)
    position = first + seqlen_k - seqlen_q
    last_position = tl.minimum(first + BLOCK_M, seqlen_q) - 1 + seqlen_k - seqlen_q
    start, stop, full_start, full_stop = keys_of_tile(position, last_position, seqlen_k, window_left, window_right)
    start, before, full, full_count, behind, behind_count = tiles_between(start, stop, full_start, full_stop, BLOCK_N)

    q_tile = load_rows(q, first, seqlen_q, stride_q_row, BLOCK_M, HEAD_DIM, COLUMNS, False)
    gradient = tl.zeros([BLOCK_M, COLUMNS], tl.float32)
    gradient = over_keys(
        gradient, q_tile, dout_tile, k, v, lse_of_rows[:, None], of_out[:, None], start, before + behind_count, before,
        behind, seqlen_k, stride_k_row, stride_v_row, kept, head_values, row_values, BLOCK_N, HEAD_DIM, HEAD_DIM_V,
        COLUMNS, COLUMNS_V, True, DROPOUT, PRECISION,
    )  # fmt: skip
    gradient = over_keys(
        gradient, q_tile, dout_tile, k, v, lse_of_rows[:, None], of_out[:, None], full, full_count, 0, 0, seqlen_k,
        stride_k_row, stride_v_row, kept, head_values, row_values, BLOCK_N, HEAD_DIM, HEAD_DIM_V, COLUMNS, COLUMNS_V,
        False, DROPOUT, PRECISION,
    )  # fmt: skip
    store_rows(dq, first, seqlen_q, stride_dq_row, gradient, BLOCK_M, HEAD_DIM, COLUMNS)


@triton.jit
def over_queries(
    dk, dv, k_tile, v_tile, q, dout, lse, delta, key, first, count, before, behind, seqlen_q, stride_q_row,
    stride_dout_row, kept, head_values, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr, MASKED: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, with `count` tiles of queries more; scores are turned, a row a key."""
    kv_idx = (key + tl.arange(0, BLOCK_N))[:, None]
    for tile in tl.range(0, count):
        query = first + tile * BLOCK_M
        if MASKED:
            query = tl.where(tile < before, query, behind + (tile - before) * BLOCK_M)
        row = query + tl.arange(0, BLOCK_M)
        row_values = of_rows(row[None, :], head_values)
        q_tile = load_rows(q, query, seqlen_q, stride_q_row, BLOCK_M, HEAD_DIM, COLUMNS, not MASKED)
        lse_of_rows, delta_of_rows = load_statistics(lse, delta, row, seqlen_q, not MASKED)
        product = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        scores = score(product, kv_idx, head_values, row_values)
        if MASKED:
            scores = tl.where(seen(kv_idx, head_values, row_values), scores, float("-inf"))
        probabilities = tl.exp2(scores * LOG2E - lse_of_rows[None, :])
        dout_tile = load_rows(dout, query, seqlen_q, stride_dout_row, BLOCK_M, HEAD_DIM_V, COLUMNS_V, not MASKED)
        dprobabilities = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
        used = probabilities
        if DROPOUT:
            kept_ones = keep(kv_idx, head_values, row_values)
            used = tl.where(kept_ones, probabilities * (1.0 / kept), 0.0)
            dprobabilities = tl.where(kept_ones, dprobabilities * (1.0 / kept), 0.0)
        dv = tl.dot(used.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        dscores = probabilities * (dprobabilities - delta_of_rows[None, :])
        dproduct = product_gradient(dscores, product, head_values, row_values)
        dk = tl.dot(dproduct.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "seqlen_q",
        "seqlen_k",
        "window_left",
        "window_right",
        "threshold",
        "nheads",
        "group",
        "tiles",
        "batches",
        "rows",
    ]
)
def attention_backward_keys(
    q, k, v, dout, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, seqlen_q, seqlen_k,
    softmax_scale, softcap, window_left, window_right, threshold, kept, nheads, group, tiles, batches, rows,
    stride_q_batch, stride_q_row, stride_q_head, stride_k_batch, stride_k_row, stride_k_head, stride_v_batch,
    stride_v_row, stride_v_head, stride_dout_batch, stride_dout_row, stride_dout_head, stride_lse_batch,
    stride_lse_head, stride_dk_batch, stride_dk_row, stride_dk_head, stride_dv_batch, stride_dv_row, stride_dv_head,
    alibi_slopes_stride_0, alibi_slopes_stride_1,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program is a tile of keys of one key head of one sequence, with all query heads that read it; nheads: of
    keys."""
    seqlen_q, seqlen_k, window_left, window_right, threshold, nheads, group, tiles, batches, rows = integers(
        seqlen_q, seqlen_k, window_left, window_right, threshold, nheads, group, tiles, batches, rows
    )
    softmax_scale, softcap, kept = reals(softmax_scale, softcap, kept)
    program = tl.program_id(0)
    tile = program % tiles
    key = tile * BLOCK_N
    key_head = program // tiles % nheads
    batch = program // tiles // nheads
    seqlen_k, offset_k = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, stride_k_batch, stride_k_row)
    if cu_seqlens_k is not None:
        dk_of_head = dk + key_head.to(tl.int64) * stride_dk_head
        dv_of_head = dv + key_head.to(tl.int64) * stride_dv_head
        clear_rest(
            dk_of_head, cu_seqlens_k, batch, batches, rows, tile, tiles, stride_dk_row, BLOCK_N, HEAD_DIM, COLUMNS
        )
        clear_rest(
            dv_of_head, cu_seqlens_k, batch, batches, rows, tile, tiles, stride_dv_row, BLOCK_N, HEAD_DIM_V, COLUMNS_V
        )
    if key >= seqlen_k:
        return
    seqlen_q, offset_q = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_q_batch, stride_q_row)
    _, offset_v = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, stride_v_batch, stride_v_row)
    _, offset_dk = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, stride_dk_batch, stride_dk_row)
    _, offset_dv = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, stride_dv_batch, stride_dv_row)
    _, offset_dout = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_dout_batch, stride_dout_row)
    _, offset_lse = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_lse_batch, 1)
    k += offset_k + key_head.to(tl.int64) * stride_k_head
    v += offset_v + key_head.to(tl.int64) * stride_v_head
    dk += offset_dk + key_head.to(tl.int64) * stride_dk_head
    dv += offset_dv + key_head.to(tl.int64) * stride_dv_head

    shift = seqlen_k - seqlen_q
    last_key = tl.minimum(key + BLOCK_N, seqlen_k) - 1
    start, stop, full_start, full_stop = positions_of_tile(key, last_key, shift, seqlen_k, window_left, window_right)
    start, before, full, full_count, behind, behind_count = tiles_between(
        start - shift, stop - shift, full_start - shift, full_stop - shift, BLOCK_M
    )

    k_tile = load_rows(k, key, seqlen_k, stride_k_row, BLOCK_N, HEAD_DIM, COLUMNS, False)
    v_tile = load_rows(v, key, seqlen_k, stride_v_row, BLOCK_N, HEAD_DIM_V, COLUMNS_V, False)
    gradient_k = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    gradient_v = tl.zeros([BLOCK_N, COLUMNS_V], tl.float32)
    for member in tl.range(0, group):
        head = key_head * group + member
        q_of_head = q + offset_q + head.to(tl.int64) * stride_q_head
        dout_of_head = dout + offset_dout + head.to(tl.int64) * stride_dout_head
        lse_of_head = lse + offset_lse + head.to(tl.int64) * stride_lse_head
        delta_of_head = delta + offset_lse + head.to(tl.int64) * stride_lse_head
        head_values = of_head(
            batch, head, seqlen_q, seqlen_k, window_left, window_right, softmax_scale, softcap, threshold, alibi_slopes,
            seed, alibi_slopes_stride_0, alibi_slopes_stride_1,
        )  # fmt: skip
        gradient_k, gradient_v = over_queries(
            gradient_k, gradient_v, k_tile, v_tile, q_of_head, dout_of_head, lse_of_head, delta_of_head, key, start,
            before + behind_count, before, behind, seqlen_q, stride_q_row, stride_dout_row, kept, head_values, BLOCK_M,
            BLOCK_N, HEAD_DIM, HEAD_DIM_V, COLUMNS, COLUMNS_V, True, DROPOUT, PRECISION,
        )  # fmt: skip
        gradient_k, gradient_v = over_queries(
            gradient_k, gradient_v, k_tile, v_tile, q_of_head, dout_of_head, lse_of_head, delta_of_head, key, full,
            full_count, 0, 0, seqlen_q, stride_q_row, stride_dout_row, kept, head_values, BLOCK_M, BLOCK_N, HEAD_DIM,
            HEAD_DIM_V, COLUMNS, COLUMNS_V, False, DROPOUT, PRECISION,
        )  # fmt: skip
    store_rows(dk, key, seqlen_k, stride_dk_row, gradient_k, BLOCK_N, HEAD_DIM, COLUMNS)
    store_rows(dv, key, seqlen_k, stride_dv_row, gradient_v, BLOCK_N, HEAD_DIM_V, COLUMNS_V)
