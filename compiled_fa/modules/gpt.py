"""GPT models from a configuration: GPT-2's kind, with rotary, ALiBi, GQA, windows, gated MLPs, RMS norms.

Source: flash_attn 2.8's models.gpt, whose configuration and state dicts these have.
"""

from __future__ import annotations

import math
from collections import namedtuple
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation
from .activations import sqrelu_fwd
from .block import Block
from .embedding import GPT2Embeddings
from .mha import MHA
from .mlp import GatedMlp, Mlp
from .norms import RMSNorm
from .shared import refuse_group

GATES = {"glu": F.sigmoid, "swiglu": F.silu, "geglu": F.gelu}
TANH = ("gelu_new", "gelu_fast", "gelu_approx", "gelu_pytorch_tanh")
ACTIVATIONS: dict[str, Any] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "sqrelu": sqrelu_fwd,
    **dict.fromkeys(TANH, partial(F.gelu, approximate="tanh")),
}
# Settings that flash_attn's GPT knows and this one does not, and the values at which they do nothing.
NOT_SERVED = {
    "parallel_block": False,
    "attn_dwconv": False,
    "norm_head": False,
    "mup_embeddings_multiplier": 1.0,
    "mup_attn_multiplier": 1.0,
    "mup_output_multiplier": 1.0,
    "mup_width_scale": 1.0,
    "mup_scale_qk_dot_by_d": False,
}

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


def create_mixer_cls(
    config: Any, layer_idx: int | None = None, process_group: Any = None, device: Any = None, dtype: Any = None
) -> Any:
    """MHA of a configuration: called with the embedding's size."""
    refuse_group("process_group", process_group)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        if layer_idx is None:
            validation.refuse("layer_idx", "given with scale_attn_by_inverse_layer_idx", None)
        scale /= layer_idx + 1
    return partial(
        MHA,
        num_heads=config.num_attention_heads,
        num_heads_kv=getattr(config, "n_head_kv", None),
        qkv_proj_bias=getattr(config, "qkv_proj_bias", True),
        out_proj_bias=getattr(config, "out_proj_bias", True),
        dropout=config.attn_pdrop,
        softmax_scale=scale,
        causal=True,
        layer_idx=layer_idx,
        rotary_emb_dim=int(getattr(config, "rotary_emb_fraction", 0.0) * head_dim),
        rotary_emb_base=getattr(config, "rotary_emb_base", 10000.0),
        rotary_emb_scale_base=getattr(config, "rotary_emb_scale_base", None),
        rotary_emb_interleaved=getattr(config, "rotary_emb_interleaved", False),
        use_alibi=getattr(config, "use_alibi", False),
        window_size=getattr(config, "window_size", (-1, -1)),
        use_flash_attn=getattr(config, "use_flash_attn", False),
        device=device,
        dtype=dtype,
    )


def create_mlp_cls(
    config: Any, layer_idx: int | None = None, process_group: Any = None, device: Any = None, dtype: Any = None
) -> Any:
    """Mlp or GatedMlp of a configuration: called with the embedding's size."""
    refuse_group("process_group", process_group)
    name = config.activation_function
    if name not in GATES and name not in ACTIVATIONS:
        validation.refuse("activation_function", f"one of {[*GATES, *ACTIVATIONS]}", repr(name))
    options = {
        "hidden_features": config.n_inner,
        "bias1": getattr(config, "mlp_fc1_bias", True),
        "bias2": getattr(config, "mlp_fc2_bias", True),
        "device": device,
        "dtype": dtype,
    }
    if name in GATES:
        return partial(GatedMlp, activation=GATES[name], multiple_of=getattr(config, "mlp_multiple_of", 128), **options)
    return partial(Mlp, activation=ACTIVATIONS[name], **options)


def create_block(
    config: Any, layer_idx: int | None = None, process_group: Any = None, device: Any = None, dtype: Any = None
) -> Block:
    """Layer layer_idx of a model."""
    refuse_group("process_group", process_group)
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    block = Block(
        config.hidden_size,
        create_mixer_cls(config, layer_idx, process_group, **factory),
        create_mlp_cls(config, layer_idx, process_group, **factory),
        norm_cls=partial(_norm(config), eps=config.layer_norm_epsilon, **factory),
        prenorm=getattr(config, "prenorm", True),
        resid_dropout1=config.embd_pdrop if layer_idx == 0 else config.resid_pdrop,
        resid_dropout2=config.resid_pdrop,
        residual_in_fp32=getattr(config, "residual_in_fp32", False),
    )
    block.layer_idx = layer_idx
    return block


