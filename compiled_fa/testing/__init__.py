"""Attention problems, ways to run them, and how wrong a result may be.

cases.py        an attention problem, and its tensors
run.py          one way to run it: an engine, the op, the function, naive attention
naive.py        attention as one would write it down: the reference
budget.py       how large an error may be
strategies.py   problems drawn by hypothesis, which only this module needs

    inputs = Inputs.of(Case.packed([3, 0, 70], nheads_k=2, head_dim=16, causal=True))
    check_against_float64(inputs, run_op(inputs))
"""

from .budget import check_against_float64
from .cases import Bias, Case, Inputs, cumulative
from .run import RESULTS, packed, run, run_engine, run_function, run_naive, run_op

__all__ = [
    "RESULTS",
    "Bias",
    "Case",
    "Inputs",
    "check_against_float64",
    "cumulative",
    "packed",
    "run",
    "run_engine",
    "run_function",
    "run_naive",
    "run_op",
]
