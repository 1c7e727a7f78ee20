"""Gemma 4: heads of two sizes, layers that look at an earlier layer's state, embeddings for each layer, experts beside.

Source: transformers' `modeling_gemma4`; llama.cpp `conversion/gemma.py`, Gemma4Model; mlx-lm's and Ollama's names of
stacked experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.arch import blocks, gguf, kinds, sharing
from models.arch.base import Architecture, Model, Stack, Tensor
from models.arch.blocks import Dims
from models.arch.experts import STACKS, experts
from models.arch.gemma2 import norm
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Activation, Attention, Experts, Linear, Norm, Ops, Routing, Vector

_DEFAULTS: Mapping[str, JSON] = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "rope_parameters": {
        kinds.SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        kinds.FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}
_STACKS = (
    *STACKS,
    Stack(
        r"(.*)\.(?:experts\.switch_glu|moe\.switch_mlp)\.((?:gate|up|down)_proj)\.(weight|bias)",
        ("{0}.experts.{n}.{1}.{2}",),
    ),
    Stack(
        r"(.*)\.moe\.gate_up_proj(?:\.weight)?",
        ("{0}.experts.{n}.gate_proj.weight", "{0}.experts.{n}.up_proj.weight"),
    ),
    Stack(r"(.*)\.moe\.down_proj(?:\.weight)?", ("{0}.experts.{n}.down_proj.weight",)),
)


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts that work beside the MLP, and the norms around both."""

    router_norm: Norm
    router_scale: Vector
    router: Linear
    routing: Routing
    mlp_behind: Norm
    before: Norm
    experts: Experts
    behind: Norm


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each between two norms and beside a residual; what comes out is scaled as a whole."""

    norm1: Norm
    attention: sharing.Attending
    norm1_behind: Norm
    norm2: Norm
    mlp: blocks.MLP
    mixture: Mixture | None
    norm2_behind: Norm
    per_layer: sharing.PerLayer | None
    scalar: Vector


@dataclass(frozen=True, slots=True)
class Weights(blocks.Decoder[Layer, Norm]):
    """The whole decoder's."""

    per_layer: sharing.PerLayerInputs | None


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    return build_with(config, all_look_both_ways=False)


def build_with(config: Mapping[str, JSON], *, all_look_both_ways: bool) -> Model:
    """The model of a Gemma 4 in which only layers that slide look at pictures both ways, or all do. See `build`."""
    config = blocks.completed(config, _DEFAULTS)
    reader = ConfigReader(config)
    if "per_layer_config" in config:
        raise CheckpointError("per_layer_config is not supported", file=blocks.FILE)
    if reader.text("use_bidirectional_attention", "vision") != "vision":
        raise CheckpointError("use_bidirectional_attention is supported for pictures alone", file=blocks.FILE)
    dims = blocks.read_dims(config, activation="hidden_activation")
    plan = _plan(config, dims, all_look_both_ways=all_look_both_ways)
    double = reader.flag("use_double_wide_mlp", default=False)
    layers = tuple(_layer(config, dims, plan, index, double=double) for index in range(dims.num_layers))
    base = blocks.decoder(dims, layers)
    weights = Weights(base.embed, base.layers, base.norm, base.head, _per_layer_inputs(config, dims))
    softcap = reader.number("final_logit_softcapping", 0.0)

    def forward(ops: Ops[Tensor]) -> Tensor:
        return _forward(ops, weights, plan, dims)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return ops.softcap(scores, softcap) if softcap else scores

    if double and plan.own < dims.num_layers:
        dims = replace(dims, intermediate_size=2 * dims.intermediate_size)
    model = blocks.model_with(dims, weights, plan.specs, forward, finish)
    return replace(model, state=plan.state, stacks=_STACKS, other_parts=plan.unused)


