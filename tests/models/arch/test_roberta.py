"""RoBERTa: positions from behind the padding token's id."""

import pytest

from models.errors import CheckpointError
from tests.models.arch.encoders import build


@pytest.mark.parametrize(("pad", "context"), [(1, 94), (0, 95), (5, 90)])
def test_positions_up_to_the_paddings_id_are_nobodys(pad, context):
    assert build("roberta", pad_token_id=pad).context_length == context


@pytest.mark.parametrize("pad", [95, -1])
def test_a_padding_that_leaves_no_position_is_refused(pad):
    with pytest.raises(CheckpointError, match="pad_token_id leaves none of 96 positions"):
        build("roberta", pad_token_id=pad)
