"""What ranks.py has ranks find out about packages for sequence parallelism that import flash_attn, and find us.

ring-flash-attn and yunchang on two ranks, yunchang's hybrid on four, DeepSpeed's on two: out and gradients are full
attention's, in bf16 and fp16. Their files are as they are on PyPI.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import ranks
import torch
import torch.distributed as dist
from support import cumulative
from torch import Tensor

from compiled_fa import drop_in, flash_attn_func
from compiled_fa.testing.budget import budget, error

LENGTH, NHEADS, NHEADS_K, HEAD_DIM = 32, 4, 2, 16
LENGTHS = [8, 24]  # of packed sequences
DTYPES = (torch.bfloat16, torch.float16)
# To which dtypes a client rounds out, dq, dk and dv, where it is not their own: the plain rings' dq is always bf16.
EXACT = (None, None, None, None)
ROUNDED = (None, torch.bfloat16, None, None)
Cut = Callable[[Tensor], Tensor]  # this rank's rows of (1, LENGTH, ...)

NAMES: list[str] = []  # of all checks, whose packages are installed or not
PACKAGES = {
    "ring_flash_attn": ["ring_flash_attn"],
    "yunchang": ["yunchang"],
    "deepspeed": ["deepspeed.sequence.layer", "deepspeed.sequence.fpdt_layer"],
}


def check(function: Callable[[], None]) -> Callable[[], None]:
    """A check on ranks, if the package that its name begins with is installed."""
    NAMES.append(function.__name__)
    return ranks.check(function) if importlib.util.find_spec(package_of(function.__name__)) is not None else function


def package_of(name: str) -> str:
    return next(package for package in PACKAGES if name.startswith(package))


def prepare() -> None:
    """Before ranks are forked: imports what they will."""
    for package in {package_of(name) for name in ranks.names_in(__name__)}:
        for module in PACKAGES[package]:
            client(module)


@functools.cache
def client(name: str) -> Any:
    """A package, with us as flash_attn."""
    if "flash_attn" not in sys.modules:
        drop_in.install()
    if name.startswith("ring_flash_attn"):
        # Its adapter for transformers imports what only versions before 5 have; the package imports the adapter.
        adapter: Any = types.ModuleType("ring_flash_attn.adapters")
        adapter.substitute_hf_flash_attn = adapter.update_ring_flash_attn_params = None
        sys.modules.setdefault(adapter.__name__, adapter)
    return importlib.import_module(name)


@functools.cache
def pair() -> Any:
    """This rank's group of two."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return groups[dist.get_rank() // 2]


def chunk(x: Tensor, rank: int, ranks: int) -> Tensor:
    return x.chunk(ranks, dim=1)[rank]


def zigzag(x: Tensor, rank: int, ranks: int) -> Tensor:
    chunks = x.chunk(2 * ranks, dim=1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim=1)


def stripe(x: Tensor, rank: int, ranks: int) -> Tensor:
    return x[:, rank::ranks]


def of_each(cut: Callable[..., Tensor], x: Tensor, *of_rank: int) -> Tensor:
    """A rank's part of each packed sequence."""
    return torch.cat([cut(sequence, *of_rank) for sequence in x.split(LENGTHS, dim=1)], dim=1)


def on_two(cut: Callable[..., Tensor]) -> Cut:
    return lambda x: cut(x, dist.get_rank(pair()), 2)


def inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dout: (1, LENGTH, heads, HEAD_DIM)."""
    heads = NHEADS, NHEADS_K, NHEADS_K, NHEADS
    return [torch.randn(1, LENGTH, count, HEAD_DIM).to(dtype) for count in heads]


def gradients(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """out, dq, dk, dv."""
    *qkv, dout = tensors
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = function(*leaves)
    out = out if isinstance(out, Tensor) else out[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def naive(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Sequence[int]) -> Tensor:
    q, k, v = (x[0].transpose(0, 1).repeat_interleave(NHEADS // x.shape[2], dim=0) for x in (q, k, v))
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = sequence[:, None] == sequence
    scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(~(seen.tril() if causal else seen), -torch.inf)
    out: Tensor = (scores.softmax(-1) @ v).transpose(0, 1)[None]
    return out


def agrees(
    function: Callable[..., Any],
    cut: Cut,
    causal: bool = True,
    lengths: Sequence[int] = (LENGTH,),
    rounded: Sequence[torch.dtype | None] = EXACT,
) -> None:
    """function on parts gives the parts of full attention's out and gradients, within the error budget of its dtype;
    rounded: to which dtype the client rounds each, where it is not its own."""
    for dtype in DTYPES:
        whole = inputs(dtype)
        full = functools.partial(naive, causal=causal, lengths=lengths)
        exact, in_dtype = gradients(full, [x.double() for x in whole]), gradients(full, whole)
        found = gradients(function, [cut(x) for x in whole])
        for mine, right, theirs, coarser in zip(found, exact, in_dtype, rounded, strict=True):
            reference = cut(right)
            allowed = budget(theirs, right, float(right.abs().max()))
            if coarser is not None:
                allowed += torch.finfo(coarser).eps * float(right.abs().max())
            assert error(mine.double(), reference) <= allowed, (dtype, error(mine.double(), reference), allowed)


# ring-flash-attn


@check
def ring_flash_attn_ring() -> None:
    function = client("ring_flash_attn").ring_flash_attn_func
    for causal in (True, False):
        agrees(functools.partial(function, causal=causal, group=pair()), on_two(chunk), causal, rounded=ROUNDED)


@check
def ring_flash_attn_zigzag() -> None:
    function = client("ring_flash_attn").zigzag_ring_flash_attn_func
    agrees(functools.partial(function, causal=True, group=pair()), on_two(zigzag))


@check
def ring_flash_attn_stripe() -> None:
    function = client("ring_flash_attn").stripe_flash_attn_func
    agrees(functools.partial(function, causal=True, group=pair()), on_two(stripe))


@check
def ring_flash_attn_packed() -> None:
    package = client("ring_flash_attn")
    local = cumulative([length // 2 for length in LENGTHS])
    functions = (package.ring_flash_attn_varlen_func, chunk), (package.zigzag_ring_flash_attn_varlen_func, zigzag)
    for function, cut in functions:

        def attend(q: Tensor, k: Tensor, v: Tensor, function: Any = function) -> Tensor:
            rows = q[0], k[0], v[0]
            out: Tensor = function(*rows, local, max(LENGTHS) // 2, causal=True, group=pair())
            return out[None]

        rounded = ROUNDED if cut is chunk else EXACT
        agrees(attend, on_two(functools.partial(of_each, cut)), lengths=LENGTHS, rounded=rounded)


@check
def ring_flash_attn_llama3() -> None:
    package = client("ring_flash_attn")
    for causal in (True, False):
        sums = cumulative(LENGTHS)
        *lengths, keys = package.llama3_flash_attn_prepare_cu_seqlens(sums, causal, dist.get_rank(pair()), 2)

        def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Any = lengths, causal: bool = causal, keys: Any = keys):
            rows, options = (q[0], k[0], v[0]), {"heads_k_stride": 1, "local_k_slice": keys, "group": pair()}
            return package.llama3_flash_attn_varlen_func(*rows, *lengths, causal=causal, **options)[None]

        agrees(attend, on_two(chunk), causal, LENGTHS)


# yunchang


@check
def yunchang_ulysses() -> None:
    layer = client("yunchang").UlyssesAttention(pair())
    for causal in (True, False):
        agrees(functools.partial(layer, causal=causal), on_two(chunk), causal)


@check
def yunchang_rings_and_hybrids() -> None:
    """Ring of two, or of two by Ulysses of two; by each way to cut a sequence."""
    package = client("yunchang")
    rank = dist.get_rank()
    for ulysses, ring in ((1, 2), (2, 2)):
        package.set_seq_parallel_pg(ulysses, ring, rank, dist.get_world_size())
        for way in ("basic", "zigzag", "strip"):
            cut = functools.partial(
                package.EXTRACT_FUNC_DICT[way],
                rank=rank % (ring * ulysses),
                world_size=ring * ulysses,
                rd=ring,
                ud=ulysses,
            )
            layer = package.LongContextAttention(ring_impl_type=way)
            agrees(functools.partial(layer, causal=True), cut, rounded=ROUNDED if way == "basic" else EXACT)


# DeepSpeed


@functools.cache
def deepspeed(name: str) -> Any:
    """A module of DeepSpeed, which wraps the ranks that there are."""
    module = client(f"deepspeed.sequence.{name}")
    client("deepspeed").init_distributed("gloo", dist_init_required=False, verbose=False)
    return module


@check
def deepspeed_distributed_attention() -> None:
    layer = deepspeed("layer").DistributedAttention(flash_attn_func, pair(), scatter_idx=2, gather_idx=1)
    for causal in (True, False):
        agrees(lambda q, k, v, causal=causal: layer(q, k, v, 0, causal=causal), on_two(chunk), causal)


@check
def deepspeed_fpdt() -> None:
    """A layer with its projection of q, k and v, in chunks of 8: rank r has every other one, from the r-th on."""
    width, size = NHEADS * HEAD_DIM, 8
    config = types.SimpleNamespace(
        kv_channels=HEAD_DIM,
        num_attention_heads=NHEADS,
        num_key_value_heads=NHEADS,
        hidden_size=width,
        attention_dropout=0.0,
    )

    def cut(x: Tensor) -> Tensor:
        """x: (LENGTH, 1, width), or (1, LENGTH, ...)."""
        dim = x.shape.index(LENGTH)
        return torch.cat(x.split(size // 2, dim)[dist.get_rank(pair()) :: 2], dim)

    def whole(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = (x[:, 0] @ weight.t()).unflatten(-1, (3, 1, NHEADS, HEAD_DIM)).unbind(1)
        return naive(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), True, [LENGTH]).flatten(2)

    for dtype in DTYPES:
        rows, weight = torch.randn(LENGTH, 1, width).to(dtype), (torch.randn(3 * width, width) / width**0.5).to(dtype)
        dout, nothing, identity = (
            torch.randn(1, LENGTH, width).to(dtype),
            weight.new_zeros(1),
            torch.eye(width).to(dtype),
        )
        layer = deepspeed("fpdt_layer").FPDT_Attention(
            config, weight, nothing.expand(3 * width), identity, nothing, pair(), chunk_size=size
        )

        def ours(x: Tensor, layer: Any = layer) -> Tensor:
            out: Tensor = layer(x, None, None, None, cpu_offloading=False)[0].transpose(0, 1)
            return out

        found = gradients(ours, [cut(rows), cut(dout)])
        in_dtype = gradients(lambda x, weight=weight: whole(x, weight), [rows, dout])
        exact = gradients(lambda x, weight=weight: whole(x, weight.double()), [rows.double(), dout.double()])
        for mine, right, theirs in zip(found, exact, in_dtype, strict=True):
            assert error(mine.double(), cut(right)) <= budget(theirs, right, float(right.abs().max())), dtype
