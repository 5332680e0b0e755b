"""The triton engine: its kernels run by Triton's interpreter, its calls, and the score program as Triton code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import interpreted
import pytest
import torch

from compiled_fa.engines import CannotServeError
from compiled_fa.engines.triton import printing, program
from compiled_fa.engines.triton.printing import Level
from compiled_fa.engines.triton.program import Terms

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


@pytest.mark.parametrize("name", [*interpreted.CASES, "views", "rows of nobody"])
def test_interpreted_it_agrees_with_float64(outcomes: dict[str, str], name: str) -> None:
    assert outcomes[name] == ""


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
