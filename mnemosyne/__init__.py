"""Exact long-context serving of language models, native to PyTorch."""
