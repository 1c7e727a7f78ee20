"""Tiny random pipelines for tests that need none to compare with, and what can be done with one."""

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from models.checkpoint import open_checkpoint
from models.image import load_image_pipeline
from models.image.base import ImageResult, LoadChoices, PictureRequest
from models.image.loading import component_config, component_view
from models.image.z_image.config import read_transformer_config
from models.image.z_image.transformer import Transformer
from models.llm.qwen3 import read_config
from models.nn.decoder import DecoderStack
from models.store import CreateRequest, create_model
from models.store.policy import QUANT_TYPES

PARITY_IMAGE = Path(__file__).parent / "parity_image"
WIDE = {
    "transformer": {"dim": 192, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [16, 16, 16], "cap_feat_dim": 128},
    "text_encoder": {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32},
}


def write_wide_pipeline(folder: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """The tiny Z-Image with other random weights, wide enough for every quantisation. Its VAE is the tiny one's."""
    shutil.copytree(PARITY_IMAGE / "z_image", folder, ignore=shutil.ignore_patterns("goldens*"))
    for component, changes in WIDE.items():
        file = folder / component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    checkpoint = open_checkpoint(str(folder), folder)
    transformer = Transformer(read_transformer_config(component_config(checkpoint, "transformer")))
    text_encoder = DecoderStack(read_config(component_view(checkpoint, "text_encoder").config))
    for file, module in (
        ("transformer/diffusion_pytorch_model", transformer),
        ("text_encoder/model", text_encoder),
    ):
        arrays = {name: array.astype(dtype) for name, array in random_weights(module)}
        mx.save_safetensors(str(folder / f"{file}.safetensors"), arrays)
    return folder


def fill_store(pipeline: Path, store: Path) -> Path:
    """Create it as `p`, and as `p-int4` and so on in every quantisation."""
    for quantize in (None, *QUANT_TYPES):
        name = f"p-{quantize}" if quantize else "p"
        create_model(CreateRequest(name=name, source=pipeline, store=store, quantize=quantize))
    return store


def random_weights(module: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """A value for each parameter, seeded by its name, of a size that keeps a picture from being grey."""
    for name, array in tree_flatten(module.parameters()):
        random = np.random.default_rng([17, zlib.crc32(name.encode())])
        if "norm" in name and name.endswith("weight") and array.ndim == 1:
            yield name, mx.array(random.uniform(0.5, 1.5, array.shape).astype(np.float32))
        else:
            spread = 0.3 if array.ndim == 1 else array.shape[-1] ** -0.5
            yield name, mx.array(random.normal(0, spread, array.shape).astype(np.float32))


def picture_of(reference: str, store: Path, choices: LoadChoices | None = None, **request) -> np.ndarray:
    """Load a pipeline and have it make one small picture: uint8 (H, W, 3)."""
    pipeline = load_image_pipeline(open_checkpoint(reference, store), choices or LoadChoices())
    wanted = {"prompt": "the quick brown fox", "width": 64, "height": 48, "steps": 2, "seed": 7} | request
    last = list(pipeline.generate(PictureRequest(**wanted)))[-1]
    assert isinstance(last, ImageResult)
    return last.pixels
