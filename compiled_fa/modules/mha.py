"""Attention as modules: around qkv, around q and kv, and with the projections.

B batch, S, Sq and Sk lengths, H and Hk query and key heads, D head_dim, T total tokens of packed sequences.

Source: flash_attn 2.8's modules.mha, whose arguments and state dicts these have.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import validation
from ..interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from ..kvcache import flash_attn_with_kvcache
from ..rotary import RotaryEmbedding


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of ALiBi's paper (arXiv 2108.12409): a geometric series, for a power of two of heads; of others, those
    of the power below, and every other one of the power above."""
    power = 2 ** math.floor(math.log2(nheads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    return slopes if power == nheads else slopes + get_alibi_slopes(2 * power)[0::2][: nheads - power]


class _Attention(nn.Module):
    """What attention modules have in common. alibi_slopes is not in the state dict."""

    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale, self.window_size = causal, softmax_scale, window_size
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.deterministic = deterministic

    def options(self, causal: bool | None) -> dict[str, Any]:
        """The functions' options. A module that was cast has cast its slopes."""
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": None if self.alibi_slopes is None else self.alibi_slopes.float(),
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Attention):
    """flash_attn_qkvpacked_func as a module; dropout only in training.

    Args:
        causal, softmax_scale, window_size, alibi_slopes, deterministic: as flash_attn_func.
        attention_dropout: its dropout_p.

    Source: flash_attn.modules.mha.FlashSelfAttention.
    """

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """qkv (B, S, 3, H, D) -> (B, S, H, D); with cu_seqlens and max_seqlen (T, 3, H, D) -> (T, H, D).

        causal: in place of the module's own, where it is not None.
        """
        options = self.options(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        if max_seqlen is None:
            validation.refuse("max_seqlen", "given with cu_seqlens", None)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(_Attention):
    """flash_attn_kvpacked_func as a module; dropout only in training. Arguments: as FlashSelfAttention.

    Source: flash_attn.modules.mha.FlashCrossAttention.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """q (B, Sq, H, D), kv (B, Sk, 2, Hk, D) -> (B, Sq, H, D); with lengths, all of them, q (Tq, H, D),
        kv (Tk, 2, Hk, D) -> (Tq, H, D)."""
        options = self.options(causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        lengths = {"max_seqlen": max_seqlen, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_k": max_seqlen_k}
        for argument, given in lengths.items():
            if given is None:
                validation.refuse(argument, "given with cu_seqlens", None)
        packing: Any = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, *packing, **options)


class CrossAttention(_Attention):
    """FlashCrossAttention that takes a mask of keys; with one, whole rows of scores are in memory.

    Source: flash_attn.modules.mha.CrossAttention.
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """q (B, Sq, H, D), kv (B, Sk, 2, Hk, D), key_padding_mask bool (B, Sk), True where a key counts
        -> (B, Sq, H, D). Causal: the last query stands at the last key that counts."""
        options = self.options(causal)
        if key_padding_mask is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        last = key_padding_mask.sum(-1)[:, None, None] if options["causal"] else None
        k, v = kv.unbind(2)
        return _masked(q, k, v, key_padding_mask, last, options)


class SelfAttention(_Attention):
    """FlashSelfAttention that takes a mask of keys; with one, whole rows of scores are in memory.

    Source: flash_attn.modules.mha.SelfAttention.
    """

    def __init__(
        self, causal: bool = False, softmax_scale: float | None = None, attention_dropout: float = 0.0
    ) -> None:
        super().__init__(causal, softmax_scale, attention_dropout)

    def forward(self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """qkv (B, S, 3, H, D), key_padding_mask bool (B, S), True where a key counts -> (B, S, H, D)."""
        options = self.options(causal)
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        q, k, v = qkv.unbind(2)
        return _masked(q, k, v, key_padding_mask, qkv.shape[1] if options["causal"] else None, options)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, counts: Tensor, last: Tensor | int | None, options: dict[str, Any]
) -> Tensor:
    """Attention to the keys that count, (B, Sk); last: causal, with the last query at key last - 1."""
    seen = counts.bool()[:, None, :]
    if last is not None:
        place = torch.arange(q.shape[1], device=q.device)[:, None] + (last - q.shape[1])
        seen = seen & (torch.arange(k.shape[1], device=q.device) <= place)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        seen[:, None].expand(-1, -1, q.shape[1], -1),
        options["dropout_p"],
        scale=options["softmax_scale"],
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


class MHA(nn.Module):
    """Multi-head attention with its projections: self or cross, GQA, rotary, ALiBi, window, a cache for decoding.

    State dict: Wqkv (with cross_attn Wq and Wkv) and out_proj, weight and bias each.

    Args:
        embed_dim: E, which the heads share: D = E / num_heads.
        num_heads, num_heads_kv: H and Hk; None: Hk = H.
        cross_attn: keys and values come from a second input.
        qkv_proj_bias, out_proj_bias: do the projections have a bias?
        dropout: of attention probabilities, in training.
        softmax_scale, causal, window_size: as flash_attn_func's.
        layer_idx: the layer's key in a cache's dictionary.
        rotary_emb_dim: elements of a head that are rotated; 0: none. Not with cross_attn, nor with packed sequences.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: as RotaryEmbedding's.
        use_alibi: the paper's slopes.
        use_flash_attn: take packed sequences, and a cache's lengths of each sequence; else a mask of keys.
        return_residual: return the input, too.
        checkpointing: recompute attention in backward.
        fused_bias_fc: accepted; torch.compile fuses.
        dwconv: must be False.

    Source: flash_attn.modules.mha.MHA.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dwconv:
            validation.refuse("dwconv", "False: a convolution after the projection is not served", dwconv)
        if embed_dim % num_heads:
            validation.refuse("num_heads", f"a divisor of embed_dim, {embed_dim}", num_heads)
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv:
            validation.refuse("num_heads_kv", f"a divisor of num_heads, {num_heads}", num_heads_kv)
        if not use_flash_attn and (use_alibi or tuple(window_size) != (-1, -1)):
            validation.refuse("use_flash_attn", "True with use_alibi or window_size", use_flash_attn)
        if rotary_emb_dim and cross_attn:
            validation.refuse("rotary_emb_dim", "0 with cross_attn", rotary_emb_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.cross_attn, self.causal, self.layer_idx = cross_attn, causal, layer_idx
        self.rotary_emb_dim, self.use_flash_attn = rotary_emb_dim, use_flash_attn
        self.return_residual, self.checkpointing = return_residual, checkpointing
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                interleaved=rotary_emb_interleaved,
                scale_base=rotary_emb_scale_base,
                device=device,
            )
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **factory)
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        flash: dict[str, Any] = {"alibi_slopes": slopes, "window_size": window_size}
        self_attention = partial(FlashSelfAttention, **flash) if use_flash_attn else SelfAttention
        cross_attention = partial(FlashCrossAttention, **flash) if use_flash_attn else CrossAttention
        own: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        self.inner_attn, self.inner_cross_attn = self_attention(**own), cross_attention(**own)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """(batch_size, max_seqlen, 2, Hk, D), for keys and values."""
        weight = self.out_proj.weight
        return weight.new_empty(
            (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim), dtype=dtype or weight.dtype
        )

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """x (B, S, E) -> (B, S, E); packed (T, E) -> (T, E); with return_residual (that, x).

        Args:
            x_kv: with cross_attn, where keys and values come from, (B, Sk, E); None: x.
            key_padding_mask: without use_flash_attn, bool (B, Sk), True where a key counts.
            cu_seqlens, max_seqlen: with use_flash_attn, packed sequences; with cross_attn also cu_seqlens_k and
                max_seqlen_k. Not with rotary.
            mixer_subset: with cross_attn, an index of the tokens that are queries.
            inference_params: decode: an object with max_seqlen, max_batch_size, seqlen_offset, batch_size_offset,
                key_value_memory_dict and lengths_per_sample, as flash_attn.utils.generation.InferenceParams has them.
        """
        if cu_seqlens is not None:
            for argument, given in (("key_padding_mask", key_padding_mask), ("inference_params", inference_params)):
                if given is not None:
                    validation.refuse(argument, "None with cu_seqlens", type(given).__name__)
            if not self.use_flash_attn or self.rotary_emb_dim:
                validation.refuse("cu_seqlens", "None without use_flash_attn, and with rotary_emb_dim", "a tensor")
        if key_padding_mask is not None and (self.use_flash_attn or inference_params is not None):
            validation.refuse("key_padding_mask", "None with use_flash_attn or inference_params", "a tensor")
        if not self.cross_attn and not (x_kv is None and mixer_subset is None):
            validation.refuse("x_kv" if x_kv is not None else "mixer_subset", "None without cross_attn", "a tensor")
        if self.use_flash_attn:
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        else:
            kwargs |= {"key_padding_mask": key_padding_mask}
        if self.cross_attn:
            q = self._heads(self.Wq(x if mixer_subset is None else x[:, mixer_subset]))
            kv = self._heads(self.Wkv(x if x_kv is None else x_kv)).unflatten(-2, (2, -1))
        else:
            qkv = self._heads(self.Wqkv(x))
            if self.num_heads_kv == self.num_heads and inference_params is None:
                qkv = qkv.unflatten(-2, (3, -1))
                qkv = self.rotary_emb(qkv) if self.rotary_emb_dim else qkv
                return self._projected(self._attend(self.inner_attn, (qkv,), kwargs), x)
            q, kv = qkv[..., : self.num_heads, :], qkv[..., self.num_heads :, :].unflatten(-2, (2, -1))
        if self.rotary_emb_dim:
            q, kv = self.rotary_emb(q, kv, *_offset(inference_params))
        if inference_params is None:
            return self._projected(self._attend(self.inner_cross_attn, (q, kv), kwargs), x)
        return self._projected(self._decode(q, kv, inference_params), x)

    def _heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads

    def _projected(self, context: Tensor, x: Tensor) -> Any:
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _attend(self, inner: nn.Module, inputs: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        return (
            checkpoint(inner, *inputs, use_reentrant=False, **kwargs)
            if self.checkpointing
            else inner(*inputs, **kwargs)
        )

    def _decode(self, q: Tensor, kv: Tensor, params: Any) -> Tensor:
        """Attention to the cache, after new keys and values were written into it."""
        if self.layer_idx is None:
            validation.refuse("layer_idx", "given to a layer that decodes", None)
        if params.seqlen_offset == 0 or not self.use_flash_attn:
            written: Tensor = self.inner_cross_attn(q, _written(kv, params, self.layer_idx))
            return written
        first = params.batch_size_offset
        cache = params.key_value_memory_dict[self.layer_idx][first : first + q.shape[0]]
        lengths = params.lengths_per_sample
        options = self.inner_cross_attn.options(None)
        del options["dropout_p"], options["deterministic"]
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            cache_seqlens=params.seqlen_offset if lengths is None else lengths[first : first + q.shape[0]],
            **options,
        )


def _offset(params: Any) -> tuple[Any, int | None]:
    """Where a call's first tokens stand, and how long sequences may become."""
    if params is None:
        return 0, None
    return params.seqlen_offset if params.lengths_per_sample is None else params.lengths_per_sample, params.max_seqlen


def _written(kv: Tensor, params: Any, layer: int) -> Tensor:
    """The cache up to its new end, with kv (B, S, 2, Hk, D) written behind what was there."""
    cache = params.key_value_memory_dict.get(layer)
    if cache is None:
        cache = kv.new_empty((params.max_batch_size, params.max_seqlen, *kv.shape[2:]))
        params.key_value_memory_dict[layer] = cache
    rows = slice(params.batch_size_offset, params.batch_size_offset + kv.shape[0])
    stop = params.seqlen_offset + kv.shape[1]
    if rows.stop > cache.shape[0] or stop > cache.shape[1]:
        validation.refuse(
            "inference_params", f"of room for {rows.stop} sequences of {stop}", f"{tuple(cache.shape[:2])}"
        )
    cache[rows, params.seqlen_offset : stop] = kv
    found: Tensor = cache[rows, :stop]
    return found
