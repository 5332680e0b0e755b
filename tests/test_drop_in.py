"""This package as flash_attn: the three ways in, what is found there, and what is said about the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import shutil
import subprocess
import sys
import sysconfig
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import compiled_fa
from compiled_fa import drop_in, run
from compiled_fa.drop_in import finder, late, present, refused, wheel
from compiled_fa.drop_in.__main__ import main

ROOT = Path(compiled_fa.__file__).parent.parent
REAL = present.on_path()

pytestmark = pytest.mark.skipif(REAL is not None, reason=f"there is {REAL}")

TAIL = "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
TAIL += "deterministic=False, return_attn_probs=False"
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SCORES = "dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes"
GRADIENTS = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
# As flash_attn has them: callers look for arguments by name and by place.
SIGNATURES = {
    "flash_attn.flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn.flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn.flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn.flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {TAIL}, block_table=None",
    "flash_attn.flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {TAIL}",
    "flash_attn.flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn.flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
        "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
        "return_softmax_lse=False"
    ),
    "flash_attn.flash_attn_interface._flash_attn_forward": f"q, k, v, {SCORES}, return_softmax",
    "flash_attn.flash_attn_interface._wrapped_flash_attn_forward": f"q, k, v, {SCORES}, return_softmax",
    "flash_attn.flash_attn_interface._flash_attn_backward": f"{GRADIENTS}, {SCORES}, deterministic, rng_state=None",
    "flash_attn.flash_attn_interface._wrapped_flash_attn_backward": (
        f"{GRADIENTS}, {SCORES}, deterministic, rng_state=None"
    ),
    "flash_attn.flash_attn_interface._flash_attn_varlen_forward": (
        f"q, k, v, {LENGTHS}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, "
        "zero_tensors=False, num_splits=0"
    ),
    "flash_attn.flash_attn_interface._flash_attn_varlen_backward": (
        f"{GRADIENTS}, {LENGTHS}, {SCORES}, deterministic, rng_state=None, zero_tensors=False"
    ),
    "flash_attn.flash_attn_interface._get_block_size_n": "device, head_dim, is_dropout, is_causal",
    "flash_attn.bert_padding.pad_input": "hidden_states, indices, batch, seqlen",
    "flash_attn.bert_padding.unpad_input": "hidden_states, attention_mask, unused_mask=None",
    "flash_attn.bert_padding.unpad_input_for_concatenated_sequences": "hidden_states, attention_mask_in_length",
    "flash_attn.bert_padding.index_first_axis": "input, indices",
    "flash_attn.bert_padding.index_put_first_axis": "values, indices, first_axis_dim",
    "flash_attn.ops.triton.layer_norm.layer_norm_fn": (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, "
        "prenorm=False, residual_in_fp32=False, zero_centered_weight=False, is_rms_norm=False, "
        "return_dropout_mask=False, out_dtype=None, out=None, residual_out=None"
    ),
    "flash_attn.ops.triton.layer_norm.rms_norm_fn": (
        "x, weight, bias, residual=None, x1=None, weight1=None, bias1=None, eps=1e-06, dropout_p=0.0, rowscale=None, "
        "prenorm=False, residual_in_fp32=False, zero_centered_weight=False, return_dropout_mask=False, out_dtype=None, "
        "out=None, residual_out=None"
    ),
    "flash_attn.ops.layer_norm.dropout_add_layer_norm": (
        "x0, residual, weight, bias, dropout_p, epsilon, rowscale=None, layerscale=None, prenorm=False, "
        "residual_in_fp32=False, return_dropout_mask=False"
    ),
    "flash_attn.ops.rms_norm.rms_norm": "x, weight, epsilon",
    "flash_attn.ops.activations.swiglu": "x, y",
    "flash_attn.ops.triton.cross_entropy.cross_entropy_loss": (
        "logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
        "ignore_index=-100, inplace_backward=False, process_group=None"
    ),
    "flash_attn.ops.fused_dense.fused_dense_func": (
        "x, weight, bias=None, return_residual=False, process_group=None, sequence_parallel=True"
    ),
    "flash_attn.layers.rotary.apply_rotary_emb": (
        "x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None"
    ),
    "flash_attn.layers.rotary.apply_rotary_emb_qkv_": (
        "qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, num_heads_q=None"
    ),
    "flash_attn.layers.rotary.apply_rotary_emb_kv_": "kv, cos, sin, interleaved=False, seqlen_offsets=0",
    "flash_attn.ops.triton.rotary.apply_rotary": (
        "x, cos, sin, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None, interleaved=False, inplace=False, "
        "conjugate=False"
    ),
}
FACTORY = "device=None, dtype=None"
CLASSES = {
    "flash_attn.modules.mha.FlashSelfAttention": (
        "causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1), alibi_slopes=None, "
        "deterministic=False"
    ),
    "flash_attn.modules.mha.FlashCrossAttention": (
        "causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None, window_size=(-1, -1), "
        "deterministic=False"
    ),
    "flash_attn.modules.mha.MHA": (
        "embed_dim, num_heads, num_heads_kv=None, cross_attn=False, qkv_proj_bias=True, out_proj_bias=True, "
        "dropout=0.0, softmax_scale=None, causal=False, layer_idx=None, dwconv=False, rotary_emb_dim=0, "
        "rotary_emb_base=10000.0, rotary_emb_scale_base=None, rotary_emb_interleaved=False, use_alibi=False, "
        "window_size=(-1, -1), fused_bias_fc=False, use_flash_attn=False, return_residual=False, checkpointing=False, "
        f"{FACTORY}"
    ),
    "flash_attn.losses.cross_entropy.CrossEntropyLoss": (
        "ignore_index=-100, reduction='mean', label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, "
        "inplace_backward=False, process_group=None, return_z_loss=False"
    ),
    "flash_attn.layers.rotary.RotaryEmbedding": ("dim, base=10000.0, interleaved=False, scale_base=None, device=None"),
    "flash_attn.models.gpt.GPTLMHeadModel": f"config, process_group=None, {FACTORY}",
    "flash_attn.ops.triton.layer_norm.RMSNorm": (
        f"hidden_size, eps=1e-05, dropout_p=0.0, zero_centered_weight=False, {FACTORY}"
    ),
    "flash_attn.ops.fused_dense.FusedMLP": (
        "in_features, hidden_features=None, out_features=None, bias1=True, bias2=True, activation='gelu_approx', "
        f"return_residual=False, checkpoint_lvl=0, heuristic='auto', {FACTORY}"
    ),
}
OLD = {
    "flash_attn.flash_attn_interface._flash_attn_forward": (
        "q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax"
    ),
    "flash_attn.flash_attn_interface._flash_attn_backward": (
        f"{GRADIENTS}, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, "
        "rng_state=None"
    ),
    "flash_attn.flash_attn_interface._flash_attn_varlen_backward": (
        f"{GRADIENTS}, {LENGTHS}, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, "
        "rng_state=None"
    ),
    "flash_attn.bert_padding.unpad_input": "hidden_states, attention_mask",
}


@pytest.fixture(params=[drop_in.PROFILES[0]])
def installed(request):
    drop_in.install(request.param)
    try:
        yield importlib.import_module("flash_attn")
    finally:
        drop_in.uninstall()


old = pytest.mark.parametrize("installed", ["2.6.3"], indirect=True)


def named(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def plain_signature(function):
    """Names, kinds and defaults, without annotations."""
    signature = inspect.signature(function)
    parameters = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(parameters))


# In a program


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_are_plain_and_have_flash_attns_signatures(installed, name):
    function = named(name)
    assert isinstance(function, types.FunctionType)
    assert not hasattr(function, "__wrapped__")
    assert plain_signature(function) == f"({SIGNATURES[name]})"
    spec = inspect.getfullargspec(function)
    assert (spec.varargs, spec.varkw, spec.kwonlyargs) == (None, None, [])


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_flash_attns_arguments(installed, name):
    assert plain_signature(named(name)) == f"({CLASSES[name]})"


@old
@pytest.mark.parametrize("name", OLD)
def test_signatures_of_2_6_3(installed, name):
    assert plain_signature(named(name)) == f"({OLD[name]})"


def test_modules_have_real_specs_and_the_distribution_its_metadata(installed):
    spec: Any = importlib.util.find_spec("flash_attn")
    assert installed.__spec__.name == spec.name == "flash_attn"
    assert spec.submodule_search_locations
    assert Path(spec.origin).is_file()
    assert importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn") == "2.7.4"
    assert installed.__version__ == "2.7.4"
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    assert importlib.metadata.metadata("flash-attn")["Name"] == "flash-attn"
    assert "flash-attn" in {found.metadata["Name"] for found in importlib.metadata.distributions()}
    assert list(importlib.metadata.distributions(name="flash-attn-4")) == []
    assert importlib.import_module("flash_attn.flash_attn_interface").flash_attn_func is compiled_fa.flash_attn_func


def test_every_file_can_be_imported_and_has_what_it_lists(installed):
    top = Path(installed.__file__).parent
    for file in sorted(top.rglob("*.py")):
        parts = file.relative_to(top.parent).with_suffix("").parts
        module: Any = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        assert all(hasattr(module, name) for name in module.__all__)
        assert module.__spec__.origin == str(file)


def test_what_is_not_offered_says_why_and_versions_3_and_4_are_not_here(installed):
    for name in ("flash_attn.utils.benchmark", "flash_attn.layers.patch_embed", "flash_attn.no_such_module"):
        with pytest.raises(ImportError, match=r"is not offered by compiled_fa, which is flash_attn here: "):
            importlib.import_module(name)
    for name in ("flash_attn.cute", "flash_attn_interface", "flash_attn_3", "flash_attn_2_cuda"):
        assert importlib.util.find_spec(name) is None
    with pytest.raises(ImportError, match="No module named"):
        importlib.import_module("flash_attn.cute")
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        installed.no_such_name  # noqa: B018
    assert getattr(installed, "no_such_name", None) is None


@pytest.mark.parametrize("module", refused.NAMES)
def test_names_that_are_not_offered_say_why(installed, module):
    for name in refused.NAMES[module]:
        with pytest.raises(ImportError, match=f"{module}.{name} is not offered by compiled_fa, .*: "):
            exec(f"from {module} import {name}")


def test_nothing_is_both_offered_and_refused(installed):
    for module in refused.MODULES:
        with pytest.raises(ImportError):
            importlib.import_module(module)
    for module, names in refused.NAMES.items():
        assert not set(names) & set(importlib.import_module(module).__all__)


@old
def test_the_profile_of_2_6_3_has_its_results(installed):
    assert installed.__version__ == importlib.metadata.version("flash-attn") == "2.6.3"
    private = importlib.import_module("flash_attn.flash_attn_interface")
    q = torch.randn(1, 5, 2, 8)
    eight = private._flash_attn_forward(q, q, q, 0.0, 0.3, True, (-1, -1), 0.0, None, False)
    assert len(eight) == 8
    out, lse = eight[0], eight[5]
    assert torch.equal(out, compiled_fa.flash_attn_func(q, q, q, softmax_scale=0.3, causal=True))
    dq, dk, dv = (torch.empty_like(q) for _ in range(3))
    options = (0.0, 0.3, True, (-1, -1), 0.0, None, False)
    found = private._flash_attn_backward(out, q, q, q, out, lse, dq, dk, dv, *options)
    assert found[0] is dq
    sums = torch.tensor([0, 5], dtype=torch.int32)
    packed = private._flash_attn_varlen_forward(q[0], q[0], q[0], sums, sums, 5, 5, 0.0, 0.3, True)
    assert len(packed) == 8
    assert torch.allclose(packed[0], out[0], atol=1e-6)
    gradients = [torch.empty_like(q[0]) for _ in range(3)]
    private._flash_attn_varlen_backward(
        out[0], q[0], q[0], q[0], out[0], packed[5], *gradients, sums, sums, 5, 5, *options
    )
    for gradient, wanted in zip(gradients, (dq, dk, dv), strict=True):
        assert torch.allclose(gradient, wanted[0], atol=1e-5)
    by_extension = private.flash_attn_cuda.fwd(q, q, q, None, None, 0.0, 0.3, True, -1, -1, 0.0, False, None)
    assert len(by_extension) == 8
    assert torch.equal(by_extension[5], lse)
    padding = importlib.import_module("flash_attn.bert_padding")
    assert len(padding.unpad_input(torch.randn(2, 3, 4), torch.ones(2, 3))) == 4


def test_installing_twice_is_once_and_uninstalling_leaves_nothing():
    before = list(sys.meta_path)
    drop_in.install()
    drop_in.install()
    importlib.import_module("flash_attn.bert_padding")
    with pytest.raises(RuntimeError, match=r"compiled_fa as flash_attn 2.7.4 .* uninstall it before profile '2.6.3'"):
        drop_in.install("2.6.3")
    drop_in.uninstall()
    drop_in.uninstall()
    assert sys.meta_path == before
    assert not [name for name in sys.modules if name.split(".")[0] == "flash_attn"]
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(ValueError, match=r"profile must be one of \['2.7.4', '2.6.3'\], got '3'"):
        drop_in.install("3")


@pytest.mark.parametrize("imported", [False, True])
def test_a_real_flash_attn_is_named_and_left_alone(tmp_path, monkeypatch, capsys, imported):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("__version__ = '2.8.3'\n")
    info = tmp_path / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    if imported:
        module = importlib.import_module("flash_attn")
        del sys.modules["flash_attn"]
        monkeypatch.setitem(sys.modules, "flash_attn", module)
    with pytest.raises(RuntimeError, match=rf"a real flash_attn 2.8.3 \({tmp_path}"):
        drop_in.install()
    with pytest.raises(RuntimeError, match=r"a real flash_attn 2\.8\.3"):
        wheel.install()
    assert main(["--status"]) == 1
    assert main(["--install"]) == 1
    assert run.main(["script.py"]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("a real flash_attn 2.8.3")
    assert told.err.count("a real flash_attn 2.8.3") == 2


def test_metadata_alone_is_a_real_one_too(tmp_path, monkeypatch):
    info = tmp_path / "flash_attn-2.8.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"a real flash_attn 2.8.3 \(its metadata, without a package\)"):
        drop_in.install()


def test_apply_rotary_turns_in_place_and_its_conjugate_turns_back(installed):
    apply_rotary = named("flash_attn.ops.triton.rotary.apply_rotary")
    x, angles = torch.randn(7, 2, 8), torch.rand(9, 3)
    sums = torch.tensor([0, 5, 7], dtype=torch.int32)
    options = (angles.cos(), angles.sin(), 1, sums, 5, True)
    turned = apply_rotary(x, *options)
    assert torch.equal(
        turned, named("flash_attn.layers.rotary.apply_rotary_emb")(x, *options[:2], True, False, 1, sums)
    )
    assert torch.allclose(apply_rotary(turned, *options, conjugate=True), x, atol=1e-6)
    given = x.clone()
    assert apply_rotary(given, *options, inplace=True) is given
    assert torch.equal(given, turned)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_by_the_angles_of_each_token(installed, interleaved):
    rotary = importlib.import_module("flash_attn.layers.rotary")
    x, angles = torch.randn(2, 5, 3, 8), torch.rand(2, 5, 4)
    found = rotary.apply_rotary_emb_torch(x, angles.cos(), angles.sin(), interleaved)
    both = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    cos, sin = both.cos()[:, :, None], both.sin()[:, :, None]
    assert torch.allclose(found, x * cos + rotary.rotate_half(x, interleaved) * sin, atol=1e-6)
    plain = rotary.apply_rotary_emb(x[:1], angles[0].cos(), angles[0].sin(), interleaved)
    assert torch.equal(found[:1], plain)


@pytest.mark.parametrize("installed", drop_in.PROFILES, indirect=True)
def test_the_extension_decodes(installed):
    gpu = named("flash_attn.flash_attn_interface.flash_attn_cuda")
    q, cache = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 9, 2, 8)
    new = torch.randn(2, 2, 1, 2, 8)
    lengths = torch.tensor([3, 8], dtype=torch.int32)
    mine, theirs = cache.clone(), cache.clone()
    out = torch.empty_like(q)
    found = gpu.fwd_kvcache(
        q, *mine, *new, lengths, None, None, None, None, None, None, out, 0.4, True, 4, 0, 0.0, False, 0
    )
    wanted = installed.flash_attn_with_kvcache(
        q, *theirs, *new, cache_seqlens=lengths, softmax_scale=0.4, causal=True, window_size=(4, 0),
        return_softmax_lse=True,
    )  # fmt: skip
    assert found[0] is out
    assert torch.equal(out, wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, cache)


# Clients imported before


def test_what_transformers_remembers_is_cleared(monkeypatch):
    name = "transformers.utils.import_utils"
    module = types.ModuleType(name)
    code = "def found(): return importlib.util.find_spec('flash_attn') is not None"
    exec(f"import functools, importlib.util\n@functools.cache\n{code}\n", vars(module))
    monkeypatch.setitem(sys.modules, name, module)
    assert not module.found()
    drop_in.install()
    assert module.found()
    drop_in.uninstall()
    assert not module.found()


def test_diffusers_is_told_until_it_has_decided(monkeypatch):
    module = types.ModuleType("diffusers.utils.import_utils")
    vars(module).update(_flash_attn_available=False, _flash_attn_version="N/A")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    drop_in.install()
    assert (module._flash_attn_available, module._flash_attn_version) == (True, "2.7.4")
    drop_in.uninstall()
    assert not module._flash_attn_available
    for name in late.DECIDED:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        words = rf"{name} looked for flash_attn when imported.*compiled_fa.drop_in.install\(\) before that import"
        with pytest.warns(RuntimeWarning, match=words):
            drop_in.install()
        drop_in.uninstall()
        monkeypatch.delitem(sys.modules, name)


def test_transformers_itself_finds_it_late():
    utils = pytest.importorskip("transformers.utils.import_utils")
    assert not utils.is_flash_attn_2_available()
    drop_in.install()
    try:
        assert importlib.metadata.version("flash_attn") == "2.7.4"
        assert not utils.is_flash_attn_4_available()
        assert utils.is_flash_attn_2_available() == torch.cuda.is_available()
    finally:
        drop_in.uninstall()


# A program and all that it starts

PROGRAM = """
import importlib.metadata, multiprocessing, subprocess, sys
CHILD = "import importlib.metadata as m, importlib.util as u; "
CHILD += "print(u.find_spec('flash_attn').origin, m.version('flash-attn'))"
def found(_):
    import importlib.util
    return importlib.util.find_spec("flash_attn").origin, importlib.metadata.version("flash_attn")
