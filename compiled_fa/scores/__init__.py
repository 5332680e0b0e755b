"""What a score is: scale, softcap, ALiBi, bias, window, lengths and dropout, each defined here once for every engine.

program.py    the score program: the terms below put together as functions of (score, batch, head, q_idx, kv_idx)
terms.py      scale, softcap, ALiBi, bias and their derivative
masks.py      which keys a query sees (window, causal, lengths), element by element and as ranges
dropout.py    which probabilities are kept: an integer hash of (seed, batch, head, q_idx, kv_idx)
arguments.py  the program as arguments of compiled code
"""

from .dropout import Dropout
from .masks import Window
from .program import ScoreProgram

__all__ = ["Dropout", "ScoreProgram", "Window"]
