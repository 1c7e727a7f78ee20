from typing import Any

from models.arch import Model
from tests.models.arch.attentions import noted
from tests.models.arch.declared import biases, build, gguf_config, tensors, windows

NORMS = {"input_layernorm", "post_attention_layernorm"}


def starcoder2(**said: Any) -> Model:
    return build("Starcoder2ForCausalLM", **said)


def test_an_mlp_has_two_matrices_and_no_gate():
    found = tensors(starcoder2())
    assert [found[f"model.layers.1.mlp.{part}.weight"] for part in ("c_fc", "c_proj")] == [(24, 16), (16, 24)]
    assert noted(starcoder2()).activations == ["gelu_tanh"] * 3
    assert noted(starcoder2(hidden_act="relu")).activations == ["relu"] * 3


def test_norms_have_biases_and_projections_have_them_unless_it_is_said_that_they_have_none():
    projections = {f"self_attn.{part}_proj" for part in "qkvo"} | {"mlp.c_fc", "mlp.c_proj"}
    assert biases(starcoder2()) == NORMS | projections
    assert biases(starcoder2(use_bias=False)) == NORMS
    assert tensors(starcoder2())["model.norm.bias"] == (16,)


def test_a_window_is_every_layers():
    assert windows(starcoder2(sliding_window=8)) == (8,) * 3
    assert windows(starcoder2(sliding_window=None)) == (None,) * 3


def test_a_ggufs_norms_have_an_epsilon_of_their_own():
    said = gguf_config("starcoder2", **{"attention.layer_norm_epsilon": 0.5})
    assert (said["norm_epsilon"], said["hidden_act"], said["use_bias"]) == (0.5, "gelu_pytorch_tanh", False)
