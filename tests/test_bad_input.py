"""Wrong arguments: each a ValueError or TypeError that names the argument, what came and what is wanted.

Before anything is computed or written: no engine is reached, no random number is drawn, no tensor changes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import cumulative
from trap import ReachedAnEngineError, before_engines

from compiled_fa import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    ops,
)

HALF, META = torch.float16, "meta"
NAN, INF = float("nan"), float("inf")


def rows(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class Layout:
    """A function with arguments that are good, and the ops below it. of_q, of_k: dimensions before the heads."""

    name: str
    function: Callable[..., Any]
    good: dict[str, Any]
    dims_q: str
    dims_k: str
    of_q: tuple[int, ...]
    of_k: tuple[int, ...]
    op: Callable[..., Any]
    backward: Callable[..., Any] | None

    def q(self, nheads=4, head_dim=16, **options):
        return rows(*self.of_q, nheads, head_dim, **options)

    def k(self, nheads=2, head_dim=16, **options):
        return rows(*self.of_k, nheads, head_dim, **options)


PACKING = {
    "cu_seqlens_q": cumulative([3, 5]),
    "cu_seqlens_k": cumulative([2, 4]),
    "max_seqlen_q": 5,
    "max_seqlen_k": 4,
}
DENSE = Layout(
    "dense",
    flash_attn_func,
    {"q": rows(2, 8, 4, 16), "k": rows(2, 6, 2, 16), "v": rows(2, 6, 2, 16)},
    "batch, seqlen_q, nheads, head_dim",
    "batch, seqlen_k, nheads_k, head_dim",
    (2, 8),
    (2, 6),
    ops.attention,
    ops.attention_backward,
)
VARLEN = Layout(
    "varlen",
    flash_attn_varlen_func,
    {"q": rows(8, 4, 16), "k": rows(6, 2, 16), "v": rows(6, 2, 16), **PACKING},
    "total_q, nheads, head_dim",
    "total_k, nheads_k, head_dim",
    (8,),
    (6,),
    ops.varlen_attention,
    ops.varlen_attention_backward,
)
TABLE = torch.zeros(2, 2, dtype=torch.int32)
PAGED = Layout(
    "paged",
    flash_attn_varlen_func,
    {"q": rows(8, 4, 16), "k": rows(4, 3, 2, 16), "v": rows(4, 3, 2, 16), **PACKING, "block_table": TABLE},
    "total_q, nheads, head_dim",
    "num_blocks, block_size, nheads_k, head_dim",
    (8,),
    (4, 3),
    ops.varlen_attention,
    None,
)
LAYOUTS = (DENSE, VARLEN, PAGED)

Row = tuple[dict[str, Any], type[Exception], str]  # bad arguments, in place of good ones; the error; its message


def everywhere(at: Layout) -> list[Row]:
    """Whatever the layout, in functions and ops alike."""
    of_k, slopes = at.of_k, "alibi_slopes must be of shape (nheads,) = (4,) or (batch, nheads) = (2, 4), got"
    return [
        ({"q": rows(*at.of_q, 16)}, ValueError, f"q must be ({at.dims_q}), got shape {(*at.of_q, 16)}"),
        ({"k": rows(*of_k, 32)}, ValueError, f"k must be ({at.dims_k}), got shape {(*of_k, 32)}"),
        ({"v": rows(1, *of_k, 2, 16)}, ValueError, f"v must be ({at.dims_k}), got shape {(1, *of_k, 2, 16)}"),
        ({"q": at.q(dtype=torch.int64)}, TypeError, "q must be float16, bfloat16, float32 or float64, got torch.int64"),
        ({"k": at.k(dtype=HALF)}, TypeError, "k must be of q's dtype, torch.float32, got torch.float16"),
        ({"v": at.k(dtype=HALF)}, TypeError, "v must be of q's dtype, torch.float32, got torch.float16"),
        ({"k": at.k(device=META)}, ValueError, "k must be on q's device, cpu, got meta"),
        ({"v": at.k(device=META)}, ValueError, "v must be on q's device, cpu, got meta"),
        ({"k": at.k(head_dim=8)}, ValueError, "k must be of q's head_dim, 16, got 8"),
        ({"v": rows(of_k[0], *(n - 1 for n in of_k[1:]), 2, 16) if of_k[1:] else rows(5, 2, 16)}, ValueError,
         f"v must be of k's shape up to head_dim, {(*of_k, 2)}, got"),
        ({"v": at.k(nheads=1)}, ValueError, f"v must be of k's shape up to head_dim, {(*of_k, 2)}, got {(*of_k, 1)}"),
        ({"k": at.k(nheads=3), "v": at.k(nheads=3)}, ValueError, "k must be of a number of heads that divides q's 4, got 3"),
        ({"k": at.k(nheads=8), "v": at.k(nheads=8)}, ValueError, "k must be of a number of heads that divides q's 4, got 8"),
        ({"k": at.k(nheads=0), "v": at.k(nheads=0)}, ValueError, "k must be of a number of heads that divides q's 4, got 0"),
        ({"q": at.q(nheads=0)}, ValueError, "k must be of a number of heads that divides q's 0, got 2"),
        ({"q": at.q(head_dim=0), "k": at.k(head_dim=0)}, ValueError, "q must be of a head_dim from 1 to 512, got 0"),
        ({"q": at.q(head_dim=513), "k": at.k(head_dim=513)}, ValueError, "q must be of a head_dim from 1 to 512, got 513"),
        ({"v": at.k(head_dim=0)}, ValueError, "v must be of a head_dim from 1 to 512, got 0"),
        ({"v": at.k(head_dim=600)}, ValueError, "v must be of a head_dim from 1 to 512, got 600"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0 and below 1, got -0.1"),
        ({"dropout_p": NAN}, ValueError, "dropout_p must be at least 0 and below 1, got nan"),
        ({"softmax_scale": INF}, ValueError, "softmax_scale must be finite, got inf"),
        ({"softmax_scale": NAN}, ValueError, "softmax_scale must be finite, got nan"),
        ({"softcap": -1.0}, ValueError, "softcap must be finite and at least 0 (0: none), got -1.0"),
        ({"softcap": INF}, ValueError, "softcap must be finite and at least 0 (0: none), got inf"),
        ({"softcap": NAN}, ValueError, "softcap must be finite and at least 0 (0: none), got nan"),
        ({"window_size": (-2, 3)}, ValueError, "window_size[0] must be -1 (unbounded) or at least 0, got -2"),
        ({"window_size": (3, -7)}, ValueError, "window_size[1] must be -1 (unbounded) or at least 0, got -7"),
        ({"alibi_slopes": rows(3)}, ValueError, f"{slopes} (3,)"),
        ({"alibi_slopes": rows(3, 4)}, ValueError, f"{slopes} (3, 4)"),
        ({"alibi_slopes": rows(2)}, ValueError, f"{slopes} (2,)"),
        ({"alibi_slopes": rows(4, dtype=HALF)}, TypeError, "alibi_slopes must be of dtype float32, got torch.float16"),
        ({"alibi_slopes": rows(4, device=META)}, ValueError, "alibi_slopes must be on q's device, cpu, got meta"),
    ]  # fmt: skip


def of_the_batch(at: Layout) -> list[Row]:
    return [
        ({"k": rows(3, 6, 2, 16), "v": rows(3, 6, 2, 16)}, ValueError, "k must be of q's batch, 2, got 3"),
    ]


def of_the_packing(at: Layout) -> list[Row]:
    found: list[Row] = []
    for side, lengths, total in (("q", (3, 5), 8), ("k", (2, 4), 6)):
        name, longest, good = f"cu_seqlens_{side}", f"max_seqlen_{side}", cumulative(lengths)
        one_too_few = cumulative([lengths[0], lengths[1] - 1])
        found += [
            ({name: good.long()}, TypeError, f"{name} must be of dtype int32, got torch.int64"),
            ({name: good.float()}, TypeError, f"{name} must be of dtype int32, got torch.float32"),
            ({name: good[None]}, ValueError, f"{name} must be (batch + 1), got shape (1, 3)"),
            ({name: good.to(META)}, ValueError, f"{name} must be on q's device, cpu, got meta"),
            ({name: good[:0]}, ValueError, f"{name} must be of batch + 1 elements, got none"),
            ({name: good + 1}, ValueError, f"{name} must be 0 at its beginning, got 1"),
            ({name: cumulative([total + 1, -1]), longest: 9}, ValueError,
             f"{name} must be not decreasing, got {total + 1} before {total} at 1"),
            ({longest: lengths[1] - 1}, ValueError,
             f"{longest} must be at least the longest length in {name}, {lengths[1]}, got {lengths[1] - 1}"),
            ({longest: -1}, ValueError, f"{longest} must be at least 0, got -1"),
        ]  # fmt: skip
        if side == "q" or at is VARLEN:
            found.append(({name: one_too_few}, ValueError, f"{name} must be {side}'s total, {total}, at its end, got"))
    return [
        *found,
        ({"cu_seqlens_k": cumulative([2, 2, 2])}, ValueError, "cu_seqlens_k must be of as many elements as cu_seqlens_q, 3, got 4"),
        ({"cu_seqlens_k": cumulative([6])}, ValueError, "cu_seqlens_k must be of as many elements as cu_seqlens_q, 3, got 2"),
    ]  # fmt: skip


def of_the_pages(at: Layout) -> list[Row]:
    int32: dict[str, Any] = {"dtype": torch.int32}
    last = torch.tensor([[0, 0], [0, -1]], **int32)
    return [
        ({"block_table": rows(2, 2)}, TypeError, "block_table must be of dtype int32, got torch.float32"),
        ({"block_table": rows(4, **int32)}, ValueError, "block_table must be (batch, max_num_blocks_per_seq), got shape (4,)"),
        ({"block_table": rows(2, 2, device=META, **int32)}, ValueError, "block_table must be on q's device, cpu, got meta"),
        ({"block_table": rows(3, 2, **int32)}, ValueError, "block_table must be of one row a sequence, 2, got 3"),
        ({"block_table": rows(2, 1, **int32)}, ValueError, "block_table must be of enough blocks of 3 for 4 keys, got 1"),
        ({"block_table": rows(2, 0, **int32)}, ValueError, "block_table must be of enough blocks of 3 for 4 keys, got 0"),
        ({"block_table": TABLE + 4}, ValueError, "block_table must be block numbers from 0 to 3, got 4 to 4"),
        ({"block_table": last}, ValueError, "block_table must be block numbers from 0 to 3, got -1 to 0"),
    ]  # fmt: skip


def of_functions(at: Layout) -> list[Row]:
    """What the schema of an op refuses in words of its own."""
    pair = "window_size must be two integers, (left, right), got"
    found: list[Row] = [
        ({name: [[1.0]]}, TypeError, f"{name} must be a tensor, got list") for name in ("q", "k", "v", "alibi_slopes")
    ]
    found += [
        ({"window_size": (3,)}, ValueError, f"{pair} (3,)"),
        ({"window_size": torch.tensor([1, 2, 3])}, ValueError, f"{pair} tensor([1, 2, 3])"),
        ({"window_size": 3}, TypeError, f"{pair} 3"),
        ({"window_size": (1.5, 2)}, TypeError, f"{pair} (1.5, 2)"),
    ]
    for side in ("q", "k") if at is not DENSE else ():
        name, longest = f"cu_seqlens_{side}", f"max_seqlen_{side}"
        one = f"{longest} must be an int or a tensor of one element, got"
        found += [
            ({name: [0, 3, 8]}, TypeError, f"{name} must be a tensor, got list"),
            ({longest: "4"}, TypeError, f"{one} '4'"),
            ({longest: 5.0}, TypeError, f"{one} 5.0"),
            ({longest: True}, TypeError, f"{one} True"),
            ({longest: torch.tensor([5, 5])}, ValueError, f"{one} shape (2,)"),
        ]
    return found


def of_ops(at: Layout) -> list[Row]:
    half, seed = {"dropout_p": 0.5}, torch.tensor([1])
    return [
        (half, ValueError, "dropout_seed must be an int64 tensor of one element where dropout_p > 0, got None"),
        ({**half, "dropout_seed": seed.int()}, TypeError, "dropout_seed must be of dtype int64, got torch.int32"),
        ({**half, "dropout_seed": seed.expand(2)}, ValueError, "dropout_seed must be of one element, got shape (2,)"),
        ({**half, "dropout_seed": seed.to(META)}, ValueError, "dropout_seed must be on q's device, cpu, got meta"),
        ({"engine": "quick"}, ValueError, "engine must be one of ['auto', "),
    ]


def of_backward(at: Layout) -> list[Row]:
    out, lse = results(at)
    shape, per_row = tuple(out.shape), tuple(lse.shape)
    return [
        ({"dout": out[..., :8]}, ValueError, f"dout must be of shape {shape}, got {(*shape[:-1], 8)}"),
        ({"dout": out.half()}, TypeError, "dout must be of q's dtype, torch.float32, got torch.float16"),
        ({"out": out[:1]}, ValueError, f"out must be of shape {shape}, got {(1, *shape[1:])}"),
        ({"out": out.half()}, TypeError, "out must be of q's dtype, torch.float32, got torch.float16"),
        ({"lse": lse.mT}, ValueError, f"lse must be of shape {per_row}, got {tuple(lse.mT.shape)}"),
        ({"dlse": lse.mT}, ValueError, f"dlse must be of shape {per_row}, got {tuple(lse.mT.shape)}"),
    ]


PACKED: list[tuple[Any, dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (flash_attn_kvpacked_func, {"q": DENSE.q()}, {"kv": rows(2, 6, 3, 2, 16)}, ValueError,
     "kv must be (batch, seqlen_k, 2, nheads_k, head_dim), got shape (2, 6, 3, 2, 16)"),
    (flash_attn_kvpacked_func, {"q": DENSE.q()}, {"kv": 7}, TypeError, "kv must be a tensor (batch, seqlen_k, 2, nheads_k, head_dim), got int"),
    (flash_attn_qkvpacked_func, {}, {"qkv": rows(2, 6, 2, 16)}, ValueError,
     "qkv must be (batch, seqlen, 3, nheads, head_dim), got shape (2, 6, 2, 16)"),
    (flash_attn_qkvpacked_func, {}, {"qkv": rows(2, 6, 2, 4, 16)}, ValueError,
     "qkv must be (batch, seqlen, 3, nheads, head_dim), got shape (2, 6, 2, 4, 16)"),
    (flash_attn_qkvpacked_func, {}, {"qkv": 7}, TypeError, "qkv must be a tensor (batch, seqlen, 3, nheads, head_dim), got int"),
    (flash_attn_varlen_kvpacked_func, {"q": VARLEN.q(), **PACKING}, {"kv": rows(6, 3, 2, 16)}, ValueError,
     "kv must be (total_k, 2, nheads_k, head_dim), got shape (6, 3, 2, 16)"),
    (flash_attn_varlen_kvpacked_func, {"q": VARLEN.q(), **PACKING}, {"kv": 7}, TypeError,
     "kv must be a tensor (total_k, 2, nheads_k, head_dim), got int"),
    (flash_attn_varlen_qkvpacked_func, {"cu_seqlens": cumulative([3]), "max_seqlen": 3}, {"qkv": rows(3, 2, 16)}, ValueError,
     "qkv must be (total, 3, nheads, head_dim), got shape (3, 2, 16)"),
    (flash_attn_varlen_qkvpacked_func, {"cu_seqlens": cumulative([3]), "max_seqlen": 3}, {"qkv": rows(3, 2, 4, 16)}, ValueError,
     "qkv must be (total, 3, nheads, head_dim), got shape (3, 2, 4, 16)"),
    (flash_attn_varlen_qkvpacked_func, {"cu_seqlens": cumulative([3]), "max_seqlen": 3}, {"qkv": 7}, TypeError,
     "qkv must be a tensor (total, 3, nheads, head_dim), got int"),
]  # fmt: skip


@functools.cache
def results(at: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, as good as any for arguments that are refused."""
    out = at.q()
    return out, torch.zeros(*at.of_q[:-1], 4, at.of_q[-1])


