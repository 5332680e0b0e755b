"""Rotary position embedding (arXiv 2104.09864): the functions and the module of flash_attn 2.8's layers.rotary.

Pairs of a head's first rotary_dim elements are turned by an angle that grows with the token's position; the elements
after them stay. Plain PyTorch ops (rotation.py), so that autograd, torch.func and torch.compile see through them.

B batch, S length, H heads, D head_dim, T total tokens of packed sequences, R rotary_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from . import cache_validation as validation
from .rotation import rotated, turned


def _turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    x[..., : 2 * cos.shape[-1]].copy_(turned(x, cos, sin, interleaved))


def _is_of_a_leaf(x: Tensor) -> bool:
    """Is it a leaf of autograd's graph, or a view of one? In-place operations may not change these."""
    return x.is_leaf or (x._base is not None and x._base.is_leaf)


def _in_place(x: Tensor, turn: Callable[[Tensor], None]) -> Tensor:
    """x, into which `turn` has written; of a leaf that requires grad, a copy, which has the gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad and _is_of_a_leaf(x)):
        turn(x)
        return x
    found = x.clone()
    turn(found)
    with torch.no_grad():
        x.copy_(found)
    return found


def _of_tokens(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token of x, with a dimension for the heads."""
    if cu_seqlens is None and not isinstance(seqlen_offsets, Tensor):
        some = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return cos[some, None], sin[some, None]
    if cu_seqlens is None:
        positions = cast(Tensor, seqlen_offsets)[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        token = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)
        sequence = sequence.clamp(max=cu_seqlens.shape[0] - 2)
        offsets = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
        positions = token - cu_seqlens[sequence] + offsets
    return cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with the first R of each head's D elements rotated by the angles of their token's position.

    Differentiable in x, also in place; not in cos and sin.

    Args:
        x: (B, S, H, D); with cu_seqlens (T, H, D). fp16, bf16, fp32 or fp64.
        cos, sin: (positions, R / 2), floating point; R is at most D.
        interleaved: pair elements 0 and 1, 2 and 3, ... (GPT-J); else element j with j + R / 2 (GPT-NeoX).
        inplace: write into x, and return it. A leaf that requires grad, or a view of one, is written outside of
            autograd, as flash_attn does: the gradient goes through what is returned, a copy.
        seqlen_offsets: position of each sequence's first token: an int, or integers (B,).
        cu_seqlens: int32 (B + 1,), running sums of the lengths of packed sequences, from 0 to T.
        max_seqlen: upper bound of these lengths; not needed. One that is too small is refused.

    Returns:
        As x.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it. Values of tensors are checked on a CPU,
            outside of compiled code, and elsewhere with COMPILED_FA_CHECK=1.

    Example:
        q = apply_rotary_emb(q, cos, sin, seqlen_offsets=cache_seqlens)

    Source: RoFormer (arXiv 2104.09864); flash_attn.layers.rotary.apply_rotary_emb.
    """
    validation.rotary("x", x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    of_tokens = _of_tokens(x, cos, sin, seqlen_offsets, cu_seqlens)
    if not inplace:
        return rotated(x, *of_tokens, interleaved)
    return _in_place(x, lambda x: _turn(x, *of_tokens, interleaved))


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """apply_rotary_emb of q and k, in place, in one tensor with v.

    Args:
        qkv: (B, S, 3, H, D); or (B, S, num_heads_q + 2 * heads of k, D), where num_heads_q is given.
        cos_k, sin_k: for k, (positions, R / 2), both or neither; None: as for q.
        The rest: as apply_rotary_emb.

    Returns: qkv, as apply_rotary_emb with inplace. Raises: as apply_rotary_emb.

    Source: flash_attn.layers.rotary.apply_rotary_emb_qkv_.
    """
    q, k = validation.queries_and_keys(qkv, num_heads_q)
    if (cos_k is None) != (sin_k is None):
        validation.refuse("sin_k" if sin_k is None else "cos_k", "given where the other is", None)
    validation.rotary("qkv", q, cos, sin, seqlen_offsets)
    tables = (cos, sin), (cos, sin) if cos_k is None or sin_k is None else (cos_k, sin_k)
    names = ("cos", "sin") if cos_k is None else ("cos_k", "sin_k")
    validation.rotary("qkv", k, *tables[1], seqlen_offsets, names=names)

    def turn(qkv: Tensor) -> None:
        for x, table in zip(validation.queries_and_keys(qkv, num_heads_q), tables, strict=True):
            _turn(x, *_of_tokens(x, *table, seqlen_offsets, None), interleaved)

    return _in_place(qkv, turn)


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """apply_rotary_emb of k, in place, in one tensor with v.

    Args:
        kv: (B, S, 2, H, D).
        The rest: as apply_rotary_emb.

    Returns: kv, as apply_rotary_emb with inplace. Raises: as apply_rotary_emb.

    Source: flash_attn.layers.rotary.apply_rotary_emb_kv_.
    """
    validation.keys_and_values(kv)
    k = kv[:, :, 0]
    validation.rotary("kv", k, cos, sin, seqlen_offsets)
    of_tokens = _of_tokens(k, cos, sin, seqlen_offsets, None)
    return _in_place(kv, lambda kv: _turn(kv[:, :, 0], *of_tokens, interleaved))


class RotaryEmbedding(nn.Module):
    """Rotary embedding with its tables of cos and sin, made when they are needed, and kept.

    With scale_base q's elements are multiplied, and k's divided, by a factor that grows with the position (XPos, arXiv
    2212.10554; 512 is usual): their product falls with the distance. Factors are 1 in the middle of the tables, so
    keys that stay in a cache ask for tables of one length throughout: max_seqlen.

    Args:
        dim: R, even.
        base: the longest wave has about 2 π · base tokens.
        interleaved: as apply_rotary_emb's.
        scale_base: tokens over which factors change by one power; None: no factors.
        device: of the frequencies; the tables are on the device of what is rotated.

    Source: flash_attn.layers.rotary.RotaryEmbedding.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        validation.rotary_dim("dim", dim)
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None
        if scale_base is not None:
            scale = (torch.arange(0, dim, 2, device=device, dtype=torch.float32) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        return 1.0 / (self.base ** (torch.arange(0, self.dim, 2, device=device, dtype=dtype) / self.dim))

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Tables of at least so many positions, in this dtype, on this device."""
        kept = self._cos_cached
        serves = kept is not None and seqlen <= self._seq_len_cached and kept.device == device and kept.dtype == dtype
        if serves and self.training and not torch.compiler.is_compiling():
            serves = kept is not None and not kept.is_inference()  # which could not be saved for backward
        if serves:
            return
        self._seq_len_cached = seqlen
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        # A module that was cast has rounded its frequencies: they are made anew.
        exact = self.inv_freq.dtype == wide
        frequencies = self.inv_freq.to(device) if exact else self._compute_inv_freq(device, wide)
        angles = torch.outer(torch.arange(seqlen, device=device, dtype=wide), frequencies)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (torch.arange(seqlen, device=device, dtype=wide) - seqlen // 2) / self.scale_base
        scale = self.scale.to(device, wide) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate q and k in place.

        Args:
            qkv: as apply_rotary_emb_qkv_'s, with num_heads_q; with kv: q alone, (B, S, H, D).
            kv: (B, S, 2, Hk, D), or None.
            seqlen_offset: as apply_rotary_emb's seqlen_offsets.
            max_seqlen: positions that the tables have at least; needed, once, where seqlen_offset is a tensor.

        Returns:
            qkv; with kv (q, kv). They are the tensors given, but for leaves that require grad, as apply_rotary_emb.
        """
        if max_seqlen is None and not isinstance(seqlen_offset, Tensor):
            max_seqlen = qkv.shape[1] + seqlen_offset
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, device=qkv.device, dtype=qkv.dtype)
        if self._cos_cached is None or self._sin_cached is None:
            validation.refuse("max_seqlen", "given once where seqlen_offset is a tensor", None)
        table, options = (self._cos_cached, self._sin_cached), (self.interleaved, seqlen_offset)
        table_k = table
        if self._cos_k_cached is not None and self._sin_k_cached is not None:
            table_k = self._cos_k_cached, self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, *table, *table_k, *options, num_heads_q=num_heads_q)
        q = apply_rotary_emb(qkv, *table, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, *table_k, *options)
