"""Triton Inference Server: a model repository, and its Python backend."""
