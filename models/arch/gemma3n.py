"""Gemma 3n: several residual streams, of which each layer computes one and predicts the others.

Besides: a low-rank path beside attention, embeddings for each layer, gates of which only the greatest pass, and layers
that look at an earlier layer's state.

Source: transformers' `modeling_gemma3n`; llama.cpp `conversion/gemma.py` and `src/models/gemma3n.cpp`; AltUp (arXiv
2301.13310); LAuReL (arXiv 2411.07501).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

from models.arch import blocks, gguf, kinds, sharing
from models.arch.base import Architecture, Model, Stack, Tensor
from models.arch.blocks import Dims
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Attention, Linear, Norm, Ops, Vector

_DEFAULTS: Mapping[str, JSON] = {
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "altup_active_idx": 0,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
_FULL_EVERY = 5
_SPARSE_LAYERS, _SPARSITY = 10, 0.95
"""So many of the first layers let so much of a gate's values go, where the configuration does not say it."""
_LEAST_MEAN_SQUARE = 1e-5
_OWN_STATES = 20
"""Layers with a state of their own, where a GGUF file does not say it."""
# As GGUF's reader tells of the streams' matrices.
_STACKS = (Stack(r"(model\.altup_(?:unembed_)?projections)\.\*\.weight", ("{0}.{n}.weight",)),)


@dataclass(frozen=True, slots=True)
class Streams:
    """How a layer predicts all streams, and corrects them by what it made of one."""

    router_norm: Norm
    router: Linear
    predict: Linear
    correct: Linear
    scale: Vector


@dataclass(frozen=True, slots=True)
class LowRank:
    """A product of two narrow matrices beside attention."""

    left: Linear
    right: Linear
    behind: Norm


@dataclass(frozen=True, slots=True)
class Layer:
    """A Gemma 3's attention and MLP within one of several streams."""

    streams: Streams
    norm1: Norm
    attention: sharing.Attending
    low_rank: LowRank
    norm1_behind: Norm
    norm2: Norm
    mlp: blocks.MLP
    norm2_behind: Norm
    per_layer: sharing.PerLayer


