"""LoRA files: what they are merged into, and what is no LoRA for this pipeline."""

import re
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy

from models.checkpoint import open_checkpoint
from models.errors import CheckpointError
from models.image.base import LoadChoices, Lora
from models.image.lora import MergedCheckpoint, check_loras
from models.quantization import Packed, dequantize
from models.store.policy import QUANT_TYPES
from models.to_mlx import from_mlx, to_mlx
from tests.image_pipelines import picture_of
from tests.models.image.residuals import residuals

COMPONENTS = ("text_encoder", "transformer", "vae")
TO_Q = "transformer.layers.0.attention.to_q"
RANDOM = np.random.default_rng(3)
# A whole LoRA of one layer, for files that have one thing wrong beside it.
A, B = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((4, 192), (192, 4)))
GOOD = {f"{TO_Q}.lora_A.weight": A, f"{TO_Q}.lora_B.weight": B}


@pytest.fixture
def write(tmp_path):
    """Write a LoRA file: `lora = write({"key": array}, scale=0.5)`."""
    count = 0

    def write(tensors: dict[str, np.ndarray], scale: float = 1.0) -> Lora:
        nonlocal count
        count += 1
        path = tmp_path / f"lora-{count}.safetensors"
        safetensors.numpy.save_file(tensors, path)
        return Lora(path, scale)

    return write


def merged(reference: object, store: Path, loras: list[Lora], component: str = "transformer", **how) -> dict:
    checkpoint = open_checkpoint(str(reference), store)
    check_loras(checkpoint, COMPONENTS, loras)
    how = {"dtype": mx.float32, "requantize": False} | how
    return {
        tensor.name: tensor.value for tensor in MergedCheckpoint(checkpoint, component, loras, **how).tensors(component)
    }


def test_the_strength_is_alpha_over_the_files_rank_times_the_users_scale(wide_pipeline, tmp_path, write):
    name = "layers.0.attention.to_q.weight"
    plain = merged(wide_pipeline, tmp_path, [])[name].astype(np.float32)
    two, eight = np.float32(2), np.array([8], np.int64)
    for alpha, scale, factor in ((None, 1.0, 1.0), (None, -0.25, -0.25), (two, 1.0, 0.5), (eight, 0.5, 1.0)):
        tensors = dict(GOOD) if alpha is None else GOOD | {f"{TO_Q}.alpha": np.asarray(alpha)}
        ours = merged(wide_pipeline, tmp_path, [write(tensors, scale)])[name]
        assert ours.dtype == np.float32
        np.testing.assert_allclose(np.array(ours - plain), factor * (B @ A), atol=1e-5)


def test_several_files_add_up(wide_pipeline, tmp_path, write):
    name = "layers.0.attention.to_q.weight"
    once, twice = (merged(wide_pipeline, tmp_path, [write(GOOD)] * count)[name] for count in (1, 2))
    np.testing.assert_allclose(np.array(twice - once), B @ A, atol=1e-5)


UP, DOWN = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((192, 4), (4, 128)))


def rewritten(pipeline: Path, folder: Path, prefix: str = "", dtype: mx.Dtype | None = None, **added) -> Path:
    """The text encoder alone, its tensors' names and types other ones, and something added to a layer's weight."""
    (folder / "text_encoder").mkdir(parents=True)
    for file in ("model_index.json", "text_encoder/config.json"):
        (folder / file).write_bytes((pipeline / file).read_bytes())
    tensors = {
        tensor.name: to_mlx(tensor.value) for tensor in open_checkpoint(str(pipeline), folder).tensors("text_encoder")
    }
    tensors = {name: value.astype(dtype or value.dtype) for name, value in tensors.items()}
    for layer, change in added.items():
        tensors[f"layers.1.mlp.{layer}.weight"] += mx.array(change)
    named = {prefix + name: value for name, value in tensors.items()}
    mx.save_safetensors(str(folder / "text_encoder/model.safetensors"), named)
    return folder


@pytest.mark.parametrize("prefix", ["text_encoder.model.", "text_encoder.", "base_model.model.text_encoder."])
@pytest.mark.parametrize("stored", ["", "model."])
def test_a_text_encoders_layers_are_found_with_and_without_model(wide_pipeline, tmp_path, write, prefix, stored):
    layer = f"{prefix}layers.1.mlp.up_proj"
    lora = write({f"{layer}.lora_down.weight": DOWN, f"{layer}.lora_up.weight": UP})
    folder = rewritten(wide_pipeline, tmp_path / "named", stored)
    expected = rewritten(wide_pipeline, tmp_path / "changed", dtype=mx.float32, up_proj=UP @ DOWN)
    ours = residuals(folder, tmp_path, LoadChoices(loras=(lora,)))
    # Of stored weights in half precision the changed ones are not rounded again.
    np.testing.assert_allclose(ours, residuals(expected, tmp_path), atol=1e-4)
    plain = residuals(wide_pipeline, tmp_path)
    np.testing.assert_array_equal(ours[0], plain[0])
    assert np.abs(ours[1] - plain[1]).max() > 1


