"""What Triton asks its active driver, answered as on a machine with one Tesla T4."""

from collections.abc import Callable, Sequence

import torch
from triton.backends.compiler import GPUTarget

from tools.offline.compile import TARGET


class Driver:
    class utils:  # noqa: N801 - the name that Triton uses
        @staticmethod
        def get_device_properties(device: object) -> dict[str, int]:
            return {"max_shared_mem": 64 << 10, "max_num_regs": 65536, "multiprocessor_count": 40, "warpSize": 32}

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """Of Triton's autotuner: every configuration is called once, and all are equally fast."""

        def benchmark(
            call: Callable[[], object], *, quantiles: Sequence[float] = (0.5,), **options: object
        ) -> list[float]:
            call()
            return [1.0] * len(quantiles)

        return benchmark