@dataclass(frozen=True, slots=True)
class Weights(blocks.Decoder[Layer, Norm]):
    """The whole decoder's; each matrix makes a further stream of the embeddings, or brings one back."""

    per_layer: sharing.PerLayerInputs
    further: tuple[Linear, ...]
    back: tuple[Linear, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """What the forward pass has to know besides."""

    plan: sharing.Plan
    deviations: tuple[float | None, ...]
    """By how many deviations a layer's gate must rise above its mean; None: all of it passes."""
    streams: int
    active: int
    """The stream that layers compute."""
    scaled: bool
    """What goes to a layer's own embeddings is scaled as stored."""


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    config = blocks.completed(config, _DEFAULTS, nullable=("final_logit_softcapping",))
    reader = ConfigReader(config)
    widths = _widths(reader, config["intermediate_size"])
    dims = blocks.read_dims({**config, "intermediate_size": max(widths)}, activation="hidden_activation")
    shape = _shape(config, dims)
    layers = tuple(_layer(reader, dims, shape, index, width) for index, width in enumerate(widths))
    base = blocks.decoder(dims, layers)
    further, back = (
        tuple(
            Linear(f"model.altup_{kind}projections.{n}", dims.hidden_size, dims.hidden_size)
            for n in range(shape.streams - 1)
        )
        for kind in ("", "unembed_")
    )
    rows, width = reader.size("vocab_size_per_layer_input"), reader.size("hidden_size_per_layer_input")
    inputs = sharing.per_layer_inputs(dims, rows, width)
    weights = Weights(base.embed, base.layers, base.norm, base.head, inputs, further, back)
    softcap = 0.0 if config["final_logit_softcapping"] is None else reader.number("final_logit_softcapping")

    def forward(ops: Ops[Tensor]) -> Tensor:
        return _forward(ops, weights, shape, dims)

    def finish(ops: Ops[Tensor], scores: Tensor) -> Tensor:
        return ops.softcap(scores, softcap) if softcap else scores

    model = blocks.model_with(dims, weights, shape.plan.specs, forward, finish)
    return replace(model, state=shape.plan.state, stacks=_STACKS, other_parts=shape.plan.unused)


def _widths(reader: ConfigReader, said: JSON) -> list[int]:
    """The width of each layer's MLP."""
    layers = reader.size("num_hidden_layers")
    several = reader.sizes("intermediate_size") or () if isinstance(said, list) else None
    widths = [reader.size("intermediate_size")] * layers if several is None else list(several)
    if len(widths) != layers:
        raise CheckpointError(f"intermediate_size must have a width for each of {layers} layers", file=blocks.FILE)
    return widths


def _shape(config: Mapping[str, JSON], dims: Dims) -> Shape:
    reader = ConfigReader(config)
    streams, active = reader.size("altup_num_inputs"), reader.integer("altup_active_idx")
    if not 0 <= active < streams:
        raise CheckpointError(f"altup_active_idx {active} is none of {streams} streams", file=blocks.FILE)
    scaled = reader.flag("altup_correct_scale", default=True)
    return Shape(_plan(config, dims), _deviations(config, dims), streams, active, scaled)


def _plan(config: Mapping[str, JSON], dims: Dims) -> sharing.Plan:
    reader, sliding = ConfigReader(config), kinds.sliding_but_every(config, _FULL_EVERY)
    local = reader.number("rope_local_base_freq", 10000.0)
    ropes = kinds.ropes_by_kind(config, dims.head_dim, full=1_000_000.0, sliding=local)
    specs = [
        Attention(dims.num_heads, dims.num_kv_heads, dims.head_dim, 1.0, ropes[slides], window)
        for slides, window in zip(sliding, kinds.window_of_sliding(config, sliding), strict=True)
    ]
    return sharing.plan(specs, sliding, reader.integer("num_kv_shared_layers"))


def _deviations(config: Mapping[str, JSON], dims: Dims) -> tuple[float | None, ...]:
    """How far each layer's gate must rise, so that of values like a normal distribution's the said share does not."""
    layers = dims.num_layers
    shares = [0.0] * layers
    if config.get("activation_sparsity_pattern") is not None:
        shares = ConfigReader(config).numbers("activation_sparsity_pattern")
    elif layers > _SPARSE_LAYERS:
        shares = [_SPARSITY] * _SPARSE_LAYERS + [0.0] * (layers - _SPARSE_LAYERS)
    if len(shares) != layers or not all(0 <= share < 1 for share in shares):
        raise CheckpointError(
            f"activation_sparsity_pattern must have a share below 1 for each of {layers} layers", file=blocks.FILE
        )
    return tuple(NormalDist().inv_cdf(share) if share > 0 else None for share in shares)


def _layer(reader: ConfigReader, dims: Dims, shape: Shape, index: int, width: int) -> Layer:
    name, hidden = f"model.layers.{index}", dims.hidden_size
    bias, rank = reader.flag("attention_bias", default=False), reader.size("laurel_rank")

    def norm(part: str) -> Norm:
        return Norm(f"{name}.{part}", hidden, dims.eps)

    return Layer(
        Streams(
            norm("altup.router_norm"),
            Linear(f"{name}.altup.modality_router", hidden, shape.streams),
            Linear(f"{name}.altup.prediction_coefs", shape.streams, shape.streams**2),
            Linear(f"{name}.altup.correction_coefs", shape.streams, shape.streams),
            Vector(f"{name}.altup.correct_output_scale", hidden),
        ),
        norm("input_layernorm"),
        sharing.attending(
            dims, f"{name}.self_attn", shape.plan.specs[index], shares=index >= shape.plan.own, bias=bias
        ),
        LowRank(
            Linear(f"{name}.laurel.linear_left", hidden, rank),
            Linear(f"{name}.laurel.linear_right", rank, hidden),
            norm("laurel.post_laurel_norm"),
        ),
        norm("post_attention_layernorm"),
        norm("pre_feedforward_layernorm"),
        blocks.mlp(replace(dims, intermediate_size=width), name),
        norm("post_feedforward_layernorm"),
        sharing.per_layer(dims, name, reader.size("hidden_size_per_layer_input")),
    )


def _forward(ops: Ops[Tensor], w: Weights, shape: Shape, dims: Dims) -> Tensor:
    x = ops.residual(ops.scale(ops.embed(w.embed), dims.hidden_size**0.5), 0)
    inputs = sharing.embeddings_of_layers(ops, x, w.per_layer, dims)
    further = [ops.match_size(ops.linear(x, matrix), x, _LEAST_MEAN_SQUARE) for matrix in w.further]
    streams = ops.join([x, *further], 1)
    sizes = (dims.hidden_size,) * shape.streams
    for index, layer in enumerate(w.layers):
        coefficients = ops.linear(
            _states(ops, ops.split(streams, sizes)[shape.active], layer.streams), layer.streams.predict
        )
        predicted = ops.add(ops.mix(streams, coefficients, shape.streams), streams)
        guess = ops.split(predicted, sizes)[shape.active]
        made = _computed(ops, guess, layer, shape, index)
        parts = ops.split(_corrected(ops, predicted, guess, made, layer.streams), sizes)
        active = ops.weigh(parts[shape.active], layer.streams.scale) if shape.scaled else parts[shape.active]
        own = sharing.taken_in(ops, active, inputs[index], layer.per_layer, dims)
        # The first stream does without, whichever is computed.
        parts = (parts[0], *(ops.add(part, own) for part in parts[1:]))
        ops.residual(parts[shape.active], index + 1)
        streams = ops.join(parts, 1)
    first, *others = ops.split(streams, sizes)
    total = first
    for part, matrix in zip(others, w.back, strict=True):
        total = ops.add(total, ops.match_size(ops.linear(part, matrix), first, _LEAST_MEAN_SQUARE))
    return ops.rms_norm(ops.scale(total, 1 / shape.streams), w.norm)


def _states(ops: Ops[Tensor], x: Tensor, w: Streams) -> Tensor:
    """What the coefficients are made of. Shapes: x (T, D); returns (T, streams)."""
    routed = ops.linear(ops.scale(ops.rms_norm(x, w.router_norm), 1 / w.router.inputs), w.router)
    return ops.activate(routed, "tanh")


def _computed(ops: Ops[Tensor], guess: Tensor, layer: Layer, shape: Shape, index: int) -> Tensor:
    """Attention, the low-rank path and the MLP on one stream. Shapes: guess (T, D); returns (T, D)."""
    normed = ops.rms_norm(guess, layer.norm1)
    narrow = ops.linear(ops.linear(normed, layer.low_rank.left), layer.low_rank.right)
    beside = ops.add(normed, ops.rms_norm(narrow, layer.low_rank.behind))
    plan = shape.plan
    looked = sharing.looked(ops, normed, layer.attention, plan.state_of[index], plan.specs[index])
    seen = ops.add(guess, ops.rms_norm(looked, layer.norm1_behind))
    x = ops.scale(ops.add(seen, beside), 2**-0.5)
    made = _mlp(ops, ops.rms_norm(x, layer.norm2), layer.mlp, shape.deviations[index])
    return ops.add(x, ops.rms_norm(made, layer.norm2_behind))


def _mlp(ops: Ops[Tensor], x: Tensor, w: blocks.MLP, deviations: float | None) -> Tensor:
    """Shapes: x (T, D); returns (T, D)."""
    if deviations is None:
        return blocks.swiglu(ops, x, w)
    gate, up = ops.split(ops.linear(x, w.gate_up), w.gate_up.sizes)
    return ops.linear(ops.glu(ops.rise_above(gate, deviations), up, w.activation), w.down)


def _corrected(ops: Ops[Tensor], predicted: Tensor, guess: Tensor, made: Tensor, w: Streams) -> Tensor:
    """All streams, corrected by what was made of one. Shapes: predicted, returned (T, streams * D), others (T, D)."""
    news = ops.add(made, ops.scale(guess, -1.0))
    shares = ops.mix(news, ops.linear(_states(ops, made, w), w.correct), 1)
    return ops.add(ops.add(shares, ops.join([news] * w.router.outputs, 1)), predicted)


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    layers = metadata.count("block_count")
    config = gguf.decoder_config(metadata, per_layer=True)
    table, rank = metadata.shapes.get("per_layer_token_embd.weight"), metadata.shapes.get("blk.0.laurel_l.weight")
    shared = metadata.integer("attention.shared_kv_layers")
    widths: JSON = [*(metadata.each("feed_forward_length", layers) or [])]
    said: gguf.Config = {
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": metadata.real("attention.layer_norm_rms_epsilon") or 1e-6,
        "intermediate_size": widths or None,
        "layer_types": gguf.layer_types(metadata, _FULL_EVERY),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "rope_local_base_freq": metadata.real("rope.freq_base_swa"),
        "rope_theta": metadata.real("rope.freq_base") or 1_000_000.0,
        "num_kv_shared_layers": max(layers - _OWN_STATES, 0) if shared is None else shared,
        "altup_active_idx": metadata.integer("altup.active_idx"),
        "altup_num_inputs": metadata.integer("altup.num_inputs"),
        "laurel_rank": rank[0] if rank else None,
        "hidden_size_per_layer_input": metadata.integer("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": table[0] if table else None,
        "final_logit_softcapping": metadata.real("final_logit_softcapping"),
        "activation_sparsity_pattern": _shares(metadata, layers),
    }
    return {key: value for key, value in (config | said).items() if value is not None}


def _shares(metadata: GGUFMetadata, layers: int) -> JSON:
    """The shares whose deviations the file has; None where it has none."""
    key = f"{metadata.arch}.activation_sparsity_scale"
    deviations = metadata.reals(key, layers, infinite=True) if metadata.has(key) else None
    return None if deviations is None else [NormalDist().cdf(deviation) for deviation in deviations]


ARCHITECTURE = Architecture(
    hf=("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
    gguf=(
        gguf.layout(
            "gemma3n",
            hf="Gemma3nForCausalLM",
            model_type="gemma3n_text",
            config=_gguf_config,
            half="bfloat16",
            other_parts=("v.", "a.", "mm."),
            bare=("altup_correct_scale",),
            top={
                **sharing.PER_LAYER_GGUF,
                "altup_proj": "model.altup_projections.*",
                "altup_unembd_proj": "model.altup_unembed_projections.*",
            },
            names={
                "attn_q_norm": "self_attn.q_norm",
                "attn_k_norm": "self_attn.k_norm",
                "post_attention_norm": "post_attention_layernorm",
                "ffn_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
                "altup_correct_coef": "altup.correction_coefs",
                "altup_correct_scale": "altup.correct_output_scale",
                "altup_predict_coef": "altup.prediction_coefs",
                "altup_router": "altup.modality_router",
                "altup_router_norm": "altup.router_norm",
                "laurel_l": "laurel.linear_left",
                "laurel_r": "laurel.linear_right",
                "laurel_post_norm": "laurel.post_laurel_norm",
                "inp_gate": "per_layer_input_gate",
                "proj": "per_layer_projection",
                "post_norm": "post_per_layer_input_norm",
            },
        ),
    ),
    build=build,
    other_parts=("vision_tower.", "audio_tower.", "embed_vision.", "embed_audio."),
)
