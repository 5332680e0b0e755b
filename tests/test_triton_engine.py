"""The triton engine: its kernels run by Triton's interpreter, its calls, and the score program as Triton code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch
from support import Case, check_against_float64, make, run_op
from test_fused_cost import Ops

from compiled_fa import engines, flash_attn_func, messages
from compiled_fa.engines import CannotServeError, fused, nvidia, triton
from compiled_fa.engines.triton import launching, printing, program
from compiled_fa.engines.triton.printing import Level
from compiled_fa.engines.triton.program import Terms
from compiled_fa.inductor import lowering
from compiled_fa.problem import Direction, Packed, Problem

TESTS = Path(__file__).parent


# ----------------------------------------------------------------------------------------------------- what it computes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of tests/interpreted.py's cases; Triton asks whether it interprets when it is imported."""
    pytest.importorskip("triton", reason="needs Triton, whose interpreter it is")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "COMPILED_FA_COMPILE": "0",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    child = subprocess.run(
        [sys.executable, str(TESTS / "interpreted.py")], env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(child.stdout)
    return found


@pytest.mark.parametrize("name", [*interpreted.CASES, *interpreted.MORE])
def test_interpreted_it_agrees_with_float64(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == ""


# ------------------------------------------------------------------------------------------- which calls, and what else


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of Triton kernels serve tensors of any device."""
    monkeypatch.setattr(nvidia, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(nvidia, "capability_of", lambda device: nvidia.TURING)
    monkeypatch.setattr(messages, "_said", set())


def served(problem: Problem, direction: Direction = "forward") -> str:
    return engines.select(problem, direction).engine.name


def test_it_serves_dropout_and_what_is_too_large_for_32_bits(
    as_on_a_gpu: None, caplog: pytest.LogCaptureFixture
) -> None:
    dropping = make(Case(((9, 9),), True, dtype=torch.float16, dropout_p=0.1)).problem()
    assert (served(dropping), served(dropping, "backward")) == ("triton", "triton")
    assert served(replace(dropping, dropout_seed=None)) == "fused"
    assert not caplog.records  # to leave a call to another is no second choice
    large = torch.empty(1, 1 << 19, 64, 64, dtype=torch.float16, device="meta")
    assert served(Problem.of(large, large, large, None)) == "triton"
    assert "not fused: it indexes tensors" in caplog.text
    pages = torch.empty(5, 16, 2, 8, dtype=torch.float16)
    sums = torch.tensor([0, 9], dtype=torch.int32)
    paged = Packed(sums, sums.clone(), 9, 9, torch.zeros(1, 1, dtype=torch.int32))
    q = torch.empty(9, 2, 8, dtype=torch.float16)
    assert served(Problem.of(q, pages, pages, paged, dropout_p=0.1, dropout_seed=torch.zeros(1).long())) == "fused"


def test_what_it_does_not_serve_it_says(as_on_a_gpu: None) -> None:
    def reason(dtype: torch.dtype, head_dim: int) -> str | None:
        q = torch.empty(1, 4, 2, head_dim, dtype=dtype)
        return triton.unsupported_reason(q.device, Problem.of(q, q, q, None))

    assert reason(torch.float16, 256) is None
    assert "end at head_dim 256, and this is 257" in (reason(torch.float16, 257) or "")
    assert "end at head_dim 128, and this is 129" in (reason(torch.float32, 129) or "")
    assert "these are fp64" in (reason(torch.float64, 8) or "")


def test_another_engine_serves_in_place_of_kernels_that_cannot_be_launched(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fused is the first to be asked, and here cannot either."""
    monkeypatch.setattr(nvidia, "prepare", lambda *_: None)

    def too_large(*_: Any) -> None:
        raise CannotServeError("out of resource: shared memory")

    monkeypatch.setattr(launching, "run", too_large)
    monkeypatch.setattr(fused, "forward", too_large)
    monkeypatch.setattr(fused, "backward", too_large)
    data = make(Case(((9, 9),), True, dropout_p=0.3))
    for _ in range(2):
        check_against_float64(data, run_op(data))
    assert caplog.text.count("in place of triton, which cannot: out of resource: shared memory") == 1
    with pytest.raises(RuntimeError, match=r"asked for and cannot serve .* shared memory"):
        run_op(data, engine="triton")


def test_a_call_is_its_launches_and_allocates_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its features: no table, no copy."""
    pytest.importorskip("triton")
    from tools.offline.own_kernels import noted

    data = make(Case(((9, 9), (0, 4)), dtype=torch.float16, dropout_p=0.3, softcap=2.0, slopes="heads"))
    problem = data.problem()
    with noted() as launches, Ops() as ops:
        out, lse = triton.forward(problem)
        triton.backward(problem, data.dout, out, lse, data.dlse)
    assert [launch.kernel.function for launch in launches] == [
        "attention_forward",
        "attention_backward_queries",
        "attention_backward_keys",
    ]
    # The seed's two halves are views, and so are slopes for each sequence.
    assert set(ops.found) <= {"empty", "empty_like", "new_empty", "view", "expand", "detach"}
    assert sum(ops.found[name] for name in ("empty", "empty_like", "new_empty")) == 2 + 4


# ------------------------------------------------------------------------------------ the score program as Triton code


def lines_of(text: str, name: str) -> list[str]:
    """Of a function's body."""
    _, _, rest = text.partition(f"def {name}(")
    body = rest.partition("@triton.jit")[0].splitlines()[1:]
    return [line.strip() for line in body if line.strip()]


def test_what_no_key_takes_part_in_is_computed_once_a_row() -> None:
    text = program.text(Terms(softcap=True, alibi=True, dropout=True))
    multiplications = {name: sum(" * -2073254261" in line for line in lines_of(text, name)) for name in FUNCTIONS}
    assert multiplications == {"of_head": 6, "of_rows": 2, "keep": 2, "score": 0, "seen": 0, "product_gradient": 0}
    assert not any("/" in line for line in lines_of(text, "score"))  # softcap's reciprocal is the head's
    assert sum("tl.load(alibi_slopes" in line for line in text.splitlines()) == 1
    assert sum("tl.load" in line for line in lines_of(text, "of_head")) == 3  # and the seed's halves


FUNCTIONS = ("of_head", "of_rows", "score", "seen", "keep", "product_gradient")


def test_terms_that_a_call_has_not_are_not_there() -> None:
    text = program.text(Terms())
    assert "def keep(" not in text
    assert "tanh(" not in text.partition("@triton.jit")[2]
    assert "alibi_slopes" not in "".join(lines_of(text, "of_head"))


def printed(trace: Any, **levels: Level) -> dict[str, Any]:
    """A trace's functions, as Python that computes with tensors."""
    inputs = {name: (torch.ones(1, 1), level) for name, level in levels.items()}
    elements = [name for name, level in levels.items() if level == Level.ELEMENT]
    text = printing.levelled(trace, inputs, {"result": elements})

    class Language:
        maximum, minimum, where, exp, log, abs = torch.maximum, torch.minimum, torch.where, torch.exp, torch.log, abs
        float32, int32 = torch.float32, torch.int32

    class Triton:
        jit = staticmethod(lambda function: function)

    namespace: dict[str, Any] = {"triton": Triton, "tl": Language, "tanh": torch.tanh}
    exec(text, namespace)
    return namespace


def test_a_term_that_nobody_has_written_yet_is_printed_as_it_is_traced() -> None:
    """Such as a bias for each element, read by whoever computes, and a slope that depends on the row."""

    def trace(scale: Any, row: Any, x: Any, bias: Any) -> dict[str, Any]:
        capped = torch.tanh(x / scale) * scale + bias.to(torch.float32)
        return {"result": torch.where(bias > 0.5, capped - (row * 2 + scale).exp() * x.abs(), -capped)}

    functions = printed(trace, scale=Level.HEAD, row=Level.ROW, x=Level.ELEMENT, bias=Level.ELEMENT)
    scale, row, x, bias = torch.tensor(3.0), torch.randn(4, 1), torch.randn(4, 5), torch.rand(4, 5)
    head_values = functions["of_head"](scale)
    found = functions["result"](x, bias, head_values, functions["of_rows"](row, head_values))
    torch.testing.assert_close(found, trace(scale, row, x, bias)["result"])


def test_an_operator_that_has_no_triton_code_is_named() -> None:
    with pytest.raises(CannotServeError, match=r"no Triton code is known for aten.erfinv.default"):
        printed(lambda x: {"result": torch.erfinv(x)}, x=Level.ELEMENT)


# ------------------------------------------------------------------------------------------------- in Inductor's graphs

LAYERS = 2


def layers_on_a_t4(cases: list[tuple[bool, bool]]) -> list[tuple[list[str], str, int]]:
    """For a process of its own: launches of a training step with dropout, the code that launches them, and how many
    tensor-core instructions its forward kernel has, which is Triton code that Inductor wrote."""
    from tools.offline import KernelSource, compile_source
    from tools.offline.engine import written_for_layers

    found = [written_for_layers(LAYERS, 300, *case, dropout=True, causal=True) for case in cases]
    name = "attention_forward"
    codes = [compile_source(KernelSource(name, each.kernels[name]), turing=True) for each in found]
    return [(each.launches, each.wrapper, code.hmma) for each, code in zip(found, codes, strict=True)]


def test_in_a_graph_a_call_with_dropout_is_its_launches() -> None:
    """Dense; and packed, for any number of rows. Three of ours a layer, no op of ours, no copy, no table."""
    pytest.importorskip("triton", reason="Inductor writes Triton code only where Triton is")
    from tools.offline import in_own_process

    for launches, wrapper, hmma in in_own_process(layers_on_a_t4, [(False, False), (True, True)]):
        ours = [name.rpartition("_")[0] for name in launches if name.startswith("attention")]
        backward = ["attention_backward_queries", "attention_backward_keys"]
        assert hmma == 256
        assert ours == ["attention_forward"] * LAYERS + backward * LAYERS
        assert "torch.ops.compiled_fa" not in wrapper
        around = [name for name in launches if not name.startswith("attention")]
        # The model's own: what q, k and v are, sums of layers, and of gradients.
        assert len(around) <= 3 * LAYERS, around
        assert all("poi" in name for name in around)


def test_forward_is_computed_once_in_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of forward and one of backward, as AOTAutograd divides both: launches give tensors there, so that none is
    left out, and none done again."""
    pytest.importorskip("triton")
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    monkeypatch.setattr("compiled_fa.engines.inlined", lambda problem, direction, name="auto": triton)
    lowering.tell_inductor()
    torch._dynamo.reset()
    graphs: list[list[str]] = []

    def note(graph: Any, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        results = [
            node.meta["val"] if isinstance(node, torch.fx.Node) else None for node in graph.graph.output_node().args[0]
        ]
        return lambda *_: [
            torch.zeros(x.shape, dtype=x.dtype) if isinstance(x, torch.Tensor) else None for x in results
        ]

    table = {op: rule for op, rule in select_decomp_table().items() if "compiled_fa" in str(op)}
    backend = aot_autograd(
        fw_compiler=note, bw_compiler=note, decompositions=table, partition_fn=min_cut_rematerialization_partition
    )
    q, k, v = (torch.randn(2, 33, 4, 16, requires_grad=True) for _ in range(3))
    torch.compile(flash_attn_func, backend=backend, fullgraph=True)(q, k, v, 0.1, causal=True).sum().backward()
    torch._dynamo.reset()
    assert [sum("triton_kernel" in name for name in graph) for graph in graphs] == [1, 2]
    assert not any("compiled_fa" in name for graph in graphs for name in graph)
