"""MPNet: RoBERTa's positions and a table of biases that all layers share."""

import pytest

from models.errors import CheckpointError
from models.ops import Embedding
from tests.models.arch.encoders import build


def test_all_layers_share_one_table_of_biases():
    assert build("mpnet").weights.bias == Embedding("encoder.relative_attention_bias", 32, 3)


def test_the_first_two_positions_are_nobodys_whatever_the_padding():
    assert build("mpnet", pad_token_id=0).context_length == 94


@pytest.mark.parametrize("changes", [{"relative_attention_num_buckets": 30}, {"max_position_embeddings": 2}])
def test_sizes_that_make_no_sense_are_refused(changes):
    with pytest.raises(CheckpointError, match="make no sense"):
        build("mpnet", **changes)
