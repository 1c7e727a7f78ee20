"""Mamba-2: state spaces alone, without attention and so without positions.

Source: Mamba-2 (arXiv 2405.21060); transformers' `modeling_mamba2`; llama.cpp `conversion/mamba.py`, Mamba2Model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from models.arch import blocks, gguf, recurrent
from models.arch.base import Architecture, Model, Stack, Tensor
from models.arch.blocks import FILE, Decoder, Dims
from models.arch.recurrent import Mixer, Sizes
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Embedding, Linear, Norm, Ops

CONTEXT = 1 << 20
"""What a model without positions is said to be made for; llama.cpp's converter says the same."""

# As the first checkpoints call it.
_RENAMED = (Stack(r"backbone\.embedding\.(.+)", ("backbone.embeddings.{0}",), whole=True),)


@dataclass(frozen=True, slots=True)
class Layer:
    """A state space behind a norm and beside a residual."""

    norm: Norm
    mixer: Mixer


def build(config: Mapping[str, JSON]) -> Model:
    """See `Architecture.build`."""
    sizes = _sizes(config)
    dims = _dims(config, sizes)
    names = [f"backbone.layers.{index}" for index in range(dims.num_layers)]
    layers = [
        Layer(Norm(f"{name}.norm", dims.hidden_size, dims.eps), recurrent.mixer(sizes, f"{name}.mixer"))
        for name in names
    ]
    weights = decoder(dims, layers)
    first, state = recurrent.numbered(layer.mixer.states for layer in layers)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (layer, own) in enumerate(zip(weights.layers, first, strict=True)):
            x = ops.add(x, recurrent.mixed(ops, ops.rms_norm(x, layer.norm), layer.mixer, own))
            x = ops.residual(x, index + 1)
        return ops.rms_norm(x, weights.norm)

    model = blocks.model_with(dims, weights, (), forward)
    return replace(model, state=state, prefix="backbone.", stacks=_RENAMED)


def decoder(dims: Dims, layers: Sequence[blocks.LayerWeights]) -> Decoder[blocks.LayerWeights, Norm]:
    """Declare embedding, final norm and head around the layers, as Mamba names them."""
    embed = Embedding("backbone.embeddings", dims.vocab_size, dims.hidden_size)
    head = embed if dims.tied else Linear("lm_head", dims.hidden_size, dims.vocab_size)
    return Decoder(embed, tuple(layers), Norm("backbone.norm_f", dims.hidden_size, dims.eps), head)


def _sizes(config: Mapping[str, JSON]) -> Sizes:
    reader = ConfigReader(config)
    if (activation := reader.text("hidden_act", "silu")) not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {activation!r} is not supported", file=FILE)
    bias = reader.flag("use_bias", default=False)
    return Sizes(
        reader.size("hidden_size", 4096),
        reader.size("num_heads", 128),
        reader.size("head_dim", 64),
        reader.size("n_groups", 8),
        reader.size("state_size", 128),
        reader.size("conv_kernel", 4),
        reader.number("layer_norm_epsilon", 1e-5),
        recurrent.read_limits(config),
        in_bias=bias,
        out_bias=bias,
        conv_bias=reader.flag("use_conv_bias", default=True),
    )


def _dims(config: Mapping[str, JSON], sizes: Sizes) -> Dims:
    """Those of a decoder whose heads are the state spaces'."""
    reader = ConfigReader(config)
    if reader.number("expand", 2) * sizes.hidden != sizes.inner:
        raise CheckpointError(
            f"num_heads {sizes.heads} x head_dim {sizes.head_dim} is not expand x {sizes.hidden}", file=FILE
        )
    return Dims(
        vocab_size=reader.size("vocab_size"),
        context_length=reader.size("max_position_embeddings", CONTEXT),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_layers=reader.size("num_hidden_layers", 64),
        num_heads=sizes.heads,
        num_kv_heads=sizes.heads,
        head_dim=sizes.head_dim,
        eps=sizes.eps,
        tied=reader.flag("tie_word_embeddings", default=False),
    )


GGUF_TOP = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f"}


def _gguf_config(metadata: GGUFMetadata) -> gguf.Config:
    said, embedding = recurrent.gguf_sizes(metadata), metadata.shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise CheckpointError("is missing or no matrix", file=metadata.file, tensor="token_embd.weight")
    hidden = metadata.count("embedding_length")
    return {
        "vocab_size": embedding[0],
        "hidden_size": hidden,
        "num_hidden_layers": metadata.count("block_count"),
        "max_position_embeddings": metadata.integer("context_length") or CONTEXT,
        "layer_norm_epsilon": metadata.real("attention.layer_norm_rms_epsilon") or 1e-5,
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
        "expand": metadata.count("ssm.inner_size") / hidden,
        "num_heads": said["mamba_n_heads"],
        "head_dim": said["mamba_d_head"],
        "n_groups": said["mamba_n_groups"],
        "state_size": said["mamba_d_state"],
        "conv_kernel": said["mamba_d_conv"],
        "use_bias": said["mamba_proj_bias"],
        "use_conv_bias": said["mamba_conv_bias"],
    }


ARCHITECTURE = Architecture(
    hf=("Mamba2ForCausalLM",),
    gguf=(
        gguf.GGUFLayout(
            ("mamba2",),
            "Mamba2ForCausalLM",
            "mamba2",
            GGUF_TOP | {"output": "lm_head"},
            recurrent.gguf_names("mixer") | {"attn_norm": "norm"},
            bare=recurrent.GGUF_BARE,
            config=_gguf_config,
            layers="backbone.layers",
            rates=recurrent.GGUF_RATES,
        ),
    ),
    build=build,
)
