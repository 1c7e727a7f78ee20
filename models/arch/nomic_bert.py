"""Nomic BERT: a post-norm encoder with rotary positions and a gated MLP, without biases but in its norms.

Source: Nomic Embed (arXiv 2402.01613) and its published `modeling_hf_nomic_bert`, whose config.json speaks GPT-2's
words and whose names of tensors checkpoints have; llama.cpp `convert_hf_to_gguf.py`, NomicBertModel.
"""

from collections.abc import Mapping
from dataclasses import replace

from models.arch import encoder_blocks as blocks
from models.arch.base import Architecture, Model
from models.arch.gguf import GGUFLayout, encoder_config
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import Embedding, Joined, LayerNorm, Linear
from models.ops.rope import RopeConfig

_MUST_BE: Mapping[str, JSON] = {
    "prenorm": False,
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_fraction": 1,
    "rotary_emb_interleaved": False,
    "use_rms_norm": False,
    "parallel_block": False,
    "causal": False,
}
"""Settings of the published modeling file, of which no checkpoint of this family has others."""
_TRAINED_POSITIONS = 2048


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    reader = ConfigReader(config)
    dims = _read_dims(reader)
    for key, wanted in _MUST_BE.items():
        if config.get(key) not in (None, wanted):
            raise CheckpointError(f"{key} {config[key]!r} is not supported", file=blocks.FILE)
    if reader.number("rotary_scaling_factor", 1.0) != 1.0:
        raise CheckpointError("rotary_scaling_factor is not supported", file=blocks.FILE)
    width, kinds = dims.hidden_size, reader.integer("type_vocab_size", 2)
    tables = blocks.InputEmbeddings(
        Embedding("embeddings.word_embeddings", dims.vocab_size, width),
        None,
        Embedding("embeddings.token_type_embeddings", kinds, width) if kinds > 0 else None,
        LayerNorm("emb_ln", width, dims.eps),
    )
    layers = tuple(_layer(dims, f"encoder.layers.{index}") for index in range(dims.num_layers))
    rope = RopeConfig(dims.head_dim, reader.number("rotary_emb_base", 1000.0))
    spec = replace(blocks.attention_spec(dims), rope=rope)
    return blocks.model(dims, dims.positions, blocks.Encoder(tables, layers), spec, prefix="bert.")


def _read_dims(reader: ConfigReader) -> blocks.EncoderDims:
    """The sizes, in GPT-2's words."""
    if (activation := reader.text("activation_function", "swiglu")) != "swiglu":
        raise CheckpointError(f"activation_function {activation!r} is not supported", file=blocks.FILE)
    trained = reader.size("max_trained_positions", _TRAINED_POSITIONS)
    dims = blocks.EncoderDims(
        vocab_size=reader.size("vocab_size"),
        hidden_size=reader.size("n_embd"),
        intermediate_size=reader.size("n_inner"),
        num_heads=reader.size("n_head"),
        num_layers=reader.size("n_layer"),
        # Beyond what it was trained for the published file stretches the rotation, which is not done here.
        positions=min(reader.size("n_positions", trained), trained),
        eps=reader.number("layer_norm_epsilon", 1e-12),
        activation="silu",
    )
    return blocks.checked(dims)


def _layer(dims: blocks.EncoderDims, layer: str) -> blocks.EncoderLayer:
    width, inner = dims.hidden_size, dims.intermediate_size
    gate_up = Joined((Linear(f"{layer}.mlp.fc12", width, inner), Linear(f"{layer}.mlp.fc11", width, inner)))
    return blocks.EncoderLayer(
        Linear(f"{layer}.attn.Wqkv", width, 3 * width),
        Linear(f"{layer}.attn.out_proj", width, width),
        LayerNorm(f"{layer}.norm1", width, dims.eps),
        gate_up,
        Linear(f"{layer}.mlp.fc2", inner, width),
        LayerNorm(f"{layer}.norm2", width, dims.eps),
    )


ARCHITECTURE = Architecture(
    hf=("NomicBertModel",),
    gguf=(
        GGUFLayout(
            ("nomic-bert",),
            "NomicBertModel",
            "nomic_bert",
            top={
                "token_embd": "embeddings.word_embeddings",
                "token_types": "embeddings.token_type_embeddings",
                "token_embd_norm": "emb_ln",
            },
            layer={
                "attn_qkv": "attn.Wqkv",
                "attn_output": "attn.out_proj",
                "attn_output_norm": "norm1",
                "ffn_up": "mlp.fc11",
                "ffn_gate": "mlp.fc12",
                "ffn_down": "mlp.fc2",
                "layer_output_norm": "norm2",
            },
            layers="encoder.layers",
            config=encoder_config,
        ),
    ),
    build=build,
    is_encoder=True,
)
