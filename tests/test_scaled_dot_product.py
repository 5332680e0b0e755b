"""F.scaled_dot_product_attention through our ops: PyTorch's results, what is left to it, and undone exactly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import compiled_fa
from compiled_fa import scaled_dot_product
from compiled_fa.testing.budget import budget, error

ROOT = Path(__file__).resolve().parent.parent
sdpa_reason: Any = compiled_fa.sdpa_reason  # called with tables of arguments
PYTORCHS = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _undone():
    yield
    assert F.scaled_dot_product_attention is PYTORCHS
    assert not scaled_dot_product._enabled


def tensors(nheads_k=4, seqlen_q=9, seqlen_k=9, head_dim_v=8, dtype=torch.float32):
    shapes = (2, 4, seqlen_q, 8), (2, nheads_k, seqlen_k, 8), (2, nheads_k, seqlen_k, head_dim_v)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def result_or_error(function: Any, inputs: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor | Exception:
    try:
        result: torch.Tensor = function(*inputs, **options)
    except RuntimeError as error:
        return error
    return result


def results(function: Any, inputs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    out = function(*inputs, **options)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, towards)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({}, {"is_causal": True, "scale": 0.7}),
        ({"seqlen_q": 5}, {}),
        ({"seqlen_q": 5}, {"is_causal": True}),
        ({"nheads_k": 2, "seqlen_q": 5, "head_dim_v": 6}, {"is_causal": True, "enable_gqa": True}),
        ({"nheads_k": 1, "seqlen_k": 4}, {"enable_gqa": True}),
    ],
)
def test_results_and_gradients_are_pytorchs(sizes, options, dtype):
    inputs = tensors(**sizes, dtype=dtype)
    with sdpa_kernel(SDPBackend.MATH):
        naive = results(PYTORCHS, inputs, **options)
        exact = results(PYTORCHS, [x.detach().double().requires_grad_() for x in inputs], **options)
    with compiled_fa.sdpa(everywhere=True) as calls:
        found = results(F.scaled_dot_product_attention, inputs, **options)
    assert (calls.served, str(calls)) == (1, "1 served by compiled_fa")
    for result, as_naive, as_exact in zip(found, naive, exact, strict=True):
        assert result.shape == as_exact.shape
        assert error(result, as_exact) <= budget(as_naive, as_exact, 8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"head_dim_v": 6, "seqlen_q": 5}, (5, 9)),
        ({"head_dim_v": 6, "nheads_k": 2}, (2, 1, 1, 9)),
        ({}, (4, 9, 9)),
    ],
)
@pytest.mark.parametrize("kind", ["bool", "float", "differentiated"])
def test_masks_where_pytorch_has_its_math_path(sizes, shape, kind, dtype):
    """Rows that see nothing give 0, as they do there."""
    inputs, options = tensors(**sizes, dtype=dtype), {"enable_gqa": "nheads_k" in sizes}
    mask = torch.randn(shape)
    mask[..., -1, :] = -torch.inf
    mask = mask > -1.0 if kind == "bool" else mask.to(dtype)

    def attend(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        attn_mask = mask if kind == "bool" else mask.to(dtype)
        if kind != "differentiated":
            return results(lambda q, k, v: function(q, k, v, attn_mask=attn_mask, **options), leaves)
        leaves.append(attn_mask.detach().requires_grad_())
        return results(lambda q, k, v, attn_mask: function(q, k, v, attn_mask=attn_mask, **options), leaves)

    with sdpa_kernel(SDPBackend.MATH):
        naive, exact = (attend(PYTORCHS, x) for x in (dtype, torch.float64))
    with compiled_fa.sdpa() as calls:
        found = attend(F.scaled_dot_product_attention, dtype)
    assert calls.served == 1
    for result, as_naive, as_exact in zip(found, naive, exact, strict=True):
        assert result.shape == as_exact.shape
        assert error(result, as_exact) <= budget(as_naive, as_exact, 64.0)


def test_three_dimensions_views_and_inference_mode():
    packed = torch.randn(3, 9, 4, 8)  # heads behind positions, as layers make them
    q, k, v = (x.transpose(0, 1) for x in packed.unbind(0))
    with torch.inference_mode(), compiled_fa.sdpa() as calls:
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert calls.served == 1
    torch.testing.assert_close(found, PYTORCHS(q, k, v, is_causal=True))


def test_dropout_is_seeded_and_right_on_average():
    q, k, v = tensors()
    with compiled_fa.sdpa() as calls:
        torch.manual_seed(3)
        first = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        torch.manual_seed(3)
        assert torch.equal(first, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
        mean = torch.stack([F.scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(400)]).mean(0)
    assert calls.served == 402
    torch.testing.assert_close(mean, PYTORCHS(q, k, v), atol=0.35, rtol=0)


LEFT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a mask and is_causal, which are not for one call": ({}, {"attn_mask": torch.zeros(9, 9), "is_causal": True}),
    "causal, with more queries than keys": ({"seqlen_k": 5}, {"is_causal": True}),
    "an empty tensor": ({"seqlen_q": 0}, {}),
    "a dropout_p that is not at least 0 and below 1": ({}, {"dropout_p": 1.0}),
    "PyTorch's own fused kernel": ({}, {}),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_to_pytorch_is_its_own(reason):
    sizes, options = LEFT[reason]
    inputs = tensors(**sizes)
    everywhere = "own" not in reason
    expected = result_or_error(PYTORCHS, inputs, options)  # torch 2.15 refuses a mask and is_causal
    with compiled_fa.sdpa(everywhere) as calls:
        found = result_or_error(F.scaled_dot_product_attention, inputs, options)
    if isinstance(found, torch.Tensor) and isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert repr(found) == repr(expected)
    assert (calls.served, calls.left) == (0, {reason: 1})
    assert str(calls) == f"0 served by compiled_fa; 1 left to PyTorch: {reason}"
    assert sdpa_reason(*inputs, **options, everywhere=everywhere) == reason


def test_more_that_is_left():
    def reason(*shapes, dtypes=(torch.float32,) * 3, **options):
        made = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        return str(sdpa_reason(*made, **options, everywhere=True))

    q = (2, 4, 3, 8)
    assert reason(q, q, q) == "None"
    assert "dimensions" in reason(q[1:], q, q)
    assert "dimensions" in reason(q[2:], q[2:], q[2:])
    assert "broadcasting" in reason(q, (1, 4, 3, 8), (1, 4, 3, 8))
    assert "broadcasting" in reason(q, (2, 4, 3, 6), q)
    assert "broadcasting" in reason(q, q, (2, 4, 2, 8))
    assert "heads" in reason(q, (2, 2, 3, 8), (2, 2, 3, 8))
    assert "heads" in reason(q, (2, 3, 3, 8), (2, 3, 3, 8), enable_gqa=True)
    fits = "None", (), (3,), (1, 3), (4, 1, 3), (2, 1, 1, 3)
    does_not = "mask", (4,), (3, 4), (2, 3, 3), (2, 1, 3, 3, 3), (1, 2, 4, 3, 3)
    for found, *shapes in (fits, does_not):
        assert all(found in reason(q, q, q, attn_mask=torch.zeros(shape)) for shape in shapes)
    assert "mask" in reason(q, q, q, attn_mask=torch.zeros(3, 3, dtype=torch.float64))
    assert "mask" in reason(q, q, q, attn_mask=torch.zeros(3, 3, device="meta"))
    assert "mask" in reason(*[q[1:]] * 3, attn_mask=torch.zeros(1, 4, 3, 3))
    assert "class" in reason(q, q, q, attn_mask=causal_lower_right(3, 3))
    assert "head_dim" in reason((1, 1, 2, 513), (1, 1, 2, 513), (1, 1, 2, 8))
    assert "dtype" in reason(q, q, q, dtypes=(torch.float32, torch.float32, torch.float16))
    other: torch.Tensor = torch.zeros(q).as_subclass(type("Other", (torch.Tensor,), {}))
    assert sdpa_reason(other, other, other) == "a tensor of a class of its own"


def test_pytorch_has_a_kernel_where_we_think_so():
    """On a CPU: what is left to its fused kernel is what that kernel takes."""
    tried: list[tuple[dict[str, Any], dict[str, Any]]]
    tried = [({}, {}), ({"head_dim_v": 6}, {}), ({}, {"dropout_p": 0.5}), ({"seqlen_q": 3}, {})]
    tried.append(({"nheads_k": 2}, {"enable_gqa": True}))
    masks = torch.zeros(9, 9), torch.zeros(4, 9, 9), torch.ones(2, 1, 1, 9) > 0, torch.zeros(9, 9, requires_grad=True)
    tried += [({}, {"attn_mask": mask}) for mask in masks]
    for sizes, options in tried:
        inputs = tensors(**sizes)
        for laid_out in (inputs, [x.mT.contiguous().mT for x in inputs]):
            chosen = torch._fused_sdp_choice(*laid_out, **options)
            reason = sdpa_reason(*laid_out, **options)
            assert (reason is None) == (chosen == SDPBackend.MATH.value), (sizes, options)


class OnACard:
    """What is asked of a tensor there."""

    device = torch.device("cuda")

    def __init__(self, *shape: int) -> None:
        self.tensor = torch.empty(shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


@pytest.mark.parametrize(("capability", "fused"), [((7, 5), False), ((8, 0), True)])
def test_masks_on_cards(monkeypatch, capability, fused):
    """From 8.0 on PyTorch's memory-efficient kernel takes them, but with fewer key heads, and rows of some sizes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    is_fused: Any = scaled_dot_product._pytorch_is_fused
    q, k, odd, mask = OnACard(1, 4, 9, 8), OnACard(1, 2, 9, 8), OnACard(1, 4, 9, 6), OnACard(9, 9)
    assert is_fused(q, k, k, None, 0.0) == is_fused(q, q, q, mask, 0.0) == fused
    apart = OnACard(9, 9)
    apart.tensor = apart.tensor.mT
    assert not any(is_fused(*given, 0.0) for given in ((q, k, k, mask), (odd, odd, odd, mask), (q, q, q, apart)))


