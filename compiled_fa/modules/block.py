"""A transformer's block. Source: flash_attn 2.8's modules.block, whose arguments and state dict this has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation
from .mha import MHA
from .mlp import Mlp


class StochasticDepth(nn.Module):
    """Drops whole samples of a batch with probability p, in training (arXiv 1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.p or not self.training:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.p
        return torch.where(kept, x / (1.0 - self.p), 0.0)


class Block(nn.Module):
    """Attention and an MLP, each with dropout and a residual, and a norm before it (prenorm) or after it.

    With prenorm a block begins with what others end with: dropout, addition, norm, attention, dropout, addition, norm,
    MLP. It takes and gives (hidden_states, residual), and who comes after it adds them up.

    State dict: mixer, norm1, mlp, norm2. layer_idx is the layer's number, where whoever builds a model says it.

    Args:
        dim: E.
        mixer_cls, mlp_cls, norm_cls, dropout_cls: called with E, or dropout's probability; None: MHA with heads of 64,
            Mlp with 4 E.
        resid_dropout1, resid_dropout2: before the residual is added; drop_path1, drop_path2: of whole samples.
        return_residual: without prenorm, mixer and MLP give (result, what is added to it).
        residual_in_fp32: with prenorm, the residual that is passed on is fp32.
        fused_dropout_add_ln: accepted; torch.compile fuses. sequence_parallel, mark_shared_params: must be False.

    Source: flash_attn.modules.block.Block.
    """

    layer_idx: int | None = None

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module] | None = None,
        mlp_cls: Callable[[int], nn.Module] | None = None,
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        dropout_cls: Callable[[float], nn.Module] = nn.Dropout,
        prenorm: bool = True,
        resid_dropout1: float = 0.0,
        resid_dropout2: float = 0.0,
        drop_path1: float = 0.0,
        drop_path2: float = 0.0,
        fused_dropout_add_ln: bool = False,
        return_residual: bool = False,
        residual_in_fp32: bool = False,
        sequence_parallel: bool = False,
        mark_shared_params: bool = False,
    ) -> None:
        super().__init__()
        for argument, given in (("sequence_parallel", sequence_parallel), ("mark_shared_params", mark_shared_params)):
            if given:
                validation.refuse(argument, "False: layers over a process group are not served", given)
        if residual_in_fp32 and not prenorm:
            validation.refuse("residual_in_fp32", "False without prenorm", residual_in_fp32)
        self.prenorm, self.return_residual, self.residual_in_fp32 = prenorm, return_residual, residual_in_fp32
        self.mixer = (partial(MHA, num_heads=dim // 64) if mixer_cls is None else mixer_cls)(dim)
        self.dropout1, self.drop_path1 = dropout_cls(resid_dropout1), StochasticDepth(drop_path1)
        self.norm1 = norm_cls(dim)
        self.mlp = (partial(Mlp, hidden_features=4 * dim) if mlp_cls is None else mlp_cls)(dim)
        if not isinstance(self.mlp, nn.Identity):
            self.dropout2, self.drop_path2 = dropout_cls(resid_dropout2), StochasticDepth(drop_path2)
            self.norm2 = norm_cls(dim)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        mixer_subset: Any = None,
        mixer_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """hidden_states (B, S, E) -> (B, S, E); with prenorm (hidden_states, residual) of them, residual as the block
        before gave it, or None."""
        kwargs = dict(mixer_kwargs or {})
        if not self.prenorm:
            return self._postnorm(hidden_states, residual, kwargs)
        hidden_states, residual = self._added(hidden_states, residual, self.dropout1, self.drop_path1, self.norm1)
        if mixer_subset is not None:
            kwargs["mixer_subset"] = mixer_subset
        hidden_states = self.mixer(hidden_states, **kwargs)
        if mixer_subset is not None:
            residual = residual[:, mixer_subset]
        if isinstance(self.mlp, nn.Identity):
            return hidden_states, residual
        hidden_states, residual = self._added(hidden_states, residual, self.dropout2, self.drop_path2, self.norm2)
        return self.mlp(hidden_states), residual

    def _added(
        self, branch: Tensor, residual: Tensor | None, dropout: nn.Module, drop_path: nn.Module, norm: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """(norm(residual + branch), residual + branch)."""
        total: Tensor = drop_path(dropout(branch))
        if residual is not None:
            total = total + residual
        weight: Any = norm.weight
        normed: Tensor = norm(total.to(weight.dtype))
        return normed, total.float() if self.residual_in_fp32 else total

    def _postnorm(self, hidden_states: Tensor, residual: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        if residual is not None:
            validation.refuse("residual", "None without prenorm", "a tensor")
        branch = self.mixer(hidden_states, **kwargs)
        if self.return_residual:
            branch, hidden_states = branch
        hidden_states, _ = self._added(branch, hidden_states, self.dropout1, self.drop_path1, self.norm1)
        if isinstance(self.mlp, nn.Identity):
            return hidden_states
        branch = self.mlp(hidden_states)
        if self.return_residual:
            branch, hidden_states = branch
        return self._added(branch, hidden_states, self.dropout2, self.drop_path2, self.norm2)[0]
