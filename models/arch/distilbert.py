"""DistilBERT: BERT in other words, without kinds of tokens.

Source: DistilBERT (arXiv 1910.01108); transformers' `modeling_distilbert`, which fixes the norms' epsilon.
"""

from collections.abc import Mapping

from models.arch import encoder_blocks as blocks
from models.arch.base import Architecture, Model
from models.config_reader import JSON, ConfigReader
from models.ops import Embedding, Joined, LayerNorm, Linear

_EPS = 1e-12
_HEADS = ("vocab_transform.", "vocab_layer_norm.", "vocab_projector.", "pre_classifier.", "qa_outputs.")


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    dims = blocks.checked(
        blocks.EncoderDims(
            vocab_size=reader.size("vocab_size"),
            hidden_size=reader.size("dim"),
            intermediate_size=reader.size("hidden_dim"),
            num_heads=reader.size("n_heads"),
            num_layers=reader.size("n_layers"),
            positions=reader.size("max_position_embeddings", 512),
            eps=_EPS,
            activation=blocks.read_activation(reader, "activation"),
        )
    )
    width = dims.hidden_size
    tables = blocks.InputEmbeddings(
        Embedding("embeddings.word_embeddings", dims.vocab_size, width),
        Embedding("embeddings.position_embeddings", dims.positions, width),
        None,
        LayerNorm("embeddings.LayerNorm", width, _EPS),
    )
    weights = blocks.Encoder(tables, tuple(_layer(dims, index) for index in range(dims.num_layers)))
    spec = blocks.attention_spec(dims)
    return blocks.model(dims, dims.positions, weights, spec, prefix="distilbert.", unused=_HEADS)


def _layer(dims: blocks.EncoderDims, index: int) -> blocks.EncoderLayer:
    layer, width, inner = f"transformer.layer.{index}", dims.hidden_size, dims.intermediate_size
    parts = tuple(Linear(f"{layer}.attention.{part}_lin", width, width, bias=True) for part in "qkv")
    return blocks.EncoderLayer(
        Joined(parts, precise=True),
        Linear(f"{layer}.attention.out_lin", width, width, bias=True),
        LayerNorm(f"{layer}.sa_layer_norm", width, _EPS),
        Linear(f"{layer}.ffn.lin1", width, inner, bias=True),
        Linear(f"{layer}.ffn.lin2", inner, width, bias=True),
        LayerNorm(f"{layer}.output_layer_norm", width, _EPS),
    )


ARCHITECTURE = Architecture(
    hf=("DistilBertModel", "DistilBertForMaskedLM"),
    gguf=(),
    build=build,
    without_gguf="llama.cpp writes it as a BERT without kinds of tokens, and so it is read",
    is_encoder=True,
)
