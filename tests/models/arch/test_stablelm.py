from typing import Any

import pytest

from models.arch import Model, gguf_layout
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import RopeConfig
from tests.models.arch.attentions import attentions
from tests.models.arch.declared import biases, build

NORMS = {"input_layernorm", "post_attention_layernorm"}
VALUES = {"embedding_length": 64, "block_count": 1, "attention.head_count": 4, "feed_forward_length": 96}


def stablelm(**said: Any) -> Model:
    return build("StableLmForCausalLM", **said)


def test_a_quarter_of_a_head_turns_unless_more_is_said():
    assert attentions(stablelm())[0].rope == RopeConfig(2, 10000.0)
    assert attentions(stablelm(partial_rotary_factor=0.5))[0].rope == RopeConfig(4, 10000.0)


def test_biases_of_queries_keys_and_values_are_by_option():
    assert biases(stablelm()) == NORMS
    assert biases(stablelm(use_qkv_bias=True)) == NORMS | {f"self_attn.{part}_proj" for part in "qkv"}


@pytest.mark.parametrize("option", ["qk_layernorm", "use_parallel_residual"])
def test_what_is_not_honoured_is_refused_by_name(option: str):
    with pytest.raises(CheckpointError, match=rf"config\.json: {option} is not supported"):
        stablelm(**{option: True})


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_ggufs_tensors_say_whether_branches_are_side_by_side(side_by_side: bool):
    values: Any = {f"stablelm.{key}": value for key, value in (VALUES | {"context_length": 128}).items()}
    said = {"general.architecture": "stablelm", "stablelm.use_parallel_residual": not side_by_side}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (11, 64)}
    shapes |= {} if side_by_side else {"blk.0.ffn_norm.weight": (64,)}
    metadata = GGUFMetadata(values | said, shapes, lambda _: None, "m")
    layout = gguf_layout(metadata)
    assert layout is not None
    assert layout.config(metadata)["use_parallel_residual"] is side_by_side
