"""einops.rearrange, which some import from flash_attn.bert_padding: einops' own, or where it is not installed, ours.

Ours splits, merges and permutes dimensions of tensors, which is all that is asked of it there.
"""

from __future__ import annotations

import math
import re

from torch import Tensor

try:
    from einops import rearrange as rearrange
except ImportError:

    def rearrange(tensor: Tensor, pattern: str, **axes_lengths: int) -> Tensor:
        """rearrange(x, "b s h d -> (b s) (h d)"): names of dimensions, "..." for any others, and groups of names.

        axes_lengths: sizes of names in groups on the left; at most one of a group may be left out.

        Raises:
            ValueError: the pattern is malformed, or does not fit the tensor.
        """
        return _rearrange(tensor, pattern, axes_lengths)


def _rearrange(tensor: Tensor, pattern: str, axes_lengths: dict[str, int]) -> Tensor:
    left, arrow, right = pattern.partition("->")
    groups, wanted = _groups(left, pattern), _groups(right, pattern)
    names = [name for group in groups for name in group]
    if not arrow or sorted(names) != sorted(name for group in wanted for name in group) or len(set(names)) < len(names):
        raise ValueError(f"pattern must have the same names on both sides, each once, got {pattern!r}")
    rest = tensor.dim() - sum(group != ["..."] for group in groups)
    if rest < 0 or (rest > 0 and ["..."] not in groups):
        raise ValueError(f"pattern must fit the tensor's shape, {tuple(tensor.shape)}, got {pattern!r}")
    sizes: dict[str, list[int]] = {}
    at = 0
    for group in groups:
        width = rest if group == ["..."] else 1
        shape = list(tensor.shape[at : at + width])
        at += width
        if group == ["..."]:
            sizes["..."] = shape
            continue
        unknown = [name for name in group if name not in axes_lengths]
        known = math.prod(axes_lengths[name] for name in group if name in axes_lengths)
        if len(unknown) > 1 or known == 0 or shape[0] % known:
            raise ValueError(f"sizes of {group} must be given, and fit {shape[0]}, got {axes_lengths} for {pattern!r}")
        sizes |= {name: [axes_lengths[name]] for name in group if name in axes_lengths}
        sizes |= {name: [shape[0] // known] for name in unknown}
        if math.prod(sizes[name][0] for name in group) != shape[0]:
            raise ValueError(f"sizes of {group} must multiply to {shape[0]}, got {axes_lengths} for {pattern!r}")
    places, first = {}, 0
    for name in names:
        places[name] = list(range(first, first + len(sizes[name])))
        first += len(sizes[name])
    split = tensor.reshape([size for name in names for size in sizes[name]])
    order = [place for group in wanted for name in group for place in places[name]]
    merged: list[int] = []
    for group in wanted:
        inner = [size for name in group for size in sizes[name]]
        merged += inner if group == ["..."] else [math.prod(inner)]
    return split.permute(order).reshape(merged)


def _groups(side: str, pattern: str) -> list[list[str]]:
    if re.sub(r"\(\s*[\w\s.]*\)|\w+|\.\.\.|\s", "", side):
        raise ValueError(f"pattern must be names, '...' and groups of them in parentheses, got {pattern!r}")
    found = re.findall(r"\(([^)]*)\)|(\.\.\.|\w+)", side)
    return [[name] if name else group.split() for group, name in found]
