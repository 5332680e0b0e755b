"""flash_attn_with_kvcache refuses what is wrong, by name, and leaves the cache as it was. What nobody uses may be
anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv import small

import compiled_fa
from compiled_fa import flash_attn_func, flash_attn_with_kvcache


def bad(message, error=ValueError, **changes):
    return pytest.param(changes, error, message, id=message[:60])


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def paged(*rows):
    return {"block_table": torch.tensor(rows, dtype=torch.int32)}


TABLE = torch.rand(8, 4)
OWN_PAGES = "block_table must be pages of its own for each row of k, which is written to them"
BAD = [
    bad("q must be a tensor, got NoneType", TypeError, q=None),
    bad("v_cache must be a tensor, got list", TypeError, v_cache=[]),
    bad("cache_batch_idx must be a tensor, got list", TypeError, cache_batch_idx=[0, 1]),
    bad("q must be (batch, seqlen_q, nheads, head_dim), got shape (3, 4, 8)", q=torch.zeros(3, 4, 8)),
    bad("q must be (batch, seqlen_q, nheads, head_dim), got shape ()", q=torch.tensor(1.0), cache_seqlens=5),
    bad("k_cache must be (batch_cache, seqlen_cache, nheads_k, head_dim), got shape (2,)", k_cache=torch.zeros(2)),
    bad("k_cache must be (num_blocks, page_block_size,", k_cache=torch.zeros(2), **paged([0], [1])),
    bad("k_cache must be of q's dtype, torch.float32", TypeError, k_cache=torch.zeros(2, 12, 2, 8).half()),
    bad("v_cache must be on q's device, cpu, got meta", v_cache=torch.zeros(2, 12, 2, 8, device="meta")),
    bad("k_cache must be of q's head_dim, 8, got 9", k_cache=torch.zeros(2, 12, 2, 9)),
    bad("k_cache must be of a number of heads that divides q's 4, got 3", k_cache=torch.zeros(2, 12, 3, 8),
        v_cache=torch.zeros(2, 12, 3, 8)),
    bad("v_cache must be of k_cache's shape up to head_dim, (2, 12, 2), got (2, 11, 2)",
        v_cache=torch.zeros(2, 11, 2, 8)),
    bad("k_cache must be of at least q's batch, 2, got 1", k_cache=torch.zeros(1, 12, 2, 8),
        v_cache=torch.zeros(1, 12, 2, 8)),
    bad("v must be given where the other is, got None", v=None),
    bad("k must be given where the other is, got None", k=None),
    bad("cache_seqlens must be given where k is: it says where to write, got None", cache_seqlens=None),
    bad("k must be of shape (batch, seqlen_new, *k_cache's heads and head_dim) = (2, 3, 2, 8), got (2, 3, 1, 8)",
        k=torch.zeros(2, 3, 1, 8)),
    bad("v must be of shape (batch, seqlen_new, *v_cache's heads and head_dim) = (2, 3, 2, 8), got (2, 2, 2, 8)",
        v=torch.zeros(2, 2, 2, 8)),
    bad("k must be (batch, seqlen_new, nheads_k, head_dim), got shape (3, 2, 8)", k=torch.zeros(3, 2, 8)),
    bad("k must be of k_cache's dtype, torch.float32, got torch.float64", TypeError,
        k=torch.zeros(2, 3, 2, 8).double()),
    bad("v must be on v_cache's device, cpu, got meta", v=torch.zeros(2, 3, 2, 8, device="meta")),
    bad("k_cache must be memory of its own in every element where k is written to it, got strides",
        k_cache=torch.zeros(2, 12, 1, 8).expand(-1, -1, 2, -1)),
    bad("cache_seqlens must be of dtype int32, got torch.int64", TypeError, cache_seqlens=torch.tensor([5, 2])),
    bad("cache_seqlens must be of q's batch, 2, got 1", cache_seqlens=ints(5)),
    bad("cache_seqlens must be (batch), got shape ()", cache_seqlens=ints(5)[0]),
    bad("cache_seqlens must be on q's device, cpu, got meta", cache_seqlens=ints(5, 2).to("meta")),
    bad("cache_seqlens must be an int or a tensor of one element, got 5.0", TypeError, cache_seqlens=5.0),
    bad("cache_seqlens must be at least 0, got -1", cache_seqlens=-1),
    bad("cache_seqlens must be at least 0, got -4", cache_seqlens=ints(5, -4)),
    bad("cache_seqlens must be at most 9, so that 3 new keys fit in k_cache, got 10", cache_seqlens=ints(5, 10)),
    bad("cache_seqlens must be at most 9, so that 3 new keys fit in k_cache, got 10", RuntimeError, cache_seqlens=10),
    bad("cache_seqlens must be at most 12 in k_cache, got 13", k=None, v=None, cache_seqlens=ints(13, 0)),
    bad("cache_batch_idx must be of dtype int32, got torch.int64", TypeError, cache_batch_idx=torch.tensor([0, 1])),
    bad("cache_batch_idx must be of q's batch, 2, got 3", cache_batch_idx=ints(0, 1, 1)),
    bad("cache_batch_idx must be rows of k_cache, from 0 to 1, got 0 to 2", cache_batch_idx=ints(0, 2)),
    bad("cache_batch_idx must be rows of k_cache, from 0 to 1, got -1 to 0", cache_batch_idx=ints(0, -1)),
    bad("cache_batch_idx must be another row of k_cache for each row of k", cache_batch_idx=ints(1, 1)),
    bad("cache_batch_idx must be None where there is a block_table", cache_batch_idx=ints(0, 1), **paged([0], [1])),
    bad("cache_leftpad must be from 0 to the row's cache_seqlens, 2, got 3", cache_leftpad=ints(0, 3)),
    bad("cache_leftpad must be from 0 to the row's cache_seqlens, 5, got -1", cache_leftpad=ints(-1, 0)),
    bad("cache_leftpad must be of dtype int32, got torch.int64", TypeError, cache_leftpad=torch.tensor([0, 1])),
    bad("block_table must be of dtype int32, got torch.int64", TypeError, block_table=torch.tensor([[0], [1]])),
    bad("k_cache must be of pages of at least 1 row, got 0", k_cache=torch.zeros(2, 0, 2, 8),
        v_cache=torch.zeros(2, 0, 2, 8), **paged([0], [1])),
    bad("block_table must be of one row a sequence, 2, got 1", **paged([0])),
    bad("block_table must be (batch, max_num_blocks_per_seq), got shape (2,)", block_table=ints(0, 1)),
    bad("block_table must be of enough pages of 12 for 10 keys and 3 new ones, got 1", cache_seqlens=ints(5, 10),
        **paged([0], [1])),
    bad("block_table must be of enough pages of 12 for 10 keys and 3 new ones", RuntimeError, cache_seqlens=ints(5, 10),
        **paged([0], [1])),
    bad("block_table must be of enough pages of 12 for 13 keys, got 1", RuntimeError, k=None, v=None,
        cache_seqlens=ints(13, 0), **paged([0], [1])),
    bad("block_table must be numbers of k_cache's pages, from 0 to 1, got 0 to 2", **paged([0], [2])),
    bad("block_table must be numbers of k_cache's pages, from 0 to 1, got -1 to 1", **paged([-1], [1])),
    bad("block_table must be another place for each new key", cache_seqlens=ints(5, 6), **paged([1], [1])),
    bad(f"{OWN_PAGES}, got page 1, where row 0 writes over keys of row 1", cache_seqlens=ints(2, 8), **paged([1], [1])),
    bad(f"{OWN_PAGES}, got page 1, where row 1 writes over keys of row 0", cache_seqlens=ints(9, 5),
        cache_leftpad=ints(6, 0), **paged([1], [1])),
    bad(f"{OWN_PAGES}, got page 0, where row 1 writes over keys of row 0", cache_seqlens=ints(13, 5),
        **paged([0, 1], [0, 0])),
    bad("rotary_sin must be given where the other is, got None", rotary_cos=TABLE),
    bad("rotary_cos must be given where the other is, got None", rotary_sin=TABLE),
    bad("rotary_cos must be None where there is no k to rotate", rotary_cos=TABLE, rotary_sin=TABLE, k=None, v=None),
    bad("rotary_cos must be (positions, rotary_dim / 2), got shape (8,)", rotary_cos=TABLE[:, 0], rotary_sin=TABLE),
    bad("rotary_sin must be of rotary_cos's shape, (8, 4), got (8, 3)", rotary_cos=TABLE, rotary_sin=TABLE[:, :3]),
    bad("rotary_cos must be of at most head_dim / 2 = 4 columns, got 5", rotary_cos=torch.zeros(8, 5),
        rotary_sin=torch.zeros(8, 5)),
    bad("rotary_cos must be of a row for each of 9 positions, got 8 rows", rotary_cos=TABLE, rotary_sin=TABLE,
        cache_seqlens=ints(6, 2)),
    bad("rotary_cos must be of a row for each of 9 positions, got 8 rows", rotary_cos=TABLE, rotary_sin=TABLE,
        q=torch.zeros(2, 4, 4, 8), causal=True),
    bad("num_splits must be at least 0 (0: as engines find best), got -1", num_splits=-1),
    bad("num_splits must be an int or a tensor of one element, got 1.5", TypeError, num_splits=1.5),
    bad("window_size[0] must be -1 (unbounded) or at least 0, got -2", window_size=(-2, 0)),
    bad("softcap must be finite and at least 0", softcap=-1.0),
    bad("softmax_scale must be finite", softmax_scale=float("nan")),
    bad("alibi_slopes must be of shape (nheads,) = (4,) or (batch, nheads) = (2, 4), got (3,)",
        alibi_slopes=torch.zeros(3)),
    bad("causal must be a bool, got 'yes'", TypeError, causal="yes"),
    bad("return_softmax_lse must be a bool, got 'yes'", TypeError, return_softmax_lse="yes"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_input_is_named_and_leaves_the_cache_as_it_was(changes, error, message):
    arguments = small(**changes)
    caches = [arguments[name] for name in ("k_cache", "v_cache") if isinstance(arguments[name], torch.Tensor)]
    before = [x.clone() for x in caches]
    with pytest.raises(error) as raised:
        flash_attn_with_kvcache(**arguments)
    assert str(raised.value).startswith(message)
    assert all(x.is_meta or torch.equal(x, old) for x, old in zip(caches, before, strict=True))


def test_an_engine_that_cannot_serve_leaves_the_cache_as_it_was():
    arguments = small()
    before = arguments["k_cache"].clone()
    with (
        compiled_fa.use_engine("fused"),
        pytest.raises(RuntimeError, match="the fused engine was asked for and cannot"),
    ):
        flash_attn_with_kvcache(**arguments)
    assert torch.equal(arguments["k_cache"], before)
    with compiled_fa.use_engine("tiled"):
        flash_attn_with_kvcache(**arguments)
    assert torch.equal(arguments["k_cache"][0, 5:8], arguments["k"][0])


def test_what_nobody_uses_may_be_anything():
    """A row's table behind its last page and before its first key's, and all of a row's without keys; two rows on one
    page that is only read."""
    table = torch.tensor([[0, -7], [1, 10**6]], dtype=torch.int32)
    expected = flash_attn_with_kvcache(**small())
    assert torch.allclose(flash_attn_with_kvcache(**small(block_table=table)), expected, atol=1e-6)
    one = {"q": torch.randn(1, 3, 4, 8), "k": None, "v": None}
    for number, where in ((10**6, {"cache_seqlens": 0}), (-1, {"cache_seqlens": 12, "cache_leftpad": ints(12)})):
        assert not flash_attn_with_kvcache(**small(**one, **where, **paged([number]))).any()
    shared = small(k=None, v=None, block_table=table[:1].expand(2, -1))
    assert flash_attn_with_kvcache(**shared).isfinite().all()


def test_pages_that_rows_may_write_to_and_share():
    """Where no key of another row is written over: a page before and behind a leftpad; a ring of pages of a row's own;
    a page out of sight."""
    where: dict[str, Any] = {"cache_seqlens": ints(9, 5), "cache_leftpad": ints(8, 0)}
    apart, together = small(**where), small(**where, **paged([1], [1]))
    for name in ("k_cache", "v_cache"):
        apart[name][1, 5:8], together[name][1, :5] = 0.0, apart[name][1, :5]
        together[name][1, 8] = apart[name][0, 8]
    assert torch.allclose(flash_attn_with_kvcache(**together), flash_attn_with_kvcache(**apart), atol=1e-6)
    for table, some in (([0, 0], [1, 1]), {}), (([1, 0], [1, 1]), {"cache_leftpad": ints(12, 0)}):
        changes = {"cache_seqlens": ints(13, 14), **paged(*table), **some}
        assert flash_attn_with_kvcache(**small(**changes), window_size=(3, 0)).isfinite().all()


@pytest.mark.parametrize("append", [False, True])
def test_flash_attns_own_bounds_of_a_table(append):
    """A table of one page of 256, and a row that has one key too many: RuntimeError, which names block_table."""
    k_cache, v_cache = torch.randn(2, 4, 256, 1, 64)
    q, table = torch.randn(1, 1, 1, 64), torch.zeros(1, 1, dtype=torch.int32)
    new: dict[str, Any] = {"k": q, "v": q} if append else {}
    with pytest.raises(RuntimeError, match="block_table"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=ints(256 + (not append)), block_table=table, **new)
    full = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=ints(256), block_table=table)
    assert torch.allclose(full, flash_attn_func(q, k_cache[:1], v_cache[:1]), atol=1e-6)
