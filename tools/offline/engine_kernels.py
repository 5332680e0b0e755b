"""The fused engine's kernels by name: what calls with certain features compile, for any head_dim and options."""

import dataclasses
import itertools
from typing import Any, Literal

import torch

from compiled_fa.engines.fused.flex import Spec
from compiled_fa.engines.fused.mods import Features
from compiled_fa.engines.fused.options import options_for
from compiled_fa.scores import Window
from compiled_fa.tuning import FlexOptions

TURING = (7, 5)
HEADS = 8
CAUSAL = Window(None, 0)
Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
HEAD_DIMS = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class FeatureClass:
    """features: but for softmax_scale, which follows from head_dim."""

    features: Features
    nheads_k: int = HEADS
    divisible: bool = False  # lengths are multiples of 128


def _features(**changed: Any) -> Features:
    plain = Features(
        softmax_scale=1.0, softcap=None, alibi=False, window=CAUSAL, threshold=None, packed=False, square=True
    )
    return dataclasses.replace(plain, **changed)


_SCORES: dict[str, Any] = {"softcap": 20.0, "alibi": True, "window": Window(100, 0)}
_PACKED = {"packed": True, "square": False}

PLAIN = "causal"
EVERYTHING = "varlen + window + ALiBi + softcap + dropout"
CLASSES = {
    "causal, multiples of 128": FeatureClass(_features(), divisible=True),
    PLAIN: FeatureClass(_features()),
    "causal, GQA": FeatureClass(_features(), nheads_k=2),
    "rectangular": FeatureClass(_features(square=False)),
    "varlen": FeatureClass(_features(**_PACKED), divisible=True),
    "varlen, GQA": FeatureClass(_features(**_PACKED), nheads_k=2, divisible=True),
    "varlen + window + ALiBi + softcap": FeatureClass(_features(**_PACKED, **_SCORES), divisible=True),
    EVERYTHING: FeatureClass(_features(**_PACKED, **_SCORES, threshold=-5), divisible=True),
    f"{EVERYTHING}, GQA": FeatureClass(_features(**_PACKED, **_SCORES, threshold=-5), nheads_k=2, divisible=True),
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
        features = dataclasses.replace(kind.features, softmax_scale=d**-0.5)
        heads = (HEADS, kind.nheads_k, kind.nheads_k, HEADS)[: 3 if self.direction == "forward" else 4]
        strides = tuple((n * d, d) for n in heads)
        options = self.options
        if options is None:
            options = options_for(self.direction, d, torch.float16, features, TURING)
        return Spec(
            self.direction,
            features,
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
