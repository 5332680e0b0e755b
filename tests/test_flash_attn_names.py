"""Every public name of flash_attn 2.8: served, or refused for a reason; and the pages say what the code does."""

import importlib.util
import re

import pytest

from compiled_fa import compat
from compiled_fa.drop_in import present, refused
from tools import flash_attn_names

# Functions, classes and other public names of its modules.
NAMES = {
    "flash_attn": (
        "flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func flash_attn_varlen_func "
        "flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func flash_attn_with_kvcache"
    ),
    "flash_attn.bert_padding": (
        "IndexFirstAxis IndexFirstAxisResidual IndexPutFirstAxis index_first_axis index_first_axis_residual "
        "index_put_first_axis pad_input unpad_input unpad_input_for_concatenated_sequences"
    ),
    "flash_attn.flash_attn_interface": (
        "FlashAttnFunc FlashAttnKVPackedFunc FlashAttnQKVPackedFunc FlashAttnVarlenFunc FlashAttnVarlenKVPackedFunc "
        "FlashAttnVarlenQKVPackedFunc flash_attn_func flash_attn_kvpacked_func flash_attn_qkvpacked_func "
        "flash_attn_varlen_func flash_attn_varlen_kvpacked_func flash_attn_varlen_qkvpacked_func "
        "flash_attn_with_kvcache maybe_contiguous round_multiple"
    ),
    "flash_attn.layers.rotary": (
        "ApplyRotaryEmb ApplyRotaryEmbKV_ ApplyRotaryEmbQKV_ RotaryEmbedding apply_rotary_emb apply_rotary_emb_func "
        "apply_rotary_emb_kv_ apply_rotary_emb_qkv_ apply_rotary_emb_torch rotate_half"
    ),
    "flash_attn.losses.cross_entropy": "CrossEntropyLoss",
    "flash_attn.models.gpt": (
        "GPTLMHeadModel GPTModel GPTPreTrainedModel combine_state_dicts_tp create_block create_mixer_cls "
        "create_mlp_cls remap_state_dict_hf_gpt2 remap_state_dict_megatron shard_state_dict_tp"
    ),
    "flash_attn.modules.block": "Block ParallelBlock",
    "flash_attn.modules.embedding": (
        "BertEmbeddings ColumnParallelEmbedding GPT2Embeddings ParallelGPT2Embeddings VocabParallelEmbedding"
    ),
    "flash_attn.modules.mha": (
        "CrossAttention FlashCrossAttention FlashSelfAttention MHA ParallelMHA SelfAttention get_alibi_slopes"
    ),
    "flash_attn.modules.mlp": "GatedMlp Mlp ParallelGatedMlp ParallelMLP",
    "flash_attn.ops.activations": (
        "FastGeLUFunction GeLUFunction SwiGLUFunction bias_gelu bias_gelu_back bias_gelu_impl fast_gelu_impl "
        "gelu_bwd gelu_fwd relu_bwd sqrelu_bwd sqrelu_fwd swiglu swiglu_bwd swiglu_bwd_codestring swiglu_fwd "
        "swiglu_fwd_codestring"
    ),
    "flash_attn.ops.fused_dense": (
        "ColumnParallelLinear FusedDense FusedDenseFunc FusedMLP FusedMLPFunc ParallelFusedMLP RowParallelLinear "
        "fused_dense_func fused_mlp_func"
    ),
    "flash_attn.ops.layer_norm": (
        "DropoutAddLayerNorm DropoutAddLayerNormFn DropoutAddLayerNormParallelResidualFn "
        "DropoutAddLayerNormSubsetFn dropout_add_layer_norm dropout_add_layer_norm_parallel_residual "
        "dropout_add_layer_norm_subset layer_norm maybe_align"
    ),
    "flash_attn.ops.rms_norm": (
        "DropoutAddRMSNorm RMSNorm dropout_add_rms_norm dropout_add_rms_norm_parallel_residual "
        "dropout_add_rms_norm_subset rms_norm"
    ),
    "flash_attn.ops.triton.cross_entropy": (
        "CrossEntropyLoss cross_entropy_bwd_kernel cross_entropy_fwd_kernel cross_entropy_loss"
    ),
    "flash_attn.ops.triton.layer_norm": (
        "LayerNormFn LayerNormLinearFn RMSNorm layer_norm_fn layer_norm_linear_fn layer_norm_ref maybe_contiguous "
        "maybe_contiguous_lastdim rms_norm_fn rms_norm_ref triton_autotune_configs"
    ),
    "flash_attn.ops.triton.rotary": "apply_rotary rotary_kernel",
}
MODULES = (
    "flash_attn_triton flash_attn_triton_og flash_blocksparse_attention flash_blocksparse_attn_interface "
    "layers.patch_embed models.baichuan models.bert models.bigcode models.btlm models.falcon models.gpt_neox "
    "models.gptj models.llama models.opt models.vit ops.triton.k_activations ops.triton.linear ops.triton.mlp utils "
    "utils.benchmark utils.distributed utils.generation utils.library utils.pretrained utils.testing utils.torch "
    "flash_attn_triton_amd"
)


@pytest.mark.parametrize("module", NAMES)
def test_every_public_name_is_offered_or_refused_for_a_reason(module):
    offered = flash_attn_names.offered(module)
    for name in NAMES[module].split():
        verdict, why = compat.of_name(f"{module}.{name}")
        assert (name in offered) == (verdict != compat.REFUSED)
        assert verdict != compat.REFUSED or why == refused.NAMES[module][name]


def test_nothing_is_refused_that_flash_attn_does_not_have():
    for module, names in refused.NAMES.items():
        known = set(NAMES[module].split())
        unknown = {name for name in names if name not in known}
        assert unknown <= {"ParallelFusedMLP"}, (module, unknown)  # imported there


def test_every_module_is_offered_or_refused():
    for name in MODULES.split():
        assert f"flash_attn.{name}" in refused.MODULES
    packages = {"flash_attn.layers", "flash_attn.losses", "flash_attn.models", "flash_attn.modules", "flash_attn.ops"}
    assert set(flash_attn_names.modules()) == {*NAMES, *packages, "flash_attn.ops.triton"}


def test_the_page_has_the_tables():
    page = flash_attn_names.PAGE.read_text()
    assert flash_attn_names.with_tables(page) == page, "python -m tools.flash_attn_names --write"
    assert page.count(flash_attn_names.END) == 2


def test_tables_say_what_the_code_says(capsys):
    assert flash_attn_names.main([]) == 0
    told = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in told.splitlines()]
    for module, names, state, *_ in (row for row in rows if len(row) == 4 and row[0].startswith("`flash_attn")):
        if names == "all":
            continue
        for name in re.findall(r"`(\w+)`", names):
            assert compat.of_name(f"{module[1:-1]}.{name}")[0] == state


def test_the_page_about_migrating_names_every_profile_and_the_three_ways():
    page = (flash_attn_names.PAGE.parent / "migrating.md").read_text()
    assert set(re.findall(r"2\.\d\.\d", page)) >= set(present.PROFILES)
    for way in (
        "compiled_fa.drop_in.install()",
        "python -m compiled_fa.run",
        "python -m compiled_fa.drop_in --install",
    ):
        assert way in page
    for program in re.findall(r"python -m (compiled_fa[.\w]*)", page):
        assert importlib.util.find_spec(program) is not None
