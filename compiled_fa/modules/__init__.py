"""Layers and a model of flash_attn's, by its names, with its state dicts: PyTorch modules around our attention.

    mha.py         FlashSelfAttention, FlashCrossAttention, MHA
    mlp.py         Mlp, GatedMlp
    dense.py       FusedDense, FusedMLP, and their functions
    norms.py       layer norm and RMS norm of a sum with dropout: functions, RMSNorm, DropoutAddLayerNorm
    activations.py swiglu, gelu_fwd, sqrelu_fwd, bias_gelu
    block.py       Block: attention and MLP with residuals
    embedding.py   GPT2Embeddings
    gpt.py         GPTModel, GPTLMHeadModel
    shared.py      what several of them need

Cross entropy is in compiled_fa.losses. Layers over a process group are not among them.
"""
