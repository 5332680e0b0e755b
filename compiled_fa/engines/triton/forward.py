"""The forward kernel: out and lse of a tile of queries, with one pass over the keys that they see.

Online softmax as in FlashAttention-2 (arXiv 2307.08691), Algorithm 1. Dropout leaves the sum of the probabilities as it
is and takes part in their product with v alone, so that it needs no pass of its own.

Triton code: loading.py makes a module of it for each set of terms, with the score program's functions in place of the
names below.
"""

from typing import Any

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    clear_rest,
    clear_rest_of_lse,
    integers,
    load_rows,
    reals,
    rows_of_sequence,
    store_rows,
    tiles_between,
)

of_head: Any
of_rows: Any
score: Any
seen: Any
keep: Any
keys_of_tile: Any


@triton.jit
def over_keys(
    accumulator, total, highest, q_tile, k, v, first, count, before,
    behind, seqlen_k, stride_k_row, stride_v_row, head_values, row_values,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, COLUMNS: tl.constexpr,
    COLUMNS_V: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`count` tiles of keys from `first` on; masked ones: `before` of them, the others from `behind` on."""
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
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen no key yet: -inf - -inf is no number.
        subtracted = tl.where(new_highest == float("-inf"), 0.0, new_highest) if MASKED else new_highest
        rescale = tl.exp2((highest - subtracted) * LOG2E)
        probabilities = tl.exp2(scores * LOG2E - (subtracted * LOG2E)[:, None])
        total = total * rescale + tl.sum(probabilities, 1)
        if DROPOUT:
            probabilities = tl.where(keep(kv_idx, head_values, row_values), probabilities, 0.0)
        v_tile = load_rows(v, key, seqlen_k, stride_v_row, BLOCK_N, HEAD_DIM_V, COLUMNS_V, not MASKED)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(probabilities.to(v_tile.dtype), v_tile, accumulator, input_precision=PRECISION)
        highest = new_highest
    return accumulator, total, highest


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
def attention_forward(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed,
    seqlen_q, seqlen_k, softmax_scale, softcap, window_left, window_right, threshold,
    kept, nheads, group, tiles, batches, rows, stride_q_batch, stride_q_row, stride_q_head,
    stride_k_batch, stride_k_row, stride_k_head, stride_v_batch, stride_v_row,
    stride_v_head, stride_out_batch, stride_out_row, stride_out_head, stride_lse_batch,
    stride_lse_head, alibi_slopes_stride_0, alibi_slopes_stride_1,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    COLUMNS: tl.constexpr, COLUMNS_V: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program is a tile of queries of one head of one sequence.

    Dense tensors have no cu_seqlens, packed ones no strides of a batch. group: query heads of a key head. tiles: of a
    longest sequence. batches, rows: how many there are of packed ones. kept: the probability of being kept. seqlen_q,
    seqlen_k: of dense calls.
    """
    seqlen_q, seqlen_k, window_left, window_right, threshold, nheads, group, tiles, batches, rows = integers(
        seqlen_q, seqlen_k, window_left, window_right, threshold, nheads, group, tiles, batches, rows
    )
    softmax_scale, softcap, kept = reals(softmax_scale, softcap, kept)
    program = tl.program_id(0)
    # With causal, the last tiles of a sequence have most to do: they begin first.
    tile = tiles - 1 - program % tiles
    first = tile * BLOCK_M
    head = program // tiles % nheads
    batch = program // tiles // nheads
    seqlen_q, offset_q = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_q_batch, stride_q_row)
    if cu_seqlens_q is not None:
        out_of_head = out + head.to(tl.int64) * stride_out_head
        clear_rest(
            out_of_head, cu_seqlens_q, batch, batches, rows, tile, tiles, stride_out_row, BLOCK_M, HEAD_DIM_V, COLUMNS_V
        )
        lse_of_head = lse + head.to(tl.int64) * stride_lse_head
        clear_rest_of_lse(lse_of_head, cu_seqlens_q, batch, batches, rows, tile, tiles, BLOCK_M)
    if first >= seqlen_q:
        return
    seqlen_k, offset_k = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, stride_k_batch, stride_k_row)
    _, offset_v = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, stride_v_batch, stride_v_row)
    _, offset_out = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_out_batch, stride_out_row)
    _, offset_lse = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, stride_lse_batch, 1)
    q += offset_q + head.to(tl.int64) * stride_q_head
    k += offset_k + (head // group).to(tl.int64) * stride_k_head
    v += offset_v + (head // group).to(tl.int64) * stride_v_head
    out += offset_out + head.to(tl.int64) * stride_out_head
    lse += offset_lse + head.to(tl.int64) * stride_lse_head

    row = first + tl.arange(0, BLOCK_M)
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
    accumulator = tl.zeros([BLOCK_M, COLUMNS_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    accumulator, total, highest = over_keys(
        accumulator, total, highest, q_tile, k, v, start, before + behind_count, before, behind, seqlen_k, stride_k_row,
        stride_v_row, head_values, row_values, BLOCK_N, HEAD_DIM, HEAD_DIM_V, COLUMNS, COLUMNS_V, True, DROPOUT,
        PRECISION,
    )  # fmt: skip
    accumulator, total, highest = over_keys(
        accumulator, total, highest, q_tile, k, v, full, full_count, 0, 0, seqlen_k, stride_k_row, stride_v_row,
        head_values, row_values, BLOCK_N, HEAD_DIM, HEAD_DIM_V, COLUMNS, COLUMNS_V, False, DROPOUT, PRECISION,
    )  # fmt: skip

    # A row without keys: 0 / 1, and log 0.
    divisor = tl.where(total == 0.0, 1.0, total)
    if DROPOUT:
        divisor = divisor * kept
    store_rows(out, first, seqlen_q, stride_out_row, accumulator / divisor[:, None], BLOCK_M, HEAD_DIM_V, COLUMNS_V)
    tl.store(lse + row, highest + tl.log2(tl.where(total == 0.0, 1.0, total)) * LN2, mask=row < seqlen_q)
