"""Tiles of a GPU's size on a CPU: its table, a budget of one's own, its products, and launches counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from compiled_fa import tuning
from compiled_fa.engines.tiled.large import budget, products
from compiled_fa.tuning.gpu_tiles import GPU

NARROW = (torch.float16, torch.bfloat16)
NOTHING_TO_DO = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would be sent, by name: every operator but views, and what only allocates."""

    of_products: ClassVar[Counter[str]] = Counter()  # of all instances: products that a CPU has not

    def __init__(self) -> None:
        super().__init__()
        self.by_name = Counter[str]()

    def __enter__(self) -> Launches:
        Launches.of_products.clear()
        super().__enter__()
        return self

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in operator._schema.returns)
        name = operator.overloadpacket.__name__
        if not view and name not in NOTHING_TO_DO:
            self.by_name[name] += 1
        return operator(*arguments, **(options or {}))

    @property
    def total(self) -> int:
        return self.by_name.total() + Launches.of_products.total()


def _widening(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """As CUDA has it: one launch; of a few rows at a time, so that it takes no memory to speak of."""
    Launches.of_products["baddbmm"] += 1
    with _disable_current_modes():
        at_once = max(16, total.shape[1] // 16)
        second = b.to(total.dtype)
        for into, first in zip(total.split(at_once, 1), a.split(at_once, 1), strict=True):
            torch.baddbmm(into, first.to(total.dtype), second, beta=beta, alpha=alpha, out=into)
    return total


@contextmanager
def large_tiles(nbytes: int = 64 << 20, widens: bool = True) -> Iterator[None]:
    """nbytes: what a call may take. widens: has the device products in fp32 of operands in half precision?"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "_current", GPU)
        patch.setattr(budget, "memory", lambda device: nbytes * GPU.tiled.memory_parts)
        patch.setattr(products, "widens", lambda device, dtype: widens and dtype in NARROW)
        patch.setattr(products, "_widening", _widening)
        yield
