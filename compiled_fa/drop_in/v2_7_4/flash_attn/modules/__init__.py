"""Layers."""

__all__: list[str] = []
