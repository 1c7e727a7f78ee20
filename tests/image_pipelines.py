"""Tiny random pipelines for tests that need none to compare with, and what can be done with one."""

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.image import load_image_pipeline
from models.image.base import ImageResult, LoadChoices, PictureRequest
from models.image.loading import component_config, component_view
from models.image.z_image.config import read_transformer_config
from models.image.z_image.transformer import Transformer
from models.ops import weights_in
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
    config = component_view(checkpoint, "text_encoder").config
    model = build_model({**config, "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True})
    encoder = [tensor for weight in weights_in(model.weights) for tensor in weight.tensors()]
    for file, shapes in (
        ("transformer/diffusion_pytorch_model", shapes_of(transformer)),
        ("text_encoder/model", [(name.removeprefix("model."), shape) for name, shape in encoder]),
    ):
        arrays = {name: array.astype(dtype) for name, array in random_weights(shapes)}
        mx.save_safetensors(str(folder / f"{file}.safetensors"), arrays)
    return folder


def fill_store(pipeline: Path, store: Path) -> Path:
    """Create it as `p`, and as `p-int4` and so on in every quantisation."""
    for quantize in (None, *QUANT_TYPES):
        name = f"p-{quantize}" if quantize else "p"
        create_model(CreateRequest(name=name, source=pipeline, store=store, quantize=quantize))
    return store


def shapes_of(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter."""
    return [(name, array.shape) for name, array in tree_flatten(module.parameters())]


def random_weights(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[tuple[str, mx.array]]:
    """A value for each parameter, seeded by its name, of a size that keeps a picture from being grey."""
    for name, shape in shapes:
        random = np.random.default_rng([17, zlib.crc32(name.encode())])
        if "norm" in name and name.endswith("weight") and len(shape) == 1:
            yield name, mx.array(random.uniform(0.5, 1.5, shape).astype(np.float32))
        else:
            spread = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
            yield name, mx.array(random.normal(0, spread, shape).astype(np.float32))


def picture_of(reference: str, store: Path, choices: LoadChoices | None = None, **request) -> np.ndarray:
    """Load a pipeline and have it make one small picture: uint8 (H, W, 3)."""
    pipeline = load_image_pipeline(open_checkpoint(reference, store), choices or LoadChoices())
    wanted = {"prompt": "the quick brown fox", "width": 64, "height": 48, "steps": 2, "seed": 7} | request
    last = list(pipeline.generate(PictureRequest(**wanted)))[-1]
    assert isinstance(last, ImageResult)
    return last.pixels
