"""The score program: its terms against their formulas, its masks against pictures, its use by flex_attention."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Case, cases, check_against_float64, make
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from compiled_fa.scores import ScoreProgram, Window


def grid(seqlen_q, seqlen_k):
    return [torch.arange(n, dtype=torch.int32).view(shape) for n, shape in ((seqlen_q, (-1, 1)), (seqlen_k, (1, -1)))]


def picture(mask):
    return [" ".join(str(int(kept)) for kept in row) for row in mask]


def mask_of(seqlen_q, seqlen_k, causal, left, right):
    zero = torch.zeros(1, 1, dtype=torch.int32)
    return ScoreProgram(seqlen_q, seqlen_k, 1.0, window=Window.of(causal, left, right)).mask(
        zero, zero, *grid(seqlen_q, seqlen_k)
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((2, 5, True, -1, -1), ["1 1 1 1 0", "1 1 1 1 1"]),
        ((5, 2, True, -1, -1), ["0 0", "0 0", "0 0", "1 0", "1 1"]),
        ((4, 4, False, 1, 0), ["1 0 0 0", "1 1 0 0", "0 1 1 0", "0 0 1 1"]),
        ((4, 4, True, 1, 2), ["1 0 0 0", "1 1 0 0", "0 1 1 0", "0 0 1 1"]),
        ((2, 4, False, -1, 1), ["1 1 1 1", "1 1 1 1"]),
        ((3, 3, False, 0, -1), ["1 1 1", "0 1 1", "0 0 1"]),
    ],
)
def test_masks_are_the_pictures_of_flash_attn(arguments, expected):
    assert picture(mask_of(*arguments)) == expected


@given(st.integers(1, 30), st.integers(1, 30), st.booleans(), st.integers(-1, 12), st.integers(-1, 12), st.data())
def test_key_intervals_are_those_of_the_mask(seqlen_q, seqlen_k, causal, left, right, data):
    first = data.draw(st.integers(0, seqlen_q - 1))
    last = data.draw(st.integers(first, seqlen_q - 1))
    rows = mask_of(seqlen_q, seqlen_k, causal, left, right)[first : last + 1]
    window, offset = Window.of(causal, left, right), seqlen_k - seqlen_q
    start, stop = window.keys_seen_by_any(first + offset, last + offset, seqlen_k)
    full_start, full_stop = window.keys_seen_by_all(first + offset, last + offset, seqlen_k)
    assert rows.any(0).nonzero().flatten().tolist() == list(range(start, stop))
    assert rows.all(0).nonzero().flatten().tolist() == list(range(full_start, full_stop))


def test_terms_are_their_formulas():
    product = torch.randn(2, 3, 5, 7, dtype=torch.float64) * 20
    batch, head = torch.arange(2).view(2, 1, 1, 1), torch.arange(3).view(3, 1, 1)
    slopes = torch.rand(2, 3)
    program = ScoreProgram(5, 7, 0.5, softcap=4.0, alibi_slopes=slopes)
    expected = product.clone()
    for b in range(2):
        for h in range(3):
            for i in range(5):
                for j in range(7):
                    capped = 4.0 * math.tanh(0.5 * product[b, h, i, j].item() / 4.0)
                    expected[b, h, i, j] = capped - slopes[b, h].item() * abs(i + 7 - 5 - j)
    assert torch.allclose(program.score(product, batch, head, *grid(5, 7)), expected, rtol=1e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_product_gradient_is_the_derivative_of_score(softcap):
    product = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    program = ScoreProgram(4, 6, 0.7, softcap=softcap, alibi_slopes=torch.rand(1, 1))
    zero = torch.zeros(1, 1, dtype=torch.int32)
    dscore = torch.randn(4, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(program.score(product, zero, zero, *grid(4, 6)), product, dscore)
    assert torch.allclose(program.product_gradient(dscore, product), expected, rtol=1e-12)


@given(cases(dense=True, dropout_p=0.0, dtype=torch.float32))
def test_flex_attention_takes_it_unchanged(case):
    """score as score_mod, mask as mask_mod: flex_attention, uncompiled, computes what the tiled engine does."""
    if not case.lengths or min(case.lengths[0]) == 0:
        return  # flex_attention wants elements
    data = make(case)
    problem = data.problem()
    program = problem.program(*case.lengths[0])
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    seqlen_q, seqlen_k = case.lengths[0]
    sizes = len(case.lengths), case.nheads, seqlen_q, seqlen_k
    block_mask = create_block_mask(partial(program.mask), *sizes, device="cpu", BLOCK_SIZE=16)
    with torch._dynamo.config.patch(specialize_float=True):  # torch 2.15's flex_attention takes no symbolic scale
        out = flex_attention(q, k, v, score_mod=program.score, block_mask=block_mask, scale=1.0, enable_gqa=True)
    check_against_float64(data, {"out": out.transpose(1, 2).flatten(0, 1)})


@given(st.integers(0, 2**40))
def test_keep_decisions_can_mask_in_flex_attention(seed):
    """keep as a mask_mod drops in flex_attention what it drops in a whole tile."""
    problem = make(Case(((20, 30),) * 2, True, heads_per_key=2, dropout_p=0.4, seed=seed % 2**31)).problem()
    program = problem.program(20, 30)
    at = [torch.arange(n, dtype=torch.int32).view(-1, *[1] * (3 - d)) for d, n in enumerate((2, 4, 20, 30))]
    assert torch.equal(create_mask(partial(program.keep), 2, 4, 20, 30, device="cpu"), program.keep(*at))
