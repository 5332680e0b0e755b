"""What the flex template does with the engine's block tables and score functions, tile by tile, in PyTorch ops.

The template visits the tiles that the block tables list and no others, applies the mask to partial ones only, and keeps
to the lengths of dense inputs by itself. Run in place of the kernel, on a CPU, it shows whether the engine asks for the
right thing: a missing tile, a full tile that is not, or a wrong gradient function comes out as a wrong result.
"""

import math

import torch

from compiled_fa.engines.fused.blocks import BLOCK
from compiled_fa.engines.fused.flex import Spec
from compiled_fa.engines.fused.mods import Mods


def tiles(table, block):
    """(number of a block of the other side, is it full) for each tile of a block.

    table: counts and indices of partial tiles, and of full ones.
    """
    counts, indices, full_counts, full_indices = table
    partial = indices[0, 0, block, : counts[0, 0, block]].tolist()
    full = full_indices[0, 0, block, : full_counts[0, 0, block]].tolist()
    return [(n, False) for n in partial] + [(n, True) for n in full]


def span(block, length):
    return slice(block * BLOCK, min((block + 1) * BLOCK, length))


class Template:
    def __init__(self, spec: Spec, q, k, buffers):
        self.mods, self.buffers = Mods(spec.features), buffers
        self.dropping = spec.features.threshold is not None
        self.batch = torch.arange(q.shape[0], dtype=torch.int32)[:, None, None, None]
        self.head = torch.arange(q.shape[1], dtype=torch.int32)[:, None, None]

    def at(self, rows, columns):
        row = torch.arange(rows.start, rows.stop, dtype=torch.int32)[:, None]
        return self.batch, self.head, row, torch.arange(columns.start, columns.stop, dtype=torch.int32)

    def scores(self, product, at, full, buffers):
        score = (self.mods.kept_score if self.dropping else self.mods.score)(product, *at, *buffers)
        return score if full else torch.where(self.mods.mask(*at, *self.buffers), score, -math.inf)


def check_strides(spec: Spec, inputs):
    """As a compiled kernel checks them: all but those of dimensions of size 1."""
    for x, (row, head) in zip(inputs, spec.strides, strict=False):
        expected = x.shape[2] * row, head, row, 1
        assert all(s == e for n, s, e in zip(x.shape, x.stride(), expected, strict=True) if n != 1), (
            x.shape,
            x.stride(),
        )


def run(spec: Spec, inputs):
    """In place of flex.run."""
    check_strides(spec, inputs)
    return (forward if spec.direction == "forward" else backward)(spec, *inputs)


def forward(spec, q, k, v, *rest):
    blocks, buffers = rest[:8], rest[8:]
    template, heads_per_key = Template(spec, q, k, buffers), q.shape[1] // k.shape[1]
    q, k, v = (x.float() for x in (q, k.repeat_interleave(heads_per_key, 1), v.repeat_interleave(heads_per_key, 1)))
    out = torch.full((*q.shape[:3], v.shape[-1]), math.nan)
    lse = torch.full(q.shape[:3], math.nan)
    for block in range(-(-q.shape[2] // BLOCK)):
        rows = span(block, q.shape[2])
        scores, values = [q.new_full((*q.shape[:2], rows.stop - rows.start, 0), 0.0)], [v[:, :, :0]]
        for other, full in tiles(blocks[:4], block):
            columns = span(other, k.shape[2])
            scores.append(
                template.scores(q[:, :, rows] @ k[:, :, columns].mT, template.at(rows, columns), full, buffers)
            )
            values.append(v[:, :, columns])
        score = torch.cat(scores, -1)
        lse[:, :, rows] = score.logsumexp(-1) if score.shape[-1] else -math.inf
        shift = lse[:, :, rows, None].nan_to_num(neginf=0.0)
        out[:, :, rows] = torch.exp(score - shift) @ torch.cat(values, 2)
    return out.to(spec.dtype), lse


def backward(spec, q, k, v, dout, lse, delta, *rest):
    blocks, buffers = rest[:8], rest[8:]
    template, heads_per_key = Template(spec, q, k, buffers), q.shape[1] // k.shape[1]
    score_buffers = (*buffers, lse, delta) if template.dropping else buffers
    wide = [x.float() for x in (q, k.repeat_interleave(heads_per_key, 1), v.repeat_interleave(heads_per_key, 1), dout)]
    q, keys, values, dout = wide
    dq, dk, dv = (torch.zeros_like(x) for x in (q, keys, values))

    def tile(rows, columns, full):
        """P and the gradient of the products."""
        at, product = template.at(rows, columns), q[:, :, rows] @ keys[:, :, columns].mT
        score = template.scores(product, at, full, buffers)
        probs = torch.exp(score - lse[:, :, rows, None].nan_to_num(neginf=0.0, posinf=math.inf))
        dscore = probs * (dout[:, :, rows] @ values[:, :, columns].mT - delta[:, :, rows, None])
        dproduct = template.mods.product_gradient(product, *at, dscore, *score_buffers)[0]
        assert dproduct is not None
        return probs, dproduct if full else torch.where(template.mods.mask(*at, *buffers), dproduct, 0.0)

    for block in range(-(-q.shape[2] // BLOCK)):  # as the kernel: dQ by the key blocks of each query block
        rows = span(block, q.shape[2])
        for other, full in tiles(blocks[:4], block):
            columns = span(other, keys.shape[2])
            dq[:, :, rows] += tile(rows, columns, full)[1] @ keys[:, :, columns]
    for block in range(-(-keys.shape[2] // BLOCK)):  # and dK, dV by the query blocks of each key block
        columns = span(block, keys.shape[2])
        for other, full in tiles(blocks[4:], block):
            rows = span(other, q.shape[2])
            probs, dproduct = tile(rows, columns, full)
            dv[:, :, columns] += probs.mT @ dout[:, :, rows]
            dk[:, :, columns] += dproduct.mT @ q[:, :, rows]
    dk, dv = (x.unflatten(1, (-1, heads_per_key)).sum(2) for x in (dk, dv))
    return tuple(x.to(spec.dtype) for x in (dq, dk, dv))
