"""A synthetic service of a model's attention: requests arrive, are prefilled, decode together, and leave.

Tokens per second of flash_attn_with_kvcache on pages, which are freed and used again, and of SDPA on padded rows.

An iteration admits the requests that have arrived while there are rows for them, each with its prompt's attention, and
then decodes a token of every row that runs. All the servers see the same tokens. A model's layers ask for the same
lengths and pages, each on a cache of its own: so do the LAYERS here, and both servers make once an iteration what
layers share.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from compiled_fa import flash_attn_with_kvcache
from compiled_fa.testing.budget import Expected
from compiled_fa.testing.naive import naive_attention

from .cases import SHORT_DTYPES
from .parity import PEER_SLACK
from .timing import Timing, interleaved

HEAD_DIM, NHEADS_K, HEADS_PER_KEY, LAYERS = 64, 4, 4, 4


@dataclass(frozen=True)
class Request:
    """arrival: the iteration from which on it waits. prompt, output: tokens."""

    arrival: int
    prompt: int
    output: int

    @property
    def tokens(self) -> int:
        return self.prompt + self.output


@dataclass(frozen=True)
class Workload:
    """rows: requests that run at once, at most."""

    requests: tuple[Request, ...]
    rows: int
    page_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, quick: bool, dtype: torch.dtype, seed: int = 0) -> Workload:
        """24 requests, of 64 to 768 tokens and 16 to 128 more, on 8 rows; on average one every 8 iterations."""
        drawn, arrival, requests = random.Random(seed), 0.0, []
        for _ in range(5 if quick else 24):
            arrival += drawn.expovariate(1 / 2 if quick else 1 / 8)
            prompt, output = (3, 20), (2, 6)
            if not quick:
                prompt, output = (64, 768), (16, 128)
            requests.append(Request(int(arrival), drawn.randint(*prompt), drawn.randint(*output)))
        return cls(tuple(requests), 3 if quick else 8, 4 if quick else 64, dtype)

    @property
    def longest(self) -> int:
        return max(request.tokens for request in self.requests)

    @property
    def tokens(self) -> int:
        return sum(request.tokens for request in self.requests)

    @property
    def label(self) -> str:
        heads = f"H{NHEADS_K * HEADS_PER_KEY}/{NHEADS_K} D{HEAD_DIM}"
        dtype = SHORT_DTYPES[str(self.dtype).removeprefix("torch.")]
        service = f"{len(self.requests)} requests on {self.rows} rows"
        return f"{service}, {LAYERS} layers of {heads} {dtype}, pages of {self.page_size}"


class Server(Protocol):
    """Caches of `rows` rows, one a layer. q, k, v: (tokens, heads, HEAD_DIM), of every layer. Results: the last one's
    out, likewise."""

    def prefill(self, row: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A prompt, into a row that is free."""

    def decode(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A token of each of these rows."""

    def release(self, row: int) -> None: ...


def caches(shape: tuple[int, ...], workload: Workload, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """k and v of every layer."""

    def empty() -> Tensor:
        return torch.zeros(shape, dtype=workload.dtype, device=device)

    return [(empty(), empty()) for _ in range(LAYERS)]


class Paged:
    """Ours: pages of one pool, taken as rows grow, and given back."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self._page_size, width = workload.page_size, -(-workload.longest // workload.page_size)
        shape = workload.rows * width, workload.page_size, NHEADS_K, HEAD_DIM
        self._caches = caches(shape, workload, device)
        order = list(range(shape[0]))
        random.Random(0).shuffle(order)
        self._free = deque(order)
        self._pages: list[list[int]] = [[] for _ in range(workload.rows)]
        self._table = torch.zeros(workload.rows, width, dtype=torch.int32, device=device)
        self._lengths = [0] * workload.rows

    def _reserve(self, row: int, tokens: int) -> None:
        self._lengths[row] += tokens
        while len(self._pages[row]) * self._page_size < self._lengths[row]:
            self._table[row, len(self._pages[row])] = page = self._free.popleft()
            self._pages[row].append(page)

    def _attend(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = [self._lengths[row] for row in rows]
        for row in rows:
            self._reserve(row, q.shape[1])
        seqlens = torch.tensor(before, dtype=torch.int32, device=q.device)
        table, out = self._table[rows], q
        for k_cache, v_cache in self._caches:
            out = flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, cache_seqlens=seqlens, block_table=table, causal=True
            )
        return out

    def prefill(self, row: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend([row], q[None], k[None], v[None])[0]

    def decode(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(rows, q[:, None], k[:, None], v[:, None])[:, 0]

    def release(self, row: int) -> None:
        self._free.extend(self._pages[row])
        self._pages[row], self._lengths[row] = [], 0


class Padded:
    """SDPA: rows as long as the longest request, all of them computed up to the longest that runs, under a mask."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        shape = workload.rows, workload.longest, NHEADS_K, HEAD_DIM
        self._caches = caches(shape, workload, device)
        self._lengths = [0] * workload.rows
        self._position = torch.arange(workload.longest, device=device)

    def prefill(self, row: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._lengths[row] = tokens = q.shape[0]
        out, (queries, keys, values) = q, (x.transpose(0, 1)[None] for x in (q, k, v))
        for k_cache, v_cache in self._caches:
            k_cache[row, :tokens], v_cache[row, :tokens] = k, v
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    def decode(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row = torch.tensor(rows, device=q.device)
        place = row, torch.tensor([self._lengths[r] for r in rows], device=q.device)
        for r in rows:
            self._lengths[r] += 1
        longest = max(self._lengths)
        lengths = torch.tensor([max(1, n) for n in self._lengths], device=q.device)  # a row that is free sees a key
        mask = (self._position[:longest] < lengths[:, None])[:, None, None]
        queries = q.new_zeros(len(self._lengths), *q.shape[1:]).index_copy_(0, row, q)[:, :, None]
        out = q
        for k_cache, v_cache in self._caches:
            k_cache[place], v_cache[place] = k, v
            keys, values = (x[:, :longest].transpose(1, 2) for x in (k_cache, v_cache))
            out = F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True)[row, :, 0]
        return out

    def release(self, row: int) -> None:
        self._lengths[row] = 0


SERVERS: dict[str, Callable[[Workload, torch.device], Server]] = {"ours": Paged, "SDPA padded": Padded}


class Tokens:
    """q, k and v of token t of request r: those of a pool, so that nothing is made while the clock runs."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        generator, count = torch.Generator().manual_seed(1), 2 * workload.longest
        heads = NHEADS_K * HEADS_PER_KEY, NHEADS_K, NHEADS_K
        self.tensors = [torch.randn(count, n, HEAD_DIM, generator=generator).to(device, workload.dtype) for n in heads]
        self._longest = workload.longest

    def first(self, request: int) -> int:
        return request * 37 % self._longest

    def prompt(self, request: int, tokens: int) -> list[Tensor]:
        first = self.first(request)
        return [x[first : first + tokens] for x in self.tensors]

    def of(self, pairs: list[tuple[int, int]]) -> list[Tensor]:
        """Of (request, token) each."""
        places = torch.tensor([self.first(request) + token for request, token in pairs])
        return [x[places.to(x.device)] for x in self.tensors]


Seen = Callable[[int, int, Tensor], None]  # request, its first token, out (tokens, heads, HEAD_DIM)


def serve(workload: Workload, server: Server, tokens: Tokens, seen: Seen = lambda request, first, out: None) -> int:
    """All requests -> iterations. seen: told every result."""
    waiting, iteration, free = deque(enumerate(workload.requests)), 0, list(range(workload.rows))
    running: dict[int, int] = {}  # row -> request
    done: dict[int, int] = {}  # row -> tokens
    while waiting or running:
        while waiting and free and waiting[0][1].arrival <= iteration:
            number, request = waiting.popleft()
            row = free.pop()
            running[row], done[row] = number, request.prompt
            seen(number, 0, server.prefill(row, *tokens.prompt(number, request.prompt)))
        if running:
            rows = list(running)
            out = server.decode(rows, *tokens.of([(running[row], done[row]) for row in rows]))
            for at, row in enumerate(rows):
                seen(running[row], done[row], out[at : at + 1])
                done[row] += 1
                if done[row] == workload.requests[running[row]].tokens:
                    server.release(row)
                    free.append(row)
                    del running[row]
        iteration += 1
    return iteration


def complaint(name: str, workload: Workload, device: torch.device) -> str | None:
    """What is wrong with a server, held against float64 on this workload; None: nothing."""
    tokens = Tokens(workload, device)
    outs: dict[tuple[int, int], Tensor] = {}

    def seen(request: int, first: int, out: Tensor) -> None:
        outs[request, first] = out.cpu()

    serve(workload, SERVERS[name](workload, device), tokens, seen)
    for number, request in enumerate(workload.requests):
        q, k, v = (x[None].cpu() for x in tokens.prompt(number, request.tokens))
        kinds = torch.float64, workload.dtype
        exact, naive = (naive_attention(q.to(x), k.to(x), v.to(x), causal=True)[0][0] for x in kinds)
        parts = [outs[number, first] for first in [0, *range(request.prompt, request.tokens)]]
        allowed = Expected.of(naive, exact, 1.0 + float(exact.abs().max()))
        found = float((torch.cat(parts).double() - exact).abs().max())
        if not allowed.allows(found, 1.0 if name == "ours" else PEER_SLACK):
            return f"request {number}: error {found:.2e}, allowed {allowed.allowed:.2e}"
    return None


def _whole(name: str, workload: Workload, tokens: Tokens, device: torch.device) -> int:
    return serve(workload, SERVERS[name](workload, device), tokens)


def records(quick: bool, device: torch.device, seconds: float, rounds: int | None) -> list[list[dict[str, Any]]]:
    """A list for each dtype, of a record a server."""
    found = []
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        workload, small = Workload.of(quick, dtype), Workload.of(True, dtype, seed=2)
        tokens = Tokens(workload, device)
        runs: dict[str, Callable[[], object]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for name in SERVERS:
            rows[name] = {"case": workload.label, "direction": "forward", "peer": name, "status": "timed"}
            if (reason := complaint(name, small, device)) is not None:
                rows[name] |= {"status": "mismatch", "reason": reason}
            else:
                runs[name] = partial(_whole, name, workload, tokens, device)
        for name, timing in interleaved(runs, device, seconds, rounds).items():
            rows[name] |= _timed(timing, workload)
        found.append(list(rows.values()))
    return found


def _timed(timing: Timing, workload: Workload) -> dict[str, Any]:
    times = {"median_s": timing.median, "iqr_s": timing.iqr, "rounds": timing.rounds}
    return {**times, "tokens_per_s": workload.tokens / timing.median}
