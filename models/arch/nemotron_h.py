"""Nemotron-H: on each layer one of Mamba-2, attention without positions, an MLP without a gate and a mixture of such.

Its time steps have the limits that the configuration names, as its makers' own code, mlx-lm and Ollama have it;
transformers holds them above the least one of the initialisation, where a prompt is read but not where it goes on.

Source: transformers' `modeling_nemotron_h`; llama.cpp `conversion/nemotron.py`, NemotronHModel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.arch import blocks, gguf, mamba2, recurrent
from models.arch.base import Architecture, Model, Stack, Tensor
from models.arch.blocks import FILE, Dims, SelfAttention
from models.arch.experts import STACKS, sigmoid_routing
from models.arch.recurrent import Mixer, Sizes
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import (
    KV,
    Activation,
    Attention,
    Expert,
    Experts,
    Joined,
    LayerState,
    Linear,
    Norm,
    Ops,
    Routing,
    Vector,
)

_DEFAULTS: Mapping[str, JSON] = {
    "head_dim": 128,
    "intermediate_size": 21504,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 4096,
    "mlp_hidden_act": "relu2",
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
}
_RENAMED = {"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_conv_bias": "use_conv_bias"}
_RENAMED |= {"mamba_dt_limit": "time_step_limit", "attention_head_dim": "head_dim"}
_SPACE, _ATTENTION, _MLP, _MOE = "linear_attention", "full_attention", "mlp", "moe"
_KINDS = {"M": _SPACE, "*": _ATTENTION, "-": _MLP, "E": _MOE, "mamba": _SPACE, "attention": _ATTENTION}
_KINDS |= {kind: kind for kind in (_SPACE, _ATTENTION, _MLP, _MOE)}
_STACKS = (
    Stack(r"(.*)\.(?:switch_mlp\.fc1|experts\.up_proj)(?:\.weight)?", ("{0}.experts.{n}.up_proj.weight",)),
    Stack(r"(.*)\.(?:switch_mlp\.fc2|experts\.down_proj)(?:\.weight)?", ("{0}.experts.{n}.down_proj.weight",)),
    *STACKS,
)


@dataclass(frozen=True, slots=True)
class Attending:
    """The weights of attention, and what it is like."""

    weights: SelfAttention
    spec: Attention


@dataclass(frozen=True, slots=True)
class MLP:
    """The weights of an MLP without a gate."""

    up: Linear
    down: Linear
    activation: Activation


@dataclass(frozen=True, slots=True)
class Mixture:
    """The weights of a mixture whose experts may work in a narrower space, beside an MLP for all tokens."""

    router: Linear
    routing: Routing
    into: Linear | None
    """To that space,"""
    experts: Experts
    out: Linear | None
    """and out of it."""
    shared: MLP


@dataclass(frozen=True, slots=True)
class Layer:
    """One of the four, behind a norm and beside a residual."""

    norm: Norm
    mixer: Mixer | Attending | MLP | Mixture


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = {key: value for key, value in config.items() if value is not None}
    config = {ours: config[key] for key, ours in _RENAMED.items() if key in config} | config
    kinds = _kinds(config)
    config = blocks.completed(config, _DEFAULTS) | {"num_hidden_layers": len(kinds)}
    dims = blocks.read_dims(config, eps="layer_norm_epsilon", activation="mlp_hidden_act")
    layers = [_layer(config, dims, f"backbone.layers.{index}", kind) for index, kind in enumerate(kinds)]
    weights = mamba2.decoder(dims, layers)
    first, state = recurrent.numbered(_states(layer) for layer in layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (layer, own) in enumerate(zip(weights.layers, first, strict=True)):
            x = ops.add(x, _mixed(ops, ops.rms_norm(x, layer.norm), layer.mixer, own))
            x = ops.residual(x, index + 1)
        return ops.rms_norm(x, weights.norm)

    model = blocks.model_with(dims, weights, (), forward)
    # Layers that predict further tokens are left out.
    further = range(len(kinds), len(kinds) + ConfigReader(config).integer("num_nextn_predict_layers", 0))
    parts = tuple(f"{stem}.{number}." for number in further for stem in ("layers", "blk"))
    return replace(model, state=state, prefix="backbone.", stacks=_STACKS, other_parts=("mtp.", *parts))


def _kinds(config: Mapping[str, JSON]) -> Sequence[str]:
    reader = ConfigReader(config)
    if config.get("layers_block_type") is not None:
        said = reader.texts("layers_block_type") or []
    else:
        said = list(reader.text("hybrid_override_pattern", ""))
    if not said or not set(said) <= set(_KINDS):
        raise CheckpointError(
            "layers_block_type or hybrid_override_pattern must name kinds of layers that there are", file=FILE
        )
    return [_KINDS[kind] for kind in said]


def _layer(config: Mapping[str, JSON], dims: Dims, name: str, kind: str) -> Layer:
    norm, own = Norm(f"{name}.norm", dims.hidden_size, dims.eps), f"{name}.mixer"
    match kind:
        case "linear_attention":
            return Layer(norm, recurrent.mixer(_sizes(config, dims), own))
        case "full_attention":
            return Layer(norm, _attending(config, dims, own))
        case "mlp":
            return Layer(norm, _mlp(config, dims, own, dims.intermediate_size))
        case _:
            return Layer(norm, _mixture(config, dims, own))


def _sizes(config: Mapping[str, JSON], dims: Dims) -> Sizes:
    reader = ConfigReader(config)
    if (activation := reader.text("mamba_hidden_act", "silu")) not in ("silu", "swish"):
        raise CheckpointError(f"mamba_hidden_act {activation!r} is not supported", file=FILE)
    bias = reader.flag("use_bias", default=False)
    if reader.flag("mamba_proj_bias", default=bias) != bias:
        raise CheckpointError("mamba_proj_bias other than use_bias is not supported", file=FILE)
    return Sizes(
        dims.hidden_size,
        reader.size("mamba_num_heads", 128),
        reader.size("mamba_head_dim", 64),
        reader.size("n_groups", 8),
        reader.size("ssm_state_size", 128),
        reader.size("conv_kernel", 4),
        dims.eps,
        recurrent.read_limits(config),
        in_bias=bias,
        out_bias=bias,
        conv_bias=reader.flag("use_conv_bias", default=True),
    )


def _attending(config: Mapping[str, JSON], dims: Dims, name: str) -> Attending:
    bias = ConfigReader(config).flag("attention_bias", default=False)
    queries, keys = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim
    parts = (("q", queries), ("k", keys), ("v", keys))
    qkv = Joined(
        tuple(Linear(f"{name}.{part}_proj", dims.hidden_size, rows, bias) for part, rows in parts), precise=True
    )
    out = Linear(f"{name}.o_proj", queries, dims.hidden_size, bias)
    spec = Attention(dims.num_heads, dims.num_kv_heads, dims.head_dim, dims.head_dim**-0.5)
    return Attending(SelfAttention(qkv, out), spec)


def _mlp(config: Mapping[str, JSON], dims: Dims, name: str, width: int) -> MLP:
    hidden, bias = dims.hidden_size, ConfigReader(config).flag("mlp_bias", default=False)
    up, down = Linear(f"{name}.up_proj", hidden, width, bias), Linear(f"{name}.down_proj", width, hidden, bias)
    return MLP(up, down, dims.activation)


def _mixture(config: Mapping[str, JSON], dims: Dims, name: str) -> Mixture:
    reader, hidden = ConfigReader(config), dims.hidden_size
    count, width = reader.size("n_routed_experts", 8), reader.size("moe_intermediate_size", 7688)
    bias, has_latent = reader.flag("mlp_bias", default=False), "moe_latent_size" in config
    inner = reader.size("moe_latent_size") if has_latent else hidden
    places = [f"{name}.experts.{number}" for number in range(count)]
    each = [
        Expert(Joined((Linear(f"{place}.up_proj", inner, width),)), Linear(f"{place}.down_proj", width, inner))
        for place in places
    ]
    return Mixture(
        Linear(f"{name}.gate", hidden, count),
        sigmoid_routing(reader, count, Vector(f"{name}.gate.e_score_correction_bias", count)),
        Linear(f"{name}.fc1_latent_proj", hidden, inner, bias) if has_latent else None,
        Experts(tuple(each)),
        Linear(f"{name}.fc2_latent_proj", inner, hidden, bias) if has_latent else None,
        _mlp(config, dims, f"{name}.shared_experts", reader.size("moe_shared_expert_intermediate_size", 7688)),
    )


def _states(layer: Layer) -> tuple[LayerState, ...]:
    match layer.mixer:
        case Mixer():
            return layer.mixer.states
        case Attending(spec=spec):
            return (KV(spec.kv_heads, spec.head_dim, spec.head_dim),)
        case _:
            return ()


def _mixed(ops: Ops[Tensor], x: Tensor, w: Mixer | Attending | MLP | Mixture, state: int) -> Tensor:
    """What a layer makes, the first of whose states has that number. Shapes: x (T, D); returns (T, D)."""
    match w:
        case Mixer():
            return recurrent.mixed(ops, x, w, state)
        case Attending():
            return blocks.gqa(ops, x, w.weights, state, w.spec)
        case MLP():
            return _raised(ops, x, w)
        case Mixture():
            picks, weights = ops.route(ops.linear(x, w.router), w.routing)
            narrow = x if w.into is None else ops.linear(x, w.into)
            made = ops.experts(narrow, picks, weights, w.experts, w.shared.activation)
            return ops.add(made if w.out is None else ops.linear(made, w.out), _raised(ops, x, w.shared))


def _raised(ops: Ops[Tensor], x: Tensor, w: MLP) -> Tensor:
    """Shapes: x (T, D); returns (T, D)."""
    return ops.linear(ops.activate(ops.linear(x, w.up), w.activation), w.down)


_GGUF_KINDS = {
    "ssm_in.weight": _SPACE,
    "attn_q.weight": _ATTENTION,
    "ffn_gate_inp.weight": _MOE,
    "ffn_up.weight": _MLP,
}


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    further = metadata.integer("nextn_predict_layers") or 0
    layers = metadata.count("block_count") - further
    config, said = gguf.decoder_config(metadata, per_layer=True), recurrent.gguf_sizes(metadata)
    kinds = recurrent.gguf_layers(metadata, _GGUF_KINDS, layers)
    # Beside mixtures nothing else says how wide an MLP is.
    wide = [shape for name, shape in metadata.shapes.items() if name.endswith(".ffn_up.weight")]
    ours: gguf.Config = {
        "layers_block_type": kinds,
        "num_nextn_predict_layers": further,
        "num_key_value_heads": max(metadata.each("attention.head_count_kv", layers) or [0]),
        "intermediate_size": next((rows for rows, *_ in wide), None),
        "layer_norm_epsilon": config["rms_norm_eps"],
        "attention_bias": any(name.endswith(".attn_q.bias") for name in metadata.shapes),
        "mlp_bias": any(name.endswith((".ffn_up.bias", ".ffn_up_shexp.bias")) for name in metadata.shapes),
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": said["mamba_n_heads"],
        "mamba_head_dim": said["mamba_d_head"],
        "n_groups": said["mamba_n_groups"],
        "ssm_state_size": said["mamba_d_state"],
        "conv_kernel": said["mamba_d_conv"],
        "use_bias": said["mamba_proj_bias"],
        "use_conv_bias": said["mamba_conv_bias"],
    }
    return config | ours | (_gguf_experts(metadata) if _MOE in kinds else {})


def _gguf_experts(metadata: GGUFMetadata) -> gguf.Config:
    return {
        "n_routed_experts": metadata.count("expert_count"),
        "num_experts_per_tok": metadata.count("expert_used_count"),
        "moe_intermediate_size": metadata.count("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": metadata.count("expert_shared_feed_forward_length"),
        "moe_latent_size": metadata.integer("moe_latent_size"),
        "norm_topk_prob": metadata.flag("expert_weights_norm") is not False,
        "routed_scaling_factor": metadata.real("expert_weights_scale") or 1.0,
        "n_group": metadata.integer("expert_group_count") or 1,
        "topk_group": metadata.integer("expert_group_used_count") or 1,
    }


ARCHITECTURE = Architecture(
    hf=("NemotronHForCausalLM", "NemotronH_Nano_Omni_Reasoning_V3", "NemotronH_Omni_Reasoning_V3"),
    gguf=(
        gguf.GGUFLayout(
            ("nemotron_h", "nemotron_h_moe"),
            "NemotronHForCausalLM",
            "nemotron_h",
            mamba2.GGUF_TOP | {"output": "lm_head"},
            recurrent.gguf_names("mixer")
            | {
                "attn_norm": "norm",
                "attn_q": "mixer.q_proj",
                "attn_k": "mixer.k_proj",
                "attn_v": "mixer.v_proj",
                "attn_output": "mixer.o_proj",
                "ffn_up": "mixer.up_proj",
                "ffn_down": "mixer.down_proj",
                "ffn_gate_inp": "mixer.gate",
                "ffn_up_exps": "mixer.experts.*.up_proj",
                "ffn_down_exps": "mixer.experts.*.down_proj",
                "ffn_up_shexp": "mixer.shared_experts.up_proj",
                "ffn_down_shexp": "mixer.shared_experts.down_proj",
                "ffn_latent_down": "mixer.fc1_latent_proj",
                "ffn_latent_up": "mixer.fc2_latent_proj",
                "exp_probs_b": "mixer.gate.e_score_correction_bias",
            },
            interleaved=("attn_q", "attn_k"),
            bare=(*recurrent.GGUF_BARE, "exp_probs_b"),
            config=_gguf_config,
            layers="backbone.layers",
            # Squares leave float16's range.
            half="bfloat16",
            rates=recurrent.GGUF_RATES,
        ),
    ),
    build=build,
    other_parts=("vision_model.", "mlp1.", "vision_projector.", "sound_encoder.", "sound_projection."),
)
