"""KV caches for tests: calls drawn at random, and what each must do, from attention recomputed in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from support import DTYPES, Case, check_against_float64
from torch import Tensor

from compiled_fa import flash_attn_with_kvcache
from compiled_fa.cache_call import CacheCall
from compiled_fa.problem import Options
from compiled_fa.rotary import apply_rotary_emb
from compiled_fa.testing import Inputs

NOBODY = 10**6  # a page that does not exist
STRIDES = ("contiguous", "k beside v", "heads first", "wider", "columns")


@dataclass(frozen=True)
class Call:
    """A call of flash_attn_with_kvcache. before: keys of each row, its leftpad's places among them.

    new: keys that are written; -1: none given. page_size: 0: not paged. spare: columns of the table that nobody needs.
    rotary: "", "neox" or "gptj".
    batch_idx: rows of the cache in any order. room: keys that they have room for beyond what they need.
    """

    before: tuple[int, ...] = (20, 3)
    queries: int = 1
    new: int = -1
    leftpad: tuple[int, ...] = ()
    page_size: int = 0
    spare: int = 1
    batch_idx: bool = False
    rotary: str = ""
    rotary_pairs: int = 2
    nheads_k: int = 2
    heads_per_key: int = 2
    head_dim: int = 8
    head_dim_v: int = 8
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softmax_scale: float | None = None
    softcap: float = 0.0
    slopes: str = "none"
    num_splits: int = 0
    strides: str = "contiguous"
    room: int = 3
    seed: int = 0

    @property
    def written(self) -> int:
        return max(self.new, 0)

    @property
    def lengths(self) -> list[int]:
        """Keys that queries may see."""
        pads = self.leftpad or (0,) * len(self.before)
        return [n + self.written - pad for n, pad in zip(self.before, pads, strict=True)]

    @property
    def case(self) -> Case:
        names = {field.name for field in fields(Case)} & {field.name for field in fields(Call)} - {"page_size"}
        lengths = tuple((self.queries, n) for n in self.lengths)
        return Case(lengths, **{name: getattr(self, name) for name in names})


def laid_out(x: Tensor, strides: str) -> Tensor:
    """Values of x with other strides."""
    if strides == "k beside v":
        return torch.stack([x, x], 2)[:, :, 1]
    if strides == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "wider":
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]
    if strides == "columns":
        return x.mT.contiguous().mT
    return x.contiguous()


@dataclass
class Made:
    """A call's tensors. arguments: of the function. where: page and row of each key, from the first of the cache's."""

    call: Call
    arguments: dict[str, Any]
    where: list[tuple[Tensor, Tensor]]
    alibi_slopes: Tensor | None

    @property
    def options(self) -> Options:
        call = self.call
        return Options(call.softmax_scale, call.causal, *call.window_size, call.softcap, self.alibi_slopes)

    @property
    def consecutive(self) -> bool:
        return self.call.causal or self.call.window_size != (-1, -1)

    def cache_call(self) -> CacheCall:
        tensors: dict[str, Any] = {name: self.arguments.get(name) for name in CacheCall._fields}
        return CacheCall(**tensors)

    def keys(self, cache: Tensor, row: int) -> Tensor:
        """Those that row's queries may see, (keys, heads, head_dim)."""
        page, at = self.where[row]
        pad = self.call.leftpad[row] if self.call.leftpad else 0
        stop = self.call.before[row] + self.call.written
        return cache[page[pad:stop], at[pad:stop]]


