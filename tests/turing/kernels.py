"""Triton kernels for the tests of the Turing stage: one 64x64 tile, and a loop over K in steps of 32."""

import triton
import triton.language as tl


@triton.jit
def matmul(a, b, c, K, OTHER: tl.constexpr, OUT: tl.constexpr):
    m, k = tl.arange(0, 64), tl.arange(0, 32)
    total = tl.zeros((64, 64), OUT)
    for start in range(0, K, 32):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :], mask=(start + k)[None, :] < K, other=OTHER)
        y = tl.load(b + (start + k)[:, None] * 64 + m[None, :], mask=(start + k)[:, None] < K)
        total = tl.dot(x, y, total, out_dtype=OUT)
    tl.store(c + m[:, None] * 64 + m[None, :], total)


@triton.jit
def two_dots(a, b, wide_a, wide_b, c, K, OUT: tl.constexpr):
    """One dot of a and b, one of wide_a and wide_b, in the same loop."""
    m, k = tl.arange(0, 64), tl.arange(0, 32)
    total = tl.zeros((64, 64), tl.float32)
    wide_total = tl.zeros((64, 64), OUT)
    for start in range(0, K, 32):
        left = m[:, None] * K + (start + k)[None, :]
        right = (start + k)[:, None] * 64 + m[None, :]
        total = tl.dot(tl.load(a + left), tl.load(b + right), total)
        wide_total = tl.dot(tl.load(wide_a + left), tl.load(wide_b + right), wide_total, out_dtype=OUT)
    tl.store(c + m[:, None] * 64 + m[None, :], total + wide_total.to(tl.float32))


@triton.jit
def writes(a, b, c, K, HOW: tl.constexpr):
    """A matmul whose loop also writes, through the pointer that it loads from."""
    m, k = tl.arange(0, 64), tl.arange(0, 32)
    total = tl.zeros((64, 64), tl.float32)
    for start in tl.range(0, K, 32, num_stages=3):
        left = a + m[:, None] * K + (start + k)[None, :]
        x = tl.load(left)
        y = tl.load(b + (start + k)[:, None] * 64 + m[None, :])
        total = tl.dot(x, y, total)
        if HOW == "store":
            tl.store(left + 32, x)
        elif HOW == "store under a condition":
            if start % 64 == 0:
                tl.store(left + 32, x)
        elif HOW == "atomic":
            tl.atomic_add(left + 32, x)
        elif HOW == "assembly":
            tl.inline_asm_elementwise("fence.sc.gpu; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        elif HOW == "barrier":
            tl.debug_barrier()
        elif HOW == "call":
            write(c, start)
    tl.store(c + m[:, None] * 64 + m[None, :], total)


@triton.jit(noinline=True)
def write(pointer, value):
    tl.store(pointer, value.to(tl.float32))


@triton.jit
def volatile(a, b, c, K):
    m, k = tl.arange(0, 64), tl.arange(0, 32)
    total = tl.zeros((64, 64), tl.float32)
    for start in range(0, K, 32):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :], volatile=True)
        total = tl.dot(x, tl.load(b + (start + k)[:, None] * 64 + m[None, :]), total)
    tl.store(c + m[:, None] * 64 + m[None, :], total)


@triton.jit
def flattened(a, b, c, K, N):
    """Two loops that Triton makes one of, so that the outer loop's store is in the pipelined one."""
    m, k = tl.arange(0, 64), tl.arange(0, 32)
    for n in tl.range(0, N, flatten=True):
        total = tl.zeros((64, 64), tl.float32)
        for start in range(0, K, 32):
            x = tl.load(a + m[:, None] * K + (start + k)[None, :])
            total = tl.dot(x, tl.load(b + (start + k)[:, None] * 64 + m[None, :]), total)
        tl.store(c + n * 4096 + m[:, None] * 64 + m[None, :], total)


@triton.jit
def stages_of_its_own(a, b, c, K, STAGES: tl.constexpr):
    m, k = tl.arange(0, 64), tl.arange(0, 32)
    total = tl.zeros((64, 64), tl.float32)
    for start in tl.range(0, K, 32, num_stages=STAGES):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :])
        total = tl.dot(x, tl.load(b + (start + k)[:, None] * 64 + m[None, :]), total)
    tl.store(c + m[:, None] * 64 + m[None, :], total)


@triton.jit
def cache_hints(a, b, c, K):
    m, k = tl.arange(0, 64), tl.arange(0, 32)
    total = tl.zeros((64, 64), tl.float32)
    for start in range(0, K, 32):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :], eviction_policy="evict_last")
        y = tl.load(b + (start + k)[:, None] * 64 + m[None, :], cache_modifier=".cg")
        total = tl.dot(x, y, total)
    tl.store(c + m[:, None] * 64 + m[None, :], total)


@triton.jit
def large_tiles(a, b, c, K, ROWS: tl.constexpr):
    """Its loop fits into 64 KB of shared memory at 128 rows only unpipelined: masked ones need a second buffer."""
    m, n, k = tl.arange(0, ROWS), tl.arange(0, 64), tl.arange(0, 128)
    total = tl.zeros((ROWS, 64), tl.float32)
    for start in range(0, K, 128):
        x = tl.load(a + m[:, None] * K + (start + k)[None, :], mask=(start + k)[None, :] < K, other=1)
        total = tl.dot(x, tl.load(b + (start + k)[:, None] * 64 + n[None, :]), total)
    tl.store(c + m[:, None] * 64 + n[None, :], total)


@triton.jit
def scale(a, b, c, K):
    """No dot at all."""
    i = tl.arange(0, 128)
    for start in tl.range(0, K, 128, num_stages=3):
        tl.store(c + start + i, tl.load(a + start + i) * tl.load(b + start + i))


@triton.jit
def batched(a, b, c):
    i = tl.arange(0, 4)[:, None, None] * 1024 + tl.arange(0, 32)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    tl.store(c + i, tl.dot(tl.load(a + i), tl.load(b + i)))


@triton.jit
def scaled(a, b, scales, c):
    m, k = tl.arange(0, 64), tl.arange(0, 64)
    x = tl.load(a + m[:, None] * 64 + k[None, :])
    y = tl.load(b + k[:, None] * 64 + m[None, :])
    s = tl.load(scales + m[:, None] * 2 + tl.arange(0, 2)[None, :])
    first = tl.dot_scaled(x, s, "e5m2", y, None, "fp16")
    second = tl.dot(y, y)
    tl.store(c + m[:, None] * 64 + m[None, :], first + second)


@triton.jit
def writes_between_loops(a, b, c, K, N):
    """What the inner loop loads first, the outer one has just written."""
    m, k = tl.arange(0, 64), tl.arange(0, 32)
    for n in range(N):
        first = a + m[:, None] * K + k[None, :]
        tl.store(first, (tl.load(first) * 2).to(tl.float16))
        tl.debug_barrier()
        total = tl.zeros((64, 64), tl.float32)
        for start in range(0, K, 32):
            x = tl.load(a + m[:, None] * K + (start + k)[None, :])
            total = tl.dot(x, tl.load(b + (start + k)[:, None] * 64 + m[None, :]), total)
        tl.store(c + n * 4096 + m[:, None] * 64 + m[None, :], total)
