"""flex_attention's template, for keys that lie in pages.

It is torch's own but for two lines of the loop over blocks of keys:

- The functions of a score get a key's number as it counts along the list of blocks: that of the first block is its
  place in memory, and from there on they are consecutive, wherever the next blocks lie. torch's get places in memory,
  from which nobody could tell where in its sequence a key of a page is; a sequence may have a page twice.
- Values of keys that no query weighs count as 0. What lies behind a sequence's last key may be NaN, which a
  probability of 0 does not undo.

torch's template for few queries, flex_decoding, would want the same two lines. It is made for one batch size, for
groups of query heads that are powers of two, and divides its splits by the rows of memory, not those of a sequence, as
soon as there are tiles without a mask; in splits that are batches of this one nothing is fixed but the heads.

Graphs ask for it by an option of the kernel, `LIST_ORDER`; all others get torch's.

Private API: torch._inductor.kernel.flex.flex_attention, its template and grid, and TritonTemplate. Tried with torch
2.11.0, 2.13.0 and 2.15.0. Where the lines are others, there is a reason, and keys are gathered.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from typing import Any

LIST_ORDER = "KEYS_IN_LIST_ORDER"

_LINES = {
    r"^( +)offs_n = offs_n \+ offset$": r"\1offs_n = offs_n + BLOCK_N",
    r"^( +)(v = load_checked_2d\(V, .*\))$": r"\1\2\n\1v = tl.where((tl.max(p, 0) > 0.0)[:, None], v, 0.0)",
}


class _ByOption:
    """In the place of torch's template: the one that a graph asks for."""

    def __init__(self, stock: Any, changed: Any) -> None:
        self._stock, self._changed = stock, changed

    def maybe_append_choice(self, choices: list[Any], **options: Any) -> Any:
        chosen = self._changed if options.get(LIST_ORDER) else self._stock
        return chosen.maybe_append_choice(choices, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)


@functools.cache
def install() -> str | None:
    """For all graphs of the process that are lowered from now on. Returns why that cannot be; None: done."""
    try:
        # The package has a function of this module's name.
        lowering: Any = importlib.import_module("torch._inductor.kernel.flex.flex_attention")
        from torch._inductor.select_algorithm import TritonTemplate

        stock, load = lowering.flex_attention_template, lowering.load_flex_template
        source = changed("".join(load(name) for name in ("flex_attention", "utilities", "common")))
        if source is None:
            return "torch's flex_attention template has other lines than the ones that keys in pages need changed"
        known = inspect.signature(TritonTemplate.__init__).parameters
        template = TritonTemplate(
            name="flex_attention_in_list_order",
            grid=lowering.flex_attention_grid,
            source=source,
            **{name: True for name in ("always_freeze_layout",) if name in known},  # torch 2.11 does not have it
        )
        lowering.flex_attention_template = _ByOption(stock, template)
    except (ImportError, AttributeError, TypeError) as error:
        return f"torch's flex_attention template is not where it was: {error}"
    return None


def changed(source: str) -> str | None:
    """The template's text with the two lines; None: they are not there, once each."""
    for line, replacement in _LINES.items():
        source, count = re.subn(line, replacement, source, flags=re.MULTILINE)
        if count != 1:
            return None
    return source
