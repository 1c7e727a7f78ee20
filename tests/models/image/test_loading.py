"""Components of a pipeline, from every form that weights are stored in."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from models.checkpoint import open_checkpoint
from models.errors import CheckpointError
from models.executors.onnx import filling
from models.image import loading
from models.image.base import LoadChoices
from models.image.loading import component_config, component_view, load_component
from models.image.z_image.config import read_transformer_config
from models.image.z_image.transformer import Transformer
from models.quantization import Packed
from models.store.policy import QUANT_TYPES
from models.to_mlx import dequantized, packed_to_mlx, to_mlx
from models.tokenizer import load_tokenizer
from tests.image_pipelines import picture_of
from tests.models.image.residuals import residuals, weight_bytes

# Mean difference of the pixels, of 255, to the unquantised picture: about half as much again as was found.
BOUNDS = {"int4": 6.0, "int8": 0.5, "nvfp4": 6.0, "mxfp4": 6.0, "mxfp8": 2.0}


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def weights_of(folder: Path, component: str) -> dict[str, mx.array]:
    """A component's stored tensors."""
    return {tensor.name: to_mlx(tensor.value) for tensor in open_checkpoint(str(folder), folder).tensors(component)}


def rewrite(folder: Path, component: str, tensors: dict[str, mx.array], file: str = "model.safetensors") -> None:
    for old in (folder / component).glob("*.safetensors*"):
        old.unlink()
    mx.save_safetensors(str(folder / component / file), tensors)


def loaded(reference: object, store: Path, policy: str = "float32", kept: int = 0) -> dict[str, mx.array]:
    """The transformer's parameters once loaded, by name; of layers that stayed quantised, the dequantised weights."""
    checkpoint = open_checkpoint(str(reference), store)
    model = Transformer(read_transformer_config(component_config(checkpoint, "transformer")))
    report = load_component(model, checkpoint, "transformer", LoadChoices(policy=policy))
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            dense = mx.dequantize(
                module.weight,
                module.scales,
                module.get("biases"),
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
                dtype=mx.float32,
            )
            found[f"{name}.weight"] = dense
    assert len(found) == report.kept_quantized == kept
    rest = {name: value for name, value in tree_flatten(model.parameters()) if name not in found}
    return {name: value for name, value in rest.items() if not name.endswith((".scales", ".biases"))} | found


def expected_from(checkpoint, component: str) -> dict[str, mx.array]:
    """Each tensor's values in float32, dequantised by MLX itself."""
    return {
        tensor.name: dequantized(packed_to_mlx(value), mx.float32)
        if isinstance(value := tensor.value, Packed)
        else to_mlx(value).astype(mx.float32)
        for tensor in checkpoint.tensors(component)
    }


def assert_same(ours: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.array(ours[name]), np.array(value), err_msg=name)


def test_a_components_files_are_read_and_a_missing_one_is_named(tiny_pipeline):
    checkpoint = open_checkpoint(str(tiny_pipeline), tiny_pipeline)
    assert component_config(checkpoint, "transformer").integer("n_layers") == 2
    assert component_config(checkpoint, "scheduler", "scheduler_config.json").number("shift") > 0
    with pytest.raises(CheckpointError, match=r"the pipeline has no vae/other\.json"):
        component_config(checkpoint, "vae", "other.json")
    with pytest.raises(CheckpointError, match=r"transformer/config\.json: heads is missing"):
        component_config(checkpoint, "transformer").integer("heads")


