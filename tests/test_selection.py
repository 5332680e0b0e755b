"""Which engine serves a call: decided once, by one measure, for this thread and task."""

from __future__ import annotations

import asyncio
import inspect
import threading
from dataclasses import replace

import pytest
import torch
from support import Case, cumulative, make

from compiled_fa import engines, flash_attn_func, flash_attn_varlen_func, ops, tuning, use_engine
from compiled_fa.config import ENGINES as NAMES
from compiled_fa.engines import ENGINES, requested, sdpa_cpu, select, selection, tiled
from compiled_fa.problem import Packed, Problem


def served(problem, direction="forward"):
    return select(problem, direction).engine.name


def packed_problem(lengths_q, lengths_k, nheads=8, nheads_k=8, head_dim=64, dtype=torch.float32, **options):
    q = torch.empty(sum(lengths_q), nheads, head_dim, dtype=dtype)
    k = torch.empty(sum(lengths_k), nheads_k, head_dim, dtype=dtype)
    packed = Packed(cumulative(lengths_q), cumulative(lengths_k), max(lengths_q), max(lengths_k))
    return Problem.of(q, k, k, packed, **options)


def test_the_names_of_the_engines():
    assert ("auto", *(engine.name for engine in ENGINES)) == NAMES


def test_their_functions_have_the_protocols_parameters():
    """Which mypy does not compare by name."""
    for engine in ENGINES:
        for member in ("unsupported_reason", "defers", "inlines", "prepared", "forward", "backward"):
            wanted = list(inspect.signature(getattr(engines.Engine, member)).parameters)[1:]
            found = list(inspect.signature(getattr(engine, member)).parameters)
            assert found[: len(wanted)] == wanted, f"{engine.name}.{member}"


def test_sequences_of_unlike_lengths_are_judged_once(compiled_steps):
    """By the engine that would serve: what it cannot do goes to the best of the others, never past it."""
    assert served(packed_problem([1, 31], [4096, 4096])) == "sdpa_cpu"  # few queries on average, but not in each
    assert served(packed_problem([1, 1], [4096, 4096])) == "split_kv"
    assert served(packed_problem([16, 16], [4096, 4096])) == "split_kv"
    assert served(packed_problem([17, 17], [4096, 4096])) == "sdpa_cpu"
    assert served(packed_problem([1, 31], [4096, 4096], softcap=2.0)) == "tiled"
    assert served(packed_problem([8, 8], [4096, 4096], nheads_k=4)) == "split_kv"  # 16 rows a key head
    assert served(packed_problem([9, 9], [4096, 4096], nheads_k=4)) == "sdpa_cpu"
    assert served(packed_problem([1, 1, 1], [4096, 0, 1])) == "split_kv"  # 1,365 keys on average
    assert served(packed_problem([96] * 10, [96] * 10)) == "split_kv"  # short ones
    assert served(packed_problem([97] * 10, [97] * 10)) == "sdpa_cpu"
    assert served(packed_problem([96] * 5, [96] * 5)) == "sdpa_cpu"  # too little to be worth code of its own


def test_without_queries_or_keys(compiled_steps):
    for lengths in (((0,), (50,)), ((1,), (0,)), ((0, 0), (0, 0))):
        assert served(packed_problem(*lengths)) == "sdpa_cpu"
    assert served(packed_problem([0], [5000], softcap=1.0)) == "tiled"


def test_gradients_have_a_route_of_their_own(compiled_steps):
    problem = packed_problem([1, 1], [4096, 4096])
    assert (served(problem), served(problem, "backward")) == ("split_kv", "sdpa_cpu")
    causal = packed_problem([600, 600], [600, 600], causal=True)
    assert (served(causal), served(causal, "backward")) == ("sdpa_cpu", "tiled")


def test_a_call_is_routed_once(monkeypatch):
    """And those like it never again."""
    routes, best = [], selection._best

    def counted(problem, direction):
        routes.append(direction)
        return best(problem, direction)

    monkeypatch.setattr(selection, "_best", counted)
    q = torch.randn(1, 5, 2, 11, requires_grad=True)
    for _ in range(2):
        flash_attn_func(q, q, q).sum().backward()
    cu_seqlens = cumulative([2, 3])
    for _ in range(2):
        flash_attn_varlen_func(q[0], q[0], q[0], cu_seqlens, cu_seqlens, 3, 3).sum().backward()
    assert routes == ["forward", "backward"] * 2