def _plan(config: Mapping[str, JSON], dims: Dims, *, all_look_both_ways: bool) -> sharing.Plan:
    reader = ConfigReader(config)
    # The last layer sees everything whatever its kind is said to be.
    sliding = (*kinds.sliding_but_every(config, 6)[:-1], False)
    head_dim, kv_heads = reader.size("global_head_dim"), dims.num_kv_heads
    if reader.flag("attention_k_eq_v", default=False):
        kv_heads = reader.size("num_global_key_value_heads", kv_heads)
    if dims.num_heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{dims.num_heads} heads of {head_dim} cannot share {kv_heads} key-value heads", file=blocks.FILE
        )
    window = max(kinds.window_of_sliding(config, sliding), key=bool)
    ropes = kinds.ropes_by_kind(config, head_dim, full=1_000_000.0, sliding=10000.0, sliding_dims=dims.head_dim)
    sees_pictures = reader.text("use_bidirectional_attention", "") == "vision"
    slides = Attention(dims.num_heads, dims.num_kv_heads, dims.head_dim, 1.0, ropes[True], window)
    slides = replace(slides, two_way=sees_pictures)
    sees = Attention(dims.num_heads, kv_heads, head_dim, 1.0, ropes[False])
    sees = replace(sees, two_way=sees_pictures and all_look_both_ways)
    specs = [slides if each else sees for each in sliding]
    return sharing.plan(specs, sliding, reader.integer("num_kv_shared_layers", 0))


def _layer(config: Mapping[str, JSON], dims: Dims, plan: sharing.Plan, index: int, *, double: bool) -> Layer:
    reader, name = ConfigReader(config), f"model.layers.{index}"
    shares = index >= plan.own
    wide = replace(dims, intermediate_size=dims.intermediate_size * (1 + (double and shares)))
    width = reader.integer("hidden_size_per_layer_input")
    spec, bias = plan.specs[index], reader.flag("attention_bias", default=False)
    alike = reader.flag("attention_k_eq_v", default=False) and spec.window is None
    return Layer(
        _norm(dims, f"{name}.input_layernorm"),
        sharing.attending(dims, f"{name}.self_attn", spec, shares=shares, alike=alike, bias=bias),
        _norm(dims, f"{name}.post_attention_layernorm"),
        _norm(dims, f"{name}.pre_feedforward_layernorm"),
        blocks.mlp(wide, name),
        _mixture(config, dims, name) if reader.flag("enable_moe_block", default=False) else None,
        _norm(dims, f"{name}.post_feedforward_layernorm"),
        sharing.per_layer(dims, name, width) if width else None,
        Vector(f"{name}.layer_scalar", 1),
    )


def _mixture(config: Mapping[str, JSON], dims: Dims, name: str) -> Mixture:
    reader = ConfigReader(config)
    count = reader.size("num_experts")
    scales = Vector(f"{name}.router.per_expert_scale", count)
    return Mixture(
        Norm("", dims.hidden_size, dims.eps),
        Vector(f"{name}.router.scale", dims.hidden_size),
        Linear(f"{name}.router.proj", dims.hidden_size, count),
        Routing(reader.count("top_k_experts", count), expert_scales=scales),
        _norm(dims, f"{name}.post_feedforward_layernorm_1"),
        _norm(dims, f"{name}.pre_feedforward_layernorm_2"),
        experts(name, count, dims.hidden_size, reader.size("moe_intermediate_size")),
        _norm(dims, f"{name}.post_feedforward_layernorm_2"),
    )


def _per_layer_inputs(config: Mapping[str, JSON], dims: Dims) -> sharing.PerLayerInputs | None:
    reader = ConfigReader(config)
    width = reader.integer("hidden_size_per_layer_input")
    if not width:
        return None
    rows = reader.size("vocab_size_per_layer_input")
    if width < 0 or rows < dims.vocab_size:
        raise CheckpointError(f"{rows} x {width} are no embeddings for each layer and token", file=blocks.FILE)
    return sharing.per_layer_inputs(dims, rows, width)


def _norm(dims: Dims, name: str) -> Norm:
    return replace(norm(dims, name), offset=0.0)


def _forward(ops: Ops[Tensor], w: Weights, plan: sharing.Plan, dims: Dims) -> Tensor:
    x = ops.scale(ops.embed(w.embed), dims.hidden_size**0.5)
    inputs = () if w.per_layer is None else sharing.embeddings_of_layers(ops, x, w.per_layer, dims)
    x = ops.residual(x, 0)
    for index, (layer, spec) in enumerate(zip(w.layers, plan.specs, strict=True)):
        looked = sharing.looked(ops, ops.rms_norm(x, layer.norm1), layer.attention, plan.state_of[index], spec)
        x = ops.add(x, ops.rms_norm(looked, layer.norm1_behind))
        made = blocks.swiglu(ops, ops.rms_norm(x, layer.norm2), layer.mlp)
        if layer.mixture is not None:
            made = ops.add(ops.rms_norm(made, layer.mixture.mlp_behind), _mixed(ops, x, layer.mixture, dims.activation))
        x = ops.add(x, ops.rms_norm(made, layer.norm2_behind))
        if layer.per_layer is not None:
            x = ops.add(x, sharing.taken_in(ops, x, inputs[index], layer.per_layer, dims))
        x = ops.residual(ops.weigh(x, layer.scalar), index + 1)
    return ops.rms_norm(x, w.norm)