@pytest.mark.parametrize("quantize", QUANT_TYPES)
def test_a_quantised_text_encoder_is_changed_kept_and_widened(pipeline_store, write, quantize):
    layer, model = "text_encoder.layers.1.mlp.up_proj", f"p-{quantize}"
    lora = write({f"{layer}.lora_A.weight": DOWN, f"{layer}.lora_B.weight": UP})
    plain = residuals(model, pipeline_store)
    kept, widened = (
        residuals(model, pipeline_store, LoadChoices(policy=policy, loras=(lora,))) for policy in ("keep", "float32")
    )
    assert np.abs(widened[1] - plain[1]).std() > 0.5 * plain[1].std()
    # A layer that stays quantised is rounded once more.
    assert np.abs(kept - widened).std() < 0.2 * np.abs(widened - plain).std()


def test_a_changed_weight_keeps_its_type_where_nothing_else_is_wanted(wide_pipeline, tmp_path, write):
    ours = merged(wide_pipeline, tmp_path, [write(GOOD)], dtype=None)
    assert {value.dtype for value in ours.values()} == {np.dtype(ml_dtypes.bfloat16)}
    exact = merged(wide_pipeline, tmp_path, [write(GOOD)])["layers.0.attention.to_q.weight"]
    assert np.array_equal(ours["layers.0.attention.to_q.weight"], exact.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("quantize", ["int4", "int8", "nvfp4", "mxfp8"])
def test_a_quantised_weight_is_changed_in_full_and_then_quantised_again_if_it_stays_so(pipeline_store, write, quantize):
    model = f"p-{quantize}"
    name = "layers.0.attention.to_q.weight"
    checkpoint = open_checkpoint(model, pipeline_store)
    stored = next(each.value for each in checkpoint.tensors("transformer") if each.name == name)
    exact = dequantize(stored) + B @ A
    dense = merged(model, pipeline_store, [write(GOOD)])
    np.testing.assert_allclose(np.array(dense[name]), exact, atol=1e-5)
    kept = merged(model, pipeline_store, [write(GOOD)], requantize=True)
    packed = kept.pop(name)
    assert isinstance(packed, Packed)
    assert packed.spec == stored.spec
    assert packed.weight.shape == stored.weight.shape
    assert packed.scales.dtype == stored.scales.dtype
    # As far from the exact matrix as its own quantisation is, and no farther.
    source = to_mlx(exact.astype(stored.scales.dtype if quantize.startswith("int") else np.float32))
    parts = mx.quantize(source, group_size=stored.spec.group_size, bits=stored.spec.bits, mode=stored.spec.mode)
    assert np.array_equal(packed.weight, from_mlx(parts[0]))
    error = np.abs(dequantize(packed) - exact).mean()
    assert error < {"int4": 0.15, "int8": 0.02, "nvfp4": 0.2, "mxfp8": 0.06}[quantize] * np.abs(exact).mean()
    quantized = {info.name for info in checkpoint.infos("transformer") if info.quantized}
    assert {each for each in kept if isinstance(kept[each], Packed)} == quantized - {name}


def test_a_global_scale_stays_as_it_is(tmp_path, write):
    dense = mx.array(RANDOM.normal(size=(192, 192)).astype(np.float32))
    weight, scales = mx.quantize(dense / 2.0, group_size=16, bits=4, mode="nvfp4")
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder.parent / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    (folder / "config.json").write_text('{"quantization": {"mode": "nvfp4", "bits": 4, "group_size": 16}}')
    name = "layers.0.attention.to_q.weight"
    parts = {name: weight, f"{name}.scale": scales, f"{name}.global_scale": mx.array([2.0])}
    mx.save_safetensors(str(folder / "model.safetensors"), parts)
    ours = MergedCheckpoint(
        open_checkpoint(str(folder.parent), tmp_path), "transformer", [write(GOOD)], dtype=None, requantize=True
    )
    (tensor,) = ours.tensors("transformer")
    value = tensor.value
    assert value.global_scale.item() == 2.0
    exact = dequantize(Packed(from_mlx(weight), from_mlx(scales), None, value.spec)) * 2.0 + B @ A
    assert np.abs(dequantize(value) - exact).mean() < 0.2 * np.abs(exact).mean()


def test_a_lora_changes_the_picture_and_its_opposite_changes_it_back(wide_pipeline, tmp_path, write):
    plain = picture_of(str(wide_pipeline), tmp_path)
    lora = write({name: 0.3 * value for name, value in GOOD.items()})
    changed = picture_of(str(wide_pipeline), tmp_path, LoadChoices(loras=(lora,)))
    assert np.abs(changed.astype(float) - plain).mean() > 1
    both = LoadChoices(loras=(lora, Lora(lora.path, -1.0)))
    assert np.abs(picture_of(str(wide_pipeline), tmp_path, both).astype(float) - plain).max() <= 1


def test_a_freed_text_encoder_is_changed_as_a_kept_one_is(wide_pipeline, tmp_path, write):
    layer = "text_encoder.layers.1.mlp.down_proj"
    lora = write(
        {
            f"{layer}.lora_A.weight": RANDOM.normal(size=(4, 192)).astype(np.float32),
            f"{layer}.lora_B.weight": RANDOM.normal(size=(128, 4)).astype(np.float32),
        }
    )
    kept, freed = (
        picture_of(str(wide_pipeline), tmp_path, LoadChoices(loras=(lora,), keep_text_encoder=keep))
        for keep in (True, False)
    )
    assert np.array_equal(kept, freed)
    assert not np.array_equal(kept, picture_of(str(wide_pipeline), tmp_path))


OTHER = "transformer.layers.1.attention.to_k"
WRONG = {
    "a layer of another model": (
        {"transformer.blocks.7.attn.lora_A.weight": A, "transformer.blocks.7.attn.lora_B.weight": B},
        "blocks.7.attn.lora_A.weight: matches nothing in the transformer of",
    ),
    "a component that is not there": (
        {"transformer.x.lora_A.weight": A, "transformer.x.lora_B.weight": B},
        "x.lora_A.weight: matches nothing",
    ),
    "the wrong width": (
        {f"{OTHER}.lora_A.weight": A[:, :100].copy(), f"{OTHER}.lora_B.weight": B},
        "to_k.lora_A.weight: makes a change of [192, 100], and layers.1.attention.to_k.weight takes [192, 192]",
    ),
    "a fused layer of the wrong height": (
        {
            "diffusion_model.layers.1.attention.qkv.lora_A.weight": A,
            "diffusion_model.layers.1.attention.qkv.lora_B.weight": B,
        },
        "qkv.lora_A.weight: makes a change of [192, 192], and layers.1.attention.to_k.weight takes [576, 192]",
    ),
    "halves of different ranks": (
        {f"{OTHER}.lora_A.weight": A[:2].copy(), f"{OTHER}.lora_B.weight": B},
        "to_k.lora_B.weight: its shape [192, 4] does not fit that of its other half [2, 192]",
    ),
    "half a layer": ({f"{OTHER}.lora_B.weight": B}, "to_k.lora_B.weight: is only half of a LoRA"),
    "one half twice": (
        {f"{OTHER}.lora_A.weight": A, f"{OTHER}.lora_down.weight": A, f"{OTHER}.lora_B.weight": B},
        "is there twice, under two names",
    ),
    "one layer under two names": (
        {"diffusion_model.layers.0.attention.to_q.lora_A.weight": A}
        | {"diffusion_model.layers.0.attention.to_q.lora_B.weight": B},
        "changes layers.0.attention.to_q.weight, which another key of the file changes as well",
    ),
    "an alpha alone": ({f"{OTHER}.alpha": np.float32([1])}, "to_k.alpha: belongs to no layer of the file"),
    "an alpha that is no number": (
        {f"{TO_Q}.alpha": np.float32([1, 2])},
        "to_q.alpha: is not one number",
    ),
    "a convolution": (
        {f"{OTHER}.lora_A.weight": A.reshape(4, 192, 1, 1), f"{OTHER}.lora_B.weight": B},
        "to_k.lora_A.weight: is F32 [4, 192, 1, 1], and a matrix of floats is wanted",
    ),
    "DoRA": ({f"{TO_Q}.lora_magnitude_vector": A}, "lora_magnitude_vector: is of DoRA, which cannot be merged"),
    "LoKr": ({f"{OTHER}.lokr_w1": A}, "lokr_w1: is of LoKr, which cannot be merged"),
    "a bias": ({f"{TO_Q}.lora_B.bias": B[:, 0].copy()}, "lora_B.bias: is of a LoRA with biases"),
    "a stranger": ({"something": A}, "something: is no part of a LoRA"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_merged_is_refused_by_file_and_key(wide_pipeline, tmp_path, write, what):
    tensors, message = WRONG[what]
    lora = write(GOOD | tensors)
    checkpoint = open_checkpoint(str(wide_pipeline), tmp_path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(lora.path))}: tensor .*{re.escape(message)}"):
        check_loras(checkpoint, COMPONENTS, [lora])


def test_a_layer_of_a_component_that_the_pipeline_has_not_is_refused(wide_pipeline, tmp_path, write):
    checkpoint = open_checkpoint(str(wide_pipeline), tmp_path)
    with pytest.raises(CheckpointError, match="is for a transformer, which this pipeline has not"):
        check_loras(checkpoint, ("vae",), [write(GOOD)])


def test_a_file_that_is_no_lora_at_all_is_refused(wide_pipeline, tmp_path, write):
    checkpoint = open_checkpoint(str(wide_pipeline), tmp_path)
    with pytest.raises(CheckpointError, match=r"lora-1\.safetensors: is no LoRA: no key"):
        check_loras(checkpoint, COMPONENTS, [write({})])
    for path, message in (
        (wide_pipeline / "model_index.json", "not a safetensors file"),
        (tmp_path / "nothing.safetensors", "cannot be read: No such file"),
        (wide_pipeline / "text_encoder/model.safetensors", "is no part of a LoRA"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_loras(checkpoint, COMPONENTS, [Lora(path)])
