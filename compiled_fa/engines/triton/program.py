"""The score program as Triton code: traced from its PyTorch ops, printed by printing.py, once for each set of terms.

    of_head, of_rows        what does not change with the key, and not with the query
    score, product_gradient scores/program.py's
    seen                    is the key in the interval that the query sees? For tiles that need a mask
    keep                    dropout's decision; where there is dropout
    keys_of_tile            the keys that some query of a tile sees, and those that all do: two intervals
    positions_of_tile       likewise, the positions that see some key of a tile, and those that see all

Numbers of the program (scale, softcap, window, dropout's threshold) are parameters: kernels serve every value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...scores import Dropout, ScoreProgram, Window, masks
from .printing import Inputs, Level, function, levelled

HEADER = "import triton\nimport triton.language as tl\n\nfrom compiled_fa.engines.triton.tiles import tanh\n\n\n"


@dataclass(frozen=True)
class Terms:
    """What of a score program is code: which terms a score has."""

    softcap: bool = False
    alibi: bool = False
    dropout: bool = False

    @property
    def words(self) -> str:
        chosen = {"softcap": self.softcap, "ALiBi": self.alibi, "dropout": self.dropout}
        return ", ".join(name for name, present in chosen.items() if present) or "plain"


# What is an element's, of each function; all else is known for a row.
PARAMETERS = {
    "score": ("product", "kv_idx"),
    "seen": ("kv_idx",),
    "keep": ("kv_idx",),
    "product_gradient": ("dscore", "product"),
}
STRIDES = ("alibi_slopes_stride_0", "alibi_slopes_stride_1")


def text(terms: Terms) -> str:
    """A module of Triton functions."""
    inputs = _inputs()
    scores = levelled(
        lambda *tensors: _scores(terms, dict(zip(inputs, tensors, strict=True))), inputs, PARAMETERS, STRIDES
    )
    intervals = [
        function(name, trace, dict.fromkeys(parameters, torch.zeros((), dtype=torch.int32)))
        for name, trace, parameters in (
            ("keys_of_tile", _keys_of_tile, ("first", "last", "seqlen_k", "window_left", "window_right")),
            (
                "positions_of_tile",
                _positions_of_tile,
                ("first", "last", "lowest", "highest", "window_left", "window_right"),
            ),
        )
    ]
    return HEADER + "\n\n".join([scores, *intervals])


def _keys_of_tile(first: Tensor, last: Tensor, seqlen_k: Tensor, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    window = Window(left, right)
    return _intervals(
        window.keys_seen_by_any(first, last, seqlen_k),
        window.keys_seen_by_all(first, last, seqlen_k),
    )


def _positions_of_tile(
    first: Tensor, last: Tensor, lowest: Tensor, highest: Tensor, left: Tensor, right: Tensor
) -> dict[str, Tensor]:
    window = Window(left, right)
    return _intervals(
        window.positions_that_see_any(first, last, lowest, highest),
        window.positions_that_see_all(first, last, lowest, highest),
    )


def _intervals(some: tuple[Tensor, Tensor], every: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("start", "stop", "full_start", "full_stop"), (*some, *every), strict=True))


def _inputs() -> Inputs:
    # Indices of shape (1, 1), as they would be of a tile: those without a dimension are read off to index a tensor.
    index, number = torch.zeros((1, 1), dtype=torch.int32), torch.ones((), dtype=torch.int32)
    product, real = torch.ones((1, 1)), torch.ones(())
    return {
        "batch": (index, Level.HEAD),
        "head": (index, Level.HEAD),
        "seqlen_q": (number, Level.HEAD),
        "seqlen_k": (number, Level.HEAD),
        "window_left": (number, Level.HEAD),
        "window_right": (number, Level.HEAD),
        "softmax_scale": (real, Level.HEAD),
        "softcap": (real, Level.HEAD),
        "threshold": (number, Level.HEAD),
        "alibi_slopes": (torch.ones((1, 1)), Level.HEAD),
        "seed": (torch.zeros(2, dtype=torch.int32), Level.HEAD),
        "q_idx": (index, Level.ROW),
        "kv_idx": (index, Level.ELEMENT),
        "product": (product, Level.ELEMENT),
        "dscore": (product, Level.ELEMENT),
    }


def _scores(terms: Terms, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is traced."""
    program = ScoreProgram(
        given["seqlen_q"],
        given["seqlen_k"],
        given["softmax_scale"],
        given["softcap"] if terms.softcap else None,
        given["alibi_slopes"] if terms.alibi else None,
        Window(given["window_left"], given["window_right"]),
        Dropout(given["seed"], given["threshold"]) if terms.dropout else None,
    )
    indices = [given[name] for name in ("batch", "head", "q_idx", "kv_idx")]
    position = masks.query_position(given["q_idx"], given["seqlen_q"], given["seqlen_k"])
    interval = program.window.keys_seen_by_any(position, position, given["seqlen_k"])
    found = {
        "score": program.score(given["product"], *indices),
        "seen": masks.within(given["kv_idx"], *interval),
        "product_gradient": program.product_gradient(given["dscore"], given["product"]),
    }
    return found | ({"keep": program.keep(*indices)} if terms.dropout else {})
