"""Every engine that can compute a call on a CPU, its steps as plain PyTorch ops, and the op that chooses among them."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import template
import test_decode
import test_short_varlen
import torch
from hypothesis import settings
from hypothesis import strategies as st
from large import large_tiles
from support import Case, Data, cases, run_engine

from compiled_fa import ops
from compiled_fa.engines import fused, sdpa_cpu, split_kv, tiled
from compiled_fa.engines.split_kv import decode, short_varlen


class Auto:
    """The ops, as `auto` has them served."""

    @staticmethod
    def _arguments(problem):
        left, right = (-1 if side is None else side for side in problem.window)
        scores = problem.softmax_scale, False, left, right, problem.softcap, problem.alibi_slopes
        options = (*scores, problem.dropout_p, problem.dropout_seed)
        if problem.bias is not None:
            biased = (problem.q, problem.k, problem.v, problem.bias, *options)
            return ops.biased_attention, ops.biased_attention_backward, biased
        if problem.packed is None:
            return ops.attention, ops.attention_backward, (problem.q, problem.k, problem.v, *options)
        p = problem.packed
        packing = p.cu_seqlens_q, p.cu_seqlens_k, p.max_seqlen_q, p.max_seqlen_k, p.block_table
        arguments = (problem.q, problem.k, problem.v, *packing, *options)
        return ops.varlen_attention, ops.varlen_attention_backward, arguments

    def forward(self, problem):
        forward, _, arguments = self._arguments(problem)
        return forward(*arguments)

    def backward(self, problem, dout, out, lse, dlse=None):
        _, backward, arguments = self._arguments(problem)
        gradients = backward(dout, dlse, out, lse, *arguments)
        return gradients if problem.bias_gradient else gradients[:3]


class SplitKV:
    """Calls without tiles, whatever their size; what these steps leave, and gradients, are tiled's."""

    def __init__(self, steps, shrink):
        self.steps, self.shrink, self.served = steps, shrink, 0

    def forward(self, problem):
        with pytest.MonkeyPatch.context() as patch:
            self.shrink(patch)
            able = split_kv.unsupported_reason(problem.q.device, problem) is None
            if able and self.steps.unsupported_reason(problem) is None:
                self.served += 1
                return self.steps.forward(problem)
        return tiled.forward(problem)

    backward = staticmethod(tiled.backward)


class Fused:
    """The fused engine with template.py in place of its kernel. A bias's gradient it leaves to others."""

    def forward(self, problem):
        with template.in_place_of_the_kernel():
            return fused.forward(problem)

    def backward(self, problem, *arguments):
        with template.in_place_of_the_kernel():
            return fused.backward(replace(problem, bias_gradient=False), *arguments)


class Large:
    """The tiled engine with tiles of a GPU's size, and products that widen half precision as on CUDA."""

    def forward(self, problem, **options):
        with large_tiles():
            return tiled.forward(problem, **options)

    def backward(self, *arguments, **options):
        with large_tiles():
            return tiled.backward(*arguments, **options)


@dataclass(frozen=True)
class Runner:
    """fields: of the cases that the engine takes, as `cases` wants them; lengths: theirs, by whether they are dense."""

    name: str
    engine: Any
    fields: dict[str, Any] = field(default_factory=dict)
    lengths: dict[bool, st.SearchStrategy[Any]] = field(default_factory=dict)
    layouts: tuple[bool, ...] = (True, False)

    def cases(self, dense: bool, **fields: Any) -> st.SearchStrategy[Case]:
        lengths = {"lengths": self.lengths[dense]} if dense in self.lengths else {}
        return cases(dense, **{**self.fields, **lengths, **fields})

    def run(self, data: Data) -> dict[str, torch.Tensor]:
        takes_tiles = self.engine is tiled or isinstance(self.engine, Large)
        return run_engine(self.engine, data, **({"tiles": data.case.tiles} if takes_tiles else {}))


PLAIN = {"window_size": (-1, -1), "softcap": 0.0, "slopes": "none", "dropout_p": 0.0, "head_dim_v": 0}
POSITIVE = {"softmax_scale": st.sampled_from([None, 0.05, 1.0])}
KEYS = st.integers(0, 70)
FEW_QUERIES = {
    False: st.tuples(st.integers(1, 3), st.lists(KEYS, min_size=1, max_size=4)).map(
        lambda drawn: tuple((drawn[0], keys) for keys in drawn[1])
    ),
    True: st.tuples(st.integers(1, 3), KEYS, st.integers(1, 3)).map(lambda drawn: (drawn[:2],) * drawn[2]),
}
NO_FP64 = {"dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16])}

RUNNERS = (
    Runner("auto", Auto(), {"tiles": None}),
    Runner("tiled", tiled),
    Runner("large tiles", Large()),
    Runner("sdpa_cpu", sdpa_cpu, PLAIN | POSITIVE),
    Runner("decode", SplitKV(decode, test_decode.shrink), {"dropout_p": 0.0}, FEW_QUERIES),
    Runner(
        "short_varlen",
        SplitKV(short_varlen, test_short_varlen.shrink),
        {"slopes": "none", "dropout_p": 0.0},
        layouts=(False,),
    ),
    Runner("fused", Fused(), NO_FP64),
)


def every_engine(dense: bool):
    """Parametrizes a test by those that take the layout."""
    chosen = [runner for runner in RUNNERS if dense in runner.layouts]
    return pytest.mark.parametrize("runner", chosen, ids=lambda runner: runner.name)


def examples(part: int):
    """This part of the profile's number of examples, for a test that every engine runs."""
    return settings(max_examples=max(1, settings().max_examples // part))
