"""What flash_attn has and we do not offer under its name, and why. docs/flash_attn.md has the same as a table.

Two are passed over in silence: flash_attn.cute and a top-level flash_attn_interface mean FlashAttention 4 and 3 to
those who look for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

LOOKED_FOR = ("flash_attn.cute",)

_PARALLEL = "layers over a process group are left to torch.distributed.tensor.parallel"
_WEIGHTS = "it maps checkpoints of one family of models; transformers loads them, and runs them through flash_attn"
_KERNELS = "kernels of flash_attn that no public function of it calls"
_HELPERS = "a helper of flash_attn's own benchmarks and tests"
_FUSED = "what torch.compile fuses by itself; write it with torch.nn"
_SUBSET = "normalisation of a subset of rows, or of two branches: a kernel that only flash_attn's models use"
_OLD = "flash_attn 1; version 2 has it no more"

MODULES = {
    "flash_attn.flash_attention": _OLD,
    "flash_attn.flash_attn_triton": _KERNELS,
    "flash_attn.flash_attn_triton_amd": "kernels for AMD's GPUs; ours run there through PyTorch",
    "flash_attn.flash_attn_triton_og": _KERNELS,
    "flash_attn.flash_blocksparse_attention": _OLD,
    "flash_attn.flash_blocksparse_attn_interface": _OLD,
    "flash_attn.fused_softmax": _OLD,
    "flash_attn.layers.patch_embed": "a convolution as a matrix product; write it with torch.nn",
    "flash_attn.models.baichuan": _WEIGHTS,
    "flash_attn.models.bert": _WEIGHTS,
    "flash_attn.models.bigcode": _WEIGHTS,
    "flash_attn.models.btlm": _WEIGHTS,
    "flash_attn.models.falcon": _WEIGHTS,
    "flash_attn.models.gpt_neox": _WEIGHTS,
    "flash_attn.models.gptj": _WEIGHTS,
    "flash_attn.models.llama": _WEIGHTS,
    "flash_attn.models.opt": _WEIGHTS,
    "flash_attn.models.vit": _WEIGHTS,
    "flash_attn.ops.triton.k_activations": _KERNELS,
    "flash_attn.ops.triton.linear": _KERNELS,
    "flash_attn.ops.triton.mlp": _KERNELS,
    "flash_attn.utils": _HELPERS,
    "flash_attn.utils.benchmark": _HELPERS,
    "flash_attn.utils.distributed": _PARALLEL,
    "flash_attn.utils.generation": "generation from flash_attn's GPT with its CUDA graphs; transformers generates",
    "flash_attn.utils.library": _HELPERS,
    "flash_attn.utils.pretrained": _WEIGHTS,
    "flash_attn.utils.testing": _HELPERS,
    "flash_attn.utils.torch": _HELPERS,
}

_AUTOGRAD = "autograd differentiates the forward"

_CLASSES = "the autograd function behind a function: call that"

NAMES: dict[str, dict[str, str]] = {
    "flash_attn.flash_attn_interface": {
        **dict.fromkeys(
            (
                "FlashAttnFunc",
                "FlashAttnKVPackedFunc",
                "FlashAttnQKVPackedFunc",
                "FlashAttnVarlenFunc",
                "FlashAttnVarlenKVPackedFunc",
                "FlashAttnVarlenQKVPackedFunc",
            ),
            _CLASSES,
        ),
        **dict.fromkeys(("maybe_contiguous", "round_multiple"), _HELPERS),
    },
    "flash_attn.bert_padding": dict.fromkeys(
        ("IndexFirstAxis", "IndexFirstAxisResidual", "IndexPutFirstAxis"), _CLASSES
    ),
    "flash_attn.layers.rotary": dict.fromkeys(("ApplyRotaryEmb", "ApplyRotaryEmbKV_", "ApplyRotaryEmbQKV_"), _CLASSES),
    "flash_attn.ops.triton.cross_entropy": {
        "CrossEntropyLoss": _CLASSES,
        **dict.fromkeys(("cross_entropy_bwd_kernel", "cross_entropy_fwd_kernel"), _KERNELS),
    },
    "flash_attn.ops.triton.rotary": {"rotary_kernel": _KERNELS},
    "flash_attn.modules.mha": dict.fromkeys(("ParallelMHA",), _PARALLEL),
    "flash_attn.modules.mlp": dict.fromkeys(("ParallelMLP", "ParallelGatedMlp", "ParallelFusedMLP"), _PARALLEL),
    "flash_attn.modules.block": {"ParallelBlock": "attention and MLP side by side, GPT-J's and GPT-NeoX's kind"},
    "flash_attn.modules.embedding": {
        "BertEmbeddings": "it is part of flash_attn's BERT, which is not served",
        **dict.fromkeys(
            ("VocabParallelEmbedding", "ColumnParallelEmbedding", "ParallelGPT2Embeddings"),
            _PARALLEL,
        ),
    },
    "flash_attn.models.gpt": {
        "GPTPreTrainedModel": _WEIGHTS,
        "remap_state_dict_hf_gpt2": _WEIGHTS,
        "remap_state_dict_megatron": _WEIGHTS,
        **dict.fromkeys(("shard_state_dict_tp", "combine_state_dicts_tp"), _PARALLEL),
    },
    "flash_attn.ops.fused_dense": {
        **dict.fromkeys(("FusedDenseFunc", "FusedMLPFunc"), _CLASSES),
        **dict.fromkeys(("ColumnParallelLinear", "ParallelFusedMLP", "RowParallelLinear"), _PARALLEL),
    },
    "flash_attn.ops.layer_norm": {
        **dict.fromkeys(("dropout_add_layer_norm_parallel_residual", "dropout_add_layer_norm_subset"), _SUBSET),
        **dict.fromkeys(
            ("DropoutAddLayerNormFn", "DropoutAddLayerNormParallelResidualFn", "DropoutAddLayerNormSubsetFn"), _CLASSES
        ),
        "maybe_align": _HELPERS,
    },
    "flash_attn.ops.rms_norm": dict.fromkeys(
        (
            "dropout_add_rms_norm_subset",
            "dropout_add_rms_norm_parallel_residual",
        ),
        _SUBSET,
    ),
    "flash_attn.ops.triton.layer_norm": {
        **dict.fromkeys(
            (
                "layer_norm_ref",
                "maybe_contiguous",
                "maybe_contiguous_lastdim",
                "rms_norm_ref",
                "triton_autotune_configs",
            ),
            _HELPERS,
        ),
        **dict.fromkeys(("LayerNormFn", "LayerNormLinearFn"), _CLASSES),
        "layer_norm_linear_fn": _FUSED,
    },
    "flash_attn.ops.activations": {
        **dict.fromkeys(("bias_gelu_back", "gelu_bwd", "relu_bwd", "sqrelu_bwd", "swiglu_bwd"), _AUTOGRAD),
        **dict.fromkeys(("bias_gelu_impl", "fast_gelu_impl", "swiglu_fwd"), "use bias_gelu, gelu_fwd and swiglu"),
        **dict.fromkeys(("FastGeLUFunction", "GeLUFunction", "SwiGLUFunction"), _CLASSES),
        **dict.fromkeys(("swiglu_bwd_codestring", "swiglu_fwd_codestring"), _KERNELS),
    },
}


ELSEWHERE = {
    "flash_attn.cute": "it is FlashAttention 4",
    "flash_attn_interface": "at the top level it is FlashAttention 3",
    "flash_attn_3": "it is FlashAttention 3",
    "flash_attn_2_cuda": "the compiled extension itself; flash_attn.flash_attn_interface has flash_attn_gpu",
}


def of_module(name: str) -> str:
    """What is said of a module of flash_attn that is not offered."""
    reason = MODULES.get(name, "flash_attn 2.8 has no such module")
    return f"{name} is not offered by compiled_fa, which is flash_attn here: {reason}; see docs/flash_attn.md"


def of_name(module: str, name: str) -> str | None:
    """What is said of a name that an offered module lacks; None: flash_attn has none of that name either."""
    reason = NAMES.get(module, {}).get(name)
    if reason is None:
        return None
    return f"{module}.{name} is not offered by compiled_fa, which is flash_attn here: {reason}"


def names_of(module: str) -> Callable[[str], NoReturn]:
    """A module's `__getattr__`: raises ImportError for what flash_attn has and we do not, AttributeError otherwise."""

    def missing(name: str) -> NoReturn:
        message = of_name(module, name)
        if message is not None:
            raise ImportError(message, name=module)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return missing
