"""The executor for CPUs: an architecture recorded once as an ONNX graph, run by ONNX Runtime."""

import os

# Its wheels send usage events to their maker and leave a file behind, from the import on, unless told not to.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

from models.executors.onnx.embedder import load_embedder
from models.executors.onnx.encoder import OnnxEncoder
from models.executors.onnx.executor import OnnxExecutor
from models.executors.onnx.loading import OnnxOptions, footprint, load
from models.executors.onnx.tower import load_tower, tower_footprint

__all__ = [
    "OnnxEncoder",
    "OnnxExecutor",
    "OnnxOptions",
    "footprint",
    "load",
    "load_embedder",
    "load_tower",
    "tower_footprint",
]
