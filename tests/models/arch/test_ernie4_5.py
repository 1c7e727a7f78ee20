from typing import Any

from models.arch import Model
from models.ops import RopeConfig
from tests.models.arch.attentions import attentions
from tests.models.arch.declared import biases, build, gguf_config, tensors


def ernie(**said: Any) -> Model:
    return build("Ernie4_5ForCausalLM", **{"head_dim": 8} | said)


def test_its_rope_pairs_neighbours():
    assert {spec.rope for spec in attentions(ernie())} == {RopeConfig(8, 500_000.0, interleaved=True)}
    assert attentions(ernie(rope_theta=100.0))[0].rope == RopeConfig(8, 100.0, interleaved=True)


def test_all_projections_have_biases_or_none():
    attention, mlp = (
        {f"self_attn.{part}_proj" for part in "qkvo"},
        {f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    )
    assert biases(ernie(use_bias=True)) == attention | mlp
    assert biases(ernie(attention_bias=True)) == set()


def test_the_head_is_tied_unless_it_is_said_not_to_be():
    assert "lm_head.weight" not in tensors(ernie())
    assert tensors(ernie(tie_word_embeddings=False))["lm_head.weight"] == (11, 16)


def test_a_gguf_without_biases_says_so():
    assert gguf_config("ernie4_5")["use_bias"] is False
