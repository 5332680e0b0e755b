"""Runs a function in a fresh process: the fake T4 and the stage both change the process that they are used in."""

import concurrent.futures
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_own_process(
    function: Callable[..., T], *args: Any, environment: dict[str, str] | None = None, **kwargs: Any
) -> T:
    """function(*args, **kwargs) in a new Python with empty compile caches; what it raises is raised here.

    The function and its arguments are pickled, so it has to be importable by name.
    """
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor,
    ):
        variables = {
            "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor"),
            **(environment or {}),
        }
        return executor.submit(_call, variables, function, args, kwargs).result()


def _call(variables: dict[str, str], function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    os.environ.update(variables)
    return function(*args, **kwargs)
