"""Nomic BERT: GPT-2's words, and the settings that no published checkpoint has otherwise."""

import pytest

from models.errors import CheckpointError
from tests.models.arch.encoders import build


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prenorm": True}, "prenorm True is not supported"),
        ({"qkv_proj_bias": True}, "qkv_proj_bias True is not supported"),
        ({"rotary_emb_fraction": 0.5}, r"rotary_emb_fraction 0\.5 is not supported"),
        ({"activation_function": "gelu"}, "activation_function 'gelu' is not supported"),
        ({"rotary_scaling_factor": 2}, "rotary_scaling_factor is not supported"),
    ],
)
def test_other_settings_are_refused_by_name(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        build("nomic_bert", **changes)


def test_a_text_is_no_longer_than_the_model_was_trained_for():
    assert build("nomic_bert", n_positions=8192).context_length == 2048
