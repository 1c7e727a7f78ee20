"""Weights: which tensors a model wants, in which form an executor holds them, and how many bytes that takes."""
