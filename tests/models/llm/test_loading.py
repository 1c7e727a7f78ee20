"""models/llm/__init__.py: finding an architecture and loading a language model."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.checkpoint import open_checkpoint
from models.errors import CheckpointError, UnsupportedArchitecture
from models.llm import discover, find_architecture, load_language_model
from models.llm.base import LanguageModel, Row
from models.nn.decoder import Decoder
from models.nn.fused import FusedDecoder
from models.quantization import WeightPolicy

FIXTURES = Path(__file__).parents[2] / "parity"
TOKENS = [5, 80, 200, 31, 31, 7]


def load(path: Path, **options: Any) -> LanguageModel:
    return load_language_model(open_checkpoint(str(path), path / "no-store"), **options)


def logits(model: LanguageModel) -> np.ndarray:
    return np.array(model.logits(model(mx.array(TOKENS), [Row(len(TOKENS), model.new_cache())])))


def copied(name: str, to: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, to / name))


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def quantize_folder(folder: Path, bits: int) -> None:
    """Pack every matrix that MLX can pack, as mlx-lm's converter does."""
    packed: dict[str, mx.array] = {}
    for name, weight in mx.load(str(folder / "model.safetensors")).items():
        if weight.ndim != 2 or weight.shape[1] % 32:
            packed[name] = weight
            continue
        module = name.removesuffix(".weight")
        packed[name], packed[f"{module}.scales"], packed[f"{module}.biases"] = mx.quantize(weight, 32, bits)
    mx.save_safetensors(str(folder / "model.safetensors"), packed, {"format": "mlx"})
    change_config(folder, quantization={"group_size": 32, "bits": bits})


def test_every_architecture_has_names_of_both_kinds():
    for architecture in discover():
        assert architecture.hf
        assert architecture.gguf


def test_the_architecture_is_the_one_that_claims_the_name():
    for architecture in discover():
        for name in architecture.hf:
            assert find_architecture({"architectures": [name]}) is architecture


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["GPTBigCodeForCausalLM"]}, "GPTBigCodeForCausalLM"),
        ({"architectures": []}, "unnamed"),
        ({"model_type": "llama"}, "unnamed"),
    ],
)
def test_an_unknown_architecture_is_refused_with_what_there_is(config: dict[str, Any], named: str):
    with pytest.raises(UnsupportedArchitecture, match=f"{named}.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        find_architecture(config)


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", [1], {"a": 1}])
def test_architectures_of_a_wrong_kind_are_a_damaged_checkpoint(architectures: Any):
    with pytest.raises(CheckpointError, match="architectures"):
        find_architecture({"architectures": architectures})


def test_progress_rises_to_one(tmp_path: Path):
    seen: list[float] = []
    load(FIXTURES / "llama_untied_sharded", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[0] < 0.5
    assert seen[-1] == 1.0


def test_a_load_can_be_abandoned():
    class Abandoned(Exception):
        pass

    def give_up(done: float) -> None:
        if done > 0.3:
            raise Abandoned

    with pytest.raises(Abandoned):
        load(FIXTURES / "qwen2", progress=give_up)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "qwen2_window"])
def test_quantised_weights_compute_the_same_kept_or_widened(name: str, bits: int, tmp_path: Path):
    folder = copied(name, tmp_path)
    quantize_folder(folder, bits)
    policies: tuple[WeightPolicy, ...] = ("keep", "float32")
    kept, widened = (load(folder, policy=policy) for policy in policies)
    assert isinstance(kept, Decoder)
    found, expected = logits(kept), logits(widened)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    original = logits(load(FIXTURES / name))
    assert np.abs(found - original).max() > 1e-3, "the weights were not quantised at all"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_weights_become_float32_where_that_is_fast(dtype: mx.Dtype, tmp_path: Path):
    folder = copied("mistral_window", tmp_path)
    rounded = {name: w.astype(dtype) for name, w in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), rounded)
    found = logits(load(folder))
    widened = {name: w.astype(mx.float32) for name, w in rounded.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), widened)
    np.testing.assert_allclose(found, logits(load(folder)), atol=1e-6)


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="the fused form is the CPU's")
def test_the_form_is_by_device_and_weights_unless_it_is_named():
    assert isinstance(load(FIXTURES / "qwen3"), FusedDecoder)
    assert isinstance(load(FIXTURES / "qwen3", fuse=True), FusedDecoder)
    assert isinstance(load(FIXTURES / "qwen3", fuse=False), Decoder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 48}, "shape"),
        ({"vocab_size": 299}, "embed_tokens.*shape"),
        ({"num_hidden_layers": 3}, r"layers\.2.*missing"),
        ({"num_hidden_layers": 2, "intermediate_size": 41}, "shape"),
        ({"num_hidden_layers": 1}, r"layers\.1.*no such tensor"),
        ({"attention_bias": True}, "bias.*missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight.*missing"),
    ],
)
def test_a_configuration_that_does_not_fit_its_weights_names_the_tensor(
    change: dict[str, Any], named: str, tmp_path: Path
):
    folder = copied("llama_tied", tmp_path)
    change_config(folder, **change)
    with pytest.raises(CheckpointError, match=named):
        load(folder)


def test_fixtures_are_small_and_complete():
    for reference in FIXTURES.glob("*/reference.safetensors"):
        folder = reference.parent
        assert sum(file.stat().st_size for file in folder.iterdir()) < 500_000
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= {
            file.name for file in folder.iterdir()
        }
        assert {"prompt.0", "logits.0", "continuation.0"} <= load_file(reference).keys()
