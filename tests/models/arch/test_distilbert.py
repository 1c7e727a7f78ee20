"""DistilBERT: BERT's blocks by other names."""

import pytest

from models.errors import CheckpointError
from tests.models.arch.encoders import build


def test_there_are_no_kinds_of_tokens_and_all_positions_are_texts():
    model = build("distilbert", max_position_embeddings=50)
    assert model.weights.embeddings.kinds is None
    assert model.context_length == 50


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_heads": 5}, "24 has no 5 heads"),
        ({"activation": "relu"}, "'relu' is not supported"),
        ({"dim": None}, "dim"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(changes, words):
    with pytest.raises(CheckpointError, match=words):
        build("distilbert", **changes)