def test_a_component_is_a_checkpoint_of_its_own_with_the_tokenizer_of_another_folder(tiny_pipeline):
    view = component_view(open_checkpoint(str(tiny_pipeline), tiny_pipeline), "text_encoder", tokenizer="tokenizer")
    assert view.config["hidden_size"] == 32
    assert view.reference == f"{tiny_pipeline}/text_encoder"
    assert view.nbytes == sum(info.nbytes for info in view.infos()) > 0
    assert {tensor.name for tensor in view.tensors()} == {info.name for info in view.infos()}
    assert json.loads(view.read("config.json"))["model_type"] == "qwen3"
    assert view.read("nothing.json") is None
    tokenizer = load_tokenizer(view)
    assert tokenizer.encode("the fox", add_bos=False)
    assert tokenizer.chat_template
    assert component_view(view.pipeline, "text_encoder").read("tokenizer.json") is None


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_dense_weights_of_any_float_are_held_in_float32_on_a_cpu(wide_pipeline, tmp_path, dtype):
    folder = copied(wide_pipeline, tmp_path / "pipeline")
    stored = {name: value.astype(dtype) for name, value in weights_of(folder, "transformer").items()}
    rewrite(folder, "transformer", stored)
    ours = loaded(folder, tmp_path, "auto")
    assert {value.dtype for value in ours.values()} == {mx.float32}
    assert_same(ours, {name: value.astype(mx.float32) for name, value in stored.items()})


def test_a_gpu_holds_weights_as_stored_but_the_autoencoders(monkeypatch):
    class Gpu:
        kind = "metal"

    monkeypatch.setattr(loading, "device", Gpu)
    assert loading.dense_dtype("transformer") is None
    assert loading.dense_dtype("text_encoder") is None
    assert loading.dense_dtype("vae") == mx.float32


def test_a_text_encoders_names_may_or_may_not_begin_with_model_and_its_head_is_passed_over(wide_pipeline, tmp_path):
    folder = copied(wide_pipeline, tmp_path / "pipeline")
    prefixed = {f"model.{name}": value for name, value in weights_of(folder, "text_encoder").items()}
    rewrite(folder, "text_encoder", prefixed | {"lm_head.weight": mx.zeros((300, 128))})
    np.testing.assert_array_equal(residuals(folder, tmp_path), residuals(wide_pipeline, tmp_path))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_layers_that_nobody_asks_for_are_passed_over_only_if_they_are_named(wide_pipeline, tmp_path, prefix):
    folder = copied(wide_pipeline, tmp_path / "pipeline")
    more = weights_of(folder, "text_encoder") | {"layers.3.mlp.up_proj.weight": mx.zeros((2, 2))}
    rewrite(folder, "text_encoder", {f"{prefix}{name}": value for name, value in more.items()})
    passed_over = residuals(folder, tmp_path, unused=("layers.3.",))
    np.testing.assert_array_equal(passed_over, residuals(wide_pipeline, tmp_path))
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight: the architecture has no such tensor"):
        residuals(folder, tmp_path, unused=("layers.4.",))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, r"pipeline/text_encoder: tensor model\.layers\.1\.mlp\.up_proj\.weight: is missing"),
        (
            (64, 128),
            r"layers\.1\.mlp\.up_proj\.weight: its shape is \[64, 128\], and config\.json asks for \[192, 128\]",
        ),
    ],
)
def test_a_text_encoders_tensor_that_is_missing_or_misshaped_is_named(wide_pipeline, tmp_path, shape, message):
    folder = copied(wide_pipeline, tmp_path / "pipeline")
    tensors = weights_of(folder, "text_encoder")
    del tensors["layers.1.mlp.up_proj.weight"]
    rewrite(folder, "text_encoder", tensors | ({"layers.1.mlp.up_proj.weight": mx.zeros(shape)} if shape else {}))
    with pytest.raises(CheckpointError, match=message):
        residuals(folder, tmp_path)


