"""The flash_attn 2 functions as PyTorch ops."""
