"""The flex_attention template: one Triton kernel forward, one backward, with the score program inlined; and all that a
call computes around it, in one graph.

torch's public flex_attention recomputes its forward to differentiate, and derives the gradient of a score itself. An op
with a backward of its own needs the two higher-order operators beneath it: forward, and backward given out's and lse's
gradients, with our `product_gradient` (which dropout needs) in place of a derived one.

Private API: torch._higher_order_ops.flex_attention's operators and BlockMask.as_tuple. Tried with torch 2.11.0, 2.13.0
and 2.15.0. On a CPU the operators run as plain PyTorch ops over the whole score matrix; that is for tests of everything
around the kernel.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._higher_order_ops
import torch.nn.functional as F
from torch import Tensor

from ...problem import Direction
from ...scores import Dropout
from .blocks import BLOCK, BlockTables, at, contiguous, stored
from .mods import LOG2E, MASK_BUFFERS, Features, Mods

SMALLEST_HEAD_DIM = 16  # tl.dot takes no less: smaller ones are padded with zeros, which change no product

TEMPLATE = {
    "BACKEND": "TRITON",
    "BLOCKS_ARE_CONTIGUOUS": False,
    "OUTPUT_LOGSUMEXP": True,
    "OUTPUT_MAX": False,
    "PRESCALE_QK": False,
    "ROWS_GUARANTEED_SAFE": False,  # a row without a key gives 0
    "WRITE_DQ": True,
}

Arguments = Mapping[str, Any]  # a call's tensors by name, and numbers that become code


@dataclass(frozen=True)
class Graph:
    """A call as a function of named tensors: what is fixed in its code, but for shapes.

    divisible: lengths are multiples of BLOCK. options: tile sizes, warps and stages by the template's names; empty:
    Inductor's own choice.

    q, k, v, dout, out, dq, dk and dv are as the op has them: (B, S, H, D) or (T, H, D); lse and its gradient (B, H, S)
    or (H, T). Where rows are padded, `source` (B, S) says which packed rows those of a batch are, and `home` (T,) where
    packed rows are then. Where keys are in pages, they are gathered as `pages` (B, blocks) says.
    """

    direction: Direction
    features: Features
    divisible: bool
    options: tuple[tuple[str, int], ...] = ()

    def __call__(self, given: Arguments) -> tuple[Tensor, ...]:
        """Forward: out, lse. Backward: dq, dk, dv."""
        return self._forward(given) if self.direction == "forward" else self._backward(given)

    def _template_options(self) -> dict[str, Any]:
        return {**TEMPLATE, "IS_DIVISIBLE": self.divisible, **dict(self.options)}

    def _mods(self, given: Arguments, dropping: bool) -> Mods:
        names = self.features.score_buffers(dropping)
        return Mods(
            self.features, dropping, {name: given[name] for name in names if not isinstance(given[name], Tensor)}
        )

    def _forward(self, given: Arguments) -> tuple[Tensor, ...]:
        q, k, v = _queries(given["q"], given), _keys(given["k"], given), _keys(given["v"], given)
        if not self.features.dropout:
            out, lse = self._pass(given, False, q, k, v)
        else:
            # The kernel normalised over the kept keys. The softmax is over all of them, whose lse a second pass finds:
            # out = exp(lse_kept - lse) / (1 - p) * out_kept. Its v is a sliver of v, to have less to multiply.
            out, kept = self._pass(self._with_hash(given, q), True, q, k, v)
            _, lse = self._pass(given, False, q, k, v.narrow(3, 0, SMALLEST_HEAD_DIM))
            factor = torch.exp2(kept - lse.clamp(min=torch.finfo(torch.float32).min)) / given["keep"]
            out = (out * factor.unsqueeze(3)).to(out.dtype)
        out = _columns(out, given["v"]).transpose(1, 2)
        if "home" in given:
            out = at(out.flatten(0, 1), given["home"])
            lse = at(lse.transpose(1, 2).flatten(0, 1), given["home"]).transpose(0, 1)
        elif given["q"].dim() == 3:
            out, lse = out.squeeze(0), lse.squeeze(0)
        return contiguous(out), contiguous(lse / LOG2E)

    def _pass(self, given: Arguments, dropping: bool, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mods = self._mods(given, dropping)
        # softmax_scale is part of the score program, so the template's own is 1.
        out, lse, *_ = operators().flex_attention(
            q,
            k,
            v,
            mods.score,
            block_mask(mods, q, k, (given[name] for name in BlockTables._fields)),
            1.0,
            self._template_options(),
            tuple(given[name] for name in mods.names),
            tuple(given[name] for name in MASK_BUFFERS),
        )
        return out, lse

    def _with_hash(self, given: Arguments, q: Tensor) -> Arguments:
        """With what dropout's decisions of each row have in common: (B, H, S)."""
        head = torch.arange(q.shape[1], dtype=torch.int32, device=q.device).unsqueeze(1)
        if self.features.layout == "packed":
            sequence, index = (given[name].narrow(0, 0, q.shape[2]).view(1, 1, -1) for name in ("sequence", "index"))
        else:
            sequence = torch.arange(q.shape[0], dtype=torch.int32, device=q.device).view(-1, 1, 1)
            index = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
        low, high = Dropout(given["seed"], given["threshold"]).row(sequence, head, index)
        return {**given, "low": stored(low), "high": stored(high)}

    def _backward(self, given: Arguments) -> tuple[Tensor, ...]:
        q, k, v = _queries(given["q"], given), _keys(given["k"], given), _keys(given["v"], given)
        dout, out = _queries(given["dout"], given), _queries(given["out"], given).float()
        batched = given["q"].dim() == 4
        lse = given["lse"] if batched else given["lse"].unsqueeze(0)
        dlse = given.get("dlse")
        dlse = dlse if dlse is None or batched else dlse.unsqueeze(0)
        lse, buffers = lse * LOG2E, {}
        if self.features.dropout:
            # P / (1 - p) in place of P gives dV. Then dS = P (dP / (1 - p) - delta) wants (1 - p) delta.
            keep = given["keep"]
            lse = lse + (torch.log2(keep) if isinstance(keep, Tensor) else math.log2(keep))
            delta = (out * dout).sum(-1)  # FlashAttention-2, Algorithm 2, line 4
            delta = (delta if dlse is None else delta - dlse) * keep
            given = self._with_hash(given, q)
            lse, delta = stored(lse), stored(delta)
            out, dlse, buffers = torch.zeros_like(out), -delta, {"lse": lse, "delta": delta}
            if self.features.bias:  # which may hide all of a row's keys where no mask does: their probabilities are 0
                buffers["lse"] = stored(torch.where(lse == -math.inf, math.inf, lse))
        mods = self._mods(given, self.features.dropout)
        dq, dk, dv, *_ = operators().flex_attention_backward(
            q,
            k,
            v,
            out,  # the template makes delta of it: rowsum(out * dout) - dlse / ln 2, for an lse in base 2
            lse,
            dout,
            None if dlse is None else dlse / LOG2E,
            mods.score,
            mods.product_gradient,
            block_mask(mods, q, k, (given[name] for name in BlockTables._fields)),
            1.0,
            self._template_options(),
            (*(given[name] for name in mods.names), *buffers.values()),
            tuple(given[name] for name in MASK_BUFFERS),
        )
        gradients = (_columns(x, given[of]).transpose(1, 2) for x, of in ((dq, "q"), (dk, "k"), (dv, "v")))
        return tuple(contiguous(x if batched else x.squeeze(0)) for x in gradients)


