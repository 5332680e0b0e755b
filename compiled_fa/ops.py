"""The ops `torch.ops.compiled_fa.*`: what torch.compile, torch.export and autograd see of us.

    attention         attention_backward         attention_jvp           q (B, Sq, H, D), k (B, Sk, Hk, D), ...
    varlen_attention  varlen_attention_backward  varlen_attention_jvp    q (Tq, H, D), ..., and cu_seqlens
    biased_attention  biased_attention_backward  biased_attention_jvp    as attention, with a bias after v

    out, lse = torch.ops.compiled_fa.attention(q, k, v, causal=True)

out is shaped as q with v's head_dim; lse is a natural logarithm in fp32 (fp64 for fp64 inputs), (B, H, Sq) or (H, Tq).
Each op has a schema, a kernel that checks its arguments and hands a `Problem` to an engine, a fake kernel, and a rule
for Inductor's graphs (lowering.py). The forward ops differentiate through out and through lse in q, k and v: in reverse
mode, in a bias, too, by the backward ops, in forward mode (forward_mode.py) by the jvp ops, which tangent.py computes.
To differentiate twice is refused. Our own functions call `attend_like`, not the op, where nobody has to see a call
(straight.py).

B batch, Sq and Sk lengths, H and Hk query and key heads, D and Dv head_dims of q, k and of v, T total tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import batching, engines, forward_mode, registration, signatures, straight, tangent, validation
from .caches import Cache
from .inductor import lowering
from .problem import Options, Packed, Problem
from .scores import Window

DENSE = ("batch, seqlen_q, nheads, head_dim", "batch, seqlen_k, nheads_k, head_dim")
PACKED = ("total_q, nheads, head_dim", "total_k, nheads_k, head_dim")
PAGED = ("total_q, nheads, head_dim", "num_blocks, block_size, nheads_k, head_dim")

OPTIONS = (
    "float? softmax_scale=None, bool causal=False, SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, "
    "Tensor? alibi_slopes=None, float dropout_p=0.0, Tensor? dropout_seed=None, str engine='auto', "
    "Tensor? numbers=None"
)
PACKING = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? block_table=None"


@dataclass(frozen=True, eq=False)
class RightCall:
    """A call that was checked: what is not a tensor of its problem, and the engine's name. Itself, by identity, it is
    the signature of all calls like it."""

    softmax_scale: float
    window: Window
    softcap: float
    dropout_p: float
    engine: str

    def problem(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed | None = None) -> Problem:
        numbers = self.softmax_scale, self.window, self.softcap, None, self.dropout_p
        return Problem(q, k, v, *numbers, None, packed, self)


_right_calls: Cache[Hashable, RightCall] = Cache("checked calls", entries=1024)
_right_lengths: Cache[Hashable, RightCall] = Cache("checked lengths", entries=1024)

MakeProblem = Callable[..., tuple[Problem, str]]


def _checked(q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, options: tuple[Any, ...]) -> tuple[Problem, str]:
    """The problem, its options checked, and the name of the engine asked for: the option after the problem's own."""
    count = len(Options._fields)
    own, (engine, *_) = Options(*options[:count]), options[count:] or ("auto",)
    problem = Problem.of(q, k, v, packed, *own)
    validation.options(problem, own.window_left, own.window_right)
    return problem, engine


def _dense_problem(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Problem, str]:
    like = dense_like(q, k, v, *options)
    return _checked_dense(q, k, v, *options) if like is None else (like.problem(q, k, v), like.engine)


