"""A call on keys in pages, as one graph: queries laid out for its tables, the template on keys where they lie, and the
splits' results merged by their lse (Flash-Decoding: Dao, Haziza, Massa and Sizov 2023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...problem import Direction
from . import flex
from .blocks import at, contiguous, stored
from .list_order import LIST_ORDER, install
from .mods import LOG2E, MASK_BUFFERS, Features, Mods


@dataclass(frozen=True)
class PagedSpec:
    """All that is fixed in compiled code; lengths, batch, splits and every number of the score program are not.

    strides: of q, and of k's and v's rows, each (row, head) in elements. divisible: memory has whole tiles of keys.
    splits: are there more than one?
    """

    features: Features
    dtype: torch.dtype
    nheads: int
    nheads_k: int
    head_dim: int
    head_dim_v: int
    strides: tuple[tuple[int, int], ...]
    divisible: bool
    options: tuple[tuple[str, int], ...]
    splits: bool

    direction: Direction = "forward"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that the compiled code takes, in order."""
        names = ["q", "k", "v", "kv_num_blocks", "kv_indices", "source", "home"]
        return (*names, *MASK_BUFFERS, *self.features.score_buffers(False))

    def function(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """What is compiled: -> out (T, H, Dv), lse (H, T)."""
        if (reason := install()) is not None:
            raise RuntimeError(reason)
        given = dict(zip(self.names, tensors, strict=True))
        k, v = (given[name].unsqueeze(0).transpose(1, 2) for name in "kv")
        q = self._queries(given["q"], given["source"], given["kv_num_blocks"].shape[1])
        mods = Mods(self.features)
        tables = given["kv_num_blocks"].view(-1, 1, 1), given["kv_indices"], *[None] * 6
        options = dict(self.options)
        size = options["BLOCK_M"], options["BLOCK_N"]
        out, lse, *_ = flex.operators().flex_attention(
            q,
            k,
            v,
            mods.score,
            flex.block_mask(mods, q, k, tables, size),
            1.0,
            {**flex.TEMPLATE, "IS_DIVISIBLE": self.divisible, LIST_ORDER: True, **options},
            tuple(given[name] for name in mods.names),
            tuple(given[name] for name in MASK_BUFFERS),
        )
        out, lse = self._merged(out, lse, given["home"], given["kv_num_blocks"].shape[1])
        return contiguous(out), contiguous((lse / LOG2E).transpose(0, 1))

    @property
    def _block_rows(self) -> int:
        return dict(self.options)["BLOCK_M"]

    def _queries(self, q: Tensor, source: Tensor, splits: Any) -> Tensor:
        """(T, H, D) -> (blocks * splits, Hk, rows, D). Rows that no query is are others', and see no keys."""
        group = self.features.heads_per_key
        sizes = source.shape[0] * splits, self.nheads_k, self._block_rows
        batch, head, row = (torch.arange(size, dtype=torch.int32, device=q.device) for size in sizes)
        row = (at(source, batch // splits).unsqueeze(1) + row).unsqueeze(1)
        return at(q, (row // group).clamp(max=q.shape[0] - 1), head.unsqueeze(1) * group + row % group)

    def _merged(self, out: Tensor, lse: Tensor, home: Tensor, splits: Any) -> tuple[Tensor, Tensor]:
        """out, normalised within its split, and lse in base 2, of all rows -> (T, H, Dv), (T, H)."""
        group = self.features.heads_per_key
        head = torch.arange(self.nheads, dtype=torch.int32, device=out.device)
        row = home.narrow(1, 1, 1) + head % group
        # By a power of two: a division is so many operations that Inductor would not compute it in each kernel anew.
        block, row = row >> (self._block_rows.bit_length() - 1), row & (self._block_rows - 1)
        batch = home.narrow(1, 0, 1) + block * splits
        if not self.splits:
            place = batch, head // group, row
            return at(out, *place), at(lse, *place)
        split = torch.arange(splits, dtype=torch.int32, device=out.device).view(-1, 1)
        place = batch.unsqueeze(1) + split, head // group, row.unsqueeze(1)
        out, lse = at(out, *place).float(), at(lse, *place)
        most = lse.amax(1, keepdim=True)
        most = torch.where(most == -torch.inf, 0.0, most)
        whole = stored(most.squeeze(1) + torch.log2(torch.exp2(lse - most).sum(1)))
        # Their sum is 1 but for rounding, which is divided away; or 0, where a row sees nothing. Of each column of v by
        # itself, for one kernel.
        weight = torch.exp2(lse - torch.where(whole == -torch.inf, 0.0, whole).unsqueeze(1)).unsqueeze(3).expand_as(out)
        total = weight.sum(1)
        return ((out * weight).sum(1) / torch.where(total == 0.0, 1.0, total)).to(self.dtype), whole

    def example_inputs(self, device: torch.device | str, size: Callable[[str, int], Any]) -> list[Tensor]:
        """Inputs to trace with. size: (name, typical value) -> a size, the same one for the same name."""
        blocks, splits, tokens, keys = size("blocks", 24), size("splits", 5), size("tokens", 99), size("keys", 5120)
        batch = blocks * splits
        wide = {
            "q": (tokens, self.nheads, self.head_dim),
            "k": (keys, self.nheads_k, self.head_dim),
            "v": (keys, self.nheads_k, self.head_dim_v),
        }
        small: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {
            "kv_num_blocks": ((blocks, splits), torch.int32),
            "kv_indices": ((batch, 1, 1, size("width", 9)), torch.int32),
            "source": ((blocks,), torch.int32),
            "home": ((tokens, 2), torch.int32),
            "owner": ((batch,), torch.int32),
            "alibi_slopes": ((size("batch", 8), self.nheads), torch.float32),
            **dict.fromkeys(("start", "stop", "position", "member"), ((batch, self._block_rows), torch.int32)),
            **dict.fromkeys(("softmax_scale", "softcap"), ((), torch.float32)),
        }
        inputs = []
        for name in self.names:
            if name in small:
                shape, dtype = small[name]
                inputs.append(torch.empty(shape, dtype=dtype, device=device))
            else:
                row, head = self.strides["qkv".index(name)]
                inputs.append(torch.empty_strided(wide[name], (row, head, 1), dtype=self.dtype, device=device))
        return inputs
