from typing import Any

import pytest

from models.arch import Model, build_model
from models.errors import CheckpointError
from tests.models.arch.declared import tensors


def llava(**text: Any) -> Model:
    """A config.json that says next to nothing of its text model, as published ones do."""
    return build_model({"architectures": ["LlavaForConditionalGeneration"], "text_config": text})


def test_what_a_text_config_leaves_unsaid_is_as_in_the_text_models_own():
    vicuna = llava(model_type="llama", vocab_size=32064, max_position_embeddings=4096)
    assert (vicuna.config.num_layers, vicuna.config.hidden_size, vicuna.context_length) == (32, 4096, 4096)
    assert tensors(vicuna)["lm_head.weight"] == (32064, 4096)
    assert tensors(vicuna)["model.layers.31.mlp.up_proj.weight"] == (11008, 4096)
    pixtral = llava(model_type="mistral", hidden_size=5120, head_dim=128, sliding_window=None, num_hidden_layers=40)
    assert tensors(pixtral)["model.layers.39.self_attn.k_proj.weight"] == (1024, 5120)
    assert {state.window for state in pixtral.state} == {None}
    assert {state.window for state in llava(model_type="mistral").state} == {4096}
    assert "model.layers.0.self_attn.q_proj.bias" in tensors(llava(model_type="qwen2", num_hidden_layers=1))


def test_another_text_model_is_refused_by_name():
    with pytest.raises(CheckpointError, match="a text model of type 'opt' is not supported"):
        llava(model_type="opt")
