"""Calls that go straight to an engine: what they must not go past, and what they must not take for one another."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import compiled_fa
from compiled_fa import (
    arguments,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    interface,
    kvcache,
    straight,
    use_engine,
)


def _qkv(dtype=torch.float32):
    q, k, v = torch.randn(3, 2, 5, 2, 8, dtype=dtype).unbind(0)
    return q, k, v


def _varlen(q, k, v):
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    q, k, v = (x.flatten(0, 1)[:5] for x in (q, k, v))
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 3, 3)


def _biased(q, k, v):
    return compiled_fa.attention(q, k, v, torch.zeros(5, 5))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "attention": flash_attn_func,
    "varlen_attention": _varlen,
    "biased_attention": _biased,
    "attention_with_kvcache": flash_attn_with_kvcache,
}


@pytest.fixture(params=list(FUNCTIONS))
def function(request):
    """An op's name and a function that calls it; and calls like those of the test went straight before."""
    call = FUNCTIONS[request.param]
    for _ in range(2):
        call(*_qkv())
    return request.param, call


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Dispatched, Called])
def test_modes_see_every_call(function, mode):
    name, call = function
    q, k, v = _qkv()
    expected = call(q, k, v)
    with mode() as seen:
        out = call(q, k, v)
    assert any(f"compiled_fa.{name}" in each for each in seen.seen)
    assert torch.equal(out, expected)


def test_a_profiler_sees_every_call(function):
    name, call = function
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*_qkv())
    assert f"compiled_fa::{name}" in {event.key for event in profile.key_averages()}


def test_flops_are_counted(function):
    _, call = function
    with FlopCounterMode(display=False) as flops:
        call(*_qkv())
    assert flops.get_total_flops() > 0


def test_tracing_sees_every_call(function):
    name, call = function
    graph = make_fx(lambda q, k, v: call(q, k, v))(*_qkv())
    assert any(f"compiled_fa.{name}" in str(node.target) for node in graph.graph.nodes)


def test_fake_tensors_stay_fake(function):
    _, call = function
    with FakeTensorMode():
        assert type(call(*_qkv())).__name__ == "FakeTensor"


def test_transforms_see_every_call():
    q, k, v = torch.randn(3, 3, 2, 5, 2, 8).unbind(0)
    one_by_one = torch.stack([flash_attn_func(*each) for each in zip(q, k, v, strict=True)])
    torch.testing.assert_close(torch.vmap(flash_attn_func)(q, k, v), one_by_one)
    q, k, v = _qkv()
    flash_attn_func(q, k, v)
    tangent = torch.func.jvp(lambda q: flash_attn_func(q, k, v), (q,), (torch.ones_like(q),))[1]
    assert tangent.shape == q.shape
    with pytest.raises(RuntimeError, match="functorch"):  # of which PyTorch has nothing for custom ops
        torch.func.grad(lambda q: flash_attn_func(q, k, v).sum())(q)


