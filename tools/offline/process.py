"""Runs a function in a fresh process: the fake T4 and the stage both change the process that they are used in."""

import concurrent.futures
import functools
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_own_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """function(*args, **kwargs) in a new Python with empty compile caches; what it raises is raised here.

    The function and its arguments are pickled, so it has to be importable by name.
    """
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor,
    ):
        caches = {
            "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
            "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor"),
        }
        return executor.submit(_call, caches, functools.partial(function, *args, **kwargs)).result()


def _call(caches: dict[str, str], function: Callable[[], T]) -> T:
    os.environ.update(caches)
    return function()