def to_op(arguments: dict[str, Any]) -> dict[str, Any]:
    left, right = arguments.pop("window_size", (-1, -1))
    return {**arguments, "window_left": left, "window_right": right}


def forward_op(at: Layout) -> Callable[..., Any]:
    return lambda **arguments: at.op(**to_op(arguments))


def backward_op(at: Layout) -> Callable[..., Any]:
    backward = at.backward
    assert backward is not None

    def call(**arguments):
        out, lse = results(at)
        return backward(**{"dout": out, "dlse": None, "out": out, "lse": lse, **to_op(arguments)})

    return call


def matrix() -> list[Any]:
    """Function or op, good arguments, bad ones, error, message."""
    found: list[tuple[str, Any, Any, dict[str, Any], type[Exception], str]] = [("packed", *row) for row in PACKED]
    for at in LAYOUTS:
        common = everywhere(at) + (of_the_batch(at) if at is DENSE else of_the_packing(at))
        common += of_the_pages(at) if at is PAGED else []
        callers = [("function", at.function, of_functions(at)), ("op", forward_op(at), of_ops(at))]
        if at.backward is not None:
            callers.append(("backward op", backward_op(at), of_ops(at) + of_backward(at)))
        for name, caller, more in callers:
            found += [(f"{at.name} {name}", caller, at.good, *row) for row in common + more]
    return [
        pytest.param(caller, good, bad, *wanted, id=f"{name}-{'+'.join(bad)}-{number}")
        for number, (name, caller, good, bad, *wanted) in enumerate(found)
    ]