def test_tangents_are_kept():
    q, k, v = _qkv()
    flash_attn_func(q, k, v)
    with forward_ad.dual_level():
        out = flash_attn_func(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
        assert forward_ad.unpack_dual(out).tangent is not None
        with pytest.raises(NotImplementedError, match="tangent"):
            flash_attn_with_kvcache(forward_ad.make_dual(q, torch.ones_like(q)), k, v)


def test_gradients_where_some_are_wanted(function):
    name, call = function
    q, k, v = _qkv()
    with torch.no_grad():
        expected = call(q, k.requires_grad_(), v)
    assert expected.grad_fn is None
    out = call(q, k, v)
    assert torch.equal(out, expected)
    if name == "attention_with_kvcache":
        assert out.grad_fn is None
    else:
        assert torch.autograd.grad(out.sum(), k)[0].shape == k.shape
    with torch.inference_mode():
        assert torch.equal(call(q, k, v), expected)
    assert call(q, k.detach(), v).grad_fn is None


def test_inference_tensors_before_and_after_others(function):
    _, call = function
    with torch.inference_mode():
        inputs = _qkv()
        expected = call(*inputs)
        assert torch.equal(call(*inputs), expected)
    copies = [x.clone() for x in inputs]
    for q, k, v in ([*inputs], [copies[0], *inputs[1:]], copies):
        if call is not flash_attn_with_kvcache or not k.is_inference():
            assert torch.equal(call(q, k, v), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(function, dtype):
    _, call = function
    q, k, v = _qkv()
    assert call(q, k, v).dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert call(q, k, v).dtype == (torch.float32 if call is flash_attn_with_kvcache else dtype)
    assert call(q, k, v).dtype == torch.float32


def test_classes_of_their_own(function):
    _, call = function

    class Own(Tensor):
        pass

    q, k, v = _qkv()
    out = call(q.as_subclass(Own), k, v)
    assert type(out) is Own
    assert torch.equal(out.as_subclass(Tensor), call(q, k, v))
    assert type(call(torch.nn.Parameter(q, requires_grad=False), k, v)) is Tensor


def test_what_memory_does_not_say():
    """Tensors whose class, shape, strides and dtype are those of others."""
    q, k, v = _qkv()
    expected = flash_attn_func(q, k, v)
    assert torch.equal(flash_attn_func(torch._neg_view(q.neg()), k, v), expected)
    zeros = flash_attn_func(torch._efficientzerotensor(q.shape), k, v)
    torch.testing.assert_close(zeros, flash_attn_func(torch.zeros_like(q), k, v))
    assert flash_attn_func(*(x.to("meta") for x in (q, k, v))).device.type == "meta"
    with pytest.raises((ValueError, TypeError, NotImplementedError, RuntimeError)):
        flash_attn_func(q.to_sparse(), k, v)


def test_strides_and_dtypes_of_one_shape():
    for _ in range(2):
        for inner in range(4):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                q, k, v = (x.movedim(inner, 0).contiguous().movedim(0, inner) for x in _qkv(dtype))
                expected = flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous())
                torch.testing.assert_close(flash_attn_func(q, k, v), expected)
    x = torch.randn(2, 5, 2, 8)  # one tensor, given three times
    for _ in range(2):
        torch.testing.assert_close(flash_attn_func(x, x, x), flash_attn_func(x, x.clone(), x.clone()))


def test_numbers_of_other_types():
    q, k, v = _qkv()
    right: dict[str, Any] = {
        "causal": True,
        "softmax_scale": 1.0,
        "softcap": 2.0,
        "window_size": (1, 0),
        "dropout_p": 0.0,
    }
    expected = flash_attn_func(q, k, v, **right)
    assert torch.equal(expected, flash_attn_func(q, k, v, **right))
    others = {"causal": 1, "softmax_scale": 1, "softcap": 2, "window_size": [1, 0], "dropout_p": None}
    for argument, other in others.items():
        assert torch.equal(flash_attn_func(q, k, v, **{**right, argument: other}), expected)
    wrong = {"causal": "yes", "softmax_scale": "1", "softcap": [2.0], "window_size": (1.0, 0), "dropout_p": 2.0}
    for argument, other in wrong.items():
        with pytest.raises((ValueError, TypeError), match=argument):
            flash_attn_func(q, k, v, **{**right, argument: other})
    with pytest.raises(TypeError, match="num_splits"):
        flash_attn_with_kvcache(q, k, v, num_splits=True)
    for argument, tensors in {"q": (q.tolist(), k, v), "k": (q, k.numpy(), v), "v": (q, k, None)}.items():
        with pytest.raises(TypeError, match=rf"^{argument}\b"):
            flash_attn_func(*tensors)
    for argument, tensors in {"q": (None, k, v), "k_cache": (q, k.numpy(), v), "v_cache": (q, k, [])}.items():
        with pytest.raises(TypeError, match=argument):
            flash_attn_with_kvcache(*tensors)
    assert len(flash_attn_func(q, k, v, return_attn_probs=True)) == 3
    assert isinstance(flash_attn_func(q, k, v), Tensor)


def test_each_call_asks_for_its_engine(monkeypatch):
    q, k, v = _qkv()
    served = []
    for name in ("tiled", "sdpa_cpu"):
        engine = next(engine for engine in compiled_fa.engines.ENGINES if engine.name == name)

        def forward(problem, name=name, forward=engine.forward):
            served.append(name)
            return forward(problem)

        monkeypatch.setattr(engine, "forward", forward)
        monkeypatch.setattr(engine, "prepared", lambda problem: None)
    compiled_fa.clear_caches()
    for _ in range(2):
        with use_engine("tiled"):
            flash_attn_func(q, k, v)
        flash_attn_func(q, k, v)
        monkeypatch.setenv("COMPILED_FA_ENGINE", "tiled")
        flash_attn_func(q, k, v)
        monkeypatch.delenv("COMPILED_FA_ENGINE")
    assert served == ["tiled", "sdpa_cpu", "tiled"] * 2
    monkeypatch.setenv("COMPILED_FA_ENGINE", "none")
    with pytest.raises(ValueError, match="COMPILED_FA_ENGINE"):
        flash_attn_func(q, k, v)
    compiled_fa.clear_caches()


def test_arguments_are_looked_at_once(monkeypatch):
    looks = []
    options = arguments.options

    def looked(*given):
        looks.append(given)
        return options(*given)

    monkeypatch.setattr(arguments, "options", looked)
    functions: list[Callable[..., Any]] = [flash_attn_func, flash_attn_with_kvcache]
    for call in functions:
        inputs = _qkv()
        compiled_fa.clear_caches()
        looks.clear()
        for _ in range(3):
            call(*inputs)
        assert len(looks) == 1
        views = [torch.empty(2, *x.shape)[1].copy_(x) for x in inputs]  # elsewhere in memory
        assert torch.equal(call(*views), call(*inputs))
        assert len(looks) == 1


def test_values_are_looked_at_every_time():
    q, k_cache, v_cache = torch.randn(2, 1, 2, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    cache_seqlens = torch.tensor([2, 3], dtype=torch.int32)
    for lengths in ([2, 3], [3, 1], [2, 3]):
        cache_seqlens.copy_(torch.tensor(lengths))
        out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=cache_seqlens)
        for n, length in enumerate(lengths):
            alone = flash_attn_func(q[n : n + 1], k_cache[n : n + 1, :length], v_cache[n : n + 1, :length])
            torch.testing.assert_close(out[n : n + 1], alone)
    cache_seqlens[1] = 6
    with pytest.raises(ValueError, match="cache_seqlens"):
        flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=cache_seqlens)