def _columns(x: Tensor, like: Tensor) -> Tensor:
    missing = like.shape[-1] < SMALLEST_HEAD_DIM
    return x.narrow(3, 0, like.shape[-1]) if missing else x


def _wide_enough(x: Tensor) -> Tensor:
    missing = SMALLEST_HEAD_DIM - x.shape[-1]
    return F.pad(x, (0, missing)) if missing > 0 else x


def _queries(x: Tensor, given: Arguments) -> Tensor:
    """The op's rows as the template has them: (B, H, S, D)."""
    x = _wide_enough(x)
    if "source" in given:
        x = at(x, given["source"])
    return (x if x.dim() == 4 else x.unsqueeze(0)).transpose(1, 2)


def _keys(x: Tensor, given: Arguments) -> Tensor:
    x = _wide_enough(x)
    if "pages" in given:
        pages, used = given["pages"], given["used"]
        rows = torch.arange(pages.shape[1] * x.shape[1], dtype=torch.int32, device=x.device)
        exists = rows < used.unsqueeze(1)
        first_of_pages = rows.view(-1, x.shape[1]).select(1, 0)
        page = torch.where(first_of_pages < used.unsqueeze(1), pages, 0)
        if "skipped" in given:
            skipped = given["skipped"].unsqueeze(1)
            exists = exists & (rows >= skipped)
            page = torch.where(first_of_pages + x.shape[1] > skipped, page, 0)
        # What nobody has written may be NaN, which a probability of 0 does not undo.
        x = torch.where(exists.view(-1, 1, 1), at(x, page).flatten(0, 2), 0.0)
    return (x if x.dim() == 4 else x.unsqueeze(0)).transpose(1, 2)


def operators() -> Any:
    """Has flex_attention and flex_attention_backward."""
    # torch._higher_order_ops has a function of the module's name, which an import statement would find.
    return sys.modules["torch._higher_order_ops.flex_attention"]


def block_mask(
    mods: Mods, q: Tensor, k: Tensor, tables: Iterable[Tensor | None], block_size: tuple[int, int] = (BLOCK, BLOCK)
) -> tuple[Any, ...]:
    """As the operators take it. tables: in the order of BlockTables."""
    from torch.nn.attention.flex_attention import BlockMask  # which imports sympy, as of torch 2.15

    make: Callable[..., Any] = BlockMask
    mask = make((q.shape[2], k.shape[2]), *tables, BLOCK_SIZE=block_size, mask_mod=mods.mask)
    return (*mask.as_tuple()[:-1], mods.mask)
