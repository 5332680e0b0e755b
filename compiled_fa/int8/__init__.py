"""Attention forward with scores from int8 products: for inference, where int8 tensor cores are twice as fast as fp16's.

    interface.py   attention and varlen_attention: what people call
    quantise.py    smoothed keys, and int8 with a scale for each block of rows
    tiles.py       attention on them in PyTorch's ops, anywhere; kernel.py: in one Triton kernel, on CUDA
    __main__.py    `python -m compiled_fa.int8`: how wrong it is, and how fast

Source: SageAttention (arXiv 2410.02367), whose idea it is; masks and empty rows are flash_attn's.
"""

from .interface import attention, varlen_attention

__all__ = ["attention", "varlen_attention"]