def test_what_calls_alike_share_is_prepared_once(monkeypatch):
    """By the engine asked for, and by no table but the one in force; gradients are there as they were."""
    asked, prepared = [], sdpa_cpu.prepared

    def counted(problem):
        asked.append(problem)
        return prepared(problem)

    monkeypatch.setattr(sdpa_cpu, "prepared", counted)
    q, k, v = (torch.randn(2, length, heads, 13) for length, heads in ((9, 4), (13, 2), (13, 2)))
    first = flash_attn_func(q, k, v, return_attn_probs=True)
    assert len(asked) == 1
    for inputs in ((q, k, v), (q.clone().requires_grad_(), k, v)):
        for one, other in zip(first[:2], flash_attn_func(*inputs, return_attn_probs=True)[:2], strict=True):
            assert torch.equal(one, other)
    assert len(asked) == 1
    flash_attn_func(q, k, v, softmax_scale=0.5)
    flash_attn_func(q, k.mT.contiguous().mT, v)  # other strides
    assert len(asked) == 3
    with use_engine("tiled"):
        assert (flash_attn_func(q, k, v) - first[0]).abs().max() < 1e-5
    with tuning.using(tuning.changed(tiled={"tile": 7})):
        flash_attn_func(q, k, v)
    assert len(asked) == 4


def test_lengths_go_to_the_host_once(monkeypatch):
    """Whoever asks: checks, the choice of an engine, tiles."""
    reads = []
    tolist = torch.Tensor.tolist

    def noted(x):
        reads.append(x)
        return tolist(x)

    monkeypatch.setattr(torch.Tensor, "tolist", noted)
    data = make(Case(((5, 9), (7, 3), (1, 0))))
    cu_q, cu_k = data.cu_seqlens
    for engine in ("auto", "sdpa_cpu", "tiled"):
        reads.clear()
        ops.varlen_attention(data.q, data.k, data.v, cu_q, cu_k, 7, 9, engine=engine)
        assert sum(x is cu_q or x is cu_k for x in reads) == len(reads) == 2, engine
    reads.clear()
    ops.varlen_attention(data.q, data.q, data.q, cu_q, cu_q, 7, 7)
    assert len(reads) == 1


def test_no_length_is_read_on_another_device(monkeypatch):
    """Which would wait for it: the choice between engines is by what the host knows."""
    monkeypatch.setattr(Packed, "host_sums", property(lambda packed: pytest.fail("lengths were read")))
    q = torch.empty(3, 2, 8, device="meta")
    pages, sums = torch.empty(9, 16, 2, 8, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    table = torch.empty(3, 5, dtype=torch.int32, device="meta")
    for keys, packed in ((pages, Packed(sums, sums, 1, 80, table)), (q, Packed(sums, sums, 1, 1))):
        problem = Problem.of(q, keys, keys, packed)
        for engine in ENGINES:
            for direction in ("forward", "backward"):
                engine.defers(problem, direction, "tiled")


def test_refusals_say_why():
    problem = make(Case(((9, 9),), True, softcap=5.0)).problem()
    route = select(problem, "forward")
    assert route.engine.name == "tiled"
    assert [name for name, _ in route.refusals()] == ["fused", "triton", "split_kv", "sdpa_cpu"]
    assert "no softcap" in route.refusals()[-1][1]
    plain = select(replace(problem, softcap=0.0), "forward")
    assert plain.engine.name == "sdpa_cpu"
    assert [name for name, _ in plain.refusals()] == ["fused", "triton", "split_kv"]


def test_an_unknown_name(monkeypatch):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"engine must be one of \['auto', .*'tiled'\], got 'quick'"):
        ops.attention(q, q, q, engine="quick")
    monkeypatch.setenv("COMPILED_FA_ENGINE", "quick")
    with pytest.raises(ValueError, match=r"COMPILED_FA_ENGINE must be one of \['auto', .*'tiled'\], got 'quick'"):
        flash_attn_func(q, q, q)


