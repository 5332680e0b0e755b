"""context_parallel: what ranks find out (ranks_ring.py), and which scores the layouts give to whom, without any."""

from __future__ import annotations

import re

import pytest
import ranks
import ranks_ring  # noqa: F401  # which adds its checks
import torch

from compiled_fa.context_parallel import layout
from compiled_fa.context_parallel.merging import merge
from tools import ring_overlap
from tools.ring_overlap import Interval, Transfer


@pytest.mark.parametrize("name", ranks.names_in("ranks_ring"))
def test_on_four_ranks(name):
    if wrong := ranks.outcomes(*ranks.OURS)[name]:
        pytest.fail(wrong, pytrace=False)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_cover_each_score_once(size, balanced, causal):
    """And under causal balanced ranks compute as many as each other, all that are whole."""
    length, work = 4, []
    seen = torch.zeros(size * length, size * length)
    chunk = length // (2 if balanced else 1)
    rows = [
        torch.cat([torch.arange(n * chunk, (n + 1) * chunk) for n in layout.chunks_of(rank, size, balanced)])
        for rank in range(size)
    ]
    for rank in range(size):
        work.append(0)
        for source in range(size):
            for block in layout.blocks(rank, source, length, causal, balanced):
                queries, keys = rows[rank][block.queries], rows[source][block.keys]
                visible = torch.ones(len(queries), len(keys))
                seen[queries[:, None], keys] += visible.tril(len(keys) - len(queries)) if block.causal else visible
                work[-1] += visible.numel()
    everything = torch.ones_like(seen)
    assert torch.equal(seen, everything.tril() if causal else everything)
    assert len(set(work)) == 1 or not balanced


@pytest.mark.parametrize("balanced", [True, False])
def test_rows_by_rank_and_in_order_are_inverse(balanced):
    x = torch.arange(12)
    by_rank = layout.by_rank(x, 3, 0, balanced)
    assert torch.equal(layout.in_order(list(by_rank.chunk(3)), 0, balanced), x)
    assert torch.equal(by_rank, x) != balanced


def test_merging_rows_without_keys():
    """Without keys on one side, on the other, and on both."""
    lse = torch.tensor([[[-torch.inf, 1.0, -torch.inf, 0.5]]])
    part_lse = torch.tensor([[[2.0, -torch.inf, -torch.inf, 0.5]]])
    out, part = torch.full((1, 4, 1, 2), 3.0), torch.full((1, 4, 1, 2), 7.0)
    out[0, [0, 2]], part[0, [1, 2]] = 0.0, 0.0
    merge(out, lse, part, part_lse)
    assert out[0, :, 0, 0].tolist() == [7.0, 3.0, 0.0, 5.0]
    torch.testing.assert_close(lse[0, 0], torch.tensor([2.0, 1.0, -torch.inf, 0.5 + torch.log(torch.tensor(2.0))]))


def test_a_trace_is_read():
    found = ring_overlap.transfers(
        [
            Interval("gloo:recv", 10.0, 25.0),
            Interval("compiled_fa::attention", 11.0, 21.0),
            Interval("gloo:send", 9.0, 26.0),
            Interval("gloo:recv", 40.0, 47.0),
            Interval("compiled_fa::attention", 5.0, 10.0),
            Interval("compiled_fa::attention_backward", 30.0, 42.0),
            Interval("compiled_fa::attention_backward", 43.0, 60.0),
        ]
    )
    assert found == [Transfer(15.0, 10.0, 4.0), Transfer(7.0, 6.0, 0.0)]


def test_keys_travel_while_attention_is_computed(monkeypatch, capfd, tmp_path):
    """In the tool's trace. Two ranks: one transfer forward, and one and two sums' backward."""
    monkeypatch.setattr("sys.argv", ["ring_overlap", "--seqlen", "512", "--trace", str(tmp_path / "trace.json")])
    ring_overlap.main()
    told = [line.split() for line in capfd.readouterr().out.splitlines() if re.match(r" +\d", line)]
    assert [number for number, *_ in told] == ["1", "2", "3", "4"]
    assert all(float(computing) > 0 for _, _, computing, _ in told[:3])
    text = (tmp_path / "trace.json").read_text()
    assert "gloo:recv" in text
    assert "compiled_fa::attention_backward" in text
