import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import models.arch
from models.arch import Architecture, build_model, discover, gguf_layout, text_config
from models.errors import CheckpointError, UnsupportedArchitecture
from models.gguf_metadata import GGUFMetadata
from tests.models.arch.declared import build, sizes, tensors

NAMES = sorted(name for architecture in discover() for name in architecture.hf)


@pytest.fixture
def rediscovered() -> Iterator[None]:
    """What is found under changed circumstances is forgotten again."""
    discover.cache_clear()
    yield
    discover.cache_clear()


def test_every_module_but_the_shared_ones_has_a_record():
    modules = {module.name for module in pkgutil.iter_modules(models.arch.__path__)}
    records = [
        importlib.import_module(f"models.arch.{name}").ARCHITECTURE for name in modules - set(models.arch._SHARED)
    ]
    assert len(records) >= 4
    assert set(map(id, records)) == set(map(id, discover()))
    for record in records:
        assert record.hf
        # Of encoders llama.cpp writes but some under names of their own.
        assert record.is_encoder or bool(record.gguf) is not bool(record.without_gguf)


def test_every_architecture_has_its_row_in_the_readme():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    modules = {module.name for module in pkgutil.iter_modules(models.arch.__path__)} - set(models.arch._SHARED)
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    assert {name for name in modules if not any(f"`{name}`" in row.split("|")[1] for row in rows)} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_built_by_the_module_that_claims_its_name(name: str):
    (own,) = (architecture for architecture in discover() if name in architecture.hf)
    built, expected = build(name), own.build(sizes(name))
    assert built.weights == expected.weights
    assert own.is_encoder or {"model.embed_tokens.weight", "backbone.embeddings.weight"} & set(tensors(built))
    assert built.is_encoder == own.is_encoder


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architectures": ["GPTBigCodeForCausalLM"]}, "GPTBigCodeForCausalLM"),
        ({"architectures": []}, "unnamed"),
        ({"model_type": "llama"}, "unnamed"),
    ],
)
def test_an_unknown_architecture_is_refused_with_what_there_is(config: dict[str, Any], named: str):
    with pytest.raises(UnsupportedArchitecture, match=f"{named} is not supported; supported: {', '.join(NAMES)}$"):
        build_model(config)


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", [1], {"a": 1}])
def test_architectures_of_a_wrong_kind_are_a_damaged_checkpoint(architectures: Any):
    with pytest.raises(CheckpointError, match="architectures"):
        build_model({"architectures": architectures})


@pytest.mark.usefixtures("rediscovered")
def test_two_modules_may_not_claim_one_name(monkeypatch: pytest.MonkeyPatch):
    from models.arch import qwen2

    twice: Architecture = replace(qwen2.ARCHITECTURE, hf=("LlamaForCausalLM",))
    monkeypatch.setattr(qwen2, "ARCHITECTURE", twice)
    with pytest.raises(ValueError, match=r"two modules of models\.arch claim one architecture.*LlamaForCausalLM"):
        discover()


MULTIMODAL: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "tie_word_embeddings": False,
    "hidden_size": 999,
    "text_config": {"hidden_size": 16, "num_hidden_layers": 2, "architectures": ["Gemma3TextModel"]},
    "vision_config": {"hidden_size": 8},
}


def test_of_a_multimodal_model_the_text_part_is_built():
    model = build_model(MULTIMODAL)
    assert (model.config.hidden_size, model.config.num_layers) == (16, 2)
    assert "lm_head.weight" in tensors(model)
    assert "vision_tower." in model.other_parts
    assert build_model(text_config(MULTIMODAL)).other_parts == ()


def test_the_text_part_goes_before_the_whole():
    assert "lm_head.weight" not in tensors(
        build_model(MULTIMODAL | {"text_config": MULTIMODAL["text_config"] | {"tie_word_embeddings": True}})
    )


def test_a_text_config_of_a_wrong_kind_is_a_damaged_checkpoint():
    with pytest.raises(CheckpointError, match="text_config must be an object"):
        build_model(MULTIMODAL | {"text_config": "gemma"})


def test_ggufs_names_are_those_of_declared_tensors():
    for architecture in discover():
        for names in architecture.gguf:
            assert names.hf in architecture.hf
            declared = tensors(build(names.hf, tie_word_embeddings=False))
            translated = {f"{name}.weight".replace("*", each) for name in names.top.values() for each in "012"}
            for layer, expert in product(range(3), "01"):
                ours = [name.replace("*", expert) for name in names.layer.values()]
                translated |= {f"{names.layers}.{layer}.{name}.weight" for name in ours}
                translated |= {f"{names.layers}.{layer}.{names.layer[name]}" for name in names.bare}
            assert {name for name in declared if name.endswith(".weight")} <= translated
            assert {*names.interleaved, *names.bare} <= set(names.layer)


# llama.cpp's converter interleaves the rows of queries and keys of Llamas alone.
INTERLEAVED = {"llama", "mistral", "mistral3", "smollm3", "granite"}


@pytest.mark.parametrize(
    ("said", "hf"),
    [
        ("llama", "LlamaForCausalLM"),
        ("mistral", "MistralForCausalLM"),
        ("qwen2", "Qwen2ForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("smollm3", "SmolLM3ForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3", "Gemma3ForCausalLM"),
        ("phi3", "Phi3ForCausalLM"),
        ("olmo2", "Olmo2ForCausalLM"),
        ("command-r", "CohereForCausalLM"),
        ("cohere2", "Cohere2ForCausalLM"),
        ("granite", "GraniteForCausalLM"),
        ("mistral3", "Ministral3ForCausalLM"),
        ("bert", "BertModel"),
        ("nomic-bert", "NomicBertModel"),
    ],
)
def test_a_gguf_architecture_finds_its_layout(said: str, hf: str):
    found = gguf_layout(GGUFMetadata({"general.architecture": said}, {}, lambda _: None, "m"))
    assert found is not None
    assert (found.hf, said in found.architectures) == (hf, True)
    assert found.interleaved == (("attn_q", "attn_k") if said in INTERLEAVED else ())


def test_a_gguf_architecture_that_nobody_claims_has_no_layout():
    assert gguf_layout(GGUFMetadata({"general.architecture": "gpt2"}, {}, lambda _: None, "m")) is None


ALONE = """
import sys
from models.arch import discover
assert discover()
print(sorted(name for name in ("mlx", "onnxruntime", "onnx", "models.executors", "gguf") if name in sys.modules))
"""


def test_architectures_are_found_without_an_array_library_but_numpy():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
