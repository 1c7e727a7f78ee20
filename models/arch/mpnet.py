"""MPNet: RoBERTa's positions without kinds of tokens, and a bias on the scores by relative position.

Source: MPNet (arXiv 2004.09297); transformers' `modeling_mpnet`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.arch import encoder_blocks as blocks
from models.arch.base import Architecture, Model, Tensor
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import Embedding, Ops, RelativeBias

_NAMES = {
    "q": "attention.attn.q",
    "k": "attention.attn.k",
    "v": "attention.attn.v",
    "out": "attention.attn.o",
    "norm1": "attention.LayerNorm",
}
_FIRST_POSITION = 2
"""Behind the padding token's id, which is 1 whatever the config says."""
_MAX_DISTANCE = 128


@dataclass(frozen=True, slots=True)
class Weights:
    """An encoder's, and the table of biases that all layers share."""

    encoder: blocks.Encoder
    bias: Embedding


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims, reader = blocks.read_dims(config), ConfigReader(config)
    buckets = reader.size("relative_attention_num_buckets", 32)
    if buckets % 4 or dims.positions <= _FIRST_POSITION:
        raise CheckpointError(
            f"{buckets} buckets of relative positions, or {dims.positions} positions, make no sense", file=blocks.FILE
        )
    tables = replace(blocks.input_embeddings(dims, reader, first_position=_FIRST_POSITION), kinds=None)
    layers = tuple(blocks.bert_layer(dims, index, _NAMES) for index in range(dims.num_layers))
    weights = Weights(
        blocks.Encoder(tables, layers), Embedding("encoder.relative_attention_bias", buckets, dims.num_heads)
    )
    spec = replace(blocks.attention_spec(dims), relative=RelativeBias(weights.bias, _MAX_DISTANCE))

    def forward(ops: Ops[Tensor]) -> Tensor:
        return blocks.post_norm(ops, weights.encoder, spec, dims.activation)

    context = dims.positions - _FIRST_POSITION
    parts = (*blocks.HEADS, blocks.POSITION_IDS)
    return Model(dims, context, weights, (), forward, None, prefix="mpnet.", other_parts=parts)


ARCHITECTURE = Architecture(hf=("MPNetModel", "MPNetForMaskedLM"), gguf=(), build=build, is_encoder=True)
