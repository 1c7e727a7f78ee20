"""BERT: as many tokens as positions."""

from tests.models.arch.encoders import build


def test_a_text_may_have_as_many_tokens_as_there_are_positions():
    assert build("bert").context_length == 96
    assert build("bert", max_position_embeddings=None).context_length == 512
