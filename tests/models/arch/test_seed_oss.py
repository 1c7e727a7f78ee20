from typing import Any

import pytest

from tests.models.arch.declared import biases, build, tensors

QKV = {f"self_attn.{part}_proj" for part in "qkv"}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, QKV),
        ({"attention_bias": False}, set()),
        ({"attention_out_bias": True}, QKV | {"self_attn.o_proj"}),
        ({"mlp_bias": True}, QKV | {f"mlp.{part}_proj" for part in ("gate", "up", "down")}),
    ],
)
def test_queries_keys_and_values_have_biases_and_the_others_by_option(said: dict[str, Any], expected: set[str]):
    assert biases(build("SeedOssForCausalLM", **said)) == expected


def test_a_head_is_128_wide_unless_it_is_said_otherwise():
    found = [tensors(build("SeedOssForCausalLM", **said)) for said in ({}, {"head_dim": 8})]
    assert [each["model.layers.0.self_attn.q_proj.weight"] for each in found] == [(4 * 128, 16), (4 * 8, 16)]
