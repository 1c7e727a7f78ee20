"""Mathematics and checkpoints: what a model is, how it is read, how it computes.

Knows no HTTP, no asyncio and no wire format. Importing this package imports no MLX: a text model on a CPU runs without
it, and a picture wants another BLAS put under it first.
"""
