"""The ops `torch.ops.compiled_fa.*`: what torch.compile, torch.export and autograd see of us.

    attention         attention_backward         attention_jvp           q (B, Sq, H, D), k (B, Sk, Hk, D), ...
    varlen_attention  varlen_attention_backward  varlen_attention_jvp    q (Tq, H, D), ..., and cu_seqlens

    out, lse = torch.ops.compiled_fa.attention(q, k, v, causal=True)

out is shaped as q with v's head_dim; lse is a natural logarithm in fp32 (fp64 for fp64 inputs), (B, H, Sq) or (H, Tq).
Each op has a schema, a kernel that checks its arguments and hands a `Problem` to an engine, a fake kernel, and a rule
for Inductor's graphs (lowering.py). The forward ops differentiate in q, k and v, through out and through lse: in
reverse mode by the backward ops, in forward mode (forward_mode.py) by the jvp ops, which tangent.py computes. To
differentiate twice is refused.

B batch, Sq and Sk lengths, H and Hk query and key heads, D and Dv head_dims of q, k and of v, T total tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import batching, engines, forward_mode, tangent, validation
from .inductor import lowering
from .problem import Options, Packed, Problem

DENSE = ("batch, seqlen_q, nheads, head_dim", "batch, seqlen_k, nheads_k, head_dim")
PACKED = ("total_q, nheads, head_dim", "total_k, nheads_k, head_dim")
PAGED = ("total_q, nheads, head_dim", "num_blocks, block_size, nheads_k, head_dim")

OPTIONS = (
    "float? softmax_scale=None, bool causal=False, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, "
    "Tensor? alibi_slopes=None, float dropout_p=0.0, Tensor? dropout_seed=None, str engine='auto'"
)
PACKING = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? block_table=None"

STRIDES = (torch.Tag.needs_exact_strides,)  # compiled or not: engines read rows where they lie

MakeProblem = Callable[..., tuple[Problem, str]]


def _checked(q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, options: tuple[Any, ...]) -> tuple[Problem, str]:
    """The problem, its options checked, and the name of the engine asked for: the option after the problem's own."""
    count = len(Options._fields)
    own, (engine,) = Options(*options[:count]), options[count:] or ("auto",)
    problem = Problem.of(q, k, v, packed, *own)
    validation.options(problem, own.window_left, own.window_right)
    return problem, engine


def _dense_problem(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Problem, str]:
    validation.qkv(q, k, v, DENSE)
    if k.shape[0] != q.shape[0]:
        validation.refuse("k", f"of q's batch, {q.shape[0]}", k.shape[0])
    return _checked(q, k, v, None, options)


def _packed_problem(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Problem, str]:
    count = len(fields(Packed))
    packed = Packed(*arguments[:count])
    validation.qkv(q, k, v, PACKED if packed.block_table is None else PAGED)
    validation.packing(q, packed)
    return _checked(q, k, v, packed, arguments[count:])


def _check_values(problem: Problem) -> None:
    if problem.packed is not None:
        validation.packed_values(problem.q, problem.k, problem.packed)


