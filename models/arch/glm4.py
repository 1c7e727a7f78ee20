"""GLM-4: a rope that turns half of each head and pairs neighbours; since 0414 each branch is between two norms.

Source: transformers' `modeling_glm` and `modeling_glm4`; llama.cpp `conversion/chatglm.py` and `conversion/glm.py`.
"""

from collections.abc import Mapping, Sequence

from models.arch import blocks, gemma2, gguf, phi3
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Norm, Ops

_DEFAULTS: Mapping[str, JSON] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-7,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
}


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    attentions = blocks.attention_specs(config, dims, [None] * dims.num_layers)
    specs = [blocks.interleaved(spec) for spec in attentions]
    layers = [_layer(dims, f"model.layers.{index}", reader) for index in range(dims.num_layers)]
    if "Glm4ForCausalLM" not in (reader.texts("architectures") or []):
        return blocks.model(dims, blocks.decoder(dims, layers), specs)
    return _model(dims, [_between_norms(dims, index, layer) for index, layer in enumerate(layers)], specs)


def _layer(dims: Dims, name: str, reader: ConfigReader) -> blocks.Layer:
    """A layer of the first GLM-4; `fused_qkv` is said by GGUF files alone."""
    declare = phi3.fused_attention if reader.flag("fused_qkv", default=False) else blocks.attention
    attention = declare(dims, name, qkv_bias=reader.flag("attention_bias", default=True))
    norm1, norm2 = blocks.layer_norm_pair(dims, name)
    return blocks.Layer(norm1, attention, norm2, phi3.fused_mlp(dims, name))


def _between_norms(dims: Dims, index: int, layer: blocks.Layer) -> gemma2.Layer:
    assert isinstance(layer.mlp, blocks.MLP)
    norm1, norm2 = (
        Norm(f"model.layers.{index}.post_{branch}_layernorm", dims.hidden_size, dims.eps)
        for branch in ("self_attn", "mlp")
    )
    return gemma2.Layer(layer.norm1, layer.attention, norm1, layer.norm2, layer.mlp, norm2)


def _model(dims: Dims, layers: Sequence[gemma2.Layer], specs: Sequence[Attention]) -> Model:
    weights = blocks.decoder(dims, layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            x = ops.residual(gemma2.between_norms(ops, x, w, index, spec), index + 1)
        return ops.rms_norm(x, weights.norm)

    return blocks.model_with(dims, weights, specs, forward)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    for key in ("nextn_predict_layers", "rope.dimension_sections"):
        if metadata.each(key, 1) not in (None, [0]):
            raise CheckpointError(f"its metadata has {metadata.arch}.{key}, which is not supported", file=metadata.file)
    fused = "blk.0.attn_qkv.weight" in metadata.shapes
    config = {"partial_rotary_factor": 1.0} | gguf.decoder_config(metadata)
    bias = f"blk.0.attn_{'qkv' if fused else 'q'}.bias" in metadata.shapes
    return config | {"fused_qkv": fused, "attention_bias": bias}


_NAMES = {"ffn_gate": "", "ffn_up": "mlp.gate_up_proj"}

ARCHITECTURE = Architecture(
    hf=("Glm4ForCausalLM", "GlmForCausalLM"),
    gguf=(
        gguf.layout(
            "glm4",
            hf="Glm4ForCausalLM",
            model_type="glm4",
            config=_gguf_config,
            # llama.cpp sums this one's down projections in float32, because float16 does not hold them.
            half="bfloat16",
            names=_NAMES,
            post_attention_norm="post_self_attn_layernorm",
            post_ffw_norm="post_mlp_layernorm",
        ),
        gguf.layout(
            "chatglm",
            hf="GlmForCausalLM",
            model_type="glm",
            config=_gguf_config,
            names=_NAMES,
            attn_qkv="self_attn.qkv_proj",
        ),
    ),
    build=build,
)
