"""LoRA files merged as diffusers and PEFT merge them; `merge_lora.py` made the files and the merged weights."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.checkpoint import open_checkpoint
from models.image.base import Lora
from models.image.lora import MergedCheckpoint, check_loras

HERE = Path(__file__).parent
FOLDER = HERE / "lora"
# The file, its pipeline, the scale it was merged at, and whose merged weights they are.
FILES = {
    "diffusers": ("diffusers.safetensors", "z_image", 0.7, "diffusers"),
    "comfyui": ("comfyui.safetensors", "z_image", 1.0, "comfyui"),
    "kohya, with a fused layer": ("kohya.safetensors", "z_image", -0.5, "kohya"),
    "klein by its authors' names": ("klein.safetensors", "flux2_klein", 1.5, "klein"),
    "klein, kohya": ("klein_kohya.safetensors", "flux2_klein", 1.0, "klein_kohya"),
    "PEFT": ("peft/adapter_model.safetensors", "z_image", 1.0, "peft"),
    "diffusers, with PEFT's metadata": ("metadata.safetensors", "z_image", 1.0, "peft"),
}


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    arrays = mx.load(str(FOLDER / "goldens.safetensors"))
    assert isinstance(arrays, dict)
    return {name: np.array(array) for name, array in arrays.items()}


@pytest.mark.parametrize("name", FILES)
def test_the_merged_weights_are_the_references_and_all_others_untouched(goldens, name):
    file, pipeline, scale, golden = FILES[name]
    checkpoint = open_checkpoint(str(HERE / pipeline), HERE)
    loras = [Lora(FOLDER / file, scale)]
    check_loras(checkpoint, ("text_encoder", "transformer", "vae"), loras)
    merged = MergedCheckpoint(checkpoint, "transformer", loras, dtype=mx.float32, requantize=False)
    expected = {key.removeprefix(f"{golden}/"): value for key, value in goldens.items() if key.startswith(f"{golden}/")}
    assert expected
    for plain, tensor in zip(checkpoint.tensors("transformer"), merged.tensors("transformer"), strict=True):
        if tensor.name in expected:
            np.testing.assert_allclose(tensor.value, expected.pop(tensor.name), rtol=0, atol=1e-6)
        else:
            assert tensor.value.dtype == plain.value.dtype
            assert np.array_equal(tensor.value, plain.value)
    assert not expected
