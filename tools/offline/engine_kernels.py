"""The fused engine's kernels by name: what calls with certain features compile, for any head_dim and options; and those
that read keys in pages."""

import dataclasses
import itertools

import torch

from compiled_fa.engines.fused.kernels import Spec
from compiled_fa.engines.fused.mods import Features
from compiled_fa.engines.fused.options import options_for, options_for_pages
from compiled_fa.engines.fused.paged import PagedSpec
from compiled_fa.engines.nvidia import TURING
from compiled_fa.problem import Direction
from compiled_fa.tuning import FlexOptions

HEADS = 8
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
HEAD_DIMS = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class FeatureClass:
    """The window is no part of a kernel: causal is every other one, too."""

    features: Features
    nheads_k: int = HEADS
    divisible: bool = False  # lengths are multiples of 128


PLAIN = "causal"
EVERYTHING = "varlen + window + ALiBi + softcap + dropout"
_DENSE, _PACKED = Features(), Features(layout="packed")
_SCORES = Features(softcap=True, alibi=True, layout="packed")
_ALL = dataclasses.replace(_SCORES, dropout=True)
CLASSES = {
    "causal, multiples of 128": FeatureClass(_DENSE, divisible=True),
    PLAIN: FeatureClass(_DENSE),
    "causal, GQA": FeatureClass(_DENSE, nheads_k=2),
    "varlen": FeatureClass(_PACKED),
    "varlen, GQA": FeatureClass(_PACKED, nheads_k=2),
    "varlen + window + ALiBi + softcap": FeatureClass(_SCORES),
    EVERYTHING: FeatureClass(_ALL),
    f"{EVERYTHING}, GQA": FeatureClass(_ALL, nheads_k=2),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """options: those of the engine's table if None."""

    direction: Direction
    head_dim: int
    features: str  # a key of CLASSES
    options: FlexOptions | None = None

    @property
    def spec(self) -> Spec:
        """For heads beside each other in a row, as the ops' tensors have them."""
        kind, d = CLASSES[self.features], self.head_dim
        heads = (HEADS, kind.nheads_k, kind.nheads_k, HEADS, HEADS)[: 3 if self.direction == "forward" else 5]
        strides = tuple((n * d, d) for n in heads)
        options = self.options
        if options is None:
            options = options_for(self.direction, d, torch.float16, kind.features, TURING)
        return Spec(
            self.direction,
            kind.features,
            torch.float16,
            HEADS,
            kind.nheads_k,
            d,
            d,
            strides,
            kind.divisible,
            options,
        )


def all_kernels() -> list[Kernel]:
    """Every kernel of the table."""
    return [Kernel(*names) for names in itertools.product(DIRECTIONS, HEAD_DIMS, CLASSES)]


def paged(
    head_dim: int, page_size: int, queries: int = 1, splits: bool = True, softcap: bool = False, alibi: bool = False
) -> PagedSpec:
    """Of calls on pages with 8 key heads, each of which 4 query heads share."""
    heads_per_key, nheads_k = 4, HEADS
    options = dict(options_for_pages(head_dim, torch.float16, queries * heads_per_key, softcap, TURING))
    options["BLOCK_N"] = min(options["BLOCK_N"], page_size)
    nheads = heads_per_key * nheads_k
    strides = tuple((n * head_dim, head_dim) for n in (nheads, nheads_k, nheads_k))
    of_call = Features(softcap, alibi, layout="paged", heads_per_key=heads_per_key)
    shape = nheads, nheads_k, head_dim, head_dim
    return PagedSpec(of_call, torch.float16, *shape, strides, True, tuple(options.items()), splits)
