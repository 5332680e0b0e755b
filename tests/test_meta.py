"""Meta tensors: the functions give shapes and dtypes, and so do gradients and tangents."""

import pytest
import torch

from compiled_fa import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

LENGTHS = torch.zeros(3, dtype=torch.int32, device="meta")
LONGEST = torch.tensor(5, device="meta")
DTYPE = torch.float16
PACKING = (LENGTHS, LENGTHS, 3, 6)

# function, shapes of its tensors, its other arguments, shapes of lse and of the probabilities
FUNCTIONS = {
    "dense": (flash_attn_func, [(2, 5, 4, 8), (2, 6, 2, 8), (2, 6, 2, 12)], (), (2, 4, 5), (2, 4, 5, 6)),
    "kvpacked": (flash_attn_kvpacked_func, [(2, 5, 4, 8), (2, 6, 2, 2, 8)], (), (2, 4, 5), (2, 4, 5, 6)),
    "qkvpacked": (flash_attn_qkvpacked_func, [(2, 5, 3, 4, 8)], (), (2, 4, 5), (2, 4, 5, 5)),
    "varlen": (flash_attn_varlen_func, [(5, 4, 8), (7, 2, 8), (7, 2, 12)], PACKING, (4, 5), (2, 4, 3, 6)),
    "varlen kvpacked": (flash_attn_varlen_kvpacked_func, [(5, 4, 8), (7, 2, 2, 8)], PACKING, (4, 5), (2, 4, 3, 6)),
    "varlen qkvpacked": (flash_attn_varlen_qkvpacked_func, [(5, 3, 4, 8)], (LENGTHS, LONGEST), (4, 5), (2, 4, 5, 5)),
}
OPTIONS = {
    "plain": {},
    "causal, window": {"causal": True, "window_size": (3, 0), "softcap": 2.0},
    "slopes": {"alibi_slopes": torch.zeros(4, device="meta")},
    "dropout": {"dropout_p": 0.5},
}


def out_shape(shapes):
    """q's, with v's head_dim."""
    if len(shapes) == 1:
        return (*shapes[0][:-3], *shapes[0][-2:])
    return (*shapes[0][:-1], shapes[-1][-1])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(
    ("function", "shapes", "packing", "lse_shape", "probs_shape"), FUNCTIONS.values(), ids=FUNCTIONS
)
def test_shapes_and_dtypes(function, shapes, packing, lse_shape, probs_shape, options):
    inputs = [torch.empty(shape, dtype=DTYPE, device="meta", requires_grad=True) for shape in shapes]
    out, lse, probs = function(*inputs, *packing, return_attn_probs=True, **options)
    assert (out.shape, out.dtype, out.device.type) == (out_shape(shapes), DTYPE, "meta")
    assert (lse.shape, lse.dtype, lse.device.type) == (lse_shape, torch.float32, "meta")
    assert (probs is None) == ("dropout_p" not in options)
    if probs is not None:
        assert (probs.shape, probs.dtype, probs.device.type) == (probs_shape, DTYPE, "meta")
    out = function(*inputs, *packing, **options)
    assert (out.shape, out.dtype, out.device.type) == (out_shape(shapes), DTYPE, "meta")
    for x, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device.type) == (x.shape, DTYPE, "meta")
    along = tuple(torch.empty_like(x) for x in inputs)
    tangent = torch.func.jvp(lambda *x: function(*x, *packing, **options), tuple(inputs), along)[1]
    assert (tangent.shape, tangent.dtype, tangent.device.type) == (out_shape(shapes), DTYPE, "meta")


def test_pages():
    q, pages = torch.empty(5, 4, 8, device="meta"), torch.empty(3, 4, 2, 12, device="meta")
    table = torch.empty(2, 2, dtype=torch.int32, device="meta")
    out = flash_attn_varlen_func(q, pages[..., :8], pages, LENGTHS, LENGTHS, 5, 5, block_table=table)
    assert out.shape == (5, 4, 12)


def test_under_autocast_of_a_real_device():
    q = torch.empty(1, 3, 2, 4, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attn_func(q, q, q).dtype == torch.float32


def test_what_is_wrong_is_refused():
    q, k = torch.empty(1, 3, 2, 4, device="meta"), torch.empty(1, 3, 2, 5, device="meta")
    with pytest.raises(ValueError, match="k must be of q's head_dim, 4, got 5"):
        flash_attn_func(q, k, k)
    with pytest.raises(ValueError, match="k must be on q's device, meta, got cpu"):
        flash_attn_func(q, torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4))
