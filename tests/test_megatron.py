"""Megatron-Core's core attention on our ops: layouts, masks, packed sequences, and what is refused.

Megatron itself trains with it in examples/megatron_gpt.py, where it is installed.
"""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compiled_fa.integrations.megatron import CoreAttention
from compiled_fa.testing.naive import naive_attention

AttnMaskType = Enum("AttnMaskType", "padding causal no_mask padding_causal arbitrary")


def attention(mask: str = "causal", layer_number: int = 1, **fields: Any) -> CoreAttention:
    config = SimpleNamespace(
        **{
            "context_parallel_size": 1,
            "attention_dropout": 0.0,
            "softmax_scale": None,
            "softmax_type": "vanilla",
            **fields,
        }
    )
    return CoreAttention(config, layer_number, AttnMaskType[mask], "self", softmax_scale=fields.get("own_scale"))


def inputs(sq: int = 5, sk: int = 7) -> tuple[torch.Tensor, ...]:
    return torch.randn(sq, 2, 4, 8), torch.randn(sk, 2, 2, 8), torch.randn(sk, 2, 2, 8)


def wanted(q, k, v, **options):
    out, _ = naive_attention(*(x.transpose(0, 1) for x in (q, k, v)), **options)
    return out.transpose(0, 1).flatten(2)


@pytest.mark.parametrize("mask", ["causal", "padding_causal", "no_mask", "padding"])
def test_results_are_in_megatrons_layout(mask):
    q, k, v = inputs()
    out = attention(mask)(q, k, v)
    assert out.shape == (5, 2, 32)
    torch.testing.assert_close(out, wanted(q, k, v, causal="causal" in mask))


def test_what_a_call_says_counts():
    """Its mask type before the constructor's; a causal one's written mask is not read."""
    q, k, v = inputs()
    layer = attention("no_mask")
    out = layer(q, k, v, torch.ones(1, 1, 5, 7, dtype=torch.bool), AttnMaskType.causal)
    torch.testing.assert_close(out, wanted(q, k, v, causal=True))


@pytest.mark.parametrize(
    ("skipped", "layer_number", "is_there"),
    [(None, 1, True), (2, 1, True), (2, 2, False), ([0, 1], 1, False), ([0, 1], 2, True)],
)
def test_windows_of_some_layers(skipped, layer_number, is_there):
    q, k, v = inputs()
    layer = attention(layer_number=layer_number, window_size=(2, 0), window_attn_skip_freq=skipped)
    window = (2, 0) if is_there else (-1, -1)
    torch.testing.assert_close(layer(q, k, v), wanted(q, k, v, causal=True, window_size=window))


def test_scales():
    q, k, v = inputs()
    torch.testing.assert_close(attention(softmax_scale=0.3)(q, k, v), wanted(q, k, v, causal=True, softmax_scale=0.3))
    both = attention(softmax_scale=0.3, own_scale=0.7)
    torch.testing.assert_close(both(q, k, v), wanted(q, k, v, causal=True, softmax_scale=0.7))


def test_dropout_is_of_training():
    q, k, v = inputs()
    layer = attention(attention_dropout=0.5)
    assert not torch.allclose(layer(q, k, v), wanted(q, k, v, causal=True))
    torch.testing.assert_close(layer.eval()(q, k, v), wanted(q, k, v, causal=True))


def packed(**fields: Any) -> SimpleNamespace:
    lengths = torch.tensor([0, 3, 7], dtype=torch.int32)
    known = {
        "qkv_format": "thd",
        "cu_seqlens_q": lengths,
        "cu_seqlens_kv": lengths,
        "max_seqlen_q": 4,
        "max_seqlen_kv": 4,
    }
    return SimpleNamespace(**{**known, "cu_seqlens_q_padded": None, "cu_seqlens_kv_padded": lengths, **fields})


def test_packed_sequences():
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    out = attention()(q, k, v, None, AttnMaskType.padding_causal, packed_seq_params=packed())
    rows = [wanted(*(x[a:b, None] for x in (q, k, v)), causal=True)[:, 0] for a, b in ((0, 3), (3, 7))]
    torch.testing.assert_close(out, torch.cat(rows))


def test_a_bias_and_a_sink():
    q, k, v = inputs()
    bias = torch.randn(1, 4, 5, 7)
    keys, values = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, keys) * 8**-0.5
    probs = (scores + bias).softmax(-1)
    found = attention("no_mask")(q, k, v, attention_bias=bias)
    torch.testing.assert_close(found, torch.einsum("bhqk,kbhd->qbhd", probs, values).flatten(2))
    scores = torch.cat([scores, torch.zeros(2, 4, 5, 1)], -1).softmax(-1)[..., :-1]
    off_by_one = attention("no_mask", softmax_type="off-by-one")
    exact = torch.einsum("bhqk,kbhd->qbhd", scores, values)
    torch.testing.assert_close(off_by_one(q, k, v), exact.flatten(2))
    lengths = torch.tensor([0, 5]), torch.tensor([0, 7])
    starts = {"cu_seqlens_q": lengths[0].int(), "cu_seqlens_kv": lengths[1].int(), "cu_seqlens_kv_padded": None}
    row = off_by_one(q[:, 0], k[:, 0], v[:, 0], packed_seq_params=packed(**starts, max_seqlen_q=5, max_seqlen_kv=7))
    torch.testing.assert_close(row, exact[:, 0].flatten(1))


def test_what_is_refused():
    q, k, v = inputs()
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask must be None where attn_mask_type is not causal"):
        attention("padding")(q, k, v, mask)
    with pytest.raises(ValueError, match="attention_bias must be None with packed_seq_params"):
        attention()(q[:, 0], k[:, 0], v[:, 0], attention_bias=mask, packed_seq_params=packed())
    with pytest.raises(ValueError, match="attn_mask_type must be one of causal, padding_causal, no_mask, padding, got"):
        attention("arbitrary")
    with pytest.raises(ValueError, match="context_parallel_size must be 1, got 2"):
        attention(context_parallel_size=2)
    with pytest.raises(ValueError, match="softmax_type must be 'vanilla' or 'off-by-one', got 'learnable'"):
        attention(softmax_type="learnable")
    with pytest.raises(ValueError, match="qkv_format must be 'thd', got 'sbhd'"):
        attention()(q, k, v, packed_seq_params=packed(qkv_format="sbhd"))
    with pytest.raises(ValueError, match="cu_seqlens_q_padded must be None"):
        attention()(q, k, v, packed_seq_params=packed(cu_seqlens_q_padded=torch.tensor([0, 4, 8])))