def written(tensors: dict[str, torch.Tensor]) -> list[Any]:
    """What shows that something was written: versions, and bits."""
    return [(x._version, None if x.is_meta else x.clone()) for x in tensors.values()]


@pytest.mark.parametrize(("function", "good", "bad", "error", "message"), matrix())
def test_refused_before_anything_is_computed(function, good, bad, error, message):
    arguments = {**good, **bad}
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    before, generator = written(tensors), torch.random.get_rng_state()
    with before_engines(), pytest.raises(error) as refusal:
        function(**arguments)
    assert message in str(refusal.value)
    assert torch.equal(torch.random.get_rng_state(), generator)
    for (version, x), (version_after, after) in zip(before, written(tensors), strict=True):
        assert version == version_after
        assert x is None or torch.equal(x, after)


GOOD = {
    "kvpacked": (flash_attn_kvpacked_func, {"q": DENSE.q(), "kv": rows(2, 6, 2, 2, 16)}),
    "qkvpacked": (flash_attn_qkvpacked_func, {"qkv": rows(2, 6, 3, 2, 16)}),
    "varlen kvpacked": (flash_attn_varlen_kvpacked_func, {"q": VARLEN.q(), "kv": rows(6, 2, 2, 16), **PACKING}),
    "varlen qkvpacked": (
        flash_attn_varlen_qkvpacked_func,
        {"qkv": rows(3, 3, 2, 16), "cu_seqlens": cumulative([3]), "max_seqlen": 3},
    ),
    **{at.name: (at.function, at.good) for at in LAYOUTS},
    **{f"{at.name} op": (forward_op(at), at.good) for at in LAYOUTS},
    **{f"{at.name} backward op": (backward_op(at), at.good) for at in LAYOUTS[:2]},
}


