"""A bias of every score, and attention sinks: any engine, both directions, any strides, against float64."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from on_cpu import RUNNERS, Runner, examples
from support import Case, check_against_float64, cumulative, make, packed, replace, run_tiled
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_fa
from compiled_fa import messages
from compiled_fa.engines import fused, nvidia, sdpa_cpu, split_kv, tiled
from compiled_fa.engines.tiled import TileSizes
from compiled_fa.problem import Direction, Problem
from compiled_fa.scores import Window
from compiled_fa.testing import Bias
from compiled_fa.testing.budget import budget, error
from compiled_fa.testing.naive import naive_attention
from compiled_fa.testing.strategies import BIASES

OPS = torch.ops.compiled_fa
SERVES = [runner for runner in RUNNERS if runner.name in ("auto", "tiled", "large tiles", "fused")]


@pytest.mark.parametrize("runner", SERVES, ids=lambda runner: runner.name)
@examples(2)
@given(st.data())
def test_any_bias_agrees_with_float64(runner: Runner, drawn):
    """With every other feature, rows that see nothing, GQA, unequal lengths and no tokens at all."""
    data = make(drawn.draw(runner.cases(dense=True, bias=BIASES)))
    check_against_float64(data, runner.run(data))


WIDE = Case(((150, 190),) * 2, dense=True, heads_per_key=2, head_dim_v=12, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_compiled_steps_agree_with_float64(compiled_steps, dtype):
    """One piece of machine code serves a bias of any strides."""
    for bias in (Bias(), Bias("hqk"), Bias("bk", expanded=True), Bias("qk", transposed=True), Bias("")):
        data = make(replace(WIDE, bias=replace(bias, dtype=dtype), seed=len(bias.varies)))
        check_against_float64(data, run_tiled(data))
    assert not any("could not compile" in said for said in messages._said)


def test_tiles_of_other_blocks_and_distant_keys_with_a_weight():
    """Where ALiBi alone would leave a key no weight, a bias may give it some: no tile is left out for distance."""
    q, k, v = (torch.randn(1, 1200, 1, 4) for _ in range(3))
    bias = torch.zeros(1, 1, 1200, 1200)
    bias[..., 0] = 500.0
    options: dict[str, Any] = {"causal": True, "alibi_slopes": torch.tensor([0.5])}
    found = compiled_fa.attention(q, k, v, bias, **options)
    expected, _ = naive_attention(q.double(), k.double(), v.double(), bias=bias.double(), **options)
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Elements of the largest memory that an operator's result, of these dtypes, lies in."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.dtypes, self.elements = dtypes, 0

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        results = operator(*arguments, **(options or {}))
        for x in results if isinstance(results, tuple) else (results,):
            if isinstance(x, Tensor) and x.dtype in self.dtypes:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return results


@pytest.mark.parametrize("bias", [Bias("k"), Bias("k", torch.bool, expanded=True), Bias("hk", torch.float16)], ids=str)
def test_nothing_is_as_large_as_the_scores(bias):
    """What broadcasts, or is expanded, is not written out, nor is its gradient."""
    compiled_fa.clear_caches()
    data = make(Case(((80, 96),) * 4, dense=True, head_dim_v=8, bias=bias, tiles=TileSizes(16, 16, 2)))
    with Largest(torch.float32, torch.float16, torch.bool) as largest:
        run_tiled(data)
    assert 0 < largest.elements <= 4 * 96 * 2 * 8 < data.case.batch * data.case.nheads * 80 * 96


def test_a_gradient_as_large_as_the_scores_is_there_once():
    """Stored in the bias's dtype as it is found, and not summed in a wider one."""
    compiled_fa.clear_caches()
    data = make(Case(((80, 96),) * 4, dense=True, bias=Bias(dtype=torch.float16), tiles=TileSizes(16, 16, 2)))
    with Largest(torch.float32) as largest:
        run_tiled(data)
    assert 0 < largest.elements <= 4 * 96 * 2 * 8


