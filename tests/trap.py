"""Where calls that must be refused would be caught computing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from compiled_fa.engines import selection

ROUTE = selection, "select"  # the one place through which ops reach an engine


class ReachedAnEngineError(Exception):
    pass


@contextmanager
def before_engines() -> Iterator[None]:
    """Raises ReachedAnEngineError where a call would be handed to an engine; what the choice itself refuses, it
    refuses."""
    choose = getattr(*ROUTE)

    def trapped(*arguments, **options):
        choose(*arguments, **options)
        raise ReachedAnEngineError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*ROUTE, trapped)
        yield
