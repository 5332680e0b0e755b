"""What the mask hides, where a tile has something to hide: a rim of its keys or queries, not the whole of it.

One launch a rim. Where all sequences of a chunk have their queries at the same offset from the keys, a mask is a
function of distance alone: tiles of one shape share it, all through a call.
"""

from __future__ import annotations

from math import inf

from torch import Tensor

from ....scores import Window
from ....scores.masks import query_position
from ..chunks import Chunk, Span
from .call import Call
from .operands import Side


class Rims:
    """Of a chunk. Rows past a sequence's end are not hidden: nothing comes of them."""

    def __init__(self, call: Call, chunk: Chunk, columns: Side) -> None:
        self._call, self._chunk = call, chunk
        # A window that ends at the query's own position ends at the last key, too.
        self._ragged = chunk.lengths_k[0] < chunk.lengths_k[1] and chunk.window.right != 0
        self._missing = columns.missing()

    def some_row_empty(self, q_start: int) -> bool:
        """May some query from q_start on see no key at all?"""
        right = self._chunk.window.right
        return right is not None and q_start + self._chunk.offsets[0] + int(right) < 0

    def hide_keys(self, scores: Tensor, queries: Span, keys: Span, full: Span) -> bool:
        """-inf where a query does not see a key. full: keys that, lengths aside, all queries see. -> were there any?"""
        stop = min(full[1], self._chunk.lengths_k[0]) if self._ragged else full[1]
        rims = _outside(keys, (full[0], stop))
        for rim in rims:
            self._hide(scores[..., rim[0] - keys[0] : rim[1] - keys[0]], queries, rim)
        return bool(rims)

    def hide_queries(self, scores: Tensor, queries: Span, keys: Span, full: Span) -> None:
        """The same; full: queries that see all of these keys."""
        rims = _outside(queries, full)
        for rim in rims:
            self._hide(scores[:, :, rim[0] - queries[0] : rim[1] - queries[0]], rim, keys)
        first = max(keys[0], self._chunk.lengths_k[0])
        if self._ragged and first < keys[1]:
            self._hide(scores[..., first - keys[0] :], queries, (first, keys[1]))

    def _hide(self, scores: Tensor, queries: Span, keys: Span) -> None:
        scores.masked_fill_(self._hidden(queries, keys), -inf)

    def _hidden(self, queries: Span, keys: Span) -> Tensor:
        """bool, broadcastable to a tile."""
        call, chunk = self._call, self._chunk
        window, positions = chunk.window, call.positions
        ends = self._ragged and keys[1] > chunk.lengths_k[0]
        if chunk.offsets[0] == chunk.offsets[1] and not ends:
            rows, columns = queries[1] - queries[0], keys[1] - keys[0]
            distance = queries[0] + chunk.offsets[0] - keys[0]
            key = distance, rows, columns
            if key not in call.masks:
                inside = window.contains(positions[:rows, None, None] + distance, positions[:columns])
                call.masks[key] = inside.logical_not_()
            return call.masks[key]
        missing = None if self._missing is None else self._missing[:, :, slice(*keys)].transpose(2, 4)
        if missing is not None and window == Window():
            return missing
        _, _, last_q, _, last_k = call.numbers_of(chunk).unbind(0)
        position = query_position(positions[slice(*queries), None, None], last_q, last_k)
        inside = window.contains(position, positions[slice(*keys)])
        return inside.logical_not_() if missing is None or not ends else inside.logical_not_() | missing


def _outside(whole: Span, part: Span) -> list[Span]:
    """What of an interval is not in another one."""
    start, stop = max(whole[0], part[0]), min(whole[1], part[1])
    if start >= stop:
        return [whole]
    return [span for span in ((whole[0], start), (stop, whole[1])) if span[0] < span[1]]