class GPTModel(nn.Module):
    """Tokens to hidden states.

    Args:
        config: an object with the attributes of transformers.GPT2Config, and where they are wanted, of flash_attn's:
            rotary_emb_fraction, rotary_emb_base, rotary_emb_interleaved, use_alibi, window_size, n_head_kv,
            use_flash_attn, rms_norm, prenorm, residual_in_fp32, qkv_proj_bias, out_proj_bias, mlp_fc1_bias,
            mlp_fc2_bias, mlp_multiple_of, pad_vocab_size_multiple, word_embed_proj_dim, tie_word_embeddings,
            lm_head_bias. Those about fused kernels are accepted; for those of NOT_SERVED ValueError is raised.
        process_group: must be None.

    State dict: embeddings, layers, ln_f (with prenorm).

    Source: flash_attn.models.gpt.GPTModel.
    """

    def __init__(self, config: Any, process_group: Any = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        refuse_group("process_group", process_group)
        for setting, without in NOT_SERVED.items():
            if getattr(config, setting, without) != without:
                validation.refuse(f"config.{setting}", f"{without}: it is not served", getattr(config, setting))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.prenorm = getattr(config, "prenorm", True)
        self.embeddings = GPT2Embeddings(
            config.hidden_size,
            _vocabulary(config),
            config.max_position_embeddings,
            word_embed_proj_dim=getattr(config, "word_embed_proj_dim", None),
            **factory,
        )
        layers = [create_block(config, layer_idx=layer, **factory) for layer in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        if getattr(config, "rotary_emb_fraction", 0.0) > 0.0:
            first: Any = layers[0].mixer
            for layer in layers[1:]:  # one set of tables
                layer.mixer.rotary_emb = first.rotary_emb
        if self.prenorm:
            self.drop_f = nn.Dropout(config.resid_pdrop)
            self.ln_f = _norm(config)(config.hidden_size, eps=config.layer_norm_epsilon, **factory)
        self.apply(partial(_init_weights, n_layer=config.num_hidden_layers, initializer_range=config.initializer_range))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Of every layer: what MHA.allocate_inference_cache gives."""
        layers: Any = self.layers
        return {
            number: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for number, layer in enumerate(layers)
        }

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, inference_params: Any = None) -> Tensor:
        """input_ids, position_ids (B, S) -> (B, S, E). inference_params: as MHA's, to decode."""
        hidden_states: Tensor = self.embeddings(input_ids, position_ids=position_ids)
        kwargs = {} if inference_params is None else {"inference_params": inference_params}
        residual = None
        for layer in self.layers:
            if self.prenorm:
                hidden_states, residual = layer(hidden_states, residual, mixer_kwargs=kwargs)
            else:
                hidden_states = layer(hidden_states, mixer_kwargs=kwargs)
        if not self.prenorm:
            return hidden_states
        total = self.drop_f(hidden_states)
        total = total if residual is None else total + residual
        normed: Tensor = self.ln_f(total.to(self.ln_f.weight.dtype))
        return normed


class GPTLMHeadModel(nn.Module):
    """GPTModel and a linear layer to logits, which shares the embedding's weight unless config.tie_word_embeddings is
    false.

    State dict: transformer, lm_head, and project_out with word_embed_proj_dim.

    Source: flash_attn.models.gpt.GPTLMHeadModel.
    """

    def __init__(self, config: Any, process_group: Any = None, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.transformer = GPTModel(config, process_group, **factory)
        self.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
        word_dim = getattr(config, "word_embed_proj_dim", None)
        self.project_out = None
        if word_dim is not None:
            self.project_out = nn.Linear(config.hidden_size, word_dim, bias=False, **factory)
        bias = getattr(config, "lm_head_bias", False)
        self.lm_head = nn.Linear(word_dim or config.hidden_size, _vocabulary(config), bias=bias, **factory)
        init = partial(_init_weights, n_layer=config.num_hidden_layers, initializer_range=config.initializer_range)
        self.apply(init)
        self.tie_weights()

    def tie_weights(self) -> None:
        if self.tie_word_embeddings:
            self.lm_head.weight = self.transformer.embeddings.word_embeddings.weight

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> dict[int, Any]:
        return self.transformer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        inference_params: Any = None,
        num_last_tokens: int = 0,
    ) -> Any:
        """input_ids (B, S) -> an object with logits (B, S, classes), or of the last num_last_tokens only."""
        hidden_states = self.transformer(input_ids, position_ids=position_ids, inference_params=inference_params)
        if num_last_tokens > 0:
            hidden_states = hidden_states[:, -num_last_tokens:]
        if self.project_out is not None:
            hidden_states = self.project_out(hidden_states)
        return CausalLMOutput(logits=self.lm_head(hidden_states))


def _norm(config: Any) -> Any:
    return RMSNorm if getattr(config, "rms_norm", False) else nn.LayerNorm


def _vocabulary(config: Any) -> int:
    multiple: int = getattr(config, "pad_vocab_size_multiple", 1)
    rounded: int = math.ceil(config.vocab_size / multiple) * multiple
    return rounded


def _init_weights(module: nn.Module, n_layer: int, initializer_range: float) -> None:
    """GPT-2's: normal, and smaller by sqrt(2 · layers) where a layer adds to the residual."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=initializer_range)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=initializer_range)
    for name, parameter in module.named_parameters(recurse=True):
        if name in ("out_proj.weight", "fc2.weight"):
            nn.init.normal_(parameter, std=initializer_range / math.sqrt(2 * n_layer))