def tensors(grad: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (2, 9, 4, 8), (2, 11, 2, 8), (2, 11, 2, 6)
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for shape in shapes]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", ["float", "bool"])
def test_opcheck(kind, grad):
    q, k, v = tensors(grad)
    bias = torch.randn(11, 9, requires_grad=grad).T if kind == "float" else torch.rand(2, 1, 1, 11) < 0.7
    opcheck(OPS.biased_attention, (q, k, v, bias), {"softcap": 3.0, "causal": True})
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    out, lse = OPS.biased_attention(q, k, v, bias)
    opcheck(OPS.biased_attention_backward, (out, torch.ones_like(lse), out, lse, q, k, v, bias))
    opcheck(OPS.biased_attention_backward, (out, None, out, lse, q, k, v, bias), {"bias_gradient": False})
    opcheck(OPS.biased_attention_jvp, (q, k, v, q, k, v, out, lse, bias))


@pytest.mark.parametrize("shape", [(2, 1, 9, 11), (4, 1, 11), ()], ids=str)
def test_gradcheck(shape):
    """Through lse, too, and in sinks."""
    q, k, v = tensors(dtype=torch.float64)
    bias, sinks = (torch.randn(x, dtype=torch.float64, requires_grad=True) for x in (shape, (4,)))
    options: dict[str, Any] = {"softcap": 3.0, "causal": True, "return_lse": True}
    attend = lambda q, k, v, bias, sinks: compiled_fa.attention(q, k, v, bias, sinks=sinks, **options)  # noqa: E731
    torch.autograd.gradcheck(attend, (q, k, v, bias, sinks), fast_mode=True)


