"""What a call of the fused engine costs besides its kernels: PyTorch ops around compiled code, and launches in it."""

import collections
from typing import Any

import kv
import pytest
import torch
from support import Case, make
from torch.utils._python_dispatch import TorchDispatchMode

from compiled_fa import cache_call
from compiled_fa.engines import fused
from compiled_fa.engines.fused import kernels
from compiled_fa.engines.fused.kernels import Spec
from compiled_fa.engines.fused.mods import Features
from compiled_fa.engines.fused.tables import Shape

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window_size": (64, 0)},
    "softcap": {"softcap": 5.0},
    "dropout": {"dropout_p": 0.1},
}
LENGTHS = {
    "square": ((256, 256),) * 2,
    "rectangular": ((200, 256),) * 2,
    "self-attention": ((200, 200), (0, 0), (312, 312)),
    "cross-attention": ((200, 100), (0, 3), (312, 5)),
    "few queries": ((1, 100), (0, 3), (1, 5)),
}


class Ops(TorchDispatchMode):
    """Counts PyTorch ops, views included, but for those in compiled code."""

    def __init__(self):
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def ops_of(call):
    """In a call like one that was before."""
    call()
    with Ops() as ops:
        call()
    return dict(ops.found)


@pytest.fixture
def kernels_for_nothing(monkeypatch):
    """In place of compiled code."""

    def run(spec, given):
        q, k, v = (given[name] for name in "qkv")
        with torch.utils._python_dispatch._disable_current_modes():
            if spec.direction == "backward":
                return tuple(map(torch.empty_like, (q, k, v)))
            return torch.empty(*q.shape[:-1], v.shape[-1]), torch.empty(*q.shape[:-1]).mT.contiguous()

    monkeypatch.setattr(kernels, "run", run)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_ops_around_compiled_code(kernels_for_nothing, lengths, features):
    """None, once a call's tables and numbers are there; views of the seed."""
    case = Case(lengths, len(set(lengths)) == 1, dtype=torch.float16, **{"causal": True, **features})
    problem = make(case).problem()
    out, lse = fused.forward(problem)
    dout = torch.empty_like(out)
    views = {"view", "detach"} if "dropout_p" in features else set()
    for call in (lambda: fused.forward(problem), lambda: fused.backward(problem, dout, out, lse, lse)):
        assert ops_of(call).keys() <= views


PAGED: dict[str, dict[str, Any]] = {
    "pages": {"page_size": 16},
    "pages, leftpad": {"page_size": 16, "leftpad": (30, 1)},
    "dense": {},
    "batch_idx": {"batch_idx": True},
}


@pytest.mark.parametrize("fields", PAGED.values(), ids=PAGED)
def test_ops_of_another_layer_on_a_kv_cache(kernels_for_nothing, monkeypatch, fields):
    """Once a step's tables are there: two appends, and views; nothing of the cache is gathered, no value is read."""
    monkeypatch.setattr(cache_call, "is_kept", lambda device: True)
    shape: dict[str, Any] = {"head_dim": 64, "head_dim_v": 64, "dtype": torch.float16}
    made = kv.make(kv.Call((70, 9), 1, 1, **fields, **shape))

    def layer():
        call = made.cache_call()._replace(shares_tables=True)
        slots = call.slots
        for name in ("k", "v"):
            made.arguments[f"{name}_cache"].index_put_(slots, made.arguments[name])
        return fused.forward(call.unread_problem(made.options))

    ops = ops_of(layer)
    assert ops.pop("index_put_") == 2
    assert ops.keys() <= {"unbind", "view", "as_strided"}, ops


# ----------------------------------------------------------------------------------------------------------- launches


def spec(direction, **features):
    strides = ((256, 64),) * (3 if direction == "forward" else 5)
    return Spec(direction, Features(**features), torch.float16, 4, 4, 64, 64, strides, False)


# (kernels of attention, others). Others: the base of lse; in backward delta, and delta in the order of lse; queries
# laid out, and back; with dropout the hash of the rows, and the factor of out.
MOST: dict[str, tuple[Any, int, int]] = {
    "forward": (spec("forward"), 1, 1),
    "forward, packed": (spec("forward", layout="packed"), 1, 1),
    "forward, padded": (spec("forward", layout="padded"), 1, 3),
    "backward": (spec("backward"), 1, 3),
    "backward, packed": (spec("backward", layout="packed"), 1, 3),
    "forward, dropout": (spec("forward", dropout=True), 2, 6),
    "backward, dropout": (spec("backward", dropout=True), 1, 6),
    "tables, dense": (Shape("dense", False), 0, 5),
    "tables, packed": (Shape("packed", False), 0, 4),
}


def all_launches(cases):
    """For a process of its own."""
    from tools.offline.engine import launches_of_call, launches_of_tables

    return [launches_of_call(case) if isinstance(case, Spec) else launches_of_tables(case) for case in cases]


@pytest.fixture(scope="module")
def launches():
    pytest.importorskip("triton", reason="Inductor writes Triton code only where Triton is")
    from tools.offline import in_own_process

    return dict(zip(MOST, in_own_process(all_launches, [case for case, _, _ in MOST.values()]), strict=True))


@pytest.mark.parametrize("name", MOST)
def test_launches_in_compiled_code(launches, name):
    _, attention, others = MOST[name]
    of_attention = [kernel for kernel in launches[name] if kernel.startswith("triton_tem")]
    assert len(of_attention) == attention
    assert len(launches[name]) - attention <= others, launches[name]
