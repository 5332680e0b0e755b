"""What the flex template does with the engine's block tables and score functions, tile by tile, in PyTorch ops.

The template visits the tiles that the block tables list and no others, applies the mask to partial ones only, and keeps
to the lengths of its tensors by itself. In place of torch's operators, on a CPU, it shows whether the engine asks for
the right thing: a missing tile, a full tile that is not, or a wrong gradient function comes out as a wrong result.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from compiled_fa.engines.fused import flex, kernels
from compiled_fa.engines.fused.blocks import BLOCK
from compiled_fa.engines.fused.list_order import LIST_ORDER
from compiled_fa.engines.fused.paged import PagedSpec

LN2 = math.log(2.0)


def tiles(table, batch, block):
    """(number of a block of the other side, is it full) for each tile of a block.

    table: counts and indices of partial tiles, and of full ones.
    """
    found = []
    for (counts, indices), full in ((table[:2], False), (table[2:], True)):
        batch = batch if counts.shape[0] > 1 else 0
        found += [(n, full) for n in indices[batch, 0, block, : counts[batch, 0, block]].tolist()]
    return found


def span(block, length):
    return slice(block * BLOCK, min((block + 1) * BLOCK, length))


def blocks_of(length):
    return range(-(-length // BLOCK))


class Tile:
    """One batch's scores of some rows and columns."""

    def __init__(self, batch, heads, mask_mod, mask_buffers):
        self.batch, self.mask_mod, self.mask_buffers = torch.tensor(batch), mask_mod, mask_buffers
        self.head = torch.arange(heads, dtype=torch.int32)[:, None, None]

    def at(self, rows, columns):
        row = torch.arange(rows.start, rows.stop, dtype=torch.int32)[:, None]
        return self.batch, self.head, row, torch.arange(columns.start, columns.stop, dtype=torch.int32)

    def masked(self, value, at, full, other):
        return value if full else torch.where(self.mask_mod(*at, *self.mask_buffers), value, other)


def flex_attention(q, k, v, score_mod, block_mask, scale, options, buffers, mask_buffers):
    """-> out, and lse in base 2."""
    assert scale == 1.0
    if options.get(LIST_ORDER):
        return in_list_order(q, k, v, score_mod, block_mask, options, buffers, mask_buffers)
    table, mask_mod = block_mask[2:6], block_mask[-1]
    heads_per_key = q.shape[1] // k.shape[1]
    out = torch.full((*q.shape[:3], v.shape[-1]), math.nan)
    lse = torch.full(q.shape[:3], math.nan)
    for batch in range(q.shape[0]):
        queries = q[batch].float()
        keys, values = (x[batch % k.shape[0]].float().repeat_interleave(heads_per_key, 0) for x in (k, v))
        tile = Tile(batch, q.shape[1], mask_mod, mask_buffers)
        for block in blocks_of(q.shape[2]):
            rows = span(block, q.shape[2])
            scores, found = [queries.new_zeros(q.shape[1], rows.stop - rows.start, 0)], [values[:, :0]]
            for other, full in tiles(table, batch, block):
                columns = span(other, k.shape[2])
                at = tile.at(rows, columns)
                score = score_mod(queries[:, rows] @ keys[:, columns].mT, *at, *buffers)
                scores.append(tile.masked(score, at, full, -math.inf))
                found.append(values[:, columns])
            score = torch.cat(scores, -1)
            lse[batch, :, rows] = score.logsumexp(-1) if score.shape[-1] else -math.inf
            shift = lse[batch, :, rows, None].nan_to_num(neginf=0.0)
            out[batch, :, rows] = torch.exp(score - shift) @ torch.cat(found, 1)
    return out.to(q.dtype), lse / LN2, None


