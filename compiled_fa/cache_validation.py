"""Every check of what a KV cache and a rotary embedding are given; wording and forms are validation.py's."""

from __future__ import annotations

import torch
from torch import Tensor

from . import config, validation
from .cache_call import CacheCall
from .problem import Options, Problem
from .validation import DTYPES, length, refuse, tensor

__all__ = [
    "keys_and_values",
    "kvcache",
    "kvcache_lengths",
    "kvcache_pages",
    "queries_and_keys",
    "reads_values",
    "refuse",
    "rotary",
    "rotary_dim",
]

QUERIES = "batch, seqlen_q, nheads, head_dim"
CACHE = "batch_cache, seqlen_cache, nheads_k, head_dim"
PAGES = "num_blocks, page_block_size, nheads_k, head_dim"
NEW = "batch, seqlen_new, nheads_k, head_dim"


class DoesNotFitError(ValueError, RuntimeError):
    """A cache, or its block table, has no room: a ValueError, as all else, and a RuntimeError, as flash_attn's."""


def readable(*tensors: Tensor) -> bool:
    """May these be read to be checked? On a CPU, outside of tracing; elsewhere (a host sync) with COMPILED_FA_CHECK=1.

    Of tensors that stand for others, such as fake ones, there are no values.
    """
    if torch.compiler.is_compiling() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors):
        return False
    return all(x.device.type == "cpu" or (config.checks_values() and not x.is_meta) for x in tensors)


# Rotary


def rotary_dim(argument: str, dim: object) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0 or dim % 2:
        refuse(argument, "an even number of elements", repr(dim))


def _integers(argument: str, x: Tensor, device: torch.device, dims: str) -> None:
    tensor(argument, x, dims)
    if x.dtype not in (torch.int32, torch.int64):
        refuse(argument, "of dtype int32 or int64", x.dtype, TypeError)
    if x.device != device:
        refuse(argument, f"on x's device, {device}", x.device)


def rotary_table(cos: object, sin: object, head_dim: int, device: torch.device, names: tuple[str, str]) -> None:
    """cos and sin (positions, R / 2), R at most head_dim."""
    for argument, table in zip(names, (cos, sin), strict=True):
        found = tensor(argument, table, "positions, rotary_dim / 2")
        if not found.is_floating_point():
            refuse(argument, "of a floating point dtype", found.dtype, TypeError)
        if found.device != device:
            refuse(argument, f"on the device of what it rotates, {device}", found.device)
        if 2 * found.shape[1] > head_dim:
            refuse(argument, f"of at most head_dim / 2 = {head_dim / 2:g} columns", found.shape[1])
    if isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.shape != sin.shape:
        refuse(names[1], f"of {names[0]}'s shape, {tuple(cos.shape)}", tuple(sin.shape))


def rotary(
    argument: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    names: tuple[str, str] = ("cos", "sin"),
) -> None:
    """Arguments of apply_rotary_emb. argument: the name of x, or of what it is a part of. names: of cos and sin."""
    tensor(argument, x, "batch, seqlen, nheads, head_dim" if cu_seqlens is None else "total, nheads, head_dim")
    if x.dtype not in DTYPES:
        refuse(argument, "float16, bfloat16, float32 or float64", x.dtype, TypeError)
    rotary_table(cos, sin, x.shape[-1], x.device, names)
    if cu_seqlens is not None:
        _integers("cu_seqlens", cu_seqlens, x.device, "batch + 1")
        if cu_seqlens.shape[0] < 2:
            refuse("cu_seqlens", "of batch + 1 elements, at least 2", cu_seqlens.shape[0])
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if isinstance(seqlen_offsets, Tensor):
        _integers("seqlen_offsets", seqlen_offsets, x.device, "batch")
        if seqlen_offsets.shape[0] != batch:
            refuse("seqlen_offsets", f"an int or of one element a sequence, {batch}", seqlen_offsets.shape[0])
    else:
        first = length("seqlen_offsets", seqlen_offsets)
        if first < 0:
            refuse("seqlen_offsets", "at least 0", first)
        if cu_seqlens is None:
            _positions(first + x.shape[1], cos.shape[0], names[0])
        elif max_seqlen is not None:
            _positions(first + length("max_seqlen", max_seqlen), cos.shape[0], names[0])
    wanted = _rotary_values(x, seqlen_offsets, cu_seqlens, max_seqlen)
    _positions(wanted, cos.shape[0], names[0])