def dense_like(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> RightCall | None:
    """What a call of `attention` shares with those alike, checked. One like one before it is not checked again: that
    takes as long as a short call's arithmetic. None: it is like no other."""
    if (key := _seen(q, k, v, options)) is None:
        return None
    return _right_calls.get(key, lambda: _remembered(*_checked_dense(q, k, v, *options)))


def _seen(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> Hashable | None:
    """All that checks, and who chooses an engine, may see of a dense call; None: more than shapes and numbers."""
    for option in options:
        if isinstance(option, Tensor):
            return None
    return signatures.of_call((q, k, v, *options))


def _remembered(problem: Problem, engine: str) -> RightCall:
    return RightCall(problem.softmax_scale, problem.window, problem.softcap, problem.dropout_p, engine)


def _checked_dense(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Problem, str]:
    validation.qkv(q, k, v, DENSE)
    if k.shape[0] != q.shape[0]:
        validation.refuse("k", f"of q's batch, {q.shape[0]}", k.shape[0])
    return _checked(q, k, v, None, options)


def _biased_problem(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *options: Any) -> tuple[Problem, str]:
    """options: backward's, too, whose last says whether the bias's gradient is wanted."""
    last = len(Options._fields) + 2  # behind the engine and numbers
    problem, engine = _checked_dense(q, k, v, *options[:last])
    validation.bias(problem, bias)
    wanted = bias.is_floating_point() and (options[last] if len(options) > last else True)
    return replace(problem, bias=bias[(None,) * (4 - bias.dim())], bias_gradient=wanted), engine


def _packed_problem(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Problem, str]:
    """On a CPU a call like one before it, with the same lengths, is not checked again, but for pages."""
    count = len(fields(Packed))
    packed, options = Packed(*arguments[:count]), arguments[count:]
    shapes = _seen(q, k, v, options) if q.device.type == "cpu" else None
    where = None if shapes is None else signatures.of_call(arguments[:count])
    if where is None:
        return _checked_packed(q, k, v, packed, options)
    like = _right_calls.get((shapes, where), lambda: _remembered(*_checked_packed(q, k, v, packed, options)))
    sums_q, sums_k = packed.host_sums
    key = like, tuple(sums_q), tuple(sums_k)
    like = _right_lengths.get(key, lambda: _with_right_lengths(q, k, packed, like))
    return like.problem(q, k, v, packed), like.engine


def _checked_packed(q: Tensor, k: Tensor, v: Tensor, packed: Packed, options: tuple[Any, ...]) -> tuple[Problem, str]:
    validation.qkv(q, k, v, PACKED if packed.block_table is None else PAGED)
    validation.packing(q, packed)
    return _checked(q, k, v, packed, options)


def _with_right_lengths(q: Tensor, k: Tensor, packed: Packed, like: RightCall) -> RightCall:
    validation.packed_lengths(q, k, packed)
    return replace(like)


def _attend_like(like: RightCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A dense call on a CPU that is like one that was checked."""
    prepared = engines.prepared(like, like.engine, lambda: like.problem(q, k, v))
    if prepared is not None:
        return prepared.run(q, k, v)
    out, lse = engines.select(like.problem(q, k, v), "forward", like.engine).forward()
    return out, lse


attend_like = straight.not_looked_at(_attend_like)


def _told(arguments: tuple[Any, ...], at: int) -> tuple[Any, ...]:
    """With softmax_scale, softcap and dropout_p out of `numbers`, which is the argument number `at`."""
    first = at - 1 - len(Options._fields)  # the options, and the engine between
    validation.numbers(arguments[at])
    softmax_scale, softcap, dropout_p = arguments[at].tolist()
    own = Options(*arguments[first : at - 1])
    own = own.changed(softmax_scale=softmax_scale, softcap=softcap, dropout_p=dropout_p)
    return *arguments[:first], *own, arguments[at - 1], None, *arguments[at + 1 :]


def _check_values(problem: Problem) -> None:
    if problem.packed is None:
        return
    if problem.signature is None:
        validation.packed_values(problem.q, problem.k, problem.packed)
    elif problem.packed.block_table is not None:
        validation.packed_blocks(problem.k, problem.packed, problem.packed.block_table)


def check_dense(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> None:
    """What `attention` checks of these arguments without reading a tensor."""
    _dense_problem(q, k, v, *options)


def check_biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *options: Any) -> None:
    """What `biased_attention` checks of these arguments without reading a tensor."""
    _biased_problem(q, k, v, bias, *options)


def check_packed(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> None:
    """What `varlen_attention` checks of these arguments without reading a tensor."""
    count = len(fields(Packed))
    _checked_packed(q, k, v, Packed(*arguments[:count]), arguments[count:])


def _unknown(argument: Any) -> bool:
    """A number of which tracing knows no value: a window or a length that is read off a tensor in compiled code."""
    if not isinstance(argument, torch.SymInt):
        return False
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # slow to import, and here it is

    return bool(free_unbacked_symbols(argument))


def _without_unknown(arguments: tuple[Any, ...]) -> list[Any]:
    """For fake kernels: shapes depend on no such number, and when the op is called it is checked as any other."""
    return [0 if _unknown(argument) else argument for argument in arguments]


def _all_gradients(problem: Problem, gradients: tuple[Tensor, ...], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """An engine's, as the backward op gives them: that of a bias, of the bias's shape; if it is not wanted, of no
    elements."""
    if problem.bias is None:
        return gradients
    bias: Tensor = arguments[3]
    dq, dk, dv, *dbias = gradients
    return dq, dk, dv, dbias[0].view(bias.shape) if dbias else bias.new_empty(0)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], results: registration.Results) -> None:
    """Of a derivative, which has none."""


def _double_backward(ctx: Any, *gradients: Tensor | None) -> NoReturn:
    raise RuntimeError("compiled_fa attention can be differentiated once, not twice: its derivatives have none")


def _define(
    name: str,
    parameters: str,
    make_problem: MakeProblem,
    biased: bool = False,
    alike: Callable[..., RightCall | None] = lambda *arguments: None,
) -> tuple[Any, Any, Any]:
    """Register compiled_fa::{name}, {name}_backward and {name}_jvp.

    parameters: the schema's after q, k, v. make_problem: (q, k, v, *parameters) -> a checked problem and an engine; it
    knows nothing of `numbers`, the last of them. biased: the first parameter is a bias, and has a gradient. alike:
    (q, k, v, *parameters) -> what a checked call shares with all calls alike, whose lengths are in their shapes.
    """
    forward_schema = f"(Tensor q, Tensor k, Tensor v, {parameters}) -> (Tensor out, Tensor lse)"
    backward_schema = (
        "(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
        f"{parameters}{', bool bias_gradient=True' if biased else ''}) "
        f"-> (Tensor dq, Tensor dk, Tensor dv{', Tensor dbias' if biased else ''})"
    )

    jvp_schema = (
        "(Tensor q, Tensor k, Tensor v, Tensor q_tangent, Tensor k_tangent, Tensor v_tangent, Tensor out, Tensor lse, "
        f"{parameters}) -> (Tensor out_tangent, Tensor lse_tangent)"
    )

    at = 2 + len(parameters.split(", "))

    def has_numbers(arguments: tuple[Any, ...]) -> bool:
        return len(arguments) > at and arguments[at] is not None  # the dispatcher leaves out defaults at the end

    def known_problem(*arguments: Any) -> tuple[Problem, str]:
        return make_problem(*(_told(arguments, at) if has_numbers(arguments) else arguments))

    def stays_an_op(arguments: tuple[Any, ...]) -> bool:
        return has_numbers(arguments) or any(map(_unknown, arguments))

    def compute(*arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v = arguments[:3]
        like = alike(*arguments) if q.device.type == "cpu" else None
        if like is not None:
            return _attend_like(like, q, k, v)
        problem, engine = known_problem(*arguments)
        _check_values(problem)
        out, lse = engines.select(problem, "forward", engine).forward()
        return out, lse

    def fake(*arguments: Any) -> tuple[Tensor, Tensor]:
        lowering.traced()
        problem, _ = make_problem(*_without_unknown(arguments))
        q, v = problem.q, problem.v
        *leading, seqlen, nheads, _ = q.shape
        lse = q.new_empty((*leading, nheads, seqlen), dtype=problem.lse_dtype)
        return q.new_empty((*q.shape[:-1], v.shape[-1])), lse

    def compute_backward(
        dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        problem, engine = known_problem(*arguments)
        validation.backward(problem, dout, dlse, out, lse)
        _check_values(problem)
        gradients = engines.select(problem, "backward", engine).backward(dout, out, lse, dlse)
        return _all_gradients(problem, gradients, arguments)

    def fake_backward(
        dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        problem, _ = make_problem(*_without_unknown(arguments))
        validation.backward(problem, dout, dlse, out, lse)
        differentiated = arguments[: 4 if problem.bias_gradient else 3]
        return _all_gradients(problem, tuple(x.new_empty(x.shape) for x in differentiated), arguments)

    def compute_jvp(
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
        problem, _ = known_problem(q, k, v, *arguments)
        validation.jvp(problem, q_tangent, k_tangent, v_tangent, out, lse)
        _check_values(problem)
        return tangent.tangents(problem, q_tangent, k_tangent, v_tangent, out, lse)

    def fake_jvp(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        problem, _ = make_problem(q, k, v, *_without_unknown(arguments[5:]))
        validation.jvp(problem, *arguments[:5])
        out, lse = arguments[3:5]
        return out.new_empty(out.shape), lse.new_empty(lse.shape)

    forward = registration.define(name, forward_schema, compute, fake)
    backward = registration.define(f"{name}_backward", backward_schema, compute_backward, fake_backward)
    jvp = registration.define(f"{name}_jvp", jvp_schema, compute_jvp, fake_jvp)

    def save(ctx: Any, inputs: tuple[Any, ...], results: registration.Results) -> None:
        ctx.set_materialize_grads(False)
        # Tensors among the options are few, and most calls have none.
        more = [at for at, argument in enumerate(inputs) if at > 2 and isinstance(argument, Tensor)]
        ctx.save_for_backward(*results, *inputs[:3], *(inputs[at] for at in more))
        ctx.more, ctx.options = more, [None if at in more else inputs[at] for at in range(3, len(inputs))]

    def differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, q, k, v, *more = ctx.saved_tensors
        options = list(ctx.options)
        for at, tensor in zip(ctx.more, more, strict=True):
            options[at - 3] = tensor
        nothing: list[Tensor | None] = [None] * len(options)
        if dout is None and dlse is None:
            return (None, None, None, *nothing)
        if dout is None:
            dout = torch.zeros_like(out)
        if not biased:
            return (*backward(dout, dlse, out, lse, q, k, v, *options), *nothing)
        wanted = ctx.needs_input_grad[4]
        *of_qkv, dbias = backward(dout, dlse, out, lse, q, k, v, *options, bias_gradient=wanted)
        return (*of_qkv, dbias if wanted else None, *nothing[1:])

    def forward_in_graph(*arguments: Any) -> Any:
        if stays_an_op(arguments):
            return NotImplemented
        problem, engine = make_problem(*arguments)
        inlined = engines.inlined(problem, "forward", engine)
        return NotImplemented if inlined is None else inlined.forward(problem)

    def backward_in_graph(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any) -> Any:
        if stays_an_op(arguments):
            return NotImplemented
        problem, engine = make_problem(*arguments)
        inlined = engines.inlined(problem, "backward", engine) if dlse is None else None
        if inlined is None:
            return NotImplemented
        return _all_gradients(problem, inlined.backward(problem, dout, out, lse), arguments)

    lowering.register(forward, forward_in_graph)
    lowering.register(backward, backward_in_graph)
    forward_mode.register(forward, registration.differentiable(forward, compute, save, differentiate), jvp)
    for op, kernel in ((backward, compute_backward), (jvp, compute_jvp)):
        forward_mode.refuse(op, registration.differentiable(op, kernel, _save_nothing, _double_backward))
    return forward, backward, jvp


attention, attention_backward, attention_jvp = _define("attention", OPTIONS, _dense_problem, alike=dense_like)
varlen_attention, varlen_attention_backward, varlen_attention_jvp = _define(
    "varlen_attention", f"{PACKING}, {OPTIONS}", _packed_problem
)
biased_attention, biased_attention_backward, biased_attention_jvp = _define(
    "biased_attention", f"Tensor bias, {OPTIONS}", _biased_problem, biased=True
)

batching.register(attention, tensors=3)
batching.register(attention_backward, tensors=7)
batching.register(attention_jvp, tensors=8)
batching.refuse(varlen_attention, varlen_attention_backward)
for _op in (varlen_attention_jvp, biased_attention, biased_attention_backward, biased_attention_jvp):
    batching.one_by_one(_op)