if __name__ == "__main__":
    print(sys.argv[1:], *found(0))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.map(found, [0])[0])
    print(subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout, end="")
    sys.exit(3)
"""


@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
def test_a_program_and_its_children_find_it(tmp_path, as_module):
    (tmp_path / "program.py").write_text(PROGRAM)
    program = ["-m", "program"] if as_module else [str(tmp_path / "program.py")]
    line = [sys.executable, "-m", "compiled_fa.run", "--profile", "2.6.3", *program, "-m", "x", "--profile"]
    environment = {"PYTHONPATH": f"{ROOT}", "PATH": ""}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    origin = present.folder("2.6.3") / "flash_attn" / "__init__.py"
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == [f"['-m', 'x', '--profile'] {origin} 2.6.3", *[f"{origin} 2.6.3"] * 2]


@pytest.mark.parametrize("arguments", [[], ["--profile", "2.7.4"], ["-m"]])
def test_run_wants_a_program(arguments, capsys):
    with pytest.raises(SystemExit) as status:
        run.main(arguments)
    assert status.value.code == 2
    assert "usage: python -m compiled_fa.run" in capsys.readouterr().err


def test_running_adds_to_pythonpath_and_keeps_the_interpreters_options(monkeypatch):
    started = []
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(os, "execv", lambda path, line: started.append((path, line)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "error", "-m", "compiled_fa.run", "a.py"])
    run.main(["a.py", "--help", "-m"])
    assert started == [(sys.executable, [sys.executable, "-W", "error", "a.py", "--help", "-m"])]
    assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(present.folder("2.7.4")), "elsewhere"]


# An environment


def test_the_wheel_is_installed_found_and_removed_by_pip(tmp_path):
    """In an environment of its own, which has this one's packages beside its own."""
    if not any(importlib.metadata.distributions(name="pip")):
        pytest.skip("there is no pip")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    scheme = sysconfig.get_path("purelib", "venv", {"base": str(tmp_path)})
    Path(scheme, "ours.pth").write_text(f"{ROOT}\n" + "\n".join(p for p in sys.path if p.endswith("-packages")))
    python = str(Path(sysconfig.get_path("scripts", "venv", {"base": str(tmp_path)}), "python"))

    def call(*line: str, code: int = 0) -> str:
        done = subprocess.run([python, *line], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    assert call("-m", "compiled_fa.drop_in", "--status", code=1).startswith("no flash_attn here; ")
    assert "installed: compiled_fa as flash_attn 2.7.4" in call("-m", "compiled_fa.drop_in", "--install")
    assert call("-m", "compiled_fa.drop_in", "--status").endswith("; pip uninstall flash-attn removes it\n")
    call("-m", "pip", "install", "--no-index", "--no-deps", "flash-attn>=2.5")  # is satisfied
    code = (
        "import multiprocessing, importlib.metadata as m, importlib.util as u; import flash_attn; "
        "from flash_attn.bert_padding import pad_input; "
        "print(flash_attn.__file__, m.version('flash_attn'), u.find_spec('flash_attn.cute'))"
    )
    assert call("-c", code).split() == [str(Path(scheme, "flash_attn", "__init__.py")), "2.7.4", "None"]
    Path(scheme, "flash_attn", "bert_padding.py").write_text("")
    assert "of another version of compiled_fa" in call("-m", "compiled_fa.drop_in", "--status", code=1)
    call("-m", "pip", "uninstall", "--yes", "flash-attn")
    assert not Path(scheme, "flash_attn").exists()


@pytest.mark.parametrize("profile", drop_in.PROFILES)
def test_a_wheel_has_every_file_once_and_a_record_of_it(tmp_path, capsys, profile):
    assert main(["--wheel", str(tmp_path / "new"), "--profile", profile]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.name == f"flash_attn-{profile}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        record = archive.read(f"flash_attn-{profile}.dist-info/RECORD").decode().splitlines()
        assert f'__version__ = "{profile}"' in archive.read("flash_attn/__init__.py").decode()
        assert f"Version: {profile}\n" in archive.read(f"flash_attn-{profile}.dist-info/METADATA").decode()
    assert sorted(line.split(",")[0] for line in record) == sorted(names)
    assert len(set(names)) == len(names)
    assert {"flash_attn/py.typed", "flash_attn/bert_padding.py"} <= set(names)


def test_a_distribution_of_this_package_has_the_folders(tmp_path):
    """What setuptools would pack: the metadata that lies in them, too."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("there is no setuptools")
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:  # as pyproject.toml wants it
        pytest.skip("this setuptools is older than the one that builds the package")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "compiled_fa", source / "compiled_fa", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    line = [
        sys.executable,
        "-c",
        "import setuptools; setuptools.setup()",
        "build_py",
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    subprocess.run(line, cwd=source, check=True, capture_output=True)
    for profile in drop_in.PROFILES:
        folder = present.folder(profile)
        files = {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}
        built = tmp_path / "lib" / folder.relative_to(ROOT)
        assert {p.relative_to(built) for p in built.rglob("*") if p.is_file()} == files
        assert Path(f"flash_attn-{profile}.dist-info", "METADATA") in files


def test_nobody_pays_who_does_not_use_it():
    code = "import sys, compiled_fa; sys.exit(any('drop_in' in m or m == 'compiled_fa.padding' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
    assert not any(isinstance(found, finder.Finder) for found in sys.meta_path)