def make(call: Call) -> Made:
    """What is nobody's is NaN, and where a table has no page, it names none."""
    generator = torch.Generator().manual_seed(call.seed)
    batch, heads = len(call.before), call.nheads_k * call.heads_per_key
    needed = [n + call.written for n in call.before]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(call.dtype)

    arguments: dict[str, Any] = {"q": random(batch, call.queries, heads, call.head_dim)}
    if call.page_size:
        size, used = call.page_size, [-(-n // call.page_size) for n in needed]
        order = torch.randperm(sum(used) + 2, generator=generator).tolist()
        table = torch.full((batch, max(used) + call.spare), NOBODY, dtype=torch.int32)
        for row, pages in enumerate(used):
            for column in range(pages):
                table[row, column] = order.pop()
            if call.leftpad:  # pages before the first key need not exist
                table[row, : call.leftpad[row] // size] = NOBODY
        arguments["block_table"] = table
        count = sum(used) + 2
        where = []
        for row, n in enumerate(needed):
            key = torch.arange(n)
            where.append((table[row, key // size].long(), key % size))
    else:
        count, size = batch + 2 * call.batch_idx, max(needed) + call.room
        rows = torch.randperm(count, generator=generator)[:batch] if call.batch_idx else torch.arange(batch)
        if call.batch_idx:
            arguments["cache_batch_idx"] = rows.int()
        where = [(torch.full((n,), int(rows[row])), torch.arange(n)) for row, n in enumerate(needed)]
    for name, head_dim in (("k_cache", call.head_dim), ("v_cache", call.head_dim_v)):
        cache = torch.full((count, size, call.nheads_k, head_dim), torch.nan, dtype=call.dtype)
        for row, n in enumerate(call.before):
            pad = call.leftpad[row] if call.leftpad else 0
            page, at = (x[pad:n] for x in where[row])
            cache[page, at] = random(n - pad, call.nheads_k, head_dim)
        arguments[name] = laid_out(cache, call.strides)
    if call.new >= 0:
        arguments["k"] = random(batch, call.new, call.nheads_k, call.head_dim)
        arguments["v"] = random(batch, call.new, call.nheads_k, call.head_dim_v)
    if call.rotary and call.new >= 0:
        angle = torch.rand(max(needed) + call.queries + 1, call.rotary_pairs, generator=generator) * 6.3
        arguments |= {"rotary_cos": angle.cos().to(call.dtype), "rotary_sin": angle.sin().to(call.dtype)}
        arguments["rotary_interleaved"] = call.rotary == "gptj"
    arguments["cache_seqlens"] = torch.tensor(call.before, dtype=torch.int32)
    if call.leftpad:
        arguments["cache_leftpad"] = torch.tensor(call.leftpad, dtype=torch.int32)
    slopes = None
    if call.slopes != "none":
        slopes = torch.rand((heads,) if call.slopes == "heads" else (batch, heads), generator=generator)
    options = {"alibi_slopes": slopes, "num_splits": call.num_splits, "return_softmax_lse": True}
    for name in ("causal", "window_size", "softmax_scale", "softcap"):
        options[name] = getattr(call, name)
    return Made(call, arguments | options, where, slopes)


def check(made: Made, out: Tensor, lse: Tensor, before: dict[str, Tensor]) -> None:
    """out and lse of a call, and its caches, which `before` has as they were."""
    call, arguments = made.call, made.arguments
    q, new = arguments["q"], {"k_cache": arguments.get("k"), "v_cache": arguments.get("v")}
    if "rotary_cos" in arguments:
        table = arguments["rotary_cos"], arguments["rotary_sin"], call.rotary == "gptj"
        offsets = arguments["cache_seqlens"]
        new["k_cache"] = apply_rotary_emb(arguments["k"], *table, seqlen_offsets=offsets)
        if made.consecutive:
            q = apply_rotary_emb(q, *table, seqlen_offsets=offsets)
        else:  # as if all of them were heads of one token
            q = apply_rotary_emb(q.flatten(1, 2)[:, None], *table, seqlen_offsets=offsets).view(q.shape)
    for name, values in new.items():
        wanted = before[name].clone()
        if values is not None:
            for row, n in enumerate(call.before):
                page, at = (x[n : n + call.new] for x in made.where[row])
                wanted[page, at] = values[row]
        assert torch.equal(arguments[name].nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0)), f"{name} is not as wanted"
    rows = range(len(call.before))
    k, v = (torch.cat([made.keys(arguments[name], row) for row in rows]) for name in new)
    case = call.case
    slopes = made.alibi_slopes
    dout = torch.zeros(len(rows) * call.queries, case.nheads, call.head_dim_v, dtype=call.dtype)
    inputs = Inputs(case, q.flatten(0, 1), k, v, dout, alibi_slopes=slopes)
    assert out.dtype == call.dtype
    check_against_float64(inputs, {"out": out.flatten(0, 1), "lse": lse.transpose(0, 1).flatten(1)})


def run(made: Made) -> None:
    """The function, checked."""
    before = {name: made.arguments[name].clone() for name in ("k_cache", "v_cache")}
    out, lse = flash_attn_with_kvcache(**made.arguments)
    check(made, out, lse, before)


def small(**changes: Any) -> dict[str, Any]:
    """Arguments of two rows, all good, or with changes: a cache of 12 keys a row, 3 new ones behind 5 and 2."""
    torch.manual_seed(1)
    k_cache, v_cache = torch.randn(2, 2, 12, 2, 8).unbind(0)
    k, v = torch.randn(2, 2, 3, 2, 8).unbind(0)
    arguments = {"q": torch.randn(2, 3, 4, 8), "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    return arguments | {"cache_seqlens": torch.tensor([5, 2], dtype=torch.int32)} | changes


LENGTH = st.one_of(st.integers(0, 40), st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65]))
SIDE = st.one_of(st.just(-1), st.integers(0, 30))


@st.composite
def calls(draw: st.DrawFn, /, **wanted: Any) -> Call:
    """wanted: fields of the call that are given."""
    new, paged = draw(st.sampled_from([-1, 0, 1, 1, 2, 5, 11])), draw(st.booleans())
    before = tuple(draw(st.lists(LENGTH, min_size=1, max_size=3)))
    if draw(st.booleans()):
        before = before[:1] * len(before)
    leftpad = tuple(draw(st.integers(0, n)) for n in before) if draw(st.booleans()) else ()
    found = Call(
        before,
        draw(st.sampled_from([1, 1, 2, 3, 7])),
        new,
        leftpad,
        draw(st.sampled_from([1, 3, 8, 16, 32, 80])) if paged else 0,
        draw(st.integers(0, 1)),
        not paged and draw(st.booleans()),
        draw(st.sampled_from(["", "neox", "gptj"])),
        draw(st.integers(0, 4)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([8, 9, 16])),
        draw(st.sampled_from([1, 8, 24])),
        draw(DTYPES),
        draw(st.booleans()),
        draw(st.one_of(st.just((-1, -1)), st.tuples(SIDE, SIDE))),
        draw(st.sampled_from([None, 0.05, -0.3])),
        draw(st.sampled_from([0.0, 2.0])),
        draw(st.sampled_from(["none", "heads", "batch"])),
        draw(st.sampled_from([0, 0, 1, 3])),
        draw(st.sampled_from(STRIDES)),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 2**31)),
    )
    return replace(found, **wanted)
