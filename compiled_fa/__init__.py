"""The flash_attn 2 functions as PyTorch ops: FlashAttention for every machine PyTorch runs on.

    interface.py      the six training functions, kvcache.py: inference on a cache; what people call
    with_bias.py      attention, varlen_attention: with a bias of every score, and attention sinks
    forward_backward.py  flash_attn's private forward and backward, with lse and dropout's state in the open
    padding.py        padded batches and packed rows; arguments.py: arguments brought into form
    modules/          flash_attn's layers and GPT; losses/
    drop_in/          this package as flash_attn; run.py, compat.py: programs and projects that want it
    scaled_dot_product.py  F.scaled_dot_product_attention through our ops, and run_with_sdpa.py: a program with it
    xformers_api/     xformers' memory_efficient_attention and its masks
    integrations/     other people's packages that call our ops: transformers
    context_parallel/ attention over rows that lie on several ranks: a ring, and gathered heads
    ops.py            torch.ops.compiled_fa.*, with cache_ops.py: what torch.compile and autograd see
    straight.py       and the way past them, of short calls that nobody has to see
    cache_call.py     a call on a KV cache: where its rows lie, and how they are written
    int8/             attention with scores from int8 products, forward only
    rotary.py         rotary position embedding: functions, and a module; rotation.py: its arithmetic
    validation.py     every check of an argument; cache_validation.py: of KV caches and rotary tables
    seed.py           dropout's seed; forward_mode.py, tangent.py: forward-mode AD; batching.py: torch.func.vmap
    engines/          who computes: fused and triton (Triton kernels, on CUDA), split_kv and sdpa_cpu (on a CPU), tiled
                      (anything, anywhere); and which of them serves a call
    scores/           what a score is: scale, softcap, ALiBi, bias, window, lengths, dropout
    inductor/         what we ask of Inductor: compiled graphs and steps, and what it makes of our ops in other graphs
    turing/           compiled_fa_turing by another name: tensor cores on Turing for every Triton kernel
    tuning/           the numbers that were tuned, and on which machine
    timing.py         seconds of calls, in turns
    caches.py         what outlives a call, bounded
    config.py         the environment variables
    testing/          attention problems, ways to run them, the reference, and how wrong a result may be
    check/            `python -m compiled_fa`
    flops.py          what torch's FLOP counter counts for our ops; sharding.py: what they do with DTensors
    warmup.py         compiling ahead; messages.py: what people are told meanwhile
    memory.py         how a system gives memory fast
    without_numpy.py  torch, imported quietly; flattening.py: dataclasses of tensors as lists

Shape letters, here and everywhere: B batch, Sq and Sk lengths, H and Hk query and key heads, D head_dim, Dv head_dim of
v, T total tokens of packed sequences.
"""

from . import without_numpy as without_numpy  # isort: skip  # before all that imports torch
from . import flops as flops
from . import rotary as rotary
from . import sharding as sharding
from .caches import clear_caches
from .engines import use_engine
from .interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .kvcache import flash_attn_with_kvcache
from .scaled_dot_product import disable_sdpa, enable_sdpa, sdpa, sdpa_reason
from .warmup import warmup
from .with_bias import attention, varlen_attention

__version__ = "0.1.0"

__all__ = [
    "attention",
    "clear_caches",
    "disable_sdpa",
    "enable_sdpa",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "sdpa",
    "sdpa_reason",
    "use_engine",
    "varlen_attention",
    "warmup",
]