def test_shards_with_an_index_are_one_component_and_a_missing_shard_is_named(wide_pipeline, tmp_path):
    folder = copied(wide_pipeline, tmp_path / "pipeline")
    tensors = weights_of(folder, "transformer")
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{n + 1}-of-00003.safetensors": names[n::3] for n in range(3)}
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    for file, members in shards.items():
        mx.save_safetensors(str(folder / "transformer" / file), {name: tensors[name] for name in members})
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, each in shards.items() for name in each}}))
    assert_same(loaded(folder, tmp_path), {n: v.astype(mx.float32) for n, v in tensors.items()})
    (folder / "transformer/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors: the file is missing; .*index\.json lists"):
        loaded(folder, tmp_path)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (("diffusion_pytorch_model", "diffusion_pytorch_model.fp16"), "diffusion_pytorch_model"),
        (("diffusion_pytorch_model.fp16",), "diffusion_pytorch_model.fp16"),
        (("diffusion_pytorch_model.fp16", "diffusion_pytorch_model.bf16"), "diffusion_pytorch_model.bf16"),
        (("diffusion_pytorch_model.non_ema", "diffusion_pytorch_model.fp16"), "diffusion_pytorch_model.fp16"),
        (("model-00001-of-00001.fp16", "model-00001-of-00001"), "model-00001-of-00001"),
        (("model.ema-00001-of-00001", "model.fp16-00001-of-00001"), "model.fp16-00001-of-00001"),
    ],
)
def test_of_several_variants_of_the_same_weights_one_is_taken(wide_pipeline, tmp_path, files, chosen):
    folder = copied(wide_pipeline, tmp_path / "pipeline")
    tensors = weights_of(folder, "transformer")
    for old in (folder / "transformer").glob("*.safetensors"):
        old.unlink()
    for file in files:
        marked = tensors | {"x_pad_token": mx.full((1, 192), float(file == chosen), tensors["x_pad_token"].dtype)}
        mx.save_safetensors(str(folder / "transformer" / f"{file}.safetensors"), marked)
    ours = loaded(folder, tmp_path)
    assert len(ours) == len(tensors)
    assert mx.all(ours["x_pad_token"] == 1)


@pytest.fixture(scope="module")
def picture(wide_pipeline, pipeline_store):
    return picture_of(str(wide_pipeline), pipeline_store)


def test_the_store_gives_the_very_weights_and_picture_of_the_folder(wide_pipeline, pipeline_store, picture):
    assert_same(loaded("p", pipeline_store), loaded(wide_pipeline, pipeline_store))
    np.testing.assert_array_equal(residuals("p", pipeline_store), residuals(wide_pipeline, pipeline_store))
    np.testing.assert_array_equal(picture_of("p", pipeline_store), picture)


@pytest.mark.parametrize("quantize", QUANT_TYPES)
def test_a_quantised_transformer_of_the_store_is_dequantised_as_mlx_does_or_kept(pipeline_store, quantize):
    checkpoint = open_checkpoint(f"p-{quantize}", pipeline_store)
    expected = expected_from(checkpoint, "transformer")
    quantized = {info.name for info in checkpoint.infos("transformer") if info.quantized}
    assert len(quantized) > 10
    assert_same(loaded(f"p-{quantize}", pipeline_store, "float32"), expected)
    assert_same(loaded(f"p-{quantize}", pipeline_store, "keep", kept=len(quantized)), expected)


@pytest.mark.parametrize("quantize", QUANT_TYPES)
def test_a_quantised_text_encoder_of_the_store_is_dequantised_as_mlx_does_or_kept(
    wide_pipeline, pipeline_store, tmp_path, quantize
):
    model, (keep, widen) = f"p-{quantize}", (LoadChoices(policy=policy) for policy in ("keep", "float32"))
    checkpoint = open_checkpoint(model, pipeline_store)
    assert sum(info.quantized for info in checkpoint.infos("text_encoder")) > 10
    folder = copied(wide_pipeline, tmp_path / "pipeline")
    rewrite(folder, "text_encoder", expected_from(checkpoint, "text_encoder"))
    widened = residuals(model, pipeline_store, widen)
    np.testing.assert_array_equal(widened, residuals(folder, tmp_path))
    kept = residuals(model, pipeline_store, keep)
    assert np.abs(kept - widened).std() < 0.02 * widened.std()
    # There is no kernel for 8-bit floats.
    is_smaller = weight_bytes(model, pipeline_store, keep) < weight_bytes(model, pipeline_store, widen) / 2
    assert is_smaller == (quantize != "mxfp8")


