"""In Inductor's graphs, a call that is one call of PyTorch's kernel becomes that; others stay ours."""

import logging

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from tuned import retune

from compiled_fa import flash_attn_func, messages, ops, tuning
from compiled_fa.inductor import lowering

OURS = {torch.ops.compiled_fa.attention.default, torch.ops.compiled_fa.attention_backward.default}
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
KERNELS = {KERNEL, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default}


def inputs(seqlen_q=24, seqlen_k=24, head_dim_v=8, dtype=torch.float32):
    q = torch.randn(2, seqlen_q, 4, 8, dtype=dtype, requires_grad=True)
    k = torch.randn(2, seqlen_k, 2, 8, dtype=dtype, requires_grad=True)
    return q, k, torch.randn(2, seqlen_k, 2, head_dim_v, dtype=dtype, requires_grad=True)


def out_and_gradients(attend, *tensors):
    out = attend(*tensors)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def attention_in_graph(tensors, tracing_mode="fake", attend=ops.attention, **options):
    """The attention operators that Inductor finds in a graph with gradients."""
    lowering.tell_inductor()
    function = lambda *x: out_and_gradients(lambda *x: attend(*x, **options)[0], *x)  # noqa: E731
    table = {op: rule for op, rule in select_decomp_table().items() if op in OURS}
    graph = make_fx(function, decomposition_table=table, tracing_mode=tracing_mode)(*tensors).graph
    return {node.target for node in graph.nodes} & (OURS | KERNELS)


@pytest.mark.parametrize("causal", [False, True])
def test_a_plain_call_is_the_kernels(causal):
    torch._dynamo.reset()
    tensors = inputs()

    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=causal)

    with torch._inductor.config.patch(force_disable_caches=True):
        compiled, code = run_and_get_code(out_and_gradients, torch.compile(attend, fullgraph=True), *tensors)
    assert "ops.compiled_fa" not in "".join(code)
    assert all("".join(code).count(f"{kernel}(") == 1 for kernel in KERNELS)
    for ours, expected in zip(compiled, out_and_gradients(attend, *tensors), strict=True):
        assert ours.is_contiguous()
        assert torch.equal(ours, expected)


def test_of_a_compiled_call_one_direction_may_stay_ours():
    """Short bf16 calls are the kernel's as they are; their gradients are widened, or the tiled engine's."""
    torch._dynamo.reset()
    tensors = inputs(dtype=torch.bfloat16)
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled, code = run_and_get_code(out_and_gradients, torch.compile(flash_attn_func), *tensors)
    assert "".join(code).count(f"{KERNEL}(") == "".join(code).count("ops.compiled_fa.attention_backward.default(") == 1
    assert all(torch.equal(*pair) for pair in zip(compiled, out_and_gradients(flash_attn_func, *tensors), strict=True))


def test_gradients_in_16_bits_stay_ours(monkeypatch):
    """The kernel sums them in their dtype, the engine in fp32."""
    kinds = "forward_bf16", "forward_bf16_gqa", "backward_bf16", "backward_bf16_gqa"
    rules = dict.fromkeys((f"tiles_{kind}" for kind in kinds), tuning.AT_NO_CALL)
    retune(monkeypatch, sdpa_cpu={"widens_bf16": False, **rules})
    expected = {KERNEL, torch.ops.compiled_fa.attention_backward.default}
    assert attention_in_graph(inputs(dtype=torch.bfloat16)) == expected


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softmax_scale": 0.2, "window_left": 40}])
def test_which_calls_become_the_kernels(options):
    assert attention_in_graph(inputs(), **options) == KERNELS


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ({}, {"softcap": 5.0}),
        ({}, {"window_left": 3}),
        ({}, {"engine": "sdpa_cpu"}),
        ({"seqlen_q": 10}, {"causal": True}),  # the kernel's triangles are square
        ({"seqlen_q": 0}, {}),
        ({"head_dim_v": 12}, {}),
        ({"dtype": torch.float16}, {}),
        ({"dtype": torch.bfloat16, "seqlen_q": 300, "seqlen_k": 300}, {}),  # the tiled engine's
    ],
)
def test_which_calls_stay_ours(shapes, options):
    assert attention_in_graph(inputs(**shapes), **options) == OURS


def test_a_gradient_of_lse_is_ours():
    def attend(*tensors):
        out, lse = ops.attention(*tensors)
        return out + lse.mT[..., None], lse

    assert attention_in_graph(inputs(), attend=attend) == {KERNEL, torch.ops.compiled_fa.attention_backward.default}


def test_symbolic_shapes_stay_ours():
    """Which engine serves depends on them; the graph shall not."""
    assert attention_in_graph(inputs(), tracing_mode="symbolic") == OURS


def test_other_backends_see_the_op():
    torch._dynamo.reset()
    seen: list[object] = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    q, k, v = (x.detach() for x in inputs())
    torch.compile(flash_attn_func, fullgraph=True, backend=backend)(q, k, v)
    assert ops.attention in seen or torch.ops.compiled_fa.attention.default in seen


def test_without_inductors_table_ops_stay_and_it_says_so(monkeypatch, caplog):
    monkeypatch.delattr("torch._inductor.decomposition.fast_random_decomps")
    monkeypatch.setattr(lowering, "_untold", {torch.ops.compiled_fa.attention.default: None})
    monkeypatch.setattr(messages, "_said", set())
    with caplog.at_level(logging.WARNING, logger="compiled_fa"):
        lowering.tell_inductor()
        lowering.tell_inductor()
    assert caplog.text.count("slower") == 1


def test_what_is_to_be_prepared_is_so_before_the_first_graph(monkeypatch):
    called: list[str] = []
    monkeypatch.setattr(
        lowering, "_untold", {torch.ops.compiled_fa.attention.default: lambda *arguments: NotImplemented}
    )
    monkeypatch.setattr(lowering, "_preparations", [lambda: called.append("now")])
    monkeypatch.setattr(
        "torch._inductor.decomposition.register_decomposition", lambda ops: lambda rule: called.append("rule")
    )
    lowering.tell_inductor()
    lowering.tell_inductor()
    assert called == ["now", "rule"]
