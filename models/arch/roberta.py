"""RoBERTa and XLM-R: BERT whose positions are counted from behind the padding token's id.

Source: transformers' `modeling_roberta` and `modeling_xlm_roberta`.
"""

from collections.abc import Mapping

from models.arch import encoder_blocks as blocks
from models.arch.base import Architecture, Model
from models.arch.bert import NAMES
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims, reader = blocks.read_dims(config), ConfigReader(config)
    first = reader.integer("pad_token_id", 1) + 1
    if not 0 < first < dims.positions:
        raise CheckpointError(f"pad_token_id leaves none of {dims.positions} positions", file=blocks.FILE)
    layers = tuple(blocks.bert_layer(dims, index, NAMES) for index in range(dims.num_layers))
    weights = blocks.Encoder(blocks.input_embeddings(dims, reader, first_position=first), layers)
    return blocks.model(dims, dims.positions - first, weights, blocks.attention_spec(dims), prefix="roberta.")


ARCHITECTURE = Architecture(
    hf=("RobertaModel", "RobertaForMaskedLM", "XLMRobertaModel", "XLMRobertaForMaskedLM"),
    gguf=(),
    build=build,
    is_encoder=True,
)
