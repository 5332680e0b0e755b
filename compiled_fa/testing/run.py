"""One way to run a case, whoever computes it: results packed, and by name.

    out (Tq, H, Dv)    lse (H, Tq)    dq (Tq, H, D)    dk (Tk, Hk, D)    dv (Tk, Hk, Dv)

and dbias, of the bias's shape, where there is one that has a gradient. Gradients are those of
(dout * out).sum() + (dlse * lse).sum(). Paged keys and values have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..interface import flash_attn_func, flash_attn_varlen_func
from ..problem import bias_part
from .cases import Inputs
from .naive import keep_decisions, naive_attention

RESULTS = ("out", "lse", "dq", "dk", "dv")

Results = dict[str, Tensor]
# q, k, v, as the ops take them, and a bias if there is one -> out and lse; None: it does not tell.
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def packed(inputs: Inputs[Any], results: Sequence[Tensor | None]) -> Results:
    """Results in the layout of the ops and the order of RESULTS, the first or all of them -> packed, by name."""
    named = {name: x for name, x in zip((*RESULTS, "dbias"), results, strict=False) if x is not None}
    if inputs.varlen:
        return named

    def rows(name: str, x: Tensor) -> Tensor:
        if name == "dbias":
            return x
        return x.transpose(0, 1).flatten(1) if name == "lse" else x.flatten(0, 1)

    return {name: rows(name, x) for name, x in named.items()}


def run(attend: Attend, inputs: Inputs[Any]) -> Results:
    """By autograd, through what is differentiable in q, k and v, and in a bias."""
    leaves = [inputs.laid_out(x).detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    if (bias := _leaf(inputs.bias)) is None:
        out, lse = attend(*leaves)
    else:
        out, lse = attend(*leaves, bias)
        leaves += [bias] if bias.requires_grad else []
    outputs, gradients = [out], [inputs.laid_out(inputs.dout)]
    dlse = inputs.per_row(inputs.dlse)
    if lse is not None and dlse is not None:
        outputs.append(lse)
        gradients.append(dlse)
    found = torch.autograd.grad(outputs, leaves, gradients)
    return packed(inputs, (out.detach(), lse.detach() if lse is not None else None, *found))


def _leaf(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or not bias.is_floating_point() else bias.detach().requires_grad_()


def run_engine(engine: Any, inputs: Inputs[Any], **options: Any) -> Results:
    """Forward and backward of an engine itself. options: what it takes besides."""
    problem = inputs.problem()
    out, lse = engine.forward(problem, **options)
    if inputs.case.page_size:
        return packed(inputs, (out, lse))
    dout, dlse = inputs.laid_out(inputs.dout), inputs.per_row(inputs.dlse)
    return packed(inputs, (out, lse, *engine.backward(problem, dout, out, lse, dlse, **options)))


def run_op(inputs: Inputs[Any], engine: str = "auto") -> Results:
    """torch.ops.compiled_fa.attention, biased_attention or varlen_attention, and autograd."""
    options = *inputs.options, engine

    def attend(q: Tensor, k: Tensor, v: Tensor, tensor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tensor: a block table, or a bias."""
        out: Tensor
        lse: Tensor
        if inputs.varlen:
            out, lse = ops.varlen_attention(q, k, v, *inputs.packing, tensor, *options)
        elif tensor is not None:
            out, lse = ops.biased_attention(q, k, v, tensor, *options)
        else:
            out, lse = ops.attention(q, k, v, *options)
        return out, lse

    if inputs.case.page_size:
        return packed(inputs, attend(inputs.q, *inputs.pages()))
    return run(attend, inputs)


def run_function(inputs: Inputs[Any]) -> Results:
    """flash_attn_func, or flash_attn_varlen_func, and autograd. Dropout it does for seeds of its own: it is refused."""
    case = inputs.case
    if case.dropout_p:
        raise ValueError(f"dropout_p must be 0: flash_attn_func tells nobody its seed, got {case.dropout_p}")
    options: dict[str, Any] = {
        "softmax_scale": case.softmax_scale,
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "return_attn_probs": True,
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if inputs.varlen:
            out, lse, _ = flash_attn_varlen_func(q, k, v, *inputs.packing, block_table=block_table, **options)
        else:
            out, lse, _ = flash_attn_func(q, k, v, **options)
        return out, lse

    if case.page_size:
        return packed(inputs, attend(inputs.q, *inputs.pages()))
    return run(attend, inputs)


def run_naive(inputs: Inputs[Any], dtype: torch.dtype, gradients: bool = True) -> Results:
    """Naive attention of each sequence, in this dtype, differentiated by autograd. gradients: or without them."""
    case, slopes = inputs.case, inputs.alibi_slopes
    q, k, v = leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in (inputs.q, inputs.k, inputs.v)]
    bias = inputs.bias
    if bias is not None and bias.is_floating_point():
        # In its own dtype, to which its gradient is rounded; but for a reference that is wider than the case.
        bias = (bias if dtype == case.dtype else bias.to(dtype)).detach().requires_grad_(gradients)
        leaves.append(bias)
    whole = slice(None), slice(None), slice(None)
    outs, lses = [q.new_zeros(0, case.nheads, case.head_dim_v)], [q.new_zeros(case.nheads, 0)]
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        keep = None
        if inputs.dropout_seed is not None:
            first = inputs.origin[0] + b, *inputs.origin[1:]
            keep = keep_decisions(inputs.dropout_seed, case.dropout_p, 1, case.nheads, seqlen_q, seqlen_k, first)
        out, lse = naive_attention(
            inputs.sequence(q, b, 0)[None],
            inputs.sequence(k, b, 1)[None],
            inputs.sequence(v, b, 1)[None],
            softmax_scale=case.softmax_scale,
            causal=case.causal,
            window_size=case.window_size,
            softcap=case.softcap,
            alibi_slopes=slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes,
            dropout_p=case.dropout_p,
            keep=keep,
            bias=None if bias is None else bias_part(bias, slice(b, b + 1), *whole),
        )
        outs.append(out[0])
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    results = {"out": out.detach(), "lse": lse.detach()}
    if gradients:
        loss = (out * inputs.dout.to(dtype)).sum()
        loss = loss + sum(x[:0].sum() for x in leaves)  # also where none is used
        if inputs.dlse is not None:
            loss = loss + torch.where(lse.isinf(), 0.0, lse * inputs.dlse.to(dtype)).sum()
        results |= dict(zip((*RESULTS[2:], "dbias"), torch.autograd.grad(loss, leaves), strict=False))
    return results
