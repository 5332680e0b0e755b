"""Runs in a process of its own, with TRITON_INTERPRET=1: the triton engine's kernels on a CPU, statement by statement.

Prints a JSON object: what is wrong with each case, or nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from support import Case, Data, check_against_float64, make, run_engine

from compiled_fa.engines import triton

SHAPE: dict[str, Any] = {"nheads_k": 1, "head_dim": 16, "head_dim_v": 16}
RAGGED = ((20, 9), (0, 3), (5, 0), (18, 40))
CASES: dict[str, dict[str, Any]] = {
    "causal": {"lengths": ((33, 33),), "dense": True, "causal": True},
    "more keys than queries, GQA, dropout": {
        "lengths": ((7, 35),) * 2, "dense": True, "causal": True, "heads_per_key": 2, "dropout_p": 0.25,
    },
    "head_dims that are no power of two": {
        "lengths": ((17, 37),), "dense": True, "head_dim": 24, "head_dim_v": 7, "slopes": "heads",
    },
    "packed, with everything": {
        "lengths": RAGGED, "window_size": (12, 4), "slopes": "batch", "softcap": 3.0, "dropout_p": 0.3,
        "heads_per_key": 2,
    },
    "packed, causal": {"lengths": ((33, 20), (0, 3), (5, 0)), "causal": True, "softmax_scale": 0.7},
    "a window, fp16": {"lengths": ((50, 40),), "window_size": (3, 9), "softcap": 30.0, "dtype": torch.float16},
    "no keys at all": {"lengths": ((3, 0), (1, 0)), "dropout_p": 0.1},
}  # fmt: skip


def found(data: Data) -> str:
    try:
        check_against_float64(data, run_engine(triton, data))
    except AssertionError as error:
        return str(error)
    return ""


def views() -> str:
    """q, k and v of one tensor, heads before rows; a gradient of no stride; a dimension of size 1 of any stride."""
    data = make(Case(**{**SHAPE, "lengths": ((19, 19),), "dense": True, "heads_per_key": 1}))
    problem = data.problem()
    expected_out, expected_lse = triton.forward(problem)
    dout = torch.ones((), dtype=torch.float32).expand(expected_out.shape)
    expected = triton.backward(problem, dout.contiguous(), expected_out, expected_lse)
    stacked = torch.stack((problem.q, problem.k, problem.v), dim=2).transpose(1, 3).contiguous()  # (1, H, 3, S, D)
    q, k, v = (x.transpose(1, 2) for x in stacked.unbind(2))
    q = q.as_strided(q.shape, (3, q.stride(1), 5, 1), q.storage_offset())
    viewed = replace(problem, q=q, k=k, v=v)
    out, lse = triton.forward(viewed)
    gradients = triton.backward(viewed, dout, out, lse)
    alike = [
        torch.equal(x, y) for x, y in zip((out, lse, *gradients), (expected_out, expected_lse, *expected), strict=True)
    ]
    return "" if all(alike) else f"out, lse, dq, dk, dv are alike: {alike}"


def rows_of_nobody() -> str:
    """Behind the last sequence, as buffers of fixed size have them: zeros, and an lse of -inf, whatever is there."""
    data = make(Case(**{**SHAPE, "lengths": ((5, 7), (9, 4))}))
    problem = data.problem()
    wanted = triton.forward(problem)
    expected = [wanted[0], wanted[1].mT, *triton.backward(problem, data.dout, *wanted)]
    nothing = torch.full((40, 1, 16), torch.nan)
    q, k, v, dout = (torch.cat([x, nothing]) for x in (problem.q, problem.k, problem.v, data.dout))
    longer = replace(problem, q=q, k=k, v=v)
    out, lse = triton.forward(longer)
    found = (out, lse.mT, *triton.backward(longer, dout, out, lse))
    right = [torch.equal(x[: len(y)], y) for x, y in zip(found, expected, strict=True)]
    rest = [
        bool((x[len(y) :] == (-torch.inf if x is found[1] else 0.0)).all())
        for x, y in zip(found, expected, strict=True)
    ]
    return "" if all(right + rest) else f"out, lse, dq, dk, dv: {right}, behind them {rest}"


def larger_than_32_bits() -> str:
    """Keys that lie within more than 2**31 elements, of which few are ever touched."""
    data = make(Case(**{**SHAPE, "lengths": ((3, 270),), "dense": True}))
    problem = data.problem()
    expected = triton.forward(problem)
    gradients = triton.backward(problem, data.batched(data.dout), *expected)
    stride = 1 << 23
    far = torch.empty(270 * stride, dtype=problem.k.dtype).as_strided(problem.k.shape, (270 * stride, stride, 16, 1))
    far.copy_(problem.k)
    longer = replace(problem, k=far)
    out, lse = triton.forward(longer)
    found = (out, lse, *triton.backward(longer, data.batched(data.dout), out, lse))
    alike = [torch.equal(x, y) for x, y in zip(found, (*expected, *gradients), strict=True)]
    return "" if all(alike) else f"out, lse, dq, dk, dv are alike: {alike}"


MORE = {"views": views, "rows of nobody": rows_of_nobody, "larger than 32 bits": larger_than_32_bits}


def main() -> None:
    results = {name: found(make(Case(**{**SHAPE, **fields}))) for name, fields in CASES.items()}
    print(json.dumps({**results, **{name: case() for name, case in MORE.items()}}))


if __name__ == "__main__":
    main()