def test_rows_whose_elements_lie_apart():
    inputs = [x.mT.contiguous().mT for x in tensors()]
    with compiled_fa.sdpa() as calls:
        found = F.scaled_dot_product_attention(*inputs)
    assert calls.served == 1
    torch.testing.assert_close(found, PYTORCHS(*inputs))


def test_modules_and_names_that_others_imported(monkeypatch):
    early, late = types.ModuleType("early"), types.ModuleType("late")
    vars(early)["scaled_dot_product_attention"] = PYTORCHS
    monkeypatch.setitem(sys.modules, "early", early)
    attention = torch.nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True)
    x = torch.randn(2, 9, 32)
    with compiled_fa.sdpa() as calls:
        assert vars(early)["scaled_dot_product_attention"] is F.scaled_dot_product_attention is not PYTORCHS
        vars(late)["scaled_dot_product_attention"] = F.scaled_dot_product_attention
        monkeypatch.setitem(sys.modules, "late", late)
        attention(x, x, x, need_weights=False)
        torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)(x)
    assert calls.served == 2
    for module in (early, late):
        assert vars(module)["scaled_dot_product_attention"] is PYTORCHS


def test_it_nests_is_undone_after_an_error_and_reaches_threads():
    inputs = tensors()
    outer = compiled_fa.enable_sdpa(everywhere=True)

    def fail():
        with compiled_fa.sdpa() as inner:
            F.scaled_dot_product_attention(*inputs)
            assert (inner.served, outer.served) == (0, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    thread = threading.Thread(target=F.scaled_dot_product_attention, args=inputs)
    thread.start()
    thread.join()
    assert outer.served == 1
    compiled_fa.disable_sdpa()
    with pytest.raises(RuntimeError, match="not enabled"):
        compiled_fa.disable_sdpa()


def test_compiled_code_follows():
    """A graph of its own in and out of the block, and no third when it comes again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs = [*tensors(head_dim_v=6), torch.randn(4, 1, 9, requires_grad=True)]

    def model(q, k, v, mask):
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return found + F.scaled_dot_product_attention(q, k, v, mask) * 2

    compiled = torch.compile(model, backend=counter, fullgraph=True)
    wanted = results(model, inputs)
    for _ in range(2):
        for result, right in zip(results(compiled, inputs), wanted, strict=True):
            torch.testing.assert_close(result, right)
        with compiled_fa.sdpa():
            for result, right in zip(results(compiled, inputs), wanted, strict=True):
                torch.testing.assert_close(result, right)
    calls = [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs]
    for op in ("compiled_fa.attention.default", "compiled_fa.biased_attention.default"):
        assert [op in targets for targets in calls] == [False, True]


PROGRAM = """
import sys, torch, torch.nn.functional as F
import beside
q = torch.randn(1, 2, 5, 4)
F.scaled_dot_product_attention(q, q, torch.randn(1, 2, 5, 6))
F.scaled_dot_product_attention(q, q, q)
print(__name__, sys.argv[1:], F.scaled_dot_product_attention.__module__)
sys.exit(3)
"""


@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
def test_a_program_with_it(tmp_path, as_module):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("")
    program = ["-m", "program"] if as_module else [str(tmp_path / "program.py")]
    line = [sys.executable, "-m", "compiled_fa.run", "--sdpa", "--report", *program, "--sdpa", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    cwd = tmp_path if as_module else tmp_path.parent
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout == "__main__ ['--sdpa', '-m'] compiled_fa.scaled_dot_product\n"
    assert done.stderr.splitlines()[-1] == (
        "scaled_dot_product_attention: 1 served by compiled_fa; 1 left to PyTorch: PyTorch's own fused kernel"
    )


def test_a_report_is_of_sdpa(capsys):
    from compiled_fa import run

    with pytest.raises(SystemExit):
        run.main(["--report", "script.py"])
    assert "--report is of --sdpa" in capsys.readouterr().err
