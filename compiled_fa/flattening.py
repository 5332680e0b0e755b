"""Dataclasses of tensors as lists of tensors, in which form they enter and leave compiled code, and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, TypeVar, cast

from torch import Tensor

Self = TypeVar("Self", bound="Flattened")


@dataclass(frozen=True)
class Flattened:
    """Base of dataclasses whose fields are tensors, or None where a call has no such one: at least two fields.

    names = x.present(); x == type(x).unflatten(names, iter(x.flatten()))
    """

    def flatten(self) -> list[Tensor]:
        """The tensors that there are, in the order of the fields."""
        return [tensor for tensor in _getter(cast(Any, type(self)))(self) if tensor is not None]

    def present(self) -> tuple[str, ...]:
        """The names of the fields that are not None."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @classmethod
    def unflatten(cls: type[Self], present: tuple[str, ...], tensors: Iterator[Tensor]) -> Self:
        """From `flatten`'s tensors, of which it takes its own; present: as `present` gives."""
        return cls(**{field.name: next(tensors) if field.name in present else None for field in fields(cls)})


@functools.cache
def _getter(cls: Any) -> Callable[[Any], tuple[Tensor | None, ...]]:
    return attrgetter(*(field.name for field in fields(cls)))
