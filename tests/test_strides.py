"""Tensors that lie in memory in unusual ways: every engine reads them where they are, forward and for all gradients."""

from typing import Any

import pytest
import torch
from on_cpu import RUNNERS
from support import Case, Data, check_against_float64, make, replace

from compiled_fa import ops

# Of a tensor as the ops take it, (B, S, H, D) or (T, H, D): the same values.


def every_other_element(x):
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


def heads_first(x):
    return x.transpose(-2, -3).contiguous().transpose(-2, -3)


def head_dim_first(x):
    return x.mT.contiguous().mT


def backwards(x):
    order = tuple(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def sequence_first(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def between_others(x):
    """As q, k or v in a packed qkv that is itself a slice: an offset, and gaps between rows and between heads."""
    wide = x.new_full((*x.shape[:-2], 3, x.shape[-2] + 1, x.shape[-1] + 5), torch.nan)
    wide[..., 1, :-1, 3:-2] = x
    return wide[..., 1, :-1, 3:-2]


def odd_strides_of_single_ones(x):
    """A dimension of size 1 may have any stride, which nobody may multiply with or believe."""
    strides = [7 * dim + 3 if x.shape[dim] == 1 else x.stride(dim) for dim in range(x.dim())]
    return x.contiguous().as_strided(x.shape, strides)


PACKED = (every_other_element, heads_first, head_dim_first, backwards, between_others)
ARRANGEMENTS = {True: (*PACKED, sequence_first), False: PACKED}


class Arranged(Data):
    """Inputs that reach the ops in an arrangement: q, k, v and dout."""

    arrangement = staticmethod(lambda x: x)

    def laid_out(self, rows):
        arranged = self.arrangement(super().laid_out(rows))
        assert torch.equal(arranged, super().laid_out(rows))
        return arranged


def arranged(case, arrangement):
    inputs = Arranged.of(case)
    inputs.arrangement = arrangement
    return inputs


# Few queries, equally many, no fp64, no window: every engine takes it.
CASE: dict[str, Any] = {"nheads_k": 2, "heads_per_key": 2, "head_dim": 8, "head_dim_v": 8, "causal": True}
LENGTHS = {True: ((3, 40),) * 2, False: ((3, 40), (3, 17), (3, 0), (3, 1))}
SINGLE: dict[str, Any] = {"nheads_k": 1, "heads_per_key": 1, "head_dim": 1, "head_dim_v": 1}
LAYOUTS = {True: "dense", False: "packed"}
ON = [
    pytest.param(runner, dense, id=f"{runner.name}-{LAYOUTS[dense]}") for runner in RUNNERS for dense in runner.layouts
]


@pytest.mark.parametrize(
    ("runner", "dense", "arrangement"),
    [
        pytest.param(runner, dense, arrangement, id=f"{runner.name}-{LAYOUTS[dense]}-{arrangement.__name__}")
        for runner in RUNNERS
        for dense in runner.layouts
        for arrangement in ARRANGEMENTS[dense]
    ],
)
def test_arrangements(runner, dense, arrangement):
    inputs = arranged(Case(LENGTHS[dense], dense, **CASE), arrangement)
    assert not inputs.laid_out(inputs.k).is_contiguous()
    check_against_float64(inputs, runner.run(inputs))


@pytest.mark.parametrize("single", [{"lengths": ((1, 40),)}, {"lengths": ((3, 1),)}, SINGLE], ids=str)
@pytest.mark.parametrize(("runner", "dense"), ON)
def test_odd_strides_of_dimensions_of_size_1(runner, dense, single):
    """Of the batch and the queries, the keys, or heads and head_dim."""
    case = Case(**{**CASE, "lengths": ((3, 40),), "dense": dense, **single})
    inputs = arranged(case, odd_strides_of_single_ones)
    laid_out = [inputs.laid_out(x) for x in (inputs.q, inputs.k)]
    assert any(x.stride() != x.clone(memory_format=torch.contiguous_format).stride() for x in laid_out)
    check_against_float64(inputs, runner.run(inputs))


@pytest.mark.parametrize(("runner", "dense"), ON)
def test_expanded(runner, dense):
    """Strides of 0: one key head for all (GQA as people write it by hand), and the gradient of a sum."""
    data = make(Case(LENGTHS[dense], dense, **CASE))
    data.k, data.v = (x[:, :1].expand(x.shape) for x in (data.k, data.v))
    data.dout = torch.ones(()).expand(data.dout.shape)
    assert data.laid_out(data.k).stride(-2) == 0
    check_against_float64(data, runner.run(data))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
@pytest.mark.parametrize("engine", ["auto", "tiled"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
def test_gradients_of_some(dense, engine, wanted):
    """Where not all of q, k and v require one; these get the gradients that they get beside the others."""
    data = replace(make(Case(LENGTHS[dense], dense, **CASE)), dlse=None)

    def gradients(names):
        leaves = {name: data.laid_out(getattr(data, name)).clone().requires_grad_(name in names) for name in "qkv"}
        packing = () if dense else (*data.packing, None)
        op = ops.attention if dense else ops.varlen_attention
        out, _ = op(*leaves.values(), *packing, *data.options, engine)
        out.backward(data.laid_out(data.dout))
        return {name: leaf.grad for name, leaf in leaves.items()}

    every, some = gradients("qkv"), gradients(wanted)
    for name in "qkv":
        assert (some[name] is None) == (name not in wanted)
        assert some[name] is None or torch.equal(some[name], every[name])