def _mixed(ops: Ops[Tensor], x: Tensor, w: Mixture, activation: Activation) -> Tensor:
    """What the experts make of the residual stream. Shapes: x (T, D); returns (T, D)."""
    scaled = ops.scale(ops.weigh(ops.rms_norm(x, w.router_norm), w.router_scale), w.router.inputs**-0.5)
    picks, weights = ops.route(ops.linear(scaled, w.router), w.routing)
    made = ops.experts(ops.rms_norm(x, w.before), picks, weights, w.experts, activation)
    return ops.rms_norm(made, w.behind)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    config = gguf.decoder_config(metadata, per_layer=True)
    layers = metadata.count("block_count")
    widths = metadata.each("feed_forward_length", layers) or []
    types = gguf.layer_types(metadata, 6)
    full = types.index(kinds.FULL) if isinstance(types, list) and kinds.FULL in types else layers - 1
    slides = types.index(kinds.SLIDING) if isinstance(types, list) and kinds.SLIDING in types else full
    kv_heads = metadata.each("attention.head_count_kv", layers) or [metadata.count("attention.head_count")] * layers
    head_dim = metadata.integer("attention.key_length_swa") or config["head_dim"]
    sliding: gguf.Config = {"rope_type": "default", "rope_theta": metadata.real("rope.freq_base_swa") or 10000.0}
    scaling = gguf.rope_scaling(metadata)
    whole: gguf.Config = dict(scaling) if isinstance(scaling, dict) else {"rope_type": "default"}
    embedding = metadata.shapes.get("per_layer_token_embd.weight")
    count = metadata.integer("expert_count") or 0
    said: gguf.Config = {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon") or 1e-6,
        "layer_types": types,
        "sliding_window": metadata.integer("attention.sliding_window"),
        "head_dim": head_dim,
        "global_head_dim": config["head_dim"],
        "num_key_value_heads": kv_heads[slides],
        "num_global_key_value_heads": kv_heads[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in metadata.shapes,
        "num_kv_shared_layers": metadata.integer("attention.shared_kv_layers") or 0,
        "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "rope_parameters": {
            kinds.FULL: whole | {"rope_theta": metadata.real("rope.freq_base") or 1000000.0},
            kinds.SLIDING: sliding,
        },
        "hidden_size_per_layer_input": metadata.integer("embedding_length_per_layer_input") or 0,
        "vocab_size_per_layer_input": embedding[0] if embedding else config["vocab_size"],
        "final_logit_softcapping": metadata.real("final_logit_softcapping"),
        "enable_moe_block": count > 0,
        "num_experts": count or None,
        "top_k_experts": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
    }
    dropped = ("rope_theta", "rope_scaling", "partial_rotary_factor")
    return {key: value for key, value in (config | said).items() if value is not None and key not in dropped}


ARCHITECTURE = Architecture(
    hf=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    gguf=(
        gguf.layout(
            "gemma4",
            hf="Gemma4ForCausalLM",
            model_type="gemma4_text",
            config=_gguf_config,
            half="bfloat16",
            other_parts=("v.", "a.", "mm."),
            bare=("layer_output_scale", "ffn_gate_inp.scale", "ffn_down_exps.scale"),
            top=sharing.PER_LAYER_GGUF,
            names={
                "attn_q_norm": "self_attn.q_norm",
                "attn_k_norm": "self_attn.k_norm",
                "post_attention_norm": "post_attention_layernorm",
                "ffn_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
                "post_ffw_norm_1": "post_feedforward_layernorm_1",
                "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
                "post_ffw_norm_2": "post_feedforward_layernorm_2",
                "ffn_gate_inp": "router.proj",
                "ffn_gate_inp.scale": "router.scale",
                "ffn_gate_up_exps": "experts.gate_up_proj",
                "ffn_down_exps": "experts.*.down_proj",
                "ffn_down_exps.scale": "router.per_expert_scale",
                "inp_gate": "per_layer_input_gate",
                "proj": "per_layer_projection",
                "post_norm": "post_per_layer_input_norm",
                "layer_output_scale": "layer_scalar",
            },
        ),
    ),
    build=build,
    other_parts=("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio."),
)
