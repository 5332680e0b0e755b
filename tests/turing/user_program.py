"""A program as somebody else would have it: an autotuned matmul, a kernel without dots, on "cuda", and a check."""

import sys

import torch
import triton
import triton.language as tl


@triton.autotune([triton.Config({"BLOCK": 16}, num_warps=1), triton.Config({"BLOCK": 32}, num_warps=2)], key=["depth"])
@triton.jit
def matmul(a, b, c, depth, BLOCK: tl.constexpr, OUT: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, 16)
    total = tl.zeros((BLOCK, BLOCK), OUT)
    for start in range(0, depth, 16):
        x = tl.load(a + i[:, None] * depth + start + k[None, :])
        total = tl.dot(x, tl.load(b + (start + k)[:, None] * 32 + i[None, :]), total, out_dtype=OUT)
    tl.store(c + i[:, None] * 32 + i[None, :], total)


@triton.jit
def doubled(x, size):
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(x + at, tl.load(x + at, mask=at < size) * 2, mask=at < size)


def main() -> None:
    torch.manual_seed(0)
    a, b = torch.ones(32, 64, device="cuda", dtype=torch.float16), torch.ones(64, 32).cuda().half()
    assert a.is_cuda
    assert a.device.type == "cuda"
    c = torch.zeros(32, 32, device=a.device)
    for _ in range(2):
        matmul[(1,)](a, b, c, 64, OUT=tl.float32)
    x = torch.ones(100, device=torch.device("cuda", 0))
    doubled[(2,)](x, 100)
    torch.cuda.synchronize()
    print(*sys.argv[1:])
    assert c.sum() == 64 * 32 * 32, "wrong"


if __name__ == "__main__":
    main()
