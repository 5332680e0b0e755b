"""compiled_fa.int8 in PyTorch's ops: against its algorithm and attention in float64, and its arguments."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import cumulative

from compiled_fa.int8 import attention, interface, quantise, tiles, varlen_attention
from compiled_fa.int8.__main__ import main
from compiled_fa.testing.budget import budget, error

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def drawn(batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, head_dim_v=None, dtype=torch.float16):
    torch.manual_seed(seqlen_q)
    q, k = torch.randn(batch, seqlen_q, nheads, head_dim), torch.randn(batch, seqlen_k, nheads_k, head_dim) + 3
    return q.to(dtype), k.to(dtype), torch.randn(batch, seqlen_k, nheads_k, head_dim_v or head_dim).to(dtype)


def softmax(q, k, v, causal, scale, dtype=torch.float64):
    """Attention as it is written down."""
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = q @ k.mT * scale
    if causal:
        seen = torch.ones(score.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        score = score.masked_fill(~seen, -torch.inf)
    weight = score.softmax(-1).nan_to_num(0.0)
    return (weight @ v).transpose(1, 2)


def dequantised(x, block):
    found = quantise.quantise(x, block)
    return found.values.double() * found.scales.double().repeat_interleave(block, 1)[:, : x.shape[1], :, None]


def algorithm(q, k, v, causal):
    """float64 attention of the queries and keys that int8 leaves."""
    scale = q.shape[-1] ** -0.5
    queries = dequantised(q.float() * (scale * interface.LOG2_E), quantise.BLOCK_Q) / (scale * interface.LOG2_E)
    return softmax(queries, dequantised(quantise.smoothed(k), quantise.BLOCK_K), v.half(), causal, scale)


SHAPES = {
    "even": (1, 128, 128, 2, 2, 64),
    "ragged, GQA": (2, 130, 70, 4, 2, 40),
    "more keys, another head_dim for v": (1, 5, 200, 2, 1, 16, 24),
    "one of each": (1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_its_algorithm_in_float64(shape, dtype, causal):
    """The weights are fp16 in every dtype: so fp16 and what the dtype loses are the measure."""
    q, k, v = (x.to(dtype) for x in drawn(*shape))
    out = attention(q, k, v, causal)
    exact = algorithm(q, k, v, causal)
    assert out.shape == exact.shape
    assert out.dtype == dtype
    naive = softmax(q, k - k.float().mean(1, keepdim=True), v, causal, q.shape[-1] ** -0.5, torch.float16)
    allowed = budget(naive.to(dtype), softmax(q, quantise.smoothed(k), v, causal, q.shape[-1] ** -0.5), 1.0)
    assert error(out, exact) <= allowed


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_near_attention(causal):
    q, k, v = drawn(1, 200, 200, 2, 2, 64)
    wanted = softmax(q, k, v, causal, 0.125)
    assert (attention(q, k, v, causal).double() - wanted).norm() < 0.02 * wanted.norm()


def test_smoothing_takes_an_offset_away():
    q, k, v = drawn(1, 200, 200, 2, 2, 64)
    k = k + 16 * torch.randn(2, 64).half()
    wanted = softmax(q, k, v, False, 0.125)
    smooth, rough = ((attention(q, k, v, smooth_k=s).double() - wanted).norm() / wanted.norm() for s in (True, False))
    assert smooth < 0.03
    assert rough > 5 * smooth


def test_softmax_scale():
    q, k, v = drawn(1, 20, 20, 2, 2, 32)
    assert torch.equal(attention(2 * q, k, v, softmax_scale=0.1), attention(q, k, v, softmax_scale=0.2))
    mean = v.double().mean(1, keepdim=True).expand_as(v)
    assert error(attention(q, k, v, softmax_scale=0), mean) < 1e-3


def test_queries_without_keys_give_0():
    q, k, v = drawn(1, 150, 20, 2, 1, 32)
    out = attention(q, k, v, causal=True)
    assert torch.equal(out[:, :130], torch.zeros(1, 130, 2, 32).half())
    assert out[:, 130:].abs().amin((0, 2, 3)).max() > 0
    for batch, seqlen_q, seqlen_k in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        empty = attention(*drawn(batch, seqlen_q, seqlen_k, 2, 1, 8))
        assert torch.equal(empty, torch.zeros(batch, seqlen_q, 2, 8).half())


def test_values_that_a_query_does_not_see():
    q, k, v = drawn(1, 70, 70, 1, 1, 16)
    changed = v.clone()
    changed[:, 40:] = 100
    assert torch.equal(attention(q, k, v, True)[:, :40], attention(q, k, changed, True)[:, :40])


def test_forms_of_tensors():
    """Views of packed projections, expanded heads, transposed batches, size-1 dimensions of any stride."""
    q, k, v = drawn(2, 9, 9, 4, 4, 16)
    wanted = attention(q, k, v, True)
    packed = torch.stack([q, k, v], 2)
    assert torch.equal(attention(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], True), wanted)
    x, y, z = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert torch.equal(attention(x, y, z, True), wanted)
    assert torch.equal(attention(q, k, v.mT.contiguous().mT, True), wanted)
    one = k[:, :, :1]
    expanded = [x[:, :, :1].expand(-1, -1, 4, -1) for x in (k, v)]
    assert torch.equal(attention(q, *expanded), attention(q, one, v[:, :, :1]))
    strange = q[:1, :1].as_strided((1, 1, 4, 16), (7, 5, 16, 1))
    assert torch.equal(attention(strange, k[:1], v[:1]), attention(q[:1, :1], k[:1], v[:1]))


def test_what_is_not_finite_stays_so():
    q, k, v = drawn(1, 200, 200, 1, 1, 16)
    q[0, 3, 0, 0] = torch.inf
    out = attention(q, k, v)
    assert out[0, :128].isnan().all()
    assert out[0, 128:].isfinite().all()


def test_zeros_are_not_divided_by():
    q, k, v = drawn(1, 9, 9, 1, 1, 16)
    assert error(attention(q * 0, k * 0, v), v.double().mean(1, keepdim=True).expand_as(v)) < 1e-3


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_varlen_is_each_sequence(causal):
    lengths_q, lengths_k = [70, 0, 3], [9, 5, 130]
    (q, _, _), (_, k, v) = drawn(1, 73, 1, 4, 2, 16), drawn(1, 1, 144, 4, 2, 16)
    q, k, v = q[0], k[0], v[0]
    out = varlen_attention(q, k, v, cumulative(lengths_q), cumulative(lengths_k), 70, 130, causal)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    assert torch.equal(out, torch.cat([attention(x[None], y[None], z[None], causal)[0] for x, y, z in parts]))
    none = torch.zeros(1, dtype=torch.int32)
    assert varlen_attention(q[:0], k[:0], v[:0], none, none, 0, 0).shape == (0, 4, 16)


def test_no_gradients():
    q, k, v = drawn(1, 5, 5, 2, 1, 8)
    v.requires_grad_()
    with pytest.raises(ValueError, match=r"v must be without gradients, .*got a tensor that requires gradients"):
        attention(q, k, v)
    with torch.no_grad():
        wanted = attention(q, k, v)
    with torch.inference_mode():
        assert torch.equal(attention(q, k, v), wanted)
    with pytest.raises(ValueError, match="v must be without gradients"):
        torch.func.jvp(lambda v: attention(q, k, v), (v.detach(),), (v.detach(),))


def test_autocast():
    q, k, v = drawn(1, 5, 5, 2, 1, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v), attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


Q = torch.zeros(2, 4, 2, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        ((Q, Q, None), {}, TypeError, "v must be a tensor"),
        ((Q, Q, Q[0]), {}, ValueError, "v must be .batch, seqlen_k, nheads_k, head_dim."),
        ((Q, Q[:1], Q[:1]), {}, ValueError, "k must be of q's batch, 2, got 1"),
        ((Q.double(), Q.double(), Q.double()), {}, TypeError, "q must be float16, bfloat16 or float32, got .*float64"),
        ((Q, Q.half(), Q.half()), {}, TypeError, "k must be of q's dtype"),
        ((Q, Q[:, :, :, :4], Q), {}, ValueError, "k must be of q's head_dim, 8, got 4"),
        ((Q, Q, Q), {"softmax_scale": "1"}, TypeError, "softmax_scale must be a number"),
        ((Q, Q, Q), {"causal": "yes"}, TypeError, "causal must be a bool"),
    ],
)
def test_wrong_arguments(arguments, options, kind, message):
    with pytest.raises(kind, match=message):
        attention(*arguments, **options)


def test_wrong_packing():
    q = Q[0]
    with pytest.raises(ValueError, match="cu_seqlens_q must be q's total, 4, at its end, got 3"):
        varlen_attention(q, q, q, cumulative([3]), cumulative([4]), 4, 4)
    with pytest.raises(ValueError, match="max_seqlen_k must be at least the longest length"):
        varlen_attention(q, q, q, cumulative([4]), cumulative([4]), 4, 3)


def test_who_serves(monkeypatch):
    """By capability, head_dim, and whether Triton is there."""
    kernel = pytest.importorskip("compiled_fa.int8.kernel", reason="triton is not installed", exc_type=ImportError)

    on_cuda: Any = SimpleNamespace(device=torch.device("cuda", 0), shape=(1, 1, 1, 64))
    enabled: list[bool] = []
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("compiled_fa.turing.enable", lambda: enabled.append(True))
    for capability, served in {(7, 0): tiles, (7, 5): kernel, (8, 0): kernel, (9, 0): kernel}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert interface._who(on_cuda, 64) is served.attend
        assert interface._who(on_cuda, 160) is tiles.attend
    assert len(enabled) == 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("compiled_fa.turing.missing", lambda: "triton 3.6 or newer is wanted")
    assert interface._who(on_cuda, 64) is tiles.attend
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert interface._who(on_cuda, 64) is tiles.attend
    assert interface._who(Q, 64) is tiles.attend


def test_the_command(capsys):
    assert main(["--device", "cpu", "--seqlen", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 6
    for line in lines[3:]:
        fp16, int8, rough = (float(cell.strip(" %")) for cell in line.split("|")[3:6])
        assert fp16 < int8 < 5
        assert int8 < rough or "offset" not in line


def test_it_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import torch; from compiled_fa.int8 import attention"
    code += "; q = torch.ones(1, 2, 1, 8); print(attention(q, q, q).sum().item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "16.0\n"
