"""What `python -m compiled_fa` checks: a case a feature, small enough to finish and large enough to have many tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..testing import Case, Inputs

CASES = {
    "dense causal": Case.uniform(768, batch=2, causal=True),
    "GQA": Case.uniform(768, batch=2, nheads_k=2, heads_per_key=4),
    "varlen": Case.packed([700, 1, 0, 333, 64, 129, 17], causal=True),
    "window + ALiBi": Case.uniform(1024, window_size=(200, 0), slopes="heads"),
    "softcap": Case.uniform(768, softcap=20.0),
    "dropout": Case.uniform(768, dropout_p=0.1),
}


def has_sdpa(case: Case) -> bool:
    """Can F.scaled_dot_product_attention do it without a bias of Sq · Sk?"""
    return case.window_size == (-1, -1) and case.slopes == "none" and not case.softcap


def sdpa(inputs: Inputs[Case], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
    """F.scaled_dot_product_attention, of packed sequences one after another -> out, and no lse."""
    case = inputs.case

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = case.heads_per_key > 1
        out = F.scaled_dot_product_attention(q, k, v, None, case.dropout_p, case.causal, enable_gqa=gqa)
        return out.transpose(1, 2)

    if case.dense:
        return attend(q, k, v), None
    sequences = zip(*(x.split([length for length, _ in case.lengths]) for x in (q, k, v)), strict=True)
    return torch.cat([attend(q[None], k[None], v[None])[0] for q, k, v in sequences]), None
