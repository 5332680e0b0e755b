"""Operators that flash_attn writes in Triton. Here they are PyTorch ops."""

__all__: list[str] = []
