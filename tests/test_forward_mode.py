"""Forward-mode AD: a tangent is never dropped."""

import pytest
import torch
from support import cumulative
from torch.autograd import forward_ad

from compiled_fa import flash_attn_func, flash_attn_varlen_func

OPS = torch.ops.compiled_fa


def calls():
    """Every op, with its tensors that may have a tangent, by name, and its other arguments."""
    q, k, v = (torch.randn(1, 3, 2, 4) for _ in range(3))
    slopes, seed = torch.rand(2), torch.tensor([1])
    options = (None, False, -1, -1, 0.0, slopes, 0.5, seed)
    out, lse = OPS.attention(q, k, v, *options)
    backward = {"dout": torch.ones_like(out), "dlse": torch.ones_like(lse), "out": out, "lse": lse}
    dense = {"q": q, "k": k, "v": v}
    packed = {name: x[0] for name, x in dense.items()}
    packing = (cumulative([3]), cumulative([3]), 3, 3, None)
    return {
        "attention": (dense, (), options),
        "attention_backward": ({**backward, **dense}, (), options),
        "varlen_attention": (packed, packing, options),
        "varlen_attention_backward": ({**{name: x[0] for name, x in backward.items()}, **packed}, packing, options),
    }


CASES = [(op, name) for op, (tensors, _, _) in calls().items() for name in [*tensors, "alibi_slopes"]]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_the_ops_refuse_a_tangent(op, name):
    tensors, packing, options = calls()[op]
    options = list(options)
    with forward_ad.dual_level():
        getattr(OPS, op)(*tensors.values(), *packing, *options)  # none has a tangent
        if name == "alibi_slopes":
            options[5] = forward_ad.make_dual(options[5], torch.ones_like(options[5]))
        else:
            tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match=f"{op} does not support forward-mode AD, and {name} has"):
            getattr(OPS, op)(*tensors.values(), *packing, *options)
