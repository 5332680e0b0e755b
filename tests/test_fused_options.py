"""The fused engine's table of kernel options."""

import itertools
from typing import Any

import pytest
import torch

from compiled_fa.engines.fused.mods import Features
from compiled_fa.engines.fused.options import largest_head_dim, options_for, options_for_pages
from compiled_fa.engines.nvidia import KB, LEAST_KB, capability_of
from compiled_fa.problem import Direction
from compiled_fa.tuning import FlexOptions
from compiled_fa.tuning.gpu import FUSED

PLAIN = Features()


def test_the_table_is_whole():
    assert set(FUSED.fp16) == set(
        itertools.product(("forward", "backward"), (32, 64, 128, 256), ("dense", "packed", "many"))
    )


TABLES: dict[Any, FlexOptions] = {
    **FUSED.fp16,
    **{(*key[2:], *key[:2]): options for key, options in FUSED.newer.items()},
}


@pytest.mark.parametrize("key", TABLES, ids=str)
def test_tiles_are_what_the_template_takes(key):
    sizes = dict(TABLES[key])
    assert all(128 % size == 0 and size >= 16 for name, size in sizes.items() if name.startswith("BLOCK"))
    if key[0] == "backward":
        assert sizes["BLOCK_N1"] % sizes["BLOCK_M1"] == 0
        assert sizes["BLOCK_M2"] % sizes["BLOCK_N2"] == 0


@pytest.mark.parametrize(("head_dim", "entry"), [(16, 32), (32, 32), (40, 64), (80, 128), (128, 128), (160, 256)])
def test_the_next_head_dim_up_serves(head_dim, entry):
    assert options_for("forward", head_dim, torch.float16, PLAIN, (7, 5)) == FUSED.fp16["forward", entry, "dense"]


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
    assert options_for("backward", 64, torch.float16, features, (7, 5)) == FUSED.fp16["backward", 64, entry]


def test_newer_gpus_have_tiles_for_every_dtype():
    """By their shared memory; up to head_dim 256 in both directions."""
    assert {key[0] for key in FUSED.newer} == {*KB.values(), LEAST_KB} - {64}
    directions: tuple[Direction, ...] = ("forward", "backward")
    for capability, direction in itertools.product(((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)), directions):
        for dtype, head_dim in itertools.product((torch.float16, torch.bfloat16, torch.float32), (1, 64, 96, 200, 256)):
            assert options_for(direction, head_dim, dtype, PLAIN, capability) in FUSED.newer.values()
            assert head_dim <= largest_head_dim(dtype, capability)
    assert options_for("forward", 64, torch.float16, PLAIN, capability_of(torch.device("cpu"))) == ()


def least_shared_memory(key, options):
    """Bytes that the template's operands take at the very least, as tuning/gpu.py has them."""
    _, itemsize, direction, head_dim = key
    sizes, row = dict(options), itemsize * head_dim
    if direction == "backward":
        return row * 2 * max(sizes["BLOCK_M1"] + sizes["BLOCK_N1"], sizes["BLOCK_M2"] + sizes["BLOCK_N2"])
    copies = max(1, sizes["num_stages"] - 1)
    return row * (sizes["BLOCK_M"] + 2 * copies * sizes["BLOCK_N"])


@pytest.mark.parametrize("key", FUSED.newer, ids=str)
def test_tiles_of_newer_gpus_fit(key):
    options = FUSED.newer[key]
    assert least_shared_memory(key, options) < key[0] * 1024
    assert all(128 % size == 0 and size >= 16 for name, size in options if name.startswith("BLOCK"))


def test_wide_dtypes_have_their_own_tiles():
    directions: tuple[Direction, ...] = ("forward", "backward")
    for direction, head_dim in itertools.product(directions, (16, 64, 128)):
        for dtype in (torch.bfloat16, torch.float32):
            assert options_for(direction, head_dim, dtype, PLAIN, (7, 5)) in FUSED.wide.values()


@pytest.mark.parametrize(("kind", "head_dim"), FUSED.few_rows, ids=str)
def test_tiles_of_few_rows_fit(kind, head_dim):
    options, itemsize = FUSED.few_rows[kind, head_dim], {"Turing, fp16": 2, "16 bits": 2}.get(kind, 4)
    most = 64 if kind.startswith("Turing") else LEAST_KB
    assert least_shared_memory((most, itemsize, "forward", head_dim), options) < most * 1024
    assert dict(options)["BLOCK_M"] == 16
    assert dict(options)["BLOCK_N"] in (16, 32, 64)


def test_options_of_keys_in_pages():
    """Few rows have their own; more have forward's."""
    for capability, kind in (((7, 5), "Turing, fp16"), ((0, 0), "Turing, fp16"), ((8, 6), "16 bits")):
        few = options_for_pages(100, torch.float16, 16, False, capability)
        assert few == FUSED.few_rows[kind, 128]
        many = options_for_pages(100, torch.float16, 17, False, capability)
        forward = options_for("forward", 100, torch.float16, Features(layout="packed"), max(capability, (7, 5)))
        assert many == forward
    assert options_for_pages(64, torch.float32, 4, False, (8, 0)) == FUSED.few_rows["32 bits", 64]
    assert options_for_pages(64, torch.bfloat16, 4, False, (7, 5)) == FUSED.few_rows["Turing", 64]
    softcapped = options_for_pages(64, torch.float16, 90, True, (7, 5))
    assert softcapped == FUSED.fp16["forward", 64, "many"]
