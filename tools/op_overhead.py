"""What an op costs that computes nothing: by torch.library.custom_op, and as compiled_fa/registration.py does it.

    python -m tools.op_overhead

Both with our ops' schema, in turns, on one thread: forward, and forward with gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.timing import compared
from compiled_fa import registration
from compiled_fa.ops import OPTIONS

SCHEMA = f"(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor out, Tensor lse)"


def _nothing(*arguments: Any) -> tuple[Tensor, Tensor]:
    q = arguments[0]
    return torch.empty_like(q), torch.empty_like(q)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.count = len(inputs)


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    return (*ctx.saved_tensors, *[None] * (ctx.count - 3))


def main() -> None:
    torch.set_num_threads(1)
    by_custom_op = torch.library.custom_op("compiled_fa_overhead::nothing", _nothing, mutates_args=(), schema=SCHEMA)
    by_custom_op.register_autograd(_differentiate, setup_context=_save)
    by_library = registration.define("nothing", SCHEMA, _nothing, _nothing)
    kernel = registration.differentiable(by_library, _nothing, _save, _differentiate)
    registration.register_autograd(by_library, kernel)
    for gradients in (False, True):
        q = torch.randn(1, 4, 2, 8, requires_grad=gradients)

        def call(op: Any, q: Tensor = q, gradients: bool = gradients) -> None:
            out, _ = op(q, q, q, None, False, -1, -1, 0.0, None, 0.0, None, "auto")
            if gradients:
                torch.autograd.grad(out, q, q.detach())

        runs: dict[str, Callable[[], object]] = {
            "ours": partial(call, by_library),
            "custom_op": partial(call, by_custom_op),
        }
        timings, ratios = compared(runs, q.device, 5.0, 0.01)
        times = ", ".join(f"{name} {timing.median * 1e6:.1f} us" for name, timing in timings.items())
        what = "with gradients" if gradients else "forward"
        print(f"{what}: {times}; ours / custom_op {ratios['custom_op'].median:.2f}")


if __name__ == "__main__":
    main()
