"""The fused engine's kernels, traced and lowered as the engine does it, compiled for sm_75."""

from unittest import mock

from compiled_fa.engines.fused.flex import Spec
from compiled_fa.inductor import graphs
from tools.offline import fake_t4
from tools.offline.compile import Compiled, KernelSource, compile_source

# Inductor's pattern matcher and constant folding run on real tensors of the device.
_CONFIG = {
    "force_disable_caches": True,
    "compile_threads": 1,
    "pattern_matcher": False,
    "joint_graph_constant_folding": False,
}


class _Unlaunched:
    """In place of a compiled kernel in the wrapper code that Inductor generates."""

    def run(self, *args: object, **kwargs: object) -> None: ...


def capture(spec: Spec) -> KernelSource:
    """The attention kernel that Inductor writes for this spec on a T4. Call it in a process of its own."""
    fake_t4.install()
    import torch._inductor.async_compile as async_compile

    sources: dict[str, str] = {}

    def triton(compiler: object, name: str, source: str, device_str: str = "cuda") -> _Unlaunched:
        sources[name] = source
        return _Unlaunched()

    with mock.patch.object(async_compile.AsyncCompile, "triton", triton):
        graphs.compile_graph(spec.graph(), lambda size: spec.example_inputs("cuda", size), dict(_CONFIG))
    # Beside it are pointwise kernels: lse's change of base, delta's.
    (kernel,) = (KernelSource(name, text) for name, text in sources.items() if name.startswith("triton_tem"))
    return kernel


def compile_spec(spec: Spec, *, turing: bool) -> Compiled:
    """The attention kernel of a spec, by stock Triton or with the project's stage; see capture()."""
    return compile_source(capture(spec), turing=turing)
