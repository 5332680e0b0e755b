"""Wrong arguments: each a ValueError or TypeError that names the argument, what came and what is wanted."""

import pytest
import torch
from support import cumulative

from compiled_fa import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from compiled_fa.engines import tiled


def rows(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


DENSE = {"q": rows(2, 8, 4, 16), "k": rows(2, 6, 2, 16), "v": rows(2, 6, 2, 16)}
VARLEN = {
    "q": rows(8, 4, 16),
    "k": rows(6, 2, 16),
    "v": rows(6, 2, 16),
    "cu_seqlens_q": cumulative([3, 5]),
    "cu_seqlens_k": cumulative([2, 4]),
    "max_seqlen_q": 5,
    "max_seqlen_k": 4,
}
PAGED = {**VARLEN, "k": rows(4, 3, 2, 16), "v": rows(4, 3, 2, 16), "block_table": torch.zeros(2, 2, dtype=torch.int32)}
HALF, META = torch.float16, "meta"

# function, its good arguments, the bad ones, error, what the message says
MATRIX = [
    (flash_attn_func, DENSE, {"q": [[1.0]]}, TypeError, "q must be a tensor, got list"),
    (flash_attn_func, DENSE, {"q": rows(8, 4, 16)}, ValueError, "q must be (batch, seqlen_q, nheads, head_dim), got shape (8, 4, 16)"),
    (flash_attn_func, DENSE, {"k": rows(2, 6, 32)}, ValueError, "k must be (batch, seqlen_k, nheads_k, head_dim), got shape (2, 6, 32)"),
    (flash_attn_func, DENSE, {"v": rows(1, 2, 6, 2, 16)}, ValueError, "v must be (batch, seqlen_k, nheads_k, head_dim), got"),
    (flash_attn_func, DENSE, {"q": rows(2, 8, 4, 16, dtype=torch.int64)}, TypeError, "q must be float16, bfloat16, float32 or float64, got torch.int64"),
    (flash_attn_func, DENSE, {"k": rows(2, 6, 2, 16, dtype=HALF)}, TypeError, "k must be of q's dtype, torch.float32, got torch.float16"),
    (flash_attn_func, DENSE, {"v": rows(2, 6, 2, 16, dtype=HALF)}, TypeError, "v must be of q's dtype, torch.float32, got torch.float16"),
    (flash_attn_func, DENSE, {"k": rows(2, 6, 2, 16, device=META)}, ValueError, "k must be on q's device, cpu, got meta"),
    (flash_attn_func, DENSE, {"v": rows(2, 6, 2, 16, device=META)}, ValueError, "v must be on q's device, cpu, got meta"),
    (flash_attn_func, DENSE, {"k": rows(3, 6, 2, 16), "v": rows(3, 6, 2, 16)}, ValueError, "k must be of q's batch, 2, got 3"),
    (flash_attn_func, DENSE, {"k": rows(2, 6, 2, 8)}, ValueError, "k must be of q's head_dim, 16, got 8"),
    (flash_attn_func, DENSE, {"v": rows(2, 5, 2, 16)}, ValueError, "v must be of k's shape up to head_dim, (2, 6, 2), got (2, 5, 2)"),
    (flash_attn_func, DENSE, {"v": rows(2, 6, 1, 16)}, ValueError, "v must be of k's shape up to head_dim, (2, 6, 2), got (2, 6, 1)"),
    (flash_attn_func, DENSE, {"k": rows(2, 6, 3, 16), "v": rows(2, 6, 3, 16)}, ValueError, "k must be of a number of heads that divides q's 4, got 3"),
    (flash_attn_func, DENSE, {"q": rows(2, 8, 4, 0), "k": rows(2, 6, 2, 0)}, ValueError, "q must be of a head_dim from 1 to 512, got 0"),
    (flash_attn_func, DENSE, {"q": rows(2, 8, 4, 513), "k": rows(2, 6, 2, 513)}, ValueError, "q must be of a head_dim from 1 to 512, got 513"),
    (flash_attn_func, DENSE, {"v": rows(2, 6, 2, 600)}, ValueError, "v must be of a head_dim from 1 to 512, got 600"),
    (flash_attn_func, DENSE, {"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
    (flash_attn_func, DENSE, {"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0 and below 1, got -0.1"),
    (flash_attn_func, DENSE, {"dropout_p": float("nan")}, ValueError, "dropout_p must be at least 0 and below 1, got nan"),
    (flash_attn_func, DENSE, {"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite, got inf"),
    (flash_attn_func, DENSE, {"softcap": -1.0}, ValueError, "softcap must be finite and at least 0 (0: none), got -1.0"),
    (flash_attn_func, DENSE, {"window_size": (-2, 3)}, ValueError, "window_size[0] must be -1 (unbounded) or at least 0, got -2"),
    (flash_attn_func, DENSE, {"window_size": (3, -7)}, ValueError, "window_size[1] must be -1 (unbounded) or at least 0, got -7"),
    (flash_attn_func, DENSE, {"window_size": (3,)}, ValueError, "window_size must be two integers, (left, right), got (3,)"),
    (flash_attn_func, DENSE, {"window_size": 3}, TypeError, "window_size must be two integers, (left, right), got 3"),
    (flash_attn_func, DENSE, {"window_size": (1.5, 2)}, TypeError, "window_size must be two integers, (left, right), got (1.5, 2)"),
    (flash_attn_func, DENSE, {"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes must be a tensor, got list"),
    (flash_attn_func, DENSE, {"alibi_slopes": rows(3)}, ValueError, "alibi_slopes must be of shape (nheads,) = (4,) or (batch, nheads) = (2, 4), got (3,)"),
    (flash_attn_func, DENSE, {"alibi_slopes": rows(3, 4)}, ValueError, "alibi_slopes must be of shape (nheads,) = (4,) or (batch, nheads) = (2, 4), got (3, 4)"),
    (flash_attn_func, DENSE, {"alibi_slopes": rows(4, dtype=HALF)}, TypeError, "alibi_slopes must be of dtype float32, got torch.float16"),
    (flash_attn_func, DENSE, {"alibi_slopes": rows(4, device=META)}, ValueError, "alibi_slopes must be on q's device, cpu, got meta"),
    (flash_attn_kvpacked_func, {"q": DENSE["q"]}, {"kv": rows(2, 6, 3, 2, 16)}, ValueError, "kv must be (batch, seqlen_k, 2, nheads_k, head_dim), got shape (2, 6, 3, 2, 16)"),
    (flash_attn_qkvpacked_func, {}, {"qkv": rows(2, 6, 2, 16)}, ValueError, "qkv must be (batch, seqlen, 3, nheads, head_dim), got shape (2, 6, 2, 16)"),
    (flash_attn_qkvpacked_func, {}, {"qkv": 7}, TypeError, "qkv must be a tensor (batch, seqlen, 3, nheads, head_dim), got int"),
    (flash_attn_varlen_qkvpacked_func, {"cu_seqlens": cumulative([3]), "max_seqlen": 3}, {"qkv": rows(3, 2, 16)}, ValueError, "qkv must be (total, 3, nheads, head_dim), got"),
    (flash_attn_varlen_func, VARLEN, {"q": rows(2, 8, 4, 16)}, ValueError, "q must be (total_q, nheads, head_dim), got"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_q": [0, 3, 8]}, TypeError, "cu_seqlens_q must be a tensor, got list"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_q": cumulative([3, 5]).long()}, TypeError, "cu_seqlens_q must be of dtype int32, got torch.int64"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_k": cumulative([2, 4]).float()}, TypeError, "cu_seqlens_k must be of dtype int32, got torch.float32"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_q": cumulative([3, 5])[None]}, ValueError, "cu_seqlens_q must be (batch + 1), got shape (1, 3)"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_q": cumulative([3, 5])[:0]}, ValueError, "cu_seqlens_q must be of batch + 1 elements, got none"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_k": cumulative([2, 2, 2])}, ValueError, "cu_seqlens_k must be of as many elements as cu_seqlens_q, 3, got 4"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_q": cumulative([3, 5]) + 1}, ValueError, "cu_seqlens_q must be 0 at its beginning, got 1"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_q": cumulative([3, 4])}, ValueError, "cu_seqlens_q must be q's total, 8, at its end, got 7"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_k": cumulative([2, 5]), "max_seqlen_k": 9}, ValueError, "cu_seqlens_k must be k's total, 6, at its end, got 7"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_q": cumulative([9, -1]), "max_seqlen_q": 9}, ValueError, "cu_seqlens_q must be not decreasing, got 9 before 8 at 1"),
    (flash_attn_varlen_func, VARLEN, {"cu_seqlens_q": cumulative([3, 5]).to(META)}, ValueError, "cu_seqlens_q must be on q's device, cpu, got meta"),
    (flash_attn_varlen_func, VARLEN, {"max_seqlen_q": 4}, ValueError, "max_seqlen_q must be at least the longest length in cu_seqlens_q, 5, got 4"),
    (flash_attn_varlen_func, VARLEN, {"max_seqlen_k": 3}, ValueError, "max_seqlen_k must be at least the longest length in cu_seqlens_k, 4, got 3"),
    (flash_attn_varlen_func, VARLEN, {"max_seqlen_k": -1}, ValueError, "max_seqlen_k must be at least 0, got -1"),
    (flash_attn_varlen_func, VARLEN, {"max_seqlen_k": "4"}, TypeError, "max_seqlen_k must be an int or a tensor of one element, got '4'"),
    (flash_attn_varlen_func, VARLEN, {"max_seqlen_q": torch.tensor([5, 5])}, ValueError, "max_seqlen_q must be an int or a tensor of one element, got shape (2,)"),
    (flash_attn_varlen_func, VARLEN, {"alibi_slopes": rows(3, 4)}, ValueError, "alibi_slopes must be of shape (nheads,) = (4,) or (batch, nheads) = (2, 4), got (3, 4)"),
    (flash_attn_varlen_func, PAGED, {"k": rows(6, 2, 16)}, ValueError, "k must be (num_blocks, block_size, nheads_k, head_dim), got shape (6, 2, 16)"),
    (flash_attn_varlen_func, PAGED, {"block_table": rows(2, 2)}, TypeError, "block_table must be of dtype int32, got torch.float32"),
    (flash_attn_varlen_func, PAGED, {"block_table": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, "block_table must be of one row a sequence, 2, got 3"),
    (flash_attn_varlen_func, PAGED, {"block_table": torch.zeros(2, 1, dtype=torch.int32)}, ValueError, "block_table must be of enough blocks of 3 for 4 keys, got 1"),
    (flash_attn_varlen_func, PAGED, {"block_table": torch.full((2, 2), 4, dtype=torch.int32)}, ValueError, "block_table must be block numbers from 0 to 3, got 4 to 4"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "good", "bad", "error", "message"),
    [pytest.param(*row, id=f"{row[0].__name__}-{next(iter(row[2]))}-{at}") for at, row in enumerate(MATRIX)],
)
def test_refused_before_anything_is_computed(monkeypatch, function, good, bad, error, message):
    def computed(*arguments):
        raise AssertionError("computed")

    monkeypatch.setattr(tiled, "forward", computed)
    before = torch.random.get_rng_state()
    with pytest.raises(error) as refusal:
        function(**{**good, **bad})
    assert message in str(refusal.value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_good_arguments_are_good():
    flash_attn_func(**DENSE)
    flash_attn_varlen_func(**VARLEN)
    flash_attn_varlen_func(**PAGED)


def test_the_ops_refuse_too():
    attention, backward = torch.ops.compiled_fa.attention, torch.ops.compiled_fa.attention_backward
    q, k, v = DENSE.values()
    with pytest.raises(ValueError, match=r"dropout_seed must be an int64 tensor of one element where dropout_p > 0"):
        attention(q, k, v, dropout_p=0.5)
    with pytest.raises(TypeError, match=r"dropout_seed must be of dtype int64, got torch.int32"):
        attention(q, k, v, dropout_p=0.5, dropout_seed=torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"dropout_seed must be of one element, got shape \(2,\)"):
        attention(q, k, v, dropout_p=0.5, dropout_seed=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"engine must be .* got 'quick'"):
        attention(q, k, v, engine="quick")
    out, lse = attention(q, k, v)
    with pytest.raises(ValueError, match=r"dout must be of shape \(2, 8, 4, 16\), got \(2, 8, 4, 8\)"):
        backward(out[..., :8], None, out, lse, q, k, v)
    with pytest.raises(TypeError, match=r"out must be of q's dtype, torch.float32, got torch.float16"):
        backward(out, None, out.half(), lse, q, k, v)
    with pytest.raises(ValueError, match=r"lse must be of shape \(2, 4, 8\), got \(2, 8, 4\)"):
        backward(out, None, out, lse.mT, q, k, v)
