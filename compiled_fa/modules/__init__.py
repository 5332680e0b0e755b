"""Layers and a model of flash_attn's, by its names, with its state dicts: PyTorch modules around our attention.

    mha.py         FlashSelfAttention, FlashCrossAttention, MHA
    mlp.py         Mlp, GatedMlp
    block.py       Block: attention and MLP with residuals
    embedding.py   GPT2Embeddings
    gpt.py         GPTModel, GPTLMHeadModel
    fused.py       what flash_attn has other kernels for, as PyTorch ops

Layers over a process group are not among them.
"""
