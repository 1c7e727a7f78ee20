"""What Ollama is told of a model."""

import json

import pytest

from models.store.chat_format import chat_format_of
from models.store.description import (
    Rendering,
    capabilities_of,
    description,
    generation_defaults,
    rendering_of,
)
from models.store.gguf_source import gguf_file_type, human_number
from models.store.go_json import go_json


@pytest.mark.parametrize(
    ("config", "template", "renderer", "parser"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "", "qwen3-coder", "qwen3"),
        ({"architectures": ["Qwen3VLForConditionalGeneration"]}, "", "qwen3-vl-instruct", "qwen3-vl-instruct"),
        ({"model_type": "qwen3_vl_moe"}, "<think>\n", "qwen3-vl-thinking", "qwen3-vl-thinking"),
        ({"architectures": ["Qwen3_5ForCausalLM"]}, "", "qwen3.5", "qwen3.5"),
        (
            {"architectures": ["Qwen3NextForCausalLM"]},
            "resolved_reasoning_effort preserve_thinking",
            "qwen3.8",
            "qwen3.5",
        ),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "", "deepseek3", "deepseek3"),
        ({"architectures": ["Glm4MoeLiteForCausalLM"]}, "", "glm-4.7", "glm-4.7"),
        ({"architectures": ["LagunaForCausalLM"]}, "laguna_glm_thinking_v8", "poolside-v1", "poolside-v1"),
        ({"architectures": ["NemotronHForCausalLM"]}, "", "nemotron-3-nano", "nemotron-3-nano"),
        ({"architectures": ["X"], "model_type": "gemma4"}, "", "gemma4", "gemma4"),
        ({"llm_config": {"model_type": "nemotron_h"}}, "", "nemotron-3-nano", "nemotron-3-nano"),
        ({"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}, "", "", "harmony"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "", "", ""),
        ({"architectures": "Qwen3", "llm_config": 3}, "", "", ""),
    ],
)
def test_renderer_and_parser_are_told_by_the_architecture(config, template, renderer, parser):
    assert rendering_of(config, template) == Rendering(renderer, parser)


@pytest.mark.parametrize(
    ("config", "template", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "", ["completion"]),
        ({"architectures": ["Qwen3ForCausalLM"]}, "", ["completion", "tools"]),
        ({"architectures": ["Qwen3ForCausalLM"]}, "<think></think>", ["completion", "tools", "thinking"]),
        ({"model_type": "qwen3_vl"}, "", ["completion", "tools"]),
        ({"model_type": "qwen3_vl"}, "<think>\n", ["completion", "tools", "thinking"]),
        ({"architectures": ["LlamaForCausalLM"]}, "content.split('</think>')", ["completion", "thinking"]),
        ({"architectures": ["L"]}, "content.split('</think>') reasoning_content", ["completion"]),
        ({"architectures": ["Gemma4"], "vision_config": {}}, "", ["completion", "tools", "thinking"]),
        ({"model_type": "gpt_oss"}, "", ["completion", "tools", "thinking"]),
        ({"model_type": "x", "audio_config": {}, "vision_config": None}, "", ["completion"]),
    ],
)
def test_capabilities_are_told_by_configuration_parser_and_template(config, template, expected):
    assert capabilities_of(config, template, rendering_of(config, template)) == expected
    seeing = capabilities_of(config, template, rendering_of(config, template), sees=True)
    assert seeing == [expected[0], "vision", *expected[1:]]


def test_sampling_defaults_have_ollamas_names_and_nulls_say_nothing():
    given = {
        "temperature": 0.6,
        "top_k": 20.0,
        "top_p": None,
        "repetition_penalty": 1,
        "do_sample": True,
        "min_p": True,
    }
    assert generation_defaults(given) == {"repeat_penalty": 1.0, "temperature": 0.6, "top_k": 20}
    described = description(model_format="safetensors", defaults=generation_defaults(given), requires="0.19.0")
    # As Ollama v0.34.4 writes it.
    assert go_json(described) == (
        b'{"model_format":"safetensors","model_family":"","model_families":null,"model_type":"","file_type":"",'
        b'"generation_defaults":{"repeat_penalty":1,"temperature":0.6,"top_k":20},"requires":"0.19.0"}'
    )


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<|im_start|>' + role }}", "ChatML"),
        ("<|start_header_id|> <|eot_id|>", "Llama 3"),
        ("[INST] <<SYS>>", "Llama 2"),
        ("[INST] [/INST]", "Mistral"),
        ("<start_of_turn> <end_of_turn>", "Gemma"),
        ("'<|' + role + '|>' <|end|> <|assistant|>", "Phi 3"),
        ("<|user|> <|assistant|>", "Zephyr"),
        ("<|start|>system<|message|> <|channel|>final<|message|> <|end|>", "Harmony"),
        ("### Instruction:", None),
    ],
)
def test_a_chat_format_is_told_by_its_markers(template, name):
    found = chat_format_of(template)
    assert (found.name if found else None) == name
    if found:
        assert found.template.count("{{") == found.template.count("}}")
        assert ".Content" in found.template


def test_json_has_gos_escapes_and_numbers():
    value = {"b": "<&>\u2028é", "a": [1.0, 0.5, 1e-7, True, None]}
    assert go_json(value) == '{"b":"\\u003c\\u0026\\u003e\\u2028é","a":[1,0.5,1e-07,true,null]}'.encode()
    assert json.loads(go_json(value)) == value
    assert go_json({"b": 1, "a": 2}, sort=True) == b'{"a":2,"b":1}'


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (38_496, "38K"), (10**6, "1M"), (134_515_008, "134.52M"), (10**9, "1B"), (1_543_714_304, "1.5B")],
)
def test_numbers_of_parameters_are_rounded_as_ollama_does(count, text):
    assert human_number(count) == text


@pytest.mark.parametrize(("value", "text"), [(0, "F32"), (15, "Q4_K_M"), (None, "unknown"), (1024, "unknown")])
def test_file_types_have_their_names(value, text):
    assert gguf_file_type(value) == text
