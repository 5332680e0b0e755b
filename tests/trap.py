"""Where calls that must be refused would be caught computing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from compiled_fa import engines

ROUTES = "select", "prepared"  # of engines: the two places through which ops reach one


class ReachedAnEngineError(Exception):
    pass


@contextmanager
def before_engines() -> Iterator[None]:
    """Raises ReachedAnEngineError where a call would be handed to an engine; what the choice itself refuses, it
    refuses."""

    def trapped(choose):
        def reached(*arguments, **options):
            choose(*arguments, **options)
            raise ReachedAnEngineError

        return reached

    with pytest.MonkeyPatch.context() as patch:
        for route in ROUTES:
            patch.setattr(engines, route, trapped(getattr(engines, route)))
        yield
