"""The heart of the tests: any shape, any feature, any dtype agrees with attention written down in float64."""

import pytest
import torch
from hypothesis import given
from support import Case, cases, check_against_float64, make, run_op, run_tiled

from compiled_fa.engines.tiled import TileSizes


@given(cases(dense=True))
def test_dense_agrees_with_float64(case):
    data = make(case)
    check_against_float64(data, run_tiled(data))


@given(cases(dense=False))
def test_varlen_agrees_with_float64(case):
    data = make(case)
    check_against_float64(data, run_tiled(data))


@given(cases(dense=False, tiles=TileSizes(16, 16, 4)))
def test_varlen_in_many_tiles_agrees_with_float64(case):
    data = make(case)
    check_against_float64(data, run_tiled(data))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (9, 3), "slopes": "batch"},
        {"causal": True, "softcap": 2.0, "slopes": "heads"},
        {"dropout_p": 0.2, "causal": True},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_op_and_autograd_agree_with_float64(dense, options, dtype):
    lengths = ((67, 41),) * 2 if dense else ((67, 41), (0, 9), (5, 0), (1, 90), (33, 33))
    data = make(Case(lengths, dense, heads_per_key=2, head_dim_v=12, dtype=dtype, **options))
    check_against_float64(data, run_op(data))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(1, 1), (80, 96), (192, 128), (256, 256), (512, 512)])
def test_every_head_dim(head_dim, head_dim_v):
    data = make(Case(((40, 50),), True, heads_per_key=2, head_dim=head_dim, head_dim_v=head_dim_v, causal=True))
    check_against_float64(data, run_tiled(data))


@pytest.mark.parametrize("std", [1e-3, 5.0, 30.0])
def test_scores_of_any_size(std):
    """Scores of thousands neither overflow nor lose their order."""
    data = make(Case(((65, 70), (3, 33)), dtype=torch.float32, causal=True), std=std)
    check_against_float64(data, run_tiled(data))
