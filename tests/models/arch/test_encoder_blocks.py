"""What encoders of BERT's kind are, and what of a configuration is refused by name."""

import pytest

from models.errors import CheckpointError
from models.ops import weights_in
from tests.models.arch.encoders import build


@pytest.mark.parametrize("fixture", ["bert", "roberta", "xlm_roberta", "mpnet", "nomic_bert", "modernbert"])
def test_an_encoder_has_no_state_and_no_words(fixture):
    model = build(fixture)
    assert model.is_encoder
    assert model.state == ()
    assert {"pooler.", "cls."} & set(model.other_parts) or "head." in model.other_parts


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder is not supported"),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6' is not supported"),
        ({"num_attention_heads": 5}, "a width of 24 has no 5 heads"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_no_encoder_here_can_do_is_refused(changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        build("bert", **changes)


def test_a_model_without_kinds_of_tokens_has_no_table_of_them():
    names = {name for weight in weights_in(build("bert", type_vocab_size=0).weights) for name, _ in weight.tensors()}
    assert "embeddings.token_type_embeddings.weight" not in names
    assert "embeddings.position_embeddings.weight" in names
