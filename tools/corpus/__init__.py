"""Triton kernels of the kinds that other people write, to hold the Turing stage against: every kind that has been met.

Each file has kernels, the functions that launch them as their users would, and the same in PyTorch's ops. Nothing here
knows Turing or the stage. case.py says what a case is; tools/turing_corpus.py compiles, executes and judges them.
"""

from tools.corpus import attention, dense, grouped, linear, plain, quantised
from tools.corpus.case import Case

CASES = (
    *dense.CASES,
    *quantised.CASES,
    *grouped.CASES,
    *attention.CASES,
    *linear.CASES,
    *plain.CASES,
)

__all__ = ["CASES", "Case"]