@pytest.mark.parametrize(("function", "good"), GOOD.values(), ids=GOOD)
def test_good_arguments_are_good_and_reach_an_engine(function, good):
    """Without this, what is refused above might be refused for another reason, and the trap trap nothing."""
    function(**good)
    with before_engines(), pytest.raises(ReachedAnEngineError):
        function(**good)


def test_paged_keys_have_no_backward():
    backward, (out, lse) = ops.varlen_attention_backward, results(PAGED)
    with before_engines(), pytest.raises(RuntimeError, match="attention with a block_table is forward only"):
        backward(out, None, out, lse, **PAGED.good)


@pytest.mark.parametrize("at", LAYOUTS[:2], ids=lambda at: at.name)
def test_fake_kernels_refuse_too(at):
    """As in a graph that is being made, whose tensors have no values."""
    good = {name: x.to(META) if isinstance(x, torch.Tensor) else x for name, x in at.good.items()}
    out, lse = (x.to(META) for x in results(at))
    with pytest.raises(ValueError, match="k must be of q's head_dim, 16, got 8"):
        at.op(**{**good, "k": at.k(head_dim=8, device=META)})
    with pytest.raises(ValueError, match="lse must be of shape"):
        at.backward(out, None, out, lse.mT, **good)
    assert at.op(**good)[0].shape == at.backward(out, None, out, lse, **good)[0].shape == at.q().shape
