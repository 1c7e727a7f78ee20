import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten

from models.errors import CheckpointError
from models.image.weights import ScaledQuantizedLinear, load_weights, planned_nbytes, stored_dtype
from models.quantization import Packed, QuantizationSpec, dequantize
from models.sources.base import Checkpoint
from models.sources.hf import HFDirectory
from models.to_mlx import from_mlx

HIDDEN, VOCABULARY = 64, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, 128)
        self.down_proj = nn.Linear(128, HIDDEN, bias=False)
        self.norm = nn.RMSNorm(HIDDEN)
        self._table = mx.ones(3)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.down_proj(self.up_proj(self.norm(x)))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = [Block() for _ in range(2)]


class Tiny(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.model = Body()
        if not tied:
            self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)


def shapes(**how: bool) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tree_flatten(Tiny(**how).parameters())}


def arrays_for(dtype: mx.Dtype = mx.float32, **how: bool) -> dict[str, mx.array]:
    random = np.random.default_rng(2)
    return {name: mx.array(random.normal(size=shape) * 0.1).astype(dtype) for name, shape in shapes(**how).items()}


def folder(path: Path, arrays: dict[str, mx.array], config: dict[str, object] | None = None) -> HFDirectory:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    mx.save_safetensors(str(path / "model.safetensors"), arrays)
    return HFDirectory(path)


def quantized_folder(path: Path, bits: int = 4, dtype: mx.Dtype = mx.float32) -> HFDirectory:
    arrays = {}
    for name, array in arrays_for(dtype).items():
        if array.ndim == 2:
            layer = name.removesuffix(".weight")
            arrays[name], arrays[f"{layer}.scales"], arrays[f"{layer}.biases"] = mx.quantize(array, 32, bits)
        else:
            arrays[name] = array
    return folder(path, arrays, {"quantization": {"group_size": 32, "bits": bits}})


def parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def test_every_parameter_gets_its_tensor_and_the_caller_is_told(tmp_path: Path):
    arrays = arrays_for(tied=False)
    model, told = Tiny(tied=False), list[float]()
    report = load_weights(model, folder(tmp_path, arrays), progress=told.append)
    assert {name: array.tolist() for name, array in parameters(model).items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    assert (report.tensors, report.kept_quantized, report.dequantized, report.ignored) == (len(arrays), 0, 0, ())
    assert report.nbytes == sum(array.nbytes for array in arrays.values())
    assert told == sorted(told)
    assert len(told) == len(arrays)
    assert told[-1] == 1.0


@pytest.mark.parametrize(("dense_dtype", "expected"), [(None, mx.bfloat16), (mx.float32, mx.float32)])
def test_dense_tensors_are_cast_if_a_type_is_asked_for(tmp_path: Path, dense_dtype: mx.Dtype, expected: mx.Dtype):
    model = Tiny()
    load_weights(model, folder(tmp_path, arrays_for(mx.bfloat16)), dense_dtype=dense_dtype)
    assert {array.dtype for array in parameters(model).values()} == {expected}


def test_quantised_weights_become_dense_where_asked(tmp_path: Path):
    checkpoint, model = quantized_folder(tmp_path, dtype=mx.float16), Tiny()
    report = load_weights(model, checkpoint, policy="float32", dense_dtype=mx.float32)
    assert (report.kept_quantized, report.dequantized) == (0, 5)
    found = parameters(model)
    assert {name: array.shape for name, array in found.items()} == shapes()
    for tensor in checkpoint.tensors():
        if isinstance(value := tensor.value, Packed):
            assert np.array_equal(found[tensor.name], dequantize(value))


@pytest.mark.parametrize("dense_dtype", [mx.float32, mx.float16, None])
def test_kept_weights_compute_what_dense_ones_do(tmp_path: Path, dense_dtype: mx.Dtype | None):
    checkpoint = quantized_folder(tmp_path, dtype=mx.float16)
    kept, dense = Tiny(), Tiny()
    report = load_weights(kept, checkpoint, policy="keep", dense_dtype=dense_dtype)
    load_weights(dense, checkpoint, policy="float32", dense_dtype=mx.float32)
    assert (report.kept_quantized, report.dequantized) == (5, 0)
    assert isinstance(kept.model.embed_tokens, nn.QuantizedEmbedding)
    assert isinstance(kept.model.layers[1].down_proj, nn.QuantizedLinear)
    scales = kept.model.layers[0].up_proj.scales
    assert scales.dtype == (dense_dtype or mx.float16)
    tokens = mx.array([1, 5, 39])
    tolerance = 1e-5 if scales.dtype == mx.float32 else 2e-2
    assert np.allclose(kept(tokens).astype(mx.float32), dense(tokens), atol=tolerance)


def test_the_policy_auto_follows_the_memory_on_this_cpu(tmp_path: Path):
    checkpoint = quantized_folder(tmp_path)
    needed = planned_nbytes(checkpoint.infos(), keep_quantized=False, dense_dtype=mx.float32)
    enough = load_weights(Tiny(), checkpoint, dense_dtype=mx.float32, available_bytes=needed)
    scarce = load_weights(Tiny(), checkpoint, dense_dtype=mx.float32, available_bytes=needed - 1)
    assert (enough.kept_quantized, scarce.kept_quantized) == (0, 5)


@pytest.mark.parametrize("dense_dtype", [mx.float32, mx.bfloat16, None])
@pytest.mark.parametrize("policy", ["float32", "keep"])
def test_the_plan_is_what_loading_takes(tmp_path: Path, policy: str, dense_dtype: mx.Dtype | None):
    checkpoint, model = quantized_folder(tmp_path, bits=8, dtype=mx.float16), Tiny()
    report = load_weights(model, checkpoint, policy=policy, dense_dtype=dense_dtype)
    planned = planned_nbytes(checkpoint.infos(), keep_quantized=policy == "keep", dense_dtype=dense_dtype)
    assert planned == report.nbytes == sum(array.nbytes for array in parameters(model).values())


def test_a_bias_survives_whichever_comes_first(tmp_path: Path):
    checkpoint = quantized_folder(tmp_path)
    expected = {info.name for info in checkpoint.infos() if info.name.endswith("up_proj.bias")}

    class Reversed:
        reference = "reversed"
        config = checkpoint.config
        nbytes = checkpoint.nbytes
        read = checkpoint.read
        infos = checkpoint.infos

        def tensors(self, component: str = ""):
            return iter(reversed(list(checkpoint.tensors(component))))

    for source in (checkpoint, Reversed()):
        model = Tiny()
        load_weights(model, source, policy="keep", dense_dtype=mx.float32)
        stored = {tensor.name: tensor.value for tensor in checkpoint.tensors() if tensor.name in expected}
        for name, value in stored.items():
            assert parameters(model)[name].tolist() == value.tolist()


def test_private_arrays_are_left_alone(tmp_path: Path):
    model = Tiny()
    load_weights(model, folder(tmp_path, arrays_for()))
    assert model.model.layers[0]._table.tolist() == [1, 1, 1]


def test_a_missing_tensor_is_named_with_how_many_more(tmp_path: Path):
    arrays = arrays_for()
    del arrays["model.layers.1.norm.weight"], arrays["model.layers.0.up_proj.bias"]
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.\d\.\S+: is missing \(and 1 more"):
        load_weights(Tiny(), folder(tmp_path, arrays))


def test_an_extra_tensor_is_named_with_its_file(tmp_path: Path):
    arrays = arrays_for() | {"model.layers.2.norm.weight": mx.ones(HIDDEN)}
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor model\.layers\.2\.norm\.weight: the architecture"
    ):
        load_weights(Tiny(), folder(tmp_path, arrays))


def test_a_misshaped_tensor_is_named_with_both_shapes(tmp_path: Path):
    arrays = arrays_for() | {"model.layers.0.norm.weight": mx.ones(HIDDEN + 1)}
    with pytest.raises(CheckpointError, match=r"norm\.weight: its shape is \[65\], and config\.json asks for \[64\]"):
        load_weights(Tiny(), folder(tmp_path, arrays))


def test_a_misshaped_quantised_tensor_is_found_by_its_logical_shape(tmp_path: Path):
    arrays = arrays_for()
    name = "model.layers.0.down_proj"
    weight, scales, biases = mx.quantize(mx.ones((HIDDEN, 64)), 32, 4)
    arrays |= {f"{name}.weight": weight, f"{name}.scales": scales, f"{name}.biases": biases}
    with pytest.raises(CheckpointError, match=r"its shape is \[64, 64\], and config\.json asks for \[64, 128\]"):
        load_weights(Tiny(), folder(tmp_path, arrays, {"quantization": {"group_size": 32, "bits": 4}}))


def test_nothing_is_read_before_names_and_shapes_agree(tmp_path: Path):
    arrays = arrays_for() | {"extra": mx.ones(1)}
    checkpoint, told = folder(tmp_path, arrays), list[float]()
    with pytest.raises(CheckpointError):
        load_weights(Tiny(), checkpoint, progress=told.append)
    assert told == []


def test_known_extras_are_passed_over(tmp_path: Path):
    extras = {"lm_head.weight": mx.ones((VOCABULARY, HIDDEN)), "model.layers.0.rotary_emb.inv_freq": mx.ones(8)}
    report = load_weights(Tiny(), folder(tmp_path, arrays_for() | extras))
    assert report.ignored == tuple(sorted(extras))


def test_a_base_model_saved_without_its_prefix_is_understood(tmp_path: Path):
    bare = {name.removeprefix("model."): array for name, array in arrays_for().items()}
    model = Tiny()
    load_weights(model, folder(tmp_path, bare))
    name = "layers.1.down_proj.weight"
    assert parameters(model)[f"model.{name}"].tolist() == bare[name].tolist()


def test_a_tensor_under_both_names_is_refused(tmp_path: Path):
    arrays = arrays_for()
    arrays["layers.0.norm.weight"] = arrays["model.layers.0.norm.weight"]
    with pytest.raises(CheckpointError, match="is there twice"):
        load_weights(Tiny(), folder(tmp_path, arrays))


def test_progress_may_abandon_the_load(tmp_path: Path):
    class AbandonedError(Exception):
        pass

    def abandon(fraction: float) -> None:
        if fraction > 0.3:
            raise AbandonedError

    with pytest.raises(AbandonedError):
        load_weights(Tiny(), folder(tmp_path, arrays_for()), progress=abandon)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, mx.bfloat16),
        ({"dtype": "float16", "torch_dtype": "float32"}, mx.float16),
        ({"torch_dtype": "torch.float32"}, mx.float32),
        ({"torch_dtype": "float8_e4m3fn"}, None),
        ({"torch_dtype": None}, None),
        ({}, None),
    ],
)
def test_the_type_of_the_weights_is_read_from_either_key(config: dict[str, str], dtype: mx.Dtype | None):
    assert stored_dtype(config) is dtype or stored_dtype(config) == dtype


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path: Path):
    checkpoint = folder(tmp_path, arrays_for())
    file = tmp_path / "model.safetensors"

    def cut(_: float) -> None:
        with file.open("r+b") as opened:
            opened.truncate(3000)

    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor \S+: cannot be read"):
        load_weights(Tiny(), checkpoint, progress=cut)


