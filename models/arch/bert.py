"""BERT: an encoder with learned positions; also what llama.cpp makes of RoBERTa, whose positions it counts from zero.

Source: transformers' `modeling_bert`; llama.cpp `convert_hf_to_gguf.py`, BertModel.
"""

from collections.abc import Mapping

from models.arch import encoder_blocks as blocks
from models.arch.base import Architecture, Model
from models.arch.gguf import GGUFLayout, encoder_config
from models.config_reader import JSON, ConfigReader

NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    dims = blocks.read_dims(config)
    layers = tuple(blocks.bert_layer(dims, index, NAMES) for index in range(dims.num_layers))
    weights = blocks.Encoder(blocks.input_embeddings(dims, ConfigReader(config)), layers)
    return blocks.model(dims, dims.positions, weights, blocks.attention_spec(dims), prefix="bert.")


ARCHITECTURE = Architecture(
    hf=("BertModel", "BertForMaskedLM"),
    gguf=(
        GGUFLayout(
            ("bert",),
            "BertModel",
            "bert",
            top={
                "token_embd": "embeddings.word_embeddings",
                "position_embd": "embeddings.position_embeddings",
                "token_types": "embeddings.token_type_embeddings",
                "token_embd_norm": "embeddings.LayerNorm",
            },
            layer={
                "attn_q": NAMES["q"],
                "attn_k": NAMES["k"],
                "attn_v": NAMES["v"],
                "attn_output": NAMES["out"],
                "attn_output_norm": NAMES["norm1"],
                "ffn_up": "intermediate.dense",
                "ffn_down": "output.dense",
                "layer_output_norm": "output.LayerNorm",
            },
            layers="encoder.layer",
            config=encoder_config,
        ),
    ),
    build=build,
    is_encoder=True,
)
