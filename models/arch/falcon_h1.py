"""Falcon-H1: Mamba-2 and attention side by side on every layer, and a factor on nearly everything.

Converters fold the factors into the weights: llama.cpp's all of them, though a tied head has but the embedding's;
mlx-lm's all but that of keys, which it forgets.

Source: transformers' `modeling_falcon_h1`; llama.cpp `conversion/falcon_h1.py`, FalconH1Model; mlx-lm `falcon_h1`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.arch import blocks, gguf, recurrent
from models.arch.base import Architecture, Model, Tensor
from models.arch.blocks import FILE, MLP, Dims, SelfAttention
from models.arch.recurrent import Mixer
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import KV, Attention, Norm, Ops

_DEFAULTS: Mapping[str, JSON] = {
    "max_position_embeddings": 8192,
    "mlp_multipliers": [1.0, 1.0],
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "ssm_multipliers": [1.0] * 5,
}
_SPACE_PARTS = 5


@dataclass(frozen=True, slots=True)
class Factors:
    """What is multiplied besides; of the keys' factor the attention knows, of the five within it the state space."""

    embedding: float = 1.0
    logits: float = 1.0
    attention_in: float = 1.0
    attention_out: float = 1.0
    space_in: float = 1.0
    space_out: float = 1.0
    gate: float = 1.0
    down: float = 1.0


@dataclass(frozen=True, slots=True)
class Layer:
    """A state space and attention behind one norm, then an MLP behind another."""

    norm1: Norm
    mixer: Mixer
    attention: SelfAttention
    norm2: Norm
    mlp: MLP


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS)
    is_folded = isinstance(config.get("quantization"), dict)
    reader, dims = ConfigReader(config), blocks.read_dims(config)
    (spec,) = blocks.attention_specs(config, dims, [None])
    spec = replace(spec, scale=spec.scale * reader.number("key_multiplier", 1.0))
    factors, within = _factors(reader), tuple(reader.numbers("ssm_multipliers"))
    if len(within) != _SPACE_PARTS:
        raise CheckpointError(f"ssm_multipliers must be {_SPACE_PARTS} numbers", file=FILE)
    if is_folded:
        if factors.attention_in != 1:
            raise CheckpointError("attention_in_multiplier is not supported where MLX's weights have it", file=FILE)
        factors, within = Factors(logits=factors.logits / factors.embedding if dims.tied else 1.0), ()
    within = () if set(within) <= {1.0} else within
    # Kernels with their axes in MLX's order come with folded weights.
    exact = not is_folded and "gguf_architecture" not in config
    names = [f"model.layers.{index}" for index in range(dims.num_layers)]
    layers = tuple(_layer(config, dims, name, within, exact=exact) for name in names)
    return _model(dims, layers, spec, factors)


def _factors(reader: ConfigReader) -> Factors:
    gate, down, *rest = [*reader.numbers("mlp_multipliers"), 1.0, 1.0]
    if len(rest) != 2:
        raise CheckpointError("mlp_multipliers must be two numbers", file=FILE)
    return Factors(
        reader.number("embedding_multiplier", 1.0),
        reader.number("lm_head_multiplier", 1.0),
        reader.number("attention_in_multiplier", 1.0),
        reader.number("attention_out_multiplier", 1.0),
        reader.number("ssm_in_multiplier", 1.0),
        reader.number("ssm_out_multiplier", 1.0),
        gate,
        down,
    )


def _layer(config: Mapping[str, JSON], dims: Dims, name: str, within: tuple[float, ...], *, exact: bool) -> Layer:
    reader = ConfigReader(config)
    norm1, norm2 = (Norm(f"{name}.{part}_layernorm", dims.hidden_size, dims.eps) for part in ("input", "pre_ff"))
    bias = reader.flag("attention_bias", default=False)
    inner = reader.size("mamba_d_ssm", reader.size("mamba_expand", 2) * dims.hidden_size)
    sizes = recurrent.read_sizes(config, inner, dims.eps, dims.activation)
    sizes = replace(sizes, out_bias=reader.flag("projectors_bias", default=False))
    own = recurrent.mixer(sizes, f"{name}.mamba")
    conv = replace(own.conv, exact=exact)
    has_norm = reader.flag("mamba_rms_norm", default=False)
    gated_last = reader.flag("mamba_norm_before_gate", default=True)
    return Layer(
        norm1,
        replace(own, conv=conv, norm=own.norm if has_norm else None, factors=within, gated_last=gated_last),
        blocks.attention(dims, name, qkv_bias=bias, out_bias=bias),
        norm2,
        blocks.mlp(dims, name, bias=reader.flag("mlp_bias", default=False), module="feed_forward"),
    )


def _model(dims: Dims, layers: tuple[Layer, ...], spec: Attention, factors: Factors) -> Model:
    weights = blocks.decoder_with(dims, layers, Norm("model.final_layernorm", dims.hidden_size, dims.eps))
    keys = KV(spec.kv_heads, spec.head_dim, spec.head_dim)
    first, state = recurrent.numbered((*layer.mixer.states, keys) for layer in layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(blocks.times(ops, ops.embed(weights.embed), factors.embedding), 0)
        for index, (w, own) in enumerate(zip(weights.layers, first, strict=True)):
            normed = ops.rms_norm(x, w.norm1)
            recurred = recurrent.mixed(ops, blocks.times(ops, normed, factors.space_in), w.mixer, own)
            place = own + len(w.mixer.states)
            looked = blocks.gqa(ops, blocks.times(ops, normed, factors.attention_in), w.attention, place, spec)
            both = ops.add(
                blocks.times(ops, recurred, factors.space_out), blocks.times(ops, looked, factors.attention_out)
            )
            x = ops.add(x, both)
            x = ops.add(x, _fed(ops, ops.rms_norm(x, w.norm2), w.mlp, factors))
            x = ops.residual(x, index + 1)
        return ops.rms_norm(x, weights.norm)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return blocks.times(ops, scores, factors.logits)

    return replace(blocks.model_with(dims, weights, (spec,), forward, finish), state=state)


def _fed(ops: Ops[Tensor], x: Tensor, w: MLP, factors: Factors) -> Tensor:
    """Shapes: x (T, D); returns (T, D)."""
    gate, up = ops.split(ops.linear(x, w.gate_up), (w.down.inputs, w.down.inputs))
    made = ops.linear(ops.glu(blocks.times(ops, gate, factors.gate), up, w.activation), w.down)
    return blocks.times(ops, made, factors.down)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    said: gguf.Config = {
        "mamba_d_ssm": metadata.count("ssm.inner_size"),
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in metadata.shapes,
        "mamba_norm_before_gate": False,
        "projectors_bias": "blk.0.ssm_out.bias" in metadata.shapes,
    }
    return gguf.decoder_config(metadata) | recurrent.gguf_sizes(metadata) | said


ARCHITECTURE = Architecture(
    hf=("FalconH1ForCausalLM",),
    gguf=(
        gguf.layout(
            "falcon-h1",
            hf="FalconH1ForCausalLM",
            model_type="falcon_h1",
            # The converter gives this norm's name no ending.
            bare=(*recurrent.GGUF_BARE, "ffn_norm"),
            rates=recurrent.GGUF_RATES,
            config=_gguf_config,
            top={"output_norm": "model.final_layernorm"},
            names=recurrent.gguf_names("mamba")
            | {
                "ffn_norm": "pre_ff_layernorm.weight",
                "ffn_gate": "feed_forward.gate_proj",
                "ffn_up": "feed_forward.up_proj",
                "ffn_down": "feed_forward.down_proj",
            },
        ),
    ),
    build=build,
)