def test_one_length_for_all_rows_is_looked_at_every_time():
    """As a tensor's: calls with two numbers are alike but for them, and an error is the number's own."""
    q, cache = torch.randn(2, 1, 2, 8), torch.randn(2, 2, 6, 2, 8)
    new = torch.randn(2, 2, 1, 2, 8)

    def attend(cache, cache_seqlens):
        return flash_attn_with_kvcache(q, cache[0], cache[1], new[0], new[1], cache_seqlens=cache_seqlens)

    for length in (2, 0, 5, 1, 2):
        expected = cache.clone()
        tensor = torch.full((2,), length, dtype=torch.int32)
        wanted = attend(expected, tensor)
        assert torch.equal(attend(cache, length), wanted)
        assert torch.equal(cache, expected)
    before = cache.clone()
    for wrong, error in ((-1, ValueError), (6, ValueError), (2**40, ValueError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match="cache_seqlens"):
            attend(cache, wrong)
    assert torch.equal(cache, before)
    k_cache, v_cache = cache.unbind(0)
    without = flash_attn_with_kvcache(q, k_cache, v_cache)
    assert torch.equal(without, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=6))
    assert not torch.equal(without, flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=5))


def test_where_pytorch_does_not_tell(function, monkeypatch):
    _, call = function
    q, k, v = _qkv()
    expected = call(q, k, v)
    monkeypatch.setattr(straight, "_able", False)
    assert torch.equal(call(q, k, v), expected)
    assert interface._calls.get((q, k, v), (), lambda: pytest.fail("it is not to be asked")) is None
    assert kvcache._calls.get((q, k, v), (), lambda: pytest.fail("it is not to be asked")) is None


def test_double_backward_is_refused():
    q, k, v = (x.requires_grad_() for x in _qkv())
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        dq.sum().backward()


@pytest.mark.parametrize("sides", [(True, 0), (1, False), (True, False)])
def test_sides_that_are_flags_are_numbers(sides):
    """As the ops' schemas have them: not what is remembered for the equal numbers, or for them."""
    q, k, v = _qkv()
    numbers = tuple(map(int, sides))
    compiled_fa.clear_caches()
    for window_size in (sides, numbers, list(sides), list(numbers)):
        out = flash_attn_func(q, k, v, window_size=window_size)
        assert torch.equal(out, flash_attn_func(q, k, v.clone().requires_grad_(), window_size=numbers))
        assert torch.equal(flash_attn_with_kvcache(q, k, v, window_size=window_size), out)


def test_numbers_of_more_than_64_bits_are_refused():
    q, k, v = _qkv()
    for call in (flash_attn_func, flash_attn_with_kvcache):
        for window_size in ((2**63, 0), (0, 2**70), [2**70, 0]):
            with pytest.raises(ValueError, match="window_size must be a number of 64 bits"):
                call(q, k, v, window_size=window_size)
    with pytest.raises(ValueError, match="num_splits must be a number of 64 bits"):
        flash_attn_with_kvcache(q, k, v, num_splits=2**70)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    for lengths in ((2**70, 5), (5, -(2**70))):
        with pytest.raises(ValueError, match=r"max_seqlen_. must be a number of 64 bits"):
            flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens, cu_seqlens, *lengths)
    with pytest.raises(ValueError, match="cache_seqlens must be a number of 32 bits"):
        flash_attn_with_kvcache(q.requires_grad_(), k, v, cache_seqlens=2**40)


@pytest.mark.parametrize("call", [flash_attn_func, flash_attn_with_kvcache])
def test_fake_tensors_of_symbolic_sizes(call):
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        sizes = [DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]
        dynamic: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(sizes)
        q, k, v = (mode.from_tensor(x, symbolic_context=dynamic) for x in _qkv())
        assert call(q, k, v).shape[2:] == (2, 8)


def test_a_profiler_of_all_threads_sees_every_call(function):
    name, call = function
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=everywhere) as profile:
        call(*_qkv())
    assert f"compiled_fa::{name}" in {event.key for event in profile.key_averages()}