class OneLinear(nn.Module):
    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(HIDDEN, 32, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_global_scale_is_applied_by_the_layer_that_stays_quantised(store_writer, bias: bool):
    dense = mx.array(np.random.default_rng(1).normal(size=(32, HIDDEN)), mx.float32)
    weight, scales = mx.quantize(dense, 16, 4, "nvfp4")
    parts = {"proj.weight": weight, "proj.weight.scale": scales, "proj.weight.global_scale": mx.array([0.25])}
    store_writer.tensors("proj.weight", parts, {"quant_type": "nvfp4"})
    if bias:
        store_writer.tensors("proj.bias", {"proj.bias": mx.full(32, 3.0)})
    store_writer.manifest()
    checkpoint = open_store(store_writer)
    kept, made_dense = OneLinear(bias=bias), OneLinear(bias=bias)
    load_weights(kept, checkpoint, policy="keep", dense_dtype=mx.float32)
    load_weights(made_dense, checkpoint, policy="float32", dense_dtype=mx.float32)
    assert isinstance(kept.proj, ScaledQuantizedLinear)
    x = mx.random.normal((3, HIDDEN), key=mx.random.key(0))
    assert np.allclose(kept.proj(x), made_dense.proj(x), atol=1e-4)
    packed = Packed(from_mlx(weight), from_mlx(scales), None, QuantizationSpec("nvfp4", 4, 16))
    assert np.allclose(made_dense.proj.weight, 0.25 * dequantize(packed))


def open_store(store_writer) -> Checkpoint:
    from models.checkpoint import open_checkpoint

    return open_checkpoint("tiny", store_writer.store)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = [nn.Linear(HIDDEN, 32, bias=False)]
        self.weight = mx.zeros((2, 32, HIDDEN))


def test_a_quantised_tensor_without_a_layer_of_its_own_becomes_dense(tmp_path: Path):
    stacked = mx.ones((2, 32, HIDDEN))
    weight, scales, biases = mx.quantize(stacked, 32, 8)
    arrays = {"weight": weight, "weight.scale": scales, "weight.bias": biases, "experts.0.weight": stacked[0]}
    model = Stacked()
    checkpoint = folder(tmp_path, arrays, {"quantization": {"group_size": 32, "bits": 8}})
    report = load_weights(model, checkpoint, policy="keep")
    assert (report.kept_quantized, report.dequantized) == (0, 1)
    assert np.allclose(model.weight, 1)


def test_loading_one_tensor_at_a_time_keeps_the_peak_near_the_model(tmp_path: Path):
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(1024, 512, bias=False) for _ in range(16)]

    arrays = {f"layers.{index}.weight": mx.ones((512, 1024), mx.bfloat16) for index in range(16)}
    checkpoint = folder(tmp_path, arrays)
    del arrays
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = Wide()
    report = load_weights(model, checkpoint, dense_dtype=mx.float32)
    assert report.nbytes == 16 * 512 * 1024 * 4
    assert mx.get_peak_memory() - before < report.nbytes * 1.15
