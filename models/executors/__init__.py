"""Executors: what runs an architecture's forward pass. `mlx` for GPUs, `onnx` for CPUs."""