@pytest.mark.parametrize(
    ("quantize", "policy"), [*((each, "float32") for each in QUANT_TYPES), ("int4", "keep"), ("nvfp4", "keep")]
)
def test_a_quantised_pipeline_makes_nearly_the_same_picture(pipeline_store, picture, quantize, policy):
    ours = picture_of(f"p-{quantize}", pipeline_store, LoadChoices(policy=policy))
    difference = np.abs(ours.astype(float) - picture).mean()
    assert 0 < difference < BOUNDS[quantize]
    assert picture.std() > 20


@pytest.mark.parametrize("quantize", ["int4", "mxfp8"])
def test_a_folder_whose_components_mlx_quantised_is_read(wide_pipeline, pipeline_store, tmp_path, quantize):
    folder = copied(wide_pipeline, tmp_path / "pipeline")
    for component in ("transformer", "text_encoder"):
        tensors = {}
        checkpoint = open_checkpoint(f"p-{quantize}", pipeline_store)
        for tensor in checkpoint.tensors(component):
            value = tensor.value
            if isinstance(value, Packed):
                layer = tensor.name.removesuffix(".weight")
                parts = {"weight": value.weight, "scales": value.scales, "biases": value.biases}
                tensors |= {f"{layer}.{part}": to_mlx(array) for part, array in parts.items() if array is not None}
            else:
                tensors[tensor.name] = to_mlx(value)
        rewrite(folder, component, tensors)
        file = folder / component / "config.json"
        (spec,) = {info.spec for info in checkpoint.infos(component) if info.spec}
        settings = {"quantization": {"mode": spec.mode, "bits": spec.bits, "group_size": spec.group_size}}
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    assert_same(loaded(folder, pipeline_store), loaded(f"p-{quantize}", pipeline_store))
    np.testing.assert_array_equal(residuals(folder, pipeline_store), residuals(f"p-{quantize}", pipeline_store))
    np.testing.assert_array_equal(picture_of(str(folder), pipeline_store), picture_of(f"p-{quantize}", pipeline_store))


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_auto_keeps_a_component_quantised_only_where_its_float32_form_does_not_fit(
    pipeline_store, monkeypatch, component
):
    checkpoint = open_checkpoint("p-int4", pipeline_store)
    assert not loading.keeps_quantized_component(checkpoint, component, "auto")
    small = loading.device().__class__("cpu", "a cpu", 1 << 20, 1 << 20)
    monkeypatch.setattr(loading, "device", lambda: small)
    assert loading.keeps_quantized_component(checkpoint, component, "auto")


@pytest.fixture
def many_parts(monkeypatch):
    """A text encoder is loaded as a large one is: a matrix at a time."""
    monkeypatch.setattr(filling, "PART_BYTES", 1)
    monkeypatch.setattr(filling, "PARTS", 1000)


@pytest.mark.usefixtures("many_parts")
def test_progress_is_told_within_the_components_part_of_the_load(tiny_pipeline):
    checkpoint = open_checkpoint(str(tiny_pipeline), tiny_pipeline)
    transformer = Transformer(read_transformer_config(component_config(checkpoint, "transformer")))
    of_encoder, of_transformer = list[float](), list[float]()
    residuals(tiny_pipeline, tiny_pipeline, LoadChoices(progress=of_encoder.append), layers=(3,), span=(0.25, 0.5))
    choices = LoadChoices(progress=of_transformer.append)
    load_component(transformer, checkpoint, "transformer", choices, (0.25, 0.5))
    for seen in (of_encoder, of_transformer):
        assert seen == sorted(seen)
        assert 0.25 < seen[0] < 0.4
        assert seen[-1] == pytest.approx(0.5)


def test_a_text_encoder_in_many_parts_is_the_one_in_one(wide_pipeline, request):
    whole = residuals(wide_pipeline, wide_pipeline)
    request.getfixturevalue("many_parts")
    np.testing.assert_array_equal(residuals(wide_pipeline, wide_pipeline), whole)
