"""torch's FLOP counter counts our ops, and attention that is saved, or compiled, is not computed twice."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Any

import pytest
import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from support import cumulative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from compiled_fa import attention, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

OPS = torch.ops.compiled_fa
B, SQ, SK, H, HK, D, DV = 2, 5, 7, 4, 2, 8, 16
SCORE = 2 * H * (D + DV)  # operations of a forward for one score in every head
SCORE_BACKWARD = 2 * H * (3 * D + 2 * DV)


def counted(function: Any, *arguments: Any, **options: Any) -> dict[str, int]:
    """By name of the op."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return {str(op).rpartition(".")[2]: count for op, count in counter.get_flop_counts()["Global"].items()}


def inputs(requires_grad: bool = True) -> list[torch.Tensor]:
    shapes = (B, SQ, H, D), (B, SK, HK, D), (B, SK, HK, DV)
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def both(function: Any, *arguments: Any, **options: Any) -> None:
    function(*arguments, **options).sum().backward()


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2).repeat_interleave(H // x.shape[2], dim=1) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


def test_forward_and_backward_count_naive_attentions_products():
    """And the scores once more, which backward recomputes."""
    scores = 2 * B * H * SQ * SK * D
    products = sum(counted(both, naive, *inputs()).values())
    found = counted(both, flash_attn_func, *inputs())
    assert sum(found.values()) == products + scores
    assert found["attention"] == counted(naive, *inputs(False))["bmm"]


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (1, 0)}, {"dropout_p": 0.5, "softcap": 2.0}])
def test_what_is_hidden_counts_as_torch_counts_it(options):
    plain, hidden = counted(both, flash_attn_func, *inputs()), counted(both, flash_attn_func, *inputs(), **options)
    assert plain == hidden == {"attention": B * SQ * SK * SCORE, "attention_backward": B * SQ * SK * SCORE_BACKWARD}


def test_a_bias_counts_nothing():
    bias = torch.randn(SQ, SK, requires_grad=True)
    scores, found = B * SQ * SK, counted(both, attention, *inputs(), bias)
    assert found == {"biased_attention": scores * SCORE, "biased_attention_backward": scores * SCORE_BACKWARD}


def test_packed_sequences_count_by_their_lengths():
    lengths_q, lengths_k = [3, 0, 5], [2, 4, 6]
    q, k, v = torch.randn(8, H, D, requires_grad=True), torch.randn(12, HK, D), torch.randn(12, HK, DV)
    call = cumulative(lengths_q), cumulative(lengths_k), 5, 6
    scores = 3 * 2 + 5 * 6
    assert counted(both, flash_attn_varlen_func, q, k, v, *call) == {
        "varlen_attention": scores * SCORE,
        "varlen_attention_backward": scores * SCORE_BACKWARD,
    }
    table = torch.tensor([[0], [1], [2]], dtype=torch.int32)
    pages = torch.randn(3, 6, HK, D), torch.randn(3, 6, HK, DV)
    assert counted(flash_attn_varlen_func, q.detach(), *pages, *call, block_table=table) == {
        "varlen_attention": scores * SCORE
    }


def test_lengths_without_values_count_as_their_bounds():
    with FakeTensorMode():
        q, k, v = torch.empty(8, H, D), torch.empty(12, HK, D), torch.empty(12, HK, DV)
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        found = counted(flash_attn_varlen_func, q, k, v, cu_seqlens, cu_seqlens, 5, 6)
    assert found == {"varlen_attention": 3 * 5 * 6 * SCORE}


def test_forward_mode_counts_five_products():
    """Three of q and k: the scores, and their tangent, which is two; two with v and its tangent."""
    x, along = inputs(False), inputs(False)
    found = counted(torch.func.jvp, lambda *x: OPS.attention(*x)[0], (*x,), (*along,))
    assert found["attention_jvp"] == B * SQ * SK * 2 * H * (3 * D + 2 * DV)
    cu_seqlens = cumulative([SQ])
    packed, packed_along = ([y[0, :SQ] for y in each] for each in (x, along))
    call = cu_seqlens, cu_seqlens, SQ, SQ
    found = counted(torch.func.jvp, lambda *x: OPS.varlen_attention(*x, *call)[0], (*packed,), (*packed_along,))
    assert found["varlen_attention_jvp"] == SQ * SQ * 2 * H * (3 * D + 2 * DV)