def test_another_thread_has_its_own():
    inside, done = threading.Event(), threading.Event()
    seen = {}

    def other():
        inside.wait()
        seen["other"] = requested()
        with use_engine("sdpa_cpu"):
            seen["its own"] = requested()
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with use_engine("tiled"):
        inside.set()
        done.wait()
        seen["mine"] = requested()
    thread.join()
    assert seen == {"other": "auto", "its own": "sdpa_cpu", "mine": "tiled"}
    assert requested() == "auto"


def test_another_task_has_its_own():
    async def asks(name, here, there):
        with use_engine(name):
            here.set()
            await there.wait()
            return requested()

    async def both():
        one, other = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(asks("tiled", one, other), asks("sdpa_cpu", other, one))

    assert asyncio.run(both()) == ["tiled", "sdpa_cpu"]


def test_nested_and_after_an_error():
    with use_engine("tiled"):
        with use_engine("auto"):
            assert requested() == "auto"
        with pytest.raises(ZeroDivisionError), use_engine("sdpa_cpu"):
            raise ZeroDivisionError
        assert requested() == "tiled"
    assert requested() == "auto"
    assert not selection._in_use


def test_compiled_code_asks_where_it_is_called(monkeypatch):
    """One graph without anybody's wish, one for all wishes; each call by its own."""
    torch._dynamo.reset()
    chosen, graphs = [], []

    def recorded(name, compute):
        def computed(*arguments, **more):
            chosen.append(name)
            return compute(*arguments, **more)

        return computed

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(tiled, "forward", recorded("tiled", tiled.forward))
    monkeypatch.setattr(sdpa_cpu.kernel, "_forward", recorded("sdpa_cpu", sdpa_cpu.kernel._forward))
    compiled = torch.compile(flash_attn_func, backend=backend, fullgraph=True)
    q = torch.randn(1, 5, 2, 8)
    compiled(q, q, q)
    for name in ("tiled", "sdpa_cpu", "tiled"):
        with use_engine(name):
            compiled(q, q, q)
    with use_engine("tiled"), use_engine("sdpa_cpu"):
        compiled(q, q, q)
    with use_engine("split_kv"), pytest.raises(RuntimeError, match="split_kv engine was asked for and cannot serve"):
        compiled(q, q, q)
    compiled(q, q, q)
    assert chosen == ["sdpa_cpu", "tiled", "sdpa_cpu", "tiled", "sdpa_cpu", "sdpa_cpu"]
    assert len(graphs) == 2


def test_a_misspelt_function_fails_mypy(tmp_path):
    """Engines are modules, which strict mypy holds against the protocol."""
    api = pytest.importorskip("mypy.api")
    engine = (
        "import torch\nfrom torch import Tensor\nfrom compiled_fa.problem import Direction, Problem\n"
        "from compiled_fa.engines import Prepared\n"
        "name = 'mine'\n"
        "def unsupported_reason(device: torch.device, problem: Problem | None = None,\n"
        "                       direction: Direction = 'forward') -> str | None: ...\n"
        "def defers(problem: Problem, direction: Direction, to: str) -> bool: ...\n"
        "def inlines(problem: Problem, direction: Direction) -> bool: ...\n"
        "def prepared(problem: Problem) -> Prepared | None: ...\n"
        "def forward(problem: Problem) -> tuple[Tensor, Tensor]: ...\n"
        "def backward(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None\n"
        "             ) -> tuple[Tensor, Tensor, Tensor]: ...\n"
    )
    (tmp_path / "good.pyi").write_text(engine)
    (tmp_path / "misspelt.pyi").write_text(engine.replace("def defers", "def defer"))
    (tmp_path / "wrong.pyi").write_text(engine.replace("to: str) -> bool", "to: int) -> bool"))
    names = ("good", "misspelt", "wrong")
    lines = ["from compiled_fa.engines import Engine", *(f"import {name}" for name in names)]
    (tmp_path / "use.py").write_text("\n".join([*lines, *(f"engine_{name}: Engine = {name}" for name in names)]) + "\n")
    out, err, _ = api.run([str(tmp_path / "use.py"), "--strict", "--follow-imports=silent", "--no-incremental"])
    wrong = [line.split(":")[1] for line in out.splitlines() if "error:" in line]
    assert wrong == ["6", "7"], out + err
