"""Compiled calls: what a kernel is compiled for, and the tensors that it takes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...caches import Cache
from ...inductor import graphs
from ...inductor.graphs import Compiled
from ...problem import Direction
from ..engine import CannotServeError
from .blocks import BLOCK, BlockTables
from .flex import Graph
from .mods import MASK_BUFFERS, Features

# By spec and device: a GPU's number is in the code. Or why there is none, which is as slow to find out as a kernel is
# to be compiled.
KERNELS: Cache[object, Compiled | str] = Cache("compiled kernels", entries=512)

# `canonical` has seen to the strides.
CONFIG: dict[str, Any] = {"size_asserts": False}


@dataclass(frozen=True)
class Spec:
    """All that is fixed in compiled code; lengths, batch, and every number of the score program are not.

    strides: of q, k, v (and dout, out), each (row, head) in elements: see `canonical`. divisible: lengths are multiples
    of BLOCK. paged: k and v are (num_blocks, block_size, nheads_k, head_dim); leftpad: sequences do not begin with
    their pages. lse_gradient: backward is given one. bias_dtype: of the bias, whose last stride is 1.
    options: tile sizes, warps and stages by the template's names; empty: Inductor's own choice.
    """

    direction: Direction
    features: Features
    dtype: torch.dtype
    nheads: int
    nheads_k: int
    head_dim: int
    head_dim_v: int
    strides: tuple[tuple[int, int], ...]
    divisible: bool
    options: tuple[tuple[str, int], ...] = ()
    paged: bool = False
    leftpad: bool = False
    lse_gradient: bool = False
    bias_dtype: torch.dtype | None = None

    @property
    def graph(self) -> Graph:
        return Graph(self.direction, self.features, self.divisible, self.options)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors that the compiled code takes, in order."""
        names = ["q", "k", "v"]
        if self.direction == "backward":
            names += ["dout", "out", "lse"]
            names += ["dlse"] if self.lse_gradient else []
        names += [*BlockTables._fields, *MASK_BUFFERS]
        dropout, layout = self.features.dropout, self.features.layout
        names += [name for name in self.features.score_buffers(dropout) if name not in ("low", "high")]
        names += ["seed", "keep"] if dropout else []
        names += ["index"] if dropout and layout == "packed" else []
        names += ["sequence"] if dropout and layout == "packed" and "sequence" not in names else []
        names += ["source", "home"] if layout == "padded" else []
        names += ["pages", "used"] if self.paged else []
        names += ["skipped"] if self.leftpad else []
        return tuple(names)

    def function(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What is compiled."""
        return self.graph(dict(zip(self.names, tensors, strict=True)))

    def example_inputs(self, device: torch.device | str, size: Callable[[str, int], Any]) -> list[Tensor]:
        """Inputs to trace with. size: (name, typical value) -> a size, the same one for the same name."""
        layout, batch = self.features.layout, size("batch", 4)
        rows_q, rows_k = size("rows_q", 8 * BLOCK), size("rows_k", 9 * BLOCK)
        leading_q = (batch, rows_q) if layout == "dense" else (rows_q,)
        leading_k = (size("pages", 6), size("page", 256)) if self.paged else (batch, rows_k)[-len(leading_q) :]
        wide = {
            "q": (leading_q, self.nheads, self.head_dim),
            "k": (leading_k, self.nheads_k, self.head_dim),
            "v": (leading_k, self.nheads_k, self.head_dim_v),
            "dout": (leading_q, self.nheads, self.head_dim_v),
            "out": (leading_q, self.nheads, self.head_dim_v),
        }
        table_batch = batch if layout == "padded" else 1
        blocks = {
            "kv": (size("blocks_q", 8), size("width_kv", 7)),
            "q": (size("blocks_k", 9), size("width_q", 6)) if layout != "padded" else (1, 1),
        }
        of_rows = (batch, size("padded_q", BLOCK)) if layout == "padded" else (size("padded_q", 8 * BLOCK),)
        of_lse = (batch, self.nheads, rows_q) if layout == "dense" else (self.nheads, rows_q)
        of_pages = (batch, size("table", 5))
        small: dict[str, tuple[tuple[Any, ...], torch.dtype]] = {
            "lse": (of_lse, torch.float32),
            "dlse": (of_lse, torch.float32),
            **dict.fromkeys(("start", "stop", "position", "sequence", "index", "key_start"), (of_rows, torch.int32)),
            **dict.fromkeys(("softmax_scale", "softcap", "keep"), ((), torch.float32)),
            "threshold": ((), torch.int32),
            "alibi_slopes": ((batch, self.nheads), torch.float32),
            "seed": ((2,), torch.int32),
            "source": ((batch, size("longest_q", 100)), torch.int32),
            "home": ((rows_q,), torch.int32),
            "pages": (of_pages, torch.int32),
            "used": ((batch,), torch.int32),
            "skipped": ((batch,), torch.int32),
        }
        for name in BlockTables._fields:
            count, width = blocks["kv" if "kv" in name else "q"]
            of_batch = 1 if "kv" not in name else table_batch
            shape = (of_batch, 1, count) if name.endswith("num_blocks") else (of_batch, 1, count, width)
            small[name] = shape, torch.int32
        strides = dict(zip(wide, self.strides, strict=False))
        inputs = []
        for name in self.names:
            if name == "bias":
                of_scores = zip((batch, self.nheads, rows_q, rows_k), self.features.bias, strict=True)
                shape = tuple(full for full, varies in of_scores if varies)
                bias_strides = [size(f"bias stride {dim}", 1 << (24 - dim)) for dim in range(len(shape))]
                bias_strides[-1:] = [1] if shape else []
                inputs.append(torch.empty_strided(shape, bias_strides, dtype=self.bias_dtype, device=device))
            elif name in small:
                shape, dtype = small[name]
                inputs.append(torch.empty(shape, dtype=dtype, device=device))
            else:
                leading, heads, columns = wide[name]
                row, head = strides[name]
                outer = (leading[1] * row,) if len(leading) == 2 else ()
                inputs.append(
                    torch.empty_strided(
                        (*leading, heads, columns), (*outer, row, head, 1), dtype=self.dtype, device=device
                    )
                )
        return inputs


class Compilable(Hashable, Protocol):
    """A Spec, or that of paged.py."""

    @property
    def direction(self) -> Direction: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    def function(self, *tensors: Tensor) -> tuple[Tensor, ...]: ...

    def example_inputs(self, device: torch.device | str, size: Callable[[str, int], Any]) -> list[Tensor]: ...


def run(spec: Compilable, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Forward: out, lse; backward: dq, dk, dv. Compiled at the first call with a spec.

    Raises CannotServeError where that fails.
    """
    inputs = [given[name] for name in spec.names]
    device = inputs[0].device
    if device.type == "cpu":
        return spec.function(*inputs)
    what = f"the fused {spec.direction} kernel for head_dim {spec.head_dim}"

    def compile_it() -> Compiled | str:
        try:
            return graphs.compiled_graph(spec.function, lambda size: spec.example_inputs(device, size), what, **CONFIG)
        except Exception as error:  # shared memory that the device does not have is an error of many kinds
            return f"{what} could not be compiled for it ({type(error).__name__}: {error})"

    kernel = KERNELS.get((spec, device), compile_it)
    if isinstance(kernel, str):
        raise CannotServeError(kernel)
    return tuple(kernel(inputs))


def canonical(x: Tensor) -> Tensor:
    """(B, S, H, D) or (T, H, D) as views of dense and qkv-packed tensors are: heads within a row, and S rows a batch;
    others are copied.

    That a kernel is compiled for, with the strides of rows and heads fixed in it: lengths are no part of them. The
    stride of a dimension of size 1 is nobody's: any number may stand there.
    """
    *leading, heads, columns = x.shape
    *outer, last_head, last_column = x.stride()
    head = last_head if heads > 1 else columns
    rows = leading[-1]
    row = outer[-1] if rows > 1 else outer[0] if leading[0] > 1 else heads * head
    strides = (*([rows * row] if len(leading) == 2 else []), row, head, 1)
    fits = (last_column == 1 or columns == 1) and head >= columns and row >= heads * head
    if fits and (len(leading) == 1 or leading[0] == 1 or outer[0] == rows * row):
        return x if strides == x.stride() else x.as_strided(x.shape, strides)
    return canonical(torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x))