def check_dense(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> None:
    """What `attention` checks of these arguments without reading a tensor."""
    _dense_problem(q, k, v, *options)


def check_packed(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> None:
    """What `varlen_attention` checks of these arguments without reading a tensor."""
    _packed_problem(q, k, v, *arguments)


def _unknown(argument: Any) -> bool:
    """A number of which tracing knows no value: a window or a length that is read off a tensor in compiled code."""
    if not isinstance(argument, torch.SymInt):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # slow to import, and here it is

    return bool(free_unbacked_symbols(argument))


def _without_unknown(arguments: tuple[Any, ...]) -> list[Any]:
    """For fake kernels: shapes depend on no such number, and when the op is called it is checked as any other."""
    return [0 if _unknown(argument) else argument for argument in arguments]


def _double_backward(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    raise RuntimeError("compiled_fa attention can be differentiated once, not twice: its derivatives have none")


def _define(name: str, parameters: str, make_problem: MakeProblem) -> tuple[Any, Any, Any]:
    """Register compiled_fa::{name}, {name}_backward and {name}_jvp.

    parameters: the schema's after q, k, v. make_problem: (q, k, v, *parameters) -> a checked problem and an engine.
    """
    forward_schema = f"(Tensor q, Tensor k, Tensor v, {parameters}) -> (Tensor out, Tensor lse)"
    backward_schema = (
        "(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
        f"{parameters}) -> (Tensor dq, Tensor dk, Tensor dv)"
    )

    jvp_schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor q_tangent, Tensor k_tangent, Tensor v_tangent, Tensor out, Tensor lse, "
        f"{parameters}) -> (Tensor out_tangent, Tensor lse_tangent)"
    )

    @torch.library.custom_op(f"compiled_fa::{name}", mutates_args=(), schema=forward_schema, tags=STRIDES)
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        problem, engine = make_problem(*arguments)
        _check_values(problem)
        out, lse = engines.select(problem, "forward", engine).engine.forward(problem)
        return out, lse

    @forward.register_fake
    def _(*arguments: Any) -> tuple[Tensor, Tensor]:
        lowering.tell_inductor()
        problem, _ = make_problem(*_without_unknown(arguments))
        q, v = problem.q, problem.v
        *leading, seqlen, nheads, _ = q.shape
        lse = q.new_empty((*leading, nheads, seqlen), dtype=problem.lse_dtype)
        return q.new_empty((*q.shape[:-1], v.shape[-1])), lse

    @torch.library.custom_op(f"compiled_fa::{name}_backward", mutates_args=(), schema=backward_schema, tags=STRIDES)
    def backward(
        dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem, engine = make_problem(*arguments)
        validation.backward(problem, dout, dlse, out, lse)
        _check_values(problem)
        dq, dk, dv = engines.select(problem, "backward", engine).engine.backward(problem, dout, out, lse, dlse)
        return dq, dk, dv

    @backward.register_fake
    def _(
        dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem, _ = make_problem(*_without_unknown(arguments))
        validation.backward(problem, dout, dlse, out, lse)
        q, k, v = arguments[:3]
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    @torch.library.custom_op(f"compiled_fa::{name}_jvp", mutates_args=(), schema=jvp_schema, tags=STRIDES)
    def jvp(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_tangent: Tensor,
        k_tangent: Tensor,
        v_tangent: Tensor,
        out: Tensor,
        lse: Tensor,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor]:
        problem, _ = make_problem(q, k, v, *arguments)
        validation.jvp(problem, q_tangent, k_tangent, v_tangent, out, lse)
        _check_values(problem)
        return tangent.tangents(problem, q_tangent, k_tangent, v_tangent, out, lse)

    @jvp.register_fake
    def _(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        problem, _ = make_problem(q, k, v, *_without_unknown(arguments[5:]))
        validation.jvp(problem, *arguments[:5])
        out, lse = arguments[3:5]
        return out.new_empty(out.shape), lse.new_empty(lse.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        tensors = [argument for argument in inputs if isinstance(argument, Tensor)]
        ctx.save_for_backward(*output, *tensors)
        ctx.others = [None if isinstance(argument, Tensor) else (argument,) for argument in inputs]

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        rest = iter(tensors)
        arguments = [next(rest) if other is None else other[0] for other in ctx.others]
        nothing: list[Tensor | None] = [None] * (len(arguments) - 3)
        if dout is None and dlse is None:
            return (None, None, None, *nothing)
        if dout is None:
            dout = torch.zeros_like(out)
        dq, dk, dv = backward(dout, dlse, out, lse, *arguments)
        return (dq, dk, dv, *nothing)

    def forward_in_graph(*arguments: Any) -> Any:
        if any(map(_unknown, arguments)):
            return NotImplemented
        problem, engine = make_problem(*arguments)
        inlined = engines.inlined(problem, "forward", engine)
        return NotImplemented if inlined is None else inlined.forward(problem)

    def backward_in_graph(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> Any:
        if any(map(_unknown, arguments)):
            return NotImplemented
        problem, engine = make_problem(*arguments)
        inlined = engines.inlined(problem, "backward", engine) if dlse is None else None
        return NotImplemented if inlined is None else inlined.backward(problem, dout, out, lse)

    lowering.register(forward, forward_in_graph)
    lowering.register(backward, backward_in_graph)
    forward.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(_double_backward)
    jvp.register_autograd(_double_backward)
    forward_mode.register(forward, jvp)
    forward_mode.refuse(backward, jvp)
    return forward, backward, jvp


attention, attention_backward, attention_jvp = _define("attention", OPTIONS, _dense_problem)
varlen_attention, varlen_attention_backward, varlen_attention_jvp = _define(
    "varlen_attention", f"{PACKING}, {OPTIONS}", _packed_problem
)

batching.register(attention, tensors=3)
batching.register(attention_backward, tensors=7)
batching.register(attention_jvp, tensors=8)
batching.refuse(varlen_attention, varlen_attention_backward)
batching.one_by_one(varlen_attention_jvp)
