"""Which sequences run side by side, padded to the longest of them: few groups, and little padding; dense ones are one.

A group costs launches, padding costs scores; a table says how many scores take as long as a group's launches. Of all
ways to cut the sequences, in the order of their lengths, into groups the cheapest is taken.
"""

from __future__ import annotations

from collections import defaultdict

from ....caches import Cache
from ..chunks import Groups, Lengths
from ..tiles import rounded_up

MOST_CLASSES = 64  # lengths that are told apart: the work below grows with their square

_groups: Cache[tuple[object, ...], Groups] = Cache("groupings", entries=16)


def groups(lengths: Lengths, nheads: int, group_scores: int) -> Groups:
    """group_scores: what a group costs, in scores of all heads. Sequences without queries or keys are in none."""
    return _groups.get((tuple(lengths), nheads, group_scores), lambda: _cheapest(lengths, group_scores / nheads))


def _cheapest(lengths: Lengths, group_cost: float) -> Groups:
    classes = _classes(lengths)
    longest = [(max(lengths[s][0] for s in members), max(lengths[s][1] for s in members)) for members in classes]
    # costs[i], starts[i]: of the cheapest way to group the first i classes, and where its last group begins.
    costs, starts = [0.0], [0]
    for stop in range(1, len(classes) + 1):
        best = float("inf"), 0
        seqlen_q = seqlen_k = count = 0
        for start in reversed(range(stop)):
            seqlen_q, seqlen_k = max(seqlen_q, longest[start][0]), max(seqlen_k, longest[start][1])
            count += len(classes[start])
            best = min(best, (costs[start] + group_cost + count * seqlen_q * seqlen_k, start))
        costs.append(best[0])
        starts.append(best[1])
    found: Groups = {}
    stop = len(classes)
    while stop:
        start = starts[stop]
        of_group = longest[start:stop]
        key = max(q for q, _ in of_group), max(k for _, k in of_group)
        found[key] = found.get(key, []) + [s for members in classes[start:stop] for s in members]
        stop = start
    return found


def _classes(lengths: Lengths) -> list[list[int]]:
    """Sequences of about the same lengths, in their order."""
    bits = 8
    while True:
        found: dict[tuple[int, int], list[int]] = defaultdict(list)
        for sequence, (seqlen_q, seqlen_k) in enumerate(lengths):
            if seqlen_q and seqlen_k:
                found[_rounded(seqlen_k, bits), _rounded(seqlen_q, bits)].append(sequence)
        if len(found) <= MOST_CLASSES or bits == 0:
            return [found[key] for key in sorted(found)]
        bits -= 1


def _rounded(length: int, bits: int) -> int:
    """Up, to so many binary digits after the first."""
    return rounded_up(length, max(1, 1 << max(0, length.bit_length() - 1 - bits)))