def _rotary_values(x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    """-> positions that tables must have, as far as values tell; 0 where none may be read."""
    given = [of for of in (seqlen_offsets, cu_seqlens) if isinstance(of, Tensor)]
    if not given or not readable(*given):
        return 0
    batch = x.shape[0]
    lengths = torch.full((batch,), x.shape[1]) if cu_seqlens is None else cu_seqlens.cpu().diff()
    if cu_seqlens is not None:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0 or last != x.shape[0] or int(lengths.min()) < 0:
            wanted = f"running sums of lengths, from 0 to x's total, {x.shape[0]}"
            refuse("cu_seqlens", wanted, cu_seqlens.tolist() if len(lengths) < 20 else f"{first} to {last}")
        longest = int(lengths.max())
        if max_seqlen is not None and longest > (bound := length("max_seqlen", max_seqlen)):
            refuse("max_seqlen", f"at least the longest length in cu_seqlens, {longest}", bound)
    offsets = seqlen_offsets.cpu() if isinstance(seqlen_offsets, Tensor) else torch.tensor([seqlen_offsets])
    if not lengths.numel():
        return 0
    if int(offsets.min()) < 0:
        refuse("seqlen_offsets", "at least 0", int(offsets.min()))
    return int(torch.where(lengths > 0, lengths + offsets, 0).max())


def _positions(wanted: int | torch.SymInt, rows: int, argument: str) -> None:
    if wanted > rows:
        refuse(argument, f"of a row for each of {wanted} positions", f"{rows} rows")


def queries_and_keys(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Views of q and k in qkv, (B, S, 3, H, D) or with the heads of all three side by side."""
    if not isinstance(qkv, Tensor) or qkv.dim() == 5:
        tensor("qkv", qkv, "batch, seqlen, 3, nheads, head_dim")
        if qkv.shape[2] != 3:
            refuse("qkv", "(batch, seqlen, 3, nheads, head_dim)", f"shape {tuple(qkv.shape)}")
        return qkv[:, :, 0], qkv[:, :, 1]
    tensor("qkv", qkv, "batch, seqlen, num_heads_q + 2 * num_heads_k, head_dim")
    if num_heads_q is None:
        refuse("num_heads_q", "given where qkv has 4 dimensions", None)
    nheads = length("num_heads_q", num_heads_q)
    others = qkv.shape[2] - nheads
    if nheads < 1 or others < 2 or others % 2:
        refuse("num_heads_q", f"the heads of q among qkv's {qkv.shape[2]}, those of k and v the rest", nheads)
    return qkv[:, :, :nheads], qkv[:, :, nheads : nheads + others // 2]


def keys_and_values(kv: Tensor) -> None:
    tensor("kv", kv, "batch, seqlen, 2, nheads, head_dim")
    if kv.shape[2] != 2:
        refuse("kv", "(batch, seqlen, 2, nheads, head_dim)", f"shape {tuple(kv.shape)}")


# KV caches


def kvcache(call: CacheCall, options: Options, num_splits: int) -> None:
    """What can be told of a call without reading a tensor."""
    names, layout = ("k_cache", "v_cache"), (QUERIES, CACHE if call.block_table is None else PAGES)
    validation.qkv(call.q, call.k_cache, call.v_cache, layout, names)
    q, batch, device = call.q, call.batch, call.q.device
    if call.block_table is not None:
        _int32("block_table", call.block_table, "batch, max_num_blocks_per_seq", device)
        if call.block_table.shape[0] != batch:
            refuse("block_table", f"of one row a sequence, {batch}", call.block_table.shape[0])
        if call.page_size < 1:
            refuse("k_cache", "of pages of at least 1 row", call.page_size)
        if call.cache_batch_idx is not None:
            refuse("cache_batch_idx", "None where there is a block_table, whose rows say it all", "a tensor")
    elif call.cache_batch_idx is None and call.k_cache.shape[0] < batch:
        refuse("k_cache", f"of at least q's batch, {batch}", call.k_cache.shape[0])
    per_row = {name: getattr(call, name) for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad")}
    for argument, values in per_row.items():
        if values is not None:
            _int32(argument, values, "batch", device)
            if values.shape[0] != batch:
                refuse(argument, f"of q's batch, {batch}", values.shape[0])
    _new_keys(call)
    if (call.rotary_cos is None) != (call.rotary_sin is None):
        refuse("rotary_sin" if call.rotary_sin is None else "rotary_cos", "given where the other is", None)
    if call.rotary_cos is not None:
        if call.k is None:
            refuse("rotary_cos", "None where there is no k to rotate", "a tensor")
        rotary_table(call.rotary_cos, call.rotary_sin, q.shape[-1], device, ("rotary_cos", "rotary_sin"))
    if num_splits < 0:
        refuse("num_splits", "at least 0 (0: as engines find best)", num_splits)
    problem = Problem.of(q, call.k_cache, call.v_cache, None, *options)
    validation.options(problem, options.window_left, options.window_right)


def _int32(argument: str, x: Tensor, dims: str, device: torch.device) -> None:
    tensor(argument, x, dims)
    if x.dtype != torch.int32:
        refuse(argument, "of dtype int32", x.dtype, TypeError)
    if x.device != device:
        refuse(argument, f"on q's device, {device}", x.device)


def _new_keys(call: CacheCall) -> None:
    if (call.k is None) != (call.v is None):
        refuse("v" if call.v is None else "k", "given where the other is", None)
    if call.k is None or call.v is None:
        return
    if call.cache_seqlens is None:
        refuse("cache_seqlens", "given where k is: it says where to write", None)
    tensor("k", call.k, NEW)
    for argument, new, like, cache in (("k", call.k, "k_cache", call.k_cache), ("v", call.v, "v_cache", call.v_cache)):
        tensor(argument, new, NEW)
        wanted = (call.batch, call.k.shape[1], *cache.shape[2:])
        if tuple(new.shape) != wanted:
            refuse(argument, f"of shape (batch, seqlen_new, *{like}'s heads and head_dim) = {wanted}", tuple(new.shape))
        if new.dtype != cache.dtype:
            refuse(argument, f"of {like}'s dtype, {cache.dtype}", new.dtype, TypeError)
        if new.device != cache.device:
            refuse(argument, f"on {like}'s device, {cache.device}", new.device)
        if any(stride == 0 and size > 1 for stride, size in zip(cache.stride(), cache.shape, strict=True)):
            refuse(like, "memory of its own in every element where k is written to it", f"strides {cache.stride()}")


def reads_values(call: CacheCall) -> bool:
    """Is what must be read to be told checked? On a CPU always, elsewhere (a host sync) where COMPILED_FA_CHECK=1."""
    return bool(call.batch) and (call.q.device.type == "cpu" or config.checks_values())


def kvcache_lengths(call: CacheCall, consecutive: bool) -> None:
    """What lengths tell, and pages of rows that have one each. consecutive: as CacheCall.rotated's."""
    _rows_fit(call)
    if call.cache_batch_idx is not None:
        pages, count = call.host_first_page, call.k_cache.shape[0]
        if min(pages) < 0 or max(pages) >= count:
            refuse("cache_batch_idx", f"rows of k_cache, from 0 to {count - 1}", f"{min(pages)} to {max(pages)}")
        if call.seqlen_new and len(set(pages)) < len(pages):
            refuse("cache_batch_idx", "another row of k_cache for each row of k, which is written to it", pages)
    if call.rotary_cos is not None:
        steps = max(call.seqlen_new, call.q.shape[1] if consecutive else min(1, call.q.shape[1]))
        _positions(max(call.host_before) + steps if steps else 0, call.rotary_cos.shape[0], "rotary_cos")


def _rows_fit(call: CacheCall) -> None:
    before, new = call.host_before, call.seqlen_new
    if min(before) < 0:
        refuse("cache_seqlens", "at least 0", min(before))
    if (longest := max(before) + new) > call.capacity:
        keys = f"{longest} keys" if not new else f"{longest - new} keys and {new} new ones"
        if call.block_table is not None:
            wanted = f"of enough pages of {call.page_size} for {keys}"
            refuse("block_table", wanted, call.block_table.shape[1], DoesNotFitError)
        wanted = f"at most {call.capacity - new}, so that {new} new keys fit in k_cache"
        refuse("cache_seqlens", wanted if new else f"at most {call.capacity} in k_cache", max(before), DoesNotFitError)
    if call.cache_leftpad is not None:
        for pad, length_of_row in zip(call.host_leftpad, before, strict=True):
            if not 0 <= pad <= length_of_row:
                refuse("cache_leftpad", f"from 0 to the row's cache_seqlens, {length_of_row}", pad)


def kvcache_pages(call: CacheCall) -> None:
    """Pages in use exist, no two new keys go to one place, and none to where another row has keys."""
    count, new, block_table = call.k_cache.shape[0], call.seqlen_new, call.block_table
    if block_table is None:
        return
    # Most tables hold nothing but pages; else what lies behind a row's last one, and before its first, may be anything.
    if not validation.blocks(block_table, count):
        used = block_table[_in_use(call, block_table)]
        if not validation.blocks(used, count):
            found = f"{int(used.min())} to {int(used.max())}"
            refuse("block_table", f"numbers of k_cache's pages, from 0 to {count - 1}", found)
    if new and call.batch > 1:
        page, row = call.slots
        places = (page * call.page_size + row).flatten().tolist()
        if len(set(places)) < len(places):
            refuse("block_table", "another place for each new key", "a page that is the last one of several rows")
        _written_pages_are_not_shared(call, block_table, page, row)


def _in_use(call: CacheCall, block_table: Tensor) -> Tensor:
    """Which places of the table are pages with keys, new ones among them."""
    column = torch.arange(block_table.shape[1], device=block_table.device)
    first = 0 if call.cache_leftpad is None else (call.cache_leftpad // call.page_size)[:, None]
    stop = ((call.before + (call.seqlen_new + call.page_size - 1)) // call.page_size)[:, None]
    return (column >= first) & (column < stop)


def _written_pages_are_not_shared(call: CacheCall, block_table: Tensor, page: Tensor, row: Tensor) -> None:
    """No new key goes to where another row of the batch has one. page, row: `slots`.

    A row may use a page twice, as a ring of pages does whose old keys no query sees; and rows may share a page where
    the keys of one begin, by its leftpad, behind those of the other.
    """
    size, new = call.page_size, call.seqlen_new
    written = torch.zeros(call.k_cache.shape[0], dtype=torch.bool, device=page.device)
    written[page.flatten()] = True
    block_table = block_table[:, : -(-(max(call.host_before) + new) // size)]
    in_use = _in_use(call, block_table)
    touched = in_use & written[block_table.where(in_use, 0)]
    own = sum((before + new - 1) // size - before // size + 1 for before in call.host_before)
    if int(touched.sum()) == int(written.sum()) == own:  # the very pages that rows write to, each by one
        return
    writes: dict[int, list[tuple[int, int]]] = {}
    for writer, (pages, rows) in enumerate(zip(page.tolist(), row.tolist(), strict=True)):
        for number, place in zip(pages, rows, strict=True):
            writes.setdefault(number, []).append((writer, place))
    for reader, column in touched.nonzero().tolist():
        number = int(block_table[reader, column])
        first = call.host_leftpad[reader] - column * size
        stop = call.host_before[reader] + new - column * size
        for writer, place in writes[number]:
            if writer != reader and first <= place < stop:
                found = f"page {number}, where row {writer} writes over keys of row {reader}"
                refuse("block_table", "pages of its own for each row of k, which is written to them", found)