def test_a_cache_counts_by_the_keys_it_has():
    q, k_cache, v_cache = torch.randn(B, 1, H, D), torch.randn(B, 32, HK, D), torch.randn(B, 32, HK, DV)
    new, new_v = torch.randn(B, 1, HK, D), torch.randn(B, 1, HK, DV)
    lengths, padding = torch.tensor([3, 9], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    count = functools.partial(counted, flash_attn_with_kvcache, q, k_cache, v_cache)
    assert count() == {"attention_with_kvcache": B * 32 * SCORE}
    assert count(new, new_v, cache_seqlens=lengths) == {"attention_with_kvcache": (4 + 10) * SCORE}
    assert count(new, new_v, cache_seqlens=lengths, cache_leftpad=padding) == {
        "attention_with_kvcache": (3 + 8) * SCORE
    }
    paged = torch.arange(4, dtype=torch.int32).reshape(2, 2)
    pages = k_cache.reshape(4, 16, HK, D), v_cache.reshape(4, 16, HK, DV)
    assert counted(flash_attn_with_kvcache, q, *pages, cache_seqlens=lengths, block_table=paged) == {
        "attention_with_kvcache": (3 + 9) * SCORE
    }
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, *pages)]
        by_table = {"cache_seqlens": mode.from_tensor(lengths), "block_table": mode.from_tensor(paged)}
        found = counted(flash_attn_with_kvcache, *fakes, **by_table)
    assert found == {"attention_with_kvcache": B * 32 * SCORE}


def test_importing_us_imports_neither_the_counter_nor_what_it_imports():
    """And it knows us as soon as it is imported."""
    program = (
        "import sys, torch, compiled_fa\n"
        "print('torch.utils.flop_counter' in sys.modules, 'triton' in sys.modules)\n"
        "import torch.utils.flop_counter as counter\n"
        "print(torch.ops.compiled_fa.attention in counter.flop_registry)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True"]


# Activation checkpointing


def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flash_attn_func(q.sin(), k, v, causal=True).cos()


def packed_layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    lengths = cumulative([SQ, SQ]), cumulative([SK, SK]), SQ, SK
    rows_q, rows_k, rows_v = (x.flatten(0, 1) for x in (q.sin(), k, v))
    return flash_attn_varlen_func(rows_q, rows_k, rows_v, *lengths).cos()


@pytest.mark.parametrize("function", [layer, packed_layer])
@pytest.mark.parametrize("saved", [True, False])
def test_attention_that_a_policy_saves_is_computed_once(function, saved):
    save = [OPS.attention.default, OPS.varlen_attention.default] if saved else [torch.ops.aten.mm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, save)
    plain, selective = inputs(), inputs()
    with torch.no_grad():
        for x, y in zip(selective, plain, strict=True):
            x.copy_(y)
    once = counted(both, function, *plain)
    found = counted(lambda: checkpoint(function, *selective, use_reentrant=False, context_fn=contexts).sum().backward())
    forward, backward = sorted(once)
    assert found == {forward: once[forward] * (1 if saved else 2), backward: once[backward]}
    torch.testing.assert_close([x.grad for x in selective], [x.grad for x in plain], rtol=0, atol=0)


@pytest.mark.parametrize("function", [layer, packed_layer])
def test_the_partitioner_saves_attention(function):
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return make_boxed_func(graph)

    partitioned = aot_function(
        function, fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition
    )
    both(partitioned, *inputs())
    forward, backward = ([node.target for node in graph.graph.nodes] for graph in graphs)
    ours = {OPS.attention.default, OPS.varlen_attention.default}
    assert len(ours.intersection(forward)) == 1
    assert not ours.intersection(backward)
    assert torch.ops.aten.sin.default in backward or torch.ops.aten.cos.default in backward  # cheap, recomputed