def test_only_what_is_differentiated_has_a_gradient():
    q, k, v = tensors(False)
    seen = torch.rand(9, 11) < 0.7
    assert not compiled_fa.attention(q, k, v, seen).requires_grad
    out, lse = OPS.biased_attention(q, k, v, seen)
    *of_qkv, dbias = OPS.biased_attention_backward(out, None, out, lse, q, k, v, seen)
    assert (len(of_qkv), dbias.shape, dbias.dtype) == (3, (0,), torch.bool)
    bias = torch.randn(9, 11, requires_grad=True)
    compiled_fa.attention(q, k, v, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == (9, 11)
    with torch.inference_mode():
        torch.testing.assert_close(compiled_fa.attention(q, k, v, bias), OPS.biased_attention(q, k, v, bias)[0])
    (dq,) = torch.autograd.grad(compiled_fa.attention(q.requires_grad_(), k, v, bias).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        dq.sum().backward()


def test_vmap_and_forward_mode():
    q, k, v = tensors(False, torch.float64)
    bias = torch.randn(3, 4, 9, 11, dtype=torch.float64)
    found = torch.func.vmap(lambda bias: compiled_fa.attention(q, k, v, bias))(bias)
    torch.testing.assert_close(found, torch.stack([compiled_fa.attention(q, k, v, x) for x in bias]))
    bias[0, :, 0] = -torch.inf
    along = torch.randn_like(q)
    attend = lambda q: compiled_fa.attention(q, k, v, bias[0])  # noqa: E731
    tangent = torch.func.jvp(attend, (q,), (along,))[1]
    nearby = (attend(q + 1e-6 * along) - attend(q - 1e-6 * along)) / 2e-6
    torch.testing.assert_close(tangent, nearby, atol=1e-7, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="forward-mode AD in bias"):
        torch.func.jvp(lambda bias: compiled_fa.attention(q, k, v, bias), (bias[0],), (bias[0],))


def test_one_graph_over_lengths():
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    table = torch.randn(4, 60, requires_grad=True)
    sinks = torch.randn(4, requires_grad=True)

    def model(x, table, sinks):
        """Relative positions, as T5 has them."""
        place = torch.arange(x.shape[1])
        bias = table[:, place - place[:, None] + 30]
        return compiled_fa.attention(x.sin(), x, x, bias, sinks=sinks, causal=True) * 2

    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for batch, seqlen in ((2, 9), (3, 17), (5, 23)):
        x = torch.randn(batch, seqlen, 4, 8, requires_grad=True)
        outs = compiled(x, table, sinks), model(x, table, sinks)
        found, expected = ((out, *torch.autograd.grad(out.square().sum(), (x, table, sinks))) for out in outs)
        for result, right in zip(found, expected, strict=True):
            torch.testing.assert_close(result, right, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    nodes = (node for graph in counter.graphs for node in graph.graph.nodes)
    assert any("biased_attention" in str(node.target) for node in nodes)


def test_inductor_has_it_in_a_graph():
    q, k, v = tensors(False)
    bias = torch.randn(1, 4, 9, 11)
    compiled = torch.compile(compiled_fa.attention, fullgraph=True)
    for values in (v, k):  # the op, and what PyTorch's kernel does in its place
        torch.testing.assert_close(compiled(q, k, values, bias), compiled_fa.attention(q, k, values, bias))


def test_without_a_bias_it_is_flash_attn_func():
    q, k, v = tensors(False)
    out, lse, _ = compiled_fa.flash_attn_func(q, k, v, softcap=2.0, return_attn_probs=True)
    found = compiled_fa.attention(q, k, v, softcap=2.0, return_lse=True)
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], lse)
    torch.manual_seed(5)
    dropped = compiled_fa.attention(q, k, v, torch.zeros(()), dropout_p=0.5)
    torch.manual_seed(5)
    torch.testing.assert_close(dropped, compiled_fa.flash_attn_func(q, k, v, dropout_p=0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled_fa.attention(q, k, v, torch.zeros(())).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("argument", "given", "says", "kind"),
    [
        (
            "bias",
            torch.zeros(3, 1, 9, 11),
            "(batch, nheads, seqlen_q, seqlen_k), (2, 4, 9, 11), got shape (3, 1, 9, 11)",
            0,
        ),
        ("bias", torch.zeros(1, 2, 4, 9, 11), "broadcastable", 0),
        ("bias", torch.zeros(9, 11, dtype=torch.int64), "got torch.int64", 1),
        ("bias", torch.zeros(9, 11, device="meta"), "on q's device, cpu", 0),
        ("bias", [0.0], "a tensor, got list", 1),
        ("sinks", torch.zeros(3), "of q's heads, 4, got 3", 0),
        ("sinks", torch.zeros(1, 4), "(nheads), got shape (1, 4)", 0),
        ("sinks", torch.zeros(4, dtype=torch.bool), "got torch.bool", 1),
        ("sinks", torch.zeros(4, device="meta"), "on q's device, cpu", 0),
        ("return_lse", "yes", "a bool", 1),
    ],
)
def test_wrong_arguments(argument, given, says, kind):
    inputs, state = tensors(False), torch.get_rng_state()
    with pytest.raises((ValueError, TypeError)[kind], match=f"^{argument} must be .*{re.escape(says)}"):
        compiled_fa.attention(*inputs, dropout_p=0.1, **{argument: given})
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_no_tensor():
    q, k, v = tensors(False)
    with pytest.raises(TypeError, match=r"^k must be a tensor, got NoneType"), torch.autocast("cpu", torch.bfloat16):
        compiled_fa.attention(q, None, v)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^v must be a tensor, got list"), torch.autocast("cpu", torch.bfloat16):
        compiled_fa.varlen_attention(q[0], k[0], [v], *[cumulative([9]), cumulative([11]), 9, 11])  # type: ignore[arg-type]


def test_engines_that_leave_it_say_so(monkeypatch):
    monkeypatch.setattr(nvidia, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(nvidia, "_missing", lambda capability: None)
    q, k, _ = tensors(False)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    problem = Problem.of(q, k, k, None, bias=torch.zeros(1, 1, 9, 11), bias_gradient=True)
    assert fused.unsupported_reason(cuda, problem) is None
    assert "changes from run to run" in (fused.unsupported_reason(cuda, problem, "backward") or "")
    assert fused.unsupported_reason(cuda, replace(problem, bias_gradient=False), "backward") is None
    huge = torch.empty(1, 4, 2**15, 2**15, device="meta")
    assert "2**31" in (fused.unsupported_reason(cuda, replace(problem, bias=huge)) or "")
    assert tiled.unsupported_reason(cpu, problem) is sdpa_cpu.unsupported_reason(cpu, problem) is None
    assert split_kv.unsupported_reason(cpu, problem) == "it has no bias"
    pairs, causal = torch.ones(9, 11, dtype=torch.bool)[None, None], replace(problem, window=Window(right=0))
    others: dict[str, tuple[Problem, Direction]] = {"gradient": (problem, "backward"), "causal": (causal, "forward")}
    others["copy"] = replace(problem, bias=pairs), "forward"
    others["too large"] = replace(problem, bias=pairs.double()), "forward"
    for word, (other, direction) in others.items():
        assert word in (sdpa_cpu.unsupported_reason(cpu, other, direction) or "")


@pytest.mark.parametrize(
    "bias", [Bias(), Bias("hqk", expanded=True), Bias("bk", torch.bool), Bias("qk", transposed=True)]
)
@pytest.mark.parametrize("dlse", [False, True])
def test_sdpa_cpu_agrees_with_float64(bias, dlse):
    data = make(Case(((33, 41),) * 2, dense=True, heads_per_key=2, bias=bias))
    problem = data.problem()
    assert sdpa_cpu.unsupported_reason(data.device, problem) is None
    out, lse = sdpa_cpu.forward(problem)
    data = data if dlse else replace(data, dlse=None)
    gradients = sdpa_cpu.backward(problem, data.laid_out(data.dout), out, lse, data.per_row(data.dlse))
    check_against_float64(data, packed(data, (out, lse, *gradients)))


def naive_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """One more score a head, whose probability nothing is multiplied by. causal: of as many keys as queries."""
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[-1] ** -0.5 + bias.to(q.dtype)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    sink = sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    scores = torch.cat([scores, sink], -1)
    probs = torch.softmax(scores, -1)[..., :-1]
    return torch.einsum("bhqk,bkhd->bqhd", probs, values), scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sinks_agree_with_float64(dtype):
    """And their gradient; rows that see no key leave all to the sink."""
    inputs = [
        torch.randn(shape, dtype=dtype) for shape in ((2, 33, 4, 8), (2, 33, 2, 8), (2, 33, 2, 6), (4,), (1, 4, 33, 33))
    ]
    inputs[4][:, :, 5] = -torch.inf
    towards = torch.randn(2, 33, 4, 6), torch.randn(2, 4, 33)

    def results(attend: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        outputs = attend(*leaves)
        gradients = torch.autograd.grad(outputs, leaves, [x.to(y.dtype) for x, y in zip(towards, outputs, strict=True)])
        return [*(x.detach() for x in outputs), *gradients]

    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor) -> Any:
        return compiled_fa.attention(q, k, v, bias, sinks=sinks, causal=True, return_lse=True)

    def naive(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return naive_sinks(q, k, v, sinks, bias, causal=True)

    found, close, exact = results(ours, dtype), results(naive, dtype), results(naive, torch.float64)
    assert not found[0][:, 5].any()
    for result, as_naive, as_exact in zip(found, close, exact, strict=True):
        assert error(result, as_exact) <= budget(as_naive, as_exact, 64.0)


def test_sinks_of_packed_rows():
    q, k, v = (x.flatten(0, 1) for x in tensors(False))
    sinks, lengths_q, lengths_k = torch.randn(4), [7, 0, 11], [9, 5, 8]
    packing = cumulative(lengths_q), cumulative(lengths_k), 11, 9
    out, lse = compiled_fa.varlen_attention(q, k, v, *packing, sinks=sinks, causal=True, return_lse=True)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    alone = [
        compiled_fa.attention(*(x[None] for x in part), sinks=sinks, causal=True, return_lse=True) for part in parts
    ]
    torch.testing.assert_close(out, torch.cat([out[0] for out, _ in alone]))
    torch.testing.assert_close(lse, torch.cat([lse[0] for _, lse in alone], 1))
    plain = compiled_fa.varlen_attention(q, k, v, *packing, causal=True)
    assert torch.equal(plain, compiled_fa.flash_attn_varlen_func(q, k, v, *packing, causal=True))
    with pytest.raises(ValueError, match=r"^sinks must be of q's heads, 4, got 3$"):
        compiled_fa.varlen_attention(q, k, v, *packing, sinks=sinks[:3])


def test_a_sink_of_no_weight_changes_nothing():
    q, k, v = tensors(False)
    bias = torch.randn(9, 11)
    bias[3] = -torch.inf
    out, lse = OPS.biased_attention(q, k, v, bias)
    found = compiled_fa.attention(q, k, v, bias, sinks=torch.full((4,), -torch.inf), return_lse=True)
    torch.testing.assert_close(found, (out, lse))
