"""The terms that make a score out of a dot product, in the order in which they apply.

    product  -scale->  softmax_scale * product  -softcap->  c * tanh(. / c)  -ALiBi->  . - slope * |position - key|
    -bias->  . + bias, in natural logarithms, as F.scaled_dot_product_attention's attn_mask; or -inf where it is False

Every function is elementwise on tensors of any broadcastable shape, so that it serves a whole tile and, inside
flex_attention, a single element.
"""

from __future__ import annotations

from math import inf, log

import torch
from torch import Tensor


def scaled(product: Tensor, softmax_scale: float | Tensor) -> Tensor:
    """softmax_scale * q·k. A factor of 1.0 is none: the product may have it in already."""
    if isinstance(softmax_scale, float) and softmax_scale == 1.0:
        return product
    return product * softmax_scale


def softcapped(score: Tensor, softcap: float | Tensor) -> Tensor:
    """c * tanh(score / c): scores bounded to (-c, c), as in Gemma 2 (arXiv 2408.00118, section 2)."""
    return torch.tanh(score / softcap) * softcap


def softcap_derivative(capped: Tensor, softcap: float | Tensor) -> Tensor:
    """d softcapped / d score, from its result: 1 - tanh² = 1 - (capped / c)²."""
    ratio = capped / softcap
    return 1.0 - ratio * ratio


def alibi(score: Tensor, slope: Tensor, position: Tensor, kv_idx: Tensor) -> Tensor:
    """score - slope * |position - kv_idx| (ALiBi, arXiv 2108.12409, with flash_attn's absolute distance)."""
    return score - slope * (position - kv_idx).abs()


def biased(score: Tensor, bias: Tensor) -> Tensor:
    """score + bias; of a bool bias: the score where it is True, else -inf."""
    if bias.dtype == torch.bool:
        return torch.where(bias, score, -inf)
    return score + bias.to(score.dtype)


def add_bias(score: Tensor, bias: Tensor) -> None:
    """`biased`, in place."""
    if bias.dtype == torch.bool:
        score.masked_fill_(bias.logical_not(), -inf)
    else:
        score.add_(bias)


def alibi_reach(slope: float, bound: float, dtype: torch.dtype) -> float:
    """Distance from which a key weighs nothing beside the one at the query's own position; inf: there is none.

    bound: of |score| before ALiBi. The query's own key scores -bound at least, and one at a distance d at most
    bound - slope·d. Where that is 24 nats further apart than the precision of the dtype, even a million such keys
    together change the softmax and its gradients by less than a thousandth of a rounding.
    """
    if not (slope > 0.0 and bound < inf):
        return inf
    return (2.0 * bound + 24.0 - log(torch.finfo(dtype).eps)) / slope