def in_list_order(q, k, v, score_mod, block_mask, options, buffers, mask_buffers):
    """The template as list_order.py has it: keys are numbered along the list, and what no row weighs counts as 0."""
    counts, indices = block_mask[2:4]
    assert block_mask[4:6] == (None, None)
    rows_of_block, keys_of_block, mask_mod = block_mask[-3:]
    assert (options["BLOCK_M"], options["BLOCK_N"]) == (rows_of_block, keys_of_block)
    assert q.shape[1] == k.shape[1]
    assert q.shape[2] % rows_of_block == 0
    assert not options["IS_DIVISIBLE"] or k.shape[2] % keys_of_block == 0
    out = torch.full((*q.shape[:3], v.shape[-1]), math.nan)
    lse = torch.full(q.shape[:3], math.nan)
    for batch, block in itertools.product(range(q.shape[0]), range(q.shape[2] // rows_of_block)):
        rows = slice(block * rows_of_block, (block + 1) * rows_of_block)
        queries, count = q[batch, :, rows].float(), int(counts[batch, 0, block])
        assert count <= -(-k.shape[2] // keys_of_block)
        tile = Tile(batch, q.shape[1], mask_mod, mask_buffers)
        scores, found = [queries.new_zeros(q.shape[1], rows_of_block, 0)], [torch.zeros(q.shape[1], 0, v.shape[-1])]
        for number, index in enumerate(indices[batch, 0, block, :count].tolist()):
            place = slice(index * keys_of_block, min((index + 1) * keys_of_block, k.shape[2]))
            first = (int(indices[batch, 0, block, 0]) + number) * keys_of_block
            at = tile.at(rows, slice(first, first + place.stop - place.start))
            score = score_mod(queries @ k[0, :, place].float().mT, *at, *buffers)
            scores.append(tile.masked(score, at, False, -math.inf))
            found.append(v[0, :, place].float())
        score = torch.cat(scores, -1)
        lse[batch, :, rows] = score.logsumexp(-1) if count else -math.inf
        probability = torch.exp(score - lse[batch, :, rows, None].nan_to_num(neginf=0.0))
        values = torch.cat(found, 1)
        out[batch, :, rows] = probability @ values.where((probability > 0.0).any(1).unsqueeze(-1), 0.0)
    return out.to(q.dtype), lse / LN2, None


def flex_attention_backward(
    q, k, v, out, lse, dout, dlse, score_mod, gradient_mod, block_mask, scale, options, buffers, mask_buffers
):
    """lse in base 2, and its gradient. Queries past the end of a sequence's last block have no probabilities."""
    assert scale == 1.0
    mask_mod, heads_per_key = block_mask[-1], q.shape[1] // k.shape[1]
    delta = (out * dout).sum(-1).float() - (0.0 if dlse is None else dlse / LN2)
    results = [torch.zeros(x.shape) for x in (q, k, v)]
    for batch in range(q.shape[0]):
        queries, douts, lses, deltas = (x[batch].float() for x in (q, dout, lse * LN2, delta))
        keys, values = (x[batch].float().repeat_interleave(heads_per_key, 0) for x in (k, v))
        dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
        tile = Tile(batch, q.shape[1], mask_mod, mask_buffers)

        def gradients(rows, columns, full, tile=tile, of=(queries, keys, values, douts, lses, deltas)):
            """P and the gradient of the products."""
            queries, keys, values, douts, lses, deltas = of
            at, product = tile.at(rows, columns), queries[:, rows] @ keys[:, columns].mT
            score = tile.masked(score_mod(product, *at, *buffers), at, full, -math.inf)
            probs = torch.exp(score - lses[:, rows, None].nan_to_num(neginf=0.0, posinf=math.inf))
            dscore = probs * (douts[:, rows] @ values[:, columns].mT - deltas[:, rows, None])
            dproduct = gradient_mod(product, *at, dscore, *buffers)[0]
            assert dproduct is not None
            return probs, tile.masked(dproduct, at, full, 0.0)

        for block in blocks_of(q.shape[2]):  # as the kernel: dQ by the key blocks of each query block
            rows = span(block, q.shape[2])
            for other, full in tiles(block_mask[2:6], batch, block):
                columns = span(other, k.shape[2])
                dq[:, rows] += gradients(rows, columns, full)[1] @ keys[:, columns]
        for block in blocks_of(k.shape[2]):  # and dK, dV by the query blocks of each key block
            columns = span(block, k.shape[2])
            for other, full in tiles(block_mask[6:10], batch, block):
                rows = span(other, q.shape[2])
                probs, dproduct = gradients(rows, columns, full)
                dv[:, columns] += probs.mT @ douts[:, rows]
                dk[:, columns] += dproduct.mT @ queries[:, rows]
        dk, dv = (x.unflatten(0, (-1, heads_per_key)).sum(1) for x in (dk, dv))
        for result, x in zip(results, (dq, dk, dv), strict=True):
            result[batch] = x
    return (*(x.to(q.dtype) for x in results), None)


class Operators:
    flex_attention = staticmethod(flex_attention)
    flex_attention_backward = staticmethod(flex_attention_backward)


def check_strides(spec, given):
    """As compiled code relies on them: all but those of dimensions of size 1."""
    if isinstance(spec, PagedSpec):
        for name, strides in zip("qkv", spec.strides, strict=True):
            assert given[name].stride() == (*strides, 1)
        return
    names = [name for name in spec.names if name in ("q", "k", "v", "dout", "out")]
    for name, (row, head) in zip(names, spec.strides, strict=True):
        x = given[name]
        expected = (*([x.shape[1] * row] if x.dim() == 4 else []), row, head, 1)
        assert x.stride() == expected, (name, x.shape, x.stride())


@contextlib.contextmanager
def in_place_of_the_kernel() -> Iterator[list[Any]]:
    """Calls of the fused engine run on this; yields the specs and tensors of those that are made."""
    calls: list[Any] = []
    run = kernels.run

    def seen(spec, given):
        check_strides(spec, given)
        calls.append((spec, given))
        return run(spec, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "operators", Operators)
        patch.setattr(kernels, "run", seen)
        yield calls
