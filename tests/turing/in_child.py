"""What the tests of the Turing stage run in processes of their own: importable by name, with results that pickle."""

import dataclasses
import glob
import os
import time
import warnings
from typing import Any

import torch
import triton

import compiled_fa.turing
from tools.offline import Kernel, capture, compile_spec, fake_t4
from tools.offline.figures import Figures, figures_of
from tools.offline.machine_code import inner_loops

FORWARD = Kernel("forward", 64, "causal", (("BLOCK_M", 64), ("BLOCK_N", 32), ("num_warps", 4), ("num_stages", 2)))


@dataclasses.dataclass(frozen=True)
class EngineKernel:
    figures: Figures
    barriers: list[int]  # an iteration of each loop over tiles


def engine_kernels(kernels: list[Kernel]) -> list[EngineKernel]:
    """Kernels of the fused engine with the stage, which must not fall back."""
    found = []
    for kernel in kernels:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # the stage falls back to less only with a warning
            compiled = compile_spec(kernel.spec, turing=True)
        loops = [loop for loop in inner_loops(compiled.sass) if loop.counts["HMMA"]]
        found.append(EngineKernel(figures_of(kernel.spec, compiled), [loop.counts["BAR"] for loop in loops]))
    return found


def jit_cache() -> list[bool]:
    """Whether a @triton.jit function launched before, during and after enable() ran tensor-core code."""
    from . import kernels

    fake_t4.install()
    seen = []
    for change in (lambda: None, compiled_fa.turing.enable, compiled_fa.turing.disable, compiled_fa.turing.enable):
        change()
        compiled = kernels.batched.warmup(torch.float16, torch.float16, torch.float32, grid=(1,))
        seen.append("mma.sync" in compiled.asm["ptx"])
    return seen


def kernels_on_disk() -> list[bool]:
    """Whether each kernel in Triton's cache on disk has tensor-core instructions."""
    texts = []
    for path in glob.glob(os.path.join(triton.knobs.cache.dir, "*", "*.ptx")):
        with open(path) as file:
            texts.append(file.read())
    return sorted("mma.sync" in text for text in texts)


def compile_workers(start_method: str) -> dict[str, Any]:
    """An attention kernel through Inductor's compile workers, with the stage and then without, by the same pool."""
    import torch._inductor.async_compile as async_compile
    from torch._inductor import config

    source = capture(FORWARD.spec)
    on_t4 = f"from tools.offline import fake_t4\nfake_t4.install()\n{source.text}"  # the workers run this too
    pids = []
    on_disk = []
    original_pool = async_compile.AsyncCompile.process_pool
    with config.patch(compile_threads=2, worker_start_method=start_method):
        for change in (compiled_fa.turing.enable, compiled_fa.turing.disable):
            change()
            _wait_for_workers(async_compile)
            pids.append(original_pool().submit(os.getpid).result())
            future = async_compile.AsyncCompile().triton(source.name, on_t4)
            future.future.result()  # what the worker sends back; loading it would need the GPU
            on_disk.append(kernels_on_disk())
        async_compile.shutdown_compile_workers()
    return {"here": os.getpid(), "workers": pids, "on_disk": on_disk}


def _wait_for_workers(async_compile: Any) -> None:
    deadline = time.monotonic() + 60
    async_compile.AsyncCompile.warm_pool()
    async_compile.AsyncCompile.wait_pool_ready()
    while not async_compile.AsyncCompile.use_process_pool():
        assert time.monotonic() < deadline, "the compile workers did not start"


def inductor_keys() -> dict[str, list[str]]:
    """The keys of Inductor's caches before, during and after enable(), on this thread and on another."""
    import threading

    from torch._inductor import async_compile, codecache
    from torch._inductor.runtime.autotune_cache import AutotuneCache

    graph = torch.fx.symbolic_trace(torch.nn.ReLU())

    def keys() -> dict[str, str]:
        found = {
            "graph": codecache.compiled_fx_graph_hash(graph, [torch.zeros(4)], {}, [])[0],
            "kernel": async_compile.CompiledTritonKernels.key("source"),
        }
        if torch.__version__ >= "2.13":  # 2.11 has no such key
            found["autotuning"] = AutotuneCache._make_local_cache_key("folder", "kernel")
        return found

    collected: dict[str, list[str]] = {name: [] for name in (*keys(), "other thread")}
    for change in (lambda: None, compiled_fa.turing.enable, compiled_fa.turing.disable):
        change()
        for name, key in keys().items():
            collected[name].append(key)
        there: list[str] = []
        thread = threading.Thread(target=lambda there=there: there.append(keys()["graph"]))
        thread.start()
        thread.join()
        collected["other thread"].append(there[0])
    return collected


def reloaded_modules() -> list[bool]:
    """Whether Inductor hands out the module of a source again: without a change, after enable(), after disable()."""
    from torch._inductor.codecache import PyCodeCache

    first = PyCodeCache.load("x = 1")
    again = PyCodeCache.load("x = 1")
    compiled_fa.turing.enable()
    enabled = PyCodeCache.load("x = 1")
    compiled_fa.turing.disable()
    disabled = PyCodeCache.load("x = 1")
    return [again is first, enabled is first, disabled is enabled]
