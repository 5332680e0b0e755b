"""Padded batches and packed rows: each way undoes the other, and gradients go where values came from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compiled_fa import flash_attn_func, flash_attn_varlen_func, padding
from compiled_fa.drop_in.rearranging import _rearrange

MASKS = st.integers(0, 5).flatmap(
    lambda seqlen: st.lists(st.lists(st.booleans(), min_size=seqlen, max_size=seqlen), min_size=1, max_size=4)
)


@given(mask=MASKS, dtype=st.sampled_from([torch.bool, torch.int64, torch.int32, torch.float32]), tail=st.integers(0, 2))
def test_unpad_keeps_the_rows_of_the_mask_and_pad_puts_them_back(mask, dtype, tail):
    mask = torch.tensor(mask, dtype=dtype).view(len(mask), -1)
    x = torch.randn(*mask.shape, 3, *([2] * tail), requires_grad=True)
    rows, indices, cu_seqlens, longest, used = padding.unpad_input(x, mask)
    kept = mask.bool()
    assert torch.equal(rows, x[kept])
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]
    assert used.tolist() == kept.sum(1).tolist()
    assert longest == max(used.tolist())
    assert isinstance(longest, int)
    back = padding.pad_input(rows, indices, *mask.shape)
    wanted = torch.where(kept.view(*kept.shape, *[1] * (x.dim() - 2)), x, 0.0)
    assert torch.equal(back, wanted)
    dout = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad(y, x, dout, retain_graph=True)[0] for y in (back, wanted)))


def test_unused_places_are_allocated_and_not_counted_as_used():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]])
    x = torch.randn(2, 4, 3)
    rows, indices, cu_seqlens, longest, used = padding.unpad_input(x, mask, unused)
    assert indices.tolist() == [0, 1, 2, 4, 5]
    assert torch.equal(rows, x.flatten(0, 1)[indices])
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 5], 3, [2, 1])


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 2, 4)
    rows, indices, cu_seqlens, longest = padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(rows, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert longest == 6
    assert torch.equal(padding.pad_input(rows, indices, 3, 6)[2], x[2])


def test_a_padded_batch_is_attended_to_as_if_each_sequence_were_alone():
    x = torch.randn(2, 7, 2, 8)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    rows, indices, cu_seqlens, longest, _ = padding.unpad_input(x, mask)
    out = flash_attn_varlen_func(rows, rows, rows, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    out = padding.pad_input(out, indices, 2, 7)
    for b, length in enumerate((7, 4)):
        alone = x[b : b + 1, :length]
        assert torch.allclose(out[b, :length], flash_attn_func(alone, alone, alone, causal=True)[0], atol=1e-6)
    assert (out[1, 4:] == 0).all()


def test_gradients_through_index_functions():
    x, indices = torch.randn(5, 2, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 4])
    assert torch.autograd.gradcheck(lambda x: padding.index_first_axis(x, indices), (x,))
    assert torch.autograd.gradcheck(lambda x: padding.index_put_first_axis(x[:3], indices, 6), (x,))
    assert torch.autograd.gradcheck(lambda x: padding.index_first_axis_residual(x, indices), (x,))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda x: padding.unpad_input(x, torch.ones(2, 4)),
            r"attention_mask must .*\(2, 3\), got shape \(2, 4\)",
        ),
        (lambda x: padding.unpad_input(x, torch.ones(2, 3), torch.ones(3, 2)), r"unused_mask must be .*got shape"),
        (
            lambda x: padding.unpad_input_for_concatenated_sequences(x, torch.tensor([[2, 2, 0], [1, 0, 0]])),
            r"attention_mask_in_length must be of sums from 0 to 3 in each row, got \[4, 1\]",
        ),
        (lambda x: padding.unpad_input(x[0, 0], torch.ones(2, 3)), r"hidden_states must be of two dimensions"),
        (lambda x: padding.index_first_axis(x, torch.zeros(1, 1)), r"indices must be \(total\)"),
        (lambda x: padding.pad_input(x, torch.tensor([0]), 1, 9), r"indices must be of one element a row .*2, got 1"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(2, 3, 4))


X = torch.arange(120.0).view(3, 5, 4, 2)
REARRANGED: tuple[tuple[str, dict[str, int], torch.Tensor], ...] = (
    ("b s h d -> b s (h d)", {}, X.flatten(2)),
    ("b s h d -> (b s) h d", {}, X.flatten(0, 1)),
    ("b s (two h) d -> two b s h d", {"two": 2}, X.unflatten(2, (2, 2)).movedim(2, 0)),
    ("b s (h two) d -> b s h (d two)", {"two": 2}, X.unflatten(2, (2, 2)).transpose(3, 4).flatten(3)),
    ("b s ... -> (b s) ...", {}, X.flatten(0, 1)),
    ("(x b) ... -> x b ...", {"x": 3}, X.unflatten(0, (3, 1))),
    ("b s h d -> h (s b) d", {}, X.permute(2, 1, 0, 3).flatten(1, 2)),
    ("... d -> d ...", {}, X.movedim(-1, 0)),
)


@pytest.mark.parametrize(("pattern", "sizes", "wanted"), REARRANGED, ids=[pattern for pattern, *_ in REARRANGED])
def test_rearrange(pattern, sizes, wanted):
    assert torch.equal(_rearrange(X, pattern, sizes), wanted)
    try:
        import einops
    except ImportError:
        return
    assert torch.equal(einops.rearrange(X, pattern, **sizes), wanted)


@pytest.mark.parametrize("pattern", ["b s -> b s", "b s h d -> b s h", "b b h d -> b h d", "b s [h] d -> b s h d"])
def test_rearrange_refuses_what_does_not_fit(pattern):
    with pytest.raises(ValueError, match="pattern must"):
        _rearrange(X, pattern, {})


@pytest.mark.parametrize("sizes", [{}, {"x": 2}, {"x": 0, "b": 0}])
def test_rearrange_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=r"sizes of \['x', 'b'\] must"):
        _rearrange(X, "(x b) ... -> x b ...", sizes)
