"""Operators of the fusion: PyTorch references."""
