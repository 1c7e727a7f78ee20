"""Mathematics and checkpoints: what a model is, how it is read, how it computes.

Knows no HTTP, no asyncio and no wire format. Importing this package imports no MLX: `models.backend.prepare` must be
able to run first.
"""
