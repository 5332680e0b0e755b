"""The fused engine's table of kernel options."""

import itertools

import pytest
import torch

from compiled_fa.engines.fused.mods import Features
from compiled_fa.engines.fused.options import capability_of, options_for
from compiled_fa.problem import Direction
from compiled_fa.tuning.gpu import TURING

PLAIN = Features()


def test_the_table_is_whole():
    assert set(TURING.fp16) == set(
        itertools.product(("forward", "backward"), (32, 64, 128, 256), ("dense", "packed", "many"))
    )


@pytest.mark.parametrize("key", TURING.fp16, ids=str)
def test_tiles_are_what_the_template_takes(key):
    sizes = dict(TURING.fp16[key])
    assert all(128 % size == 0 and size >= 16 for name, size in sizes.items() if name.startswith("BLOCK"))
    if key[0] == "backward":
        assert sizes["BLOCK_N1"] % sizes["BLOCK_M1"] == 0
        assert sizes["BLOCK_M2"] % sizes["BLOCK_N2"] == 0


@pytest.mark.parametrize(("head_dim", "entry"), [(16, 32), (32, 32), (40, 64), (80, 128), (128, 128), (160, 256)])
def test_the_next_head_dim_up_serves(head_dim, entry):
    assert options_for("forward", head_dim, torch.float16, PLAIN, (7, 5)) == TURING.fp16["forward", entry, "dense"]


@pytest.mark.parametrize(
    ("changed", "entry"),
    [
        ({"layout": "packed"}, "packed"),
        ({"layout": "padded"}, "packed"),
        ({"softcap": True}, "many"),
        ({"alibi": True}, "many"),
        ({"dropout": True}, "many"),
    ],
    ids=str,
)
def test_features_choose(changed, entry):
    features = Features(**{**vars(PLAIN), **changed})
    assert options_for("backward", 64, torch.float16, features, (7, 5)) == TURING.fp16["backward", 64, entry]


def test_inductor_chooses_for_newer_gpus():
    for capability in ((8, 0), (9, 0), capability_of(torch.device("cpu"))):
        assert options_for("forward", 64, torch.float16, PLAIN, capability) == ()


def test_wide_dtypes_have_their_own_tiles():
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction, head_dim in itertools.product(directions, (16, 64, 128)):
        for dtype in (torch.bfloat16, torch.float32):
            assert options_for(direction, head_dim, dtype, PLAIN, (7, 5)) in TURING.wide.values()
