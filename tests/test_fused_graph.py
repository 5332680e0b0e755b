"""In Inductor's graphs a call on a GPU is the template's operators and those of its tables: no op of ours is left."""

import collections
import functools
from typing import Any

import pytest
import torch
from support import cumulative
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from compiled_fa import attention, flash_attn_func, flash_attn_varlen_func
from compiled_fa.engines import fused
from compiled_fa.inductor import lowering

LAYERS = 2


def layers(q, k, v, cu_seqlens=None, **options):
    """As in a model: the tensors differ, lengths do not."""
    for _ in range(LAYERS):
        if cu_seqlens is None:
            out = flash_attn_func(q, k, v, **options)
        else:
            out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 90, 90, **options)
        q = q + out
    return q


def gradients(function, *tensors):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out.square().sum(), [x for x in tensors if x.requires_grad])]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The decomposition as it is for CUDA tensors, of tensors on the CPU, where torch's operators of the template are
    plain PyTorch ops. Yields what is left of graphs, by operator."""
    from torch._inductor.decomposition import select_decomp_table

    monkeypatch.setattr("compiled_fa.engines.inlined", lambda problem, direction, name="auto": fused)
    lowering.tell_inductor()
    torch._dynamo.reset()
    graphs: list[collections.Counter[str]] = []

    def keep(graph, _):
        graphs.append(collections.Counter(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    table = {op: rule for op, rule in select_decomp_table().items() if "compiled_fa" in str(op)}
    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=keep, decompositions=table, partition_fn=min_cut_rematerialization_partition
    )
    yield functools.partial(torch.compile, backend=backend, fullgraph=True), graphs
    torch._dynamo.reset()


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window, softcap": {"window_size": (9, 3), "softcap": 4.0, "softmax_scale": 0.3},
    "dropout": {"dropout_p": 0.4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
def test_layers_of_a_model_share_one_graph_and_its_tables(as_on_a_gpu, dense, options):
    compiled, graphs = as_on_a_gpu
    shape = (2, 70, 2, 16) if dense else (140, 2, 16)
    tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    packing = () if dense else (cumulative([50, 0, 90]),)

    run = functools.partial(layers, **options)
    torch.manual_seed(5)
    expected = gradients(run, *tensors, *packing)
    torch.manual_seed(5)
    found = gradients(compiled(run), *tensors, *packing)
    for mine, other in zip(found, expected, strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)
    passes = 2 if "dropout_p" in options else 1
    forward, backward = graphs
    assert forward["flex_attention"] == LAYERS * passes
    assert backward["flex_attention_backward"] == LAYERS
    assert not any("compiled_fa.attention" in name or "varlen" in name for graph in graphs for name in graph)
    # One search for the sequences of queries, one for those of keys.
    searches = [sum(n for name, n in graph.items() if "searchsorted" in name) for graph in graphs]
    assert all(n <= (0 if dense else 2) for n in searches), searches


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
def test_other_lengths_have_the_same_graph(as_on_a_gpu, dense):
    compiled, graphs = as_on_a_gpu
    attend = compiled(functools.partial(layers, causal=True), dynamic=True)
    for seqlen, batch in ((70, 2), (45, 4), (90, 5)):
        shape = (batch, seqlen, 7, 16) if dense else (batch * seqlen, 7, 16)
        tensors = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        packing = () if dense else (cumulative([seqlen] * batch),)
        expected = gradients(functools.partial(layers, causal=True), *tensors, *packing)
        for mine, other in zip(gradients(attend, *tensors, *packing), expected, strict=True):
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 2  # forward and backward


def test_a_bias_made_in_the_graph_is_read_by_the_template(as_on_a_gpu):
    """Of all sequences and a part of the heads' dimension; one graph over lengths."""
    compiled, graphs = as_on_a_gpu
    table = torch.randn(3, 200)

    def attend(q, k, v, seen):
        place = torch.arange(q.shape[1])
        distances = table[:, place - place[:, None] + 100]  # (H, Sq, Sk), before the mask (B, 1, 1, Sk)
        return attention(q, k, v, distances, causal=True) + attention(q, k, v, seen[:, None, None])

    run = compiled(attend, dynamic=True)
    for seqlen, batch in ((70, 2), (45, 4), (90, 5)):
        tensors = [torch.randn(batch, seqlen, 3, 16, requires_grad=True) for _ in range(3)]
        seen = torch.rand(batch, seqlen) < 0.8
        expected = gradients(attend, *tensors, seen)
        for mine, other in zip(gradients(run, *tensors, seen), expected, strict=True):
            assert torch.allclose(mine, other, rtol=1e-4, atol=1e-4)
    forward, backward = graphs
    assert forward["flex_attention"] == backward["flex_attention_backward"] == 2
    assert not any("compiled_fa" in name for graph in graphs for name in graph)


# ------------------------------------------------------------------------------------------------------- on a faked T4


def all_layers(cases):
    """For a process of its own: launches, and whether an op of ours is called."""
    from tools.offline.engine import written_for_layers

    found = [written_for_layers(LAYERS, 300, *case, causal=True) for case in cases]
    return [(each.launches, "compiled_fa" in each.wrapper) for each in found]


CASES = {
    "dense": (False, False),
    "packed": (True, False),
    "dense, dynamic": (False, True),
    "packed, dynamic": (True, True),
}


@pytest.fixture(scope="module")
def on_a_t4():
    pytest.importorskip("triton", reason="Inductor writes Triton code only where Triton is")
    from tools.offline import in_own_process

    return dict(zip(CASES, in_own_process(all_layers, list(CASES.values())), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_launches_of_layers(on_a_t4, case):
    """A kernel of attention a layer and direction; tables once; and little around: in forward the base of lse and the
    model's own sums, in backward the base of lse, delta, its copy in lse's order, and the model's own."""
    launches, calls_ours = on_a_t4[case]
    of_attention = [name for name in launches if name.startswith("triton_tem")]
    assert not calls_ours
    assert len(of_attention) == 2 * LAYERS
    tables, around = 5, LAYERS * (1 + 4)
    assert len(launches) - len(of_attention) <= tables + around, launches
