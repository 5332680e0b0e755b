"""Dropout where backward recomputes forward: it drops what forward dropped, and compiled code what eager code drops."""

import functools
import subprocess
import sys

import pytest
import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
from support import cumulative
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from compiled_fa import flash_attn_func, flash_attn_varlen_func

BACKENDS = ["inductor", "aot_eager", "aot_eager_decomp_partition"]


def layer(q, k, v):
    return flash_attn_func(q.sin(), k, v, dropout_p=0.5).cos()


def two_layers(q, k, v):
    return layer(layer(q, k, v), v, k)


def packed_layer(q, k, v):
    lengths = cumulative([q.shape[1]]).to(q.device)
    return flash_attn_varlen_func(q[0], k[0], v[0], lengths, lengths, q.shape[1], q.shape[1], dropout_p=0.5).cos()


def checkpointed(q, k, v):
    return checkpoint(two_layers, q, k, v, use_reentrant=False)


def selectively(choose):
    contexts = functools.partial(create_selective_checkpoint_contexts, choose)

    def run(q, k, v):
        return checkpoint(two_layers, q, k, v, use_reentrant=False, context_fn=contexts)

    return run


def save_attention(context, op, *arguments, **options):
    ours = op is torch.ops.compiled_fa.attention.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


def prefer_to_save(context, op, *arguments, **options):
    return CheckpointPolicy.PREFER_SAVE


FUNCTIONS = {
    "one layer": layer,
    "two layers": two_layers,
    "varlen": packed_layer,
    "checkpoint": checkpointed,
    "attention saved": selectively(save_attention),
    "saving preferred": selectively(prefer_to_save),
}


def out_and_gradients(function, inputs, between=lambda: None):
    for x in inputs:
        x.grad = None
    torch.manual_seed(3)
    out = function(*inputs)
    between()
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def torchs_random_numbers(budget):
    """Without recomputation Inductor has numbers of its own."""
    return inductor_config.patch(fallback_random=budget == 1.0)


@pytest.fixture
def inputs():
    torch._dynamo.reset()
    return [torch.randn(1, 16, 2, 16, requires_grad=True) for _ in range(3)]


def check(function, inputs, eager=None, **options):
    expected = out_and_gradients(eager or function, inputs)
    compiled = torch.compile(function, fullgraph=True, **options)
    found = out_and_gradients(compiled, inputs, lambda: torch.rand(7))  # the generator goes on before backward
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def skip_if_marked_over(name):
    """docs/parallel.md has it."""
    if name == "saving preferred" and torch.__version__ < "2.13":
        pytest.skip("this PyTorch marks over what a checkpoint in a checkpoint has marked")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "budget"),
    # Between 0 and 1 PyTorch itself cannot save an op of several results that must be saved, SDPA's neither.
    [(name, budget) for name in FUNCTIONS for budget in (0.0, 0.5, 1.0) if (name, budget) != ("attention saved", 0.5)],
)
def test_under_a_memory_budget(inputs, name, budget, backend):
    function = FUNCTIONS[name]
    if budget < 1.0:
        skip_if_marked_over(name)
    with functorch_config.patch(activation_memory_budget=budget), torchs_random_numbers(budget):
        check(function, inputs, backend=backend)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_under_aggressive_recomputation(inputs, name):
    skip_if_marked_over(name)
    function = FUNCTIONS[name]
    with functorch_config.patch(aggressive_recomputation=True):
        check(function, inputs)


def test_under_a_wider_choice_of_what_to_recompute(inputs):
    with functorch_config.patch(ban_recompute_not_in_allowlist=False):
        check(layer, inputs)


@pytest.mark.parametrize("budget", [0.0, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_requires_gradients(inputs, budget, backend):
    detached = [x.detach() for x in inputs]
    with functorch_config.patch(activation_memory_budget=budget):
        compiled = torch.compile(two_layers, fullgraph=True, backend=backend)
        assert not torch.equal(compiled(*detached), compiled(*detached))
        with torch.no_grad():
            assert not torch.equal(compiled(*inputs), compiled(*inputs))


def test_what_is_not_compiled_by_torch_compile_is_refused(inputs):
    """Nothing tells its partitioner what to do."""
    with functorch_config.patch(activation_memory_budget=0.0):
        traced = aot_function(layer, nop, partition_fn=min_cut_rematerialization_partition)
        with pytest.raises(NotImplementedError, match="dropout_p must be 0 where AOTAutograd traces without"):
            traced(*inputs)
        layer(*inputs)
    traced = aot_function(layer, nop, partition_fn=min_cut_rematerialization_partition)
    for a, b in zip(out_and_gradients(traced, inputs), out_and_gradients(layer, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_transforms_inside_of_what_recomputes_are_refused(inputs):
    mapped = torch.compile(torch.func.vmap(layer, randomness="same"), fullgraph=True, backend="aot_eager")
    inputs = [x[None] for x in inputs]
    mapped(*inputs)
    torch._dynamo.reset()
    with functorch_config.patch(activation_memory_budget=0.0), pytest.raises(Exception, match="func transform"):
        mapped(*inputs)


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"), reason="newer than this torch"
)
def test_in_a_region_of_no_budget(inputs):
    def region(q, k, v):
        with torch.autograd.graph.region_activation_memory_budget(0.0):
            return layer(q, k, v)

    check(region, inputs, layer)


@pytest.mark.parametrize("budget", [0.0, 1.0])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_compiled_inside_of_eager_checkpointing(inputs, use_reentrant, budget):
    """With use_reentrant forward runs without gradients, in another graph than its repetition."""
    compiled = torch.compile(two_layers, fullgraph=True)
    expected = out_and_gradients(two_layers, inputs)
    with functorch_config.patch(activation_memory_budget=budget), torchs_random_numbers(budget):
        found = out_and_gradients(lambda *x: checkpoint(compiled, *x, use_reentrant=use_reentrant), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_every_call_draws(inputs):
    """Also where two layers draw alike, and where a graph is called twice before the first backward."""
    q, k, v = inputs
    compiled = torch.compile(lambda *x: (layer(*x), layer(*x)), fullgraph=True)
    with functorch_config.patch(activation_memory_budget=0.0):
        torch.manual_seed(0)
        first, second = compiled(q, k, v), compiled(q, k, v)
        torch.manual_seed(0)
        expected = [layer(q, k, v) for _ in range(4)]
    found = [*first, *second]
    assert len({float(out.detach().sum()) for out in found}) == 4
    for out, reference in zip(found, expected, strict=True):
        for a, b in zip(
            *(torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (out, reference)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [0.0, 1.0])
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_draws_by_randint(strict, budget):
    class Model(torch.nn.Module):
        def forward(self, q):
            return flash_attn_func(q, q, q, dropout_p=0.5)

    q = torch.randn(1, 5, 2, 4, requires_grad=True)
    with functorch_config.patch(activation_memory_budget=budget):
        program = torch.export.export(Model(), (q,), strict=strict)
    assert "randint" in str(program.graph)
    assert "checkpoint" not in str(program.graph)
    torch.manual_seed(1)
    found = program.module()(q)
    torch.manual_seed(1)
    assert torch.equal(found, flash_attn_func(q, q, q, dropout_p=0.5))


def test_importing_the_package_imports_no_compiler():
    """To import Dynamo takes longer than to import all else."""
    program = "import sys, torch; before = set(sys.modules); import compiled_fa; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "compiled_fa.seed" in done.stdout.split()
    assert not {"torch._dynamo", "torch._inductor", "sympy"} & set(done.stdout.split())
