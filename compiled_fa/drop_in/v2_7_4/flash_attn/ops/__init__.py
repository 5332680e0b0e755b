"""Operators: PyTorch ops, which torch.compile fuses."""

__all__: list[str] = []
