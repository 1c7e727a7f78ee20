"""What encoders share: reading a config of BERT's kind, and the blocks of a post-norm encoder. Called or not called.

An encoder is given one text at a time, all of whose tokens are of the first kind (BERT's segment A) and see each other.

Source: BERT (arXiv 1810.04805); transformers' `modeling_bert` for the order of operations and the names of tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.arch.base import Model, Tensor
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import Activation, Attention, Embedding, Joined, LayerNorm, Linear, Ops

FILE = "config.json"
HEADS = ("pooler.", "cls.", "lm_head.", "classifier.", "contact_head.")
"""What trained heads are called, of which an embedding takes none."""
POSITION_IDS = "embeddings.position_ids"
"""A constant that old checkpoints hold."""
_ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True, slots=True)
class EncoderDims:
    """The sizes that every encoder's config.json gives; implements `ModelConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    positions: int
    """Rows of the table of positions, or the longest text where there is none."""
    eps: float
    activation: Activation

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class InputEmbeddings:
    """Tables whose rows are summed for each token, and the norm behind them."""

    tokens: Embedding
    positions: Embedding | None
    kinds: Embedding | None
    norm: LayerNorm
    first_position: int = 0
    """The row of the first token's position."""


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """Attention and MLP, each with a norm behind its residual sum. `up` is gate and up where the MLP is gated."""

    qkv: Joined | Linear
    out: Linear
    norm1: LayerNorm
    up: Joined | Linear
    down: Linear
    norm2: LayerNorm


@dataclass(frozen=True, slots=True)
class Encoder:
    """The weights of a whole encoder."""

    embeddings: InputEmbeddings
    layers: tuple[EncoderLayer, ...]


def read_dims(config: Mapping[str, JSON]) -> EncoderDims:
    """Read the sizes in BERT's words.

    Raises:
        CheckpointError: a value is missing, impossible, or asks for what an encoder here cannot do.
    """
    reader = ConfigReader(config)
    if (kind := reader.text("position_embedding_type", "absolute")) != "absolute":
        raise CheckpointError(f"position_embedding_type {kind!r} is not supported", file=FILE)
    if reader.flag("is_decoder", default=False):
        raise CheckpointError("is_decoder is not supported: an embedding needs an encoder", file=FILE)
    dims = EncoderDims(
        vocab_size=reader.size("vocab_size"),
        hidden_size=reader.size("hidden_size"),
        intermediate_size=reader.size("intermediate_size"),
        num_heads=reader.size("num_attention_heads"),
        num_layers=reader.size("num_hidden_layers"),
        positions=reader.size("max_position_embeddings", 512),
        eps=reader.number("layer_norm_eps", 1e-12),
        activation=read_activation(reader, "hidden_act"),
    )
    return checked(dims)


def checked(dims: EncoderDims) -> EncoderDims:
    """The sizes, if they fit together.

    Raises:
        CheckpointError: the heads do not.
    """
    if dims.hidden_size % dims.num_heads:
        raise CheckpointError(f"a width of {dims.hidden_size} has no {dims.num_heads} heads", file=FILE)
    return dims


def read_activation(reader: ConfigReader, key: str, default: str = "gelu") -> Activation:
    """The activation under `key`. Raises CheckpointError."""
    name = reader.text(key, default)
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"{key} {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}", file=FILE)
    return _ACTIVATIONS[name]


def input_embeddings(dims: EncoderDims, reader: ConfigReader, *, first_position: int = 0) -> InputEmbeddings:
    """Declare BERT's tables; one of kinds only where the config has any."""
    kinds = reader.integer("type_vocab_size", 2)
    width = dims.hidden_size
    return InputEmbeddings(
        Embedding("embeddings.word_embeddings", dims.vocab_size, width),
        Embedding("embeddings.position_embeddings", dims.positions, width),
        Embedding("embeddings.token_type_embeddings", kinds, width) if kinds > 0 else None,
        LayerNorm("embeddings.LayerNorm", width, dims.eps),
        first_position,
    )


def bert_layer(dims: EncoderDims, index: int, names: Mapping[str, str]) -> EncoderLayer:
    """Declare a layer of BERT's form; `names` are those of `q`, `k`, `v`, `out` and `norm1` within it."""
    layer, width = f"encoder.layer.{index}", dims.hidden_size
    qkv = Joined(tuple(Linear(f"{layer}.{names[part]}", width, width, bias=True) for part in "qkv"), precise=True)
    return EncoderLayer(
        qkv,
        Linear(f"{layer}.{names['out']}", width, width, bias=True),
        LayerNorm(f"{layer}.{names['norm1']}", width, dims.eps),
        Linear(f"{layer}.intermediate.dense", width, dims.intermediate_size, bias=True),
        Linear(f"{layer}.output.dense", dims.intermediate_size, width, bias=True),
        LayerNorm(f"{layer}.output.LayerNorm", width, dims.eps),
    )


def attention_spec(dims: EncoderDims) -> Attention:
    """Attention to the whole text, without positions of its own."""
    return Attention(dims.num_heads, dims.num_heads, dims.head_dim, dims.head_dim**-0.5, bidirectional=True)


def embedded(ops: Ops[Tensor], w: InputEmbeddings) -> Tensor:
    """The normed sum of each token's rows. Shapes: returns (T, D)."""
    x = ops.embed(w.tokens)
    if w.kinds is not None:
        x = ops.add(x, ops.embed_kind(w.kinds))
    if w.positions is not None:
        x = ops.add(x, ops.embed_positions(w.positions, w.first_position))
    return ops.layer_norm(x, w.norm)


def attend(ops: Ops[Tensor], x: Tensor, qkv: Joined | Linear, index: int, spec: Attention) -> Tensor:
    """Bidirectional attention, before its output's product. Shapes: x (T, D); returns (T, D)."""
    width = spec.heads * spec.head_dim
    q, k, v = ops.split(ops.linear(x, qkv), (width,) * 3)
    return ops.attention(q, k, v, index, spec)


def post_norm(ops: Ops[Tensor], w: Encoder, spec: Attention, activation: Activation) -> Tensor:
    """The whole encoder. Shapes: returns (T, D)."""
    x = embedded(ops, w.embeddings)
    for index, layer in enumerate(w.layers):
        looked = ops.linear(attend(ops, x, layer.qkv, index, spec), layer.out)
        x = ops.layer_norm(ops.add(looked, x), layer.norm1)
        if isinstance(layer.up, Joined):
            gate, up = ops.split(ops.linear(x, layer.up), layer.up.sizes)
            inner = ops.glu(gate, up, activation)
        else:
            inner = ops.activate(ops.linear(x, layer.up), activation)
        x = ops.layer_norm(ops.add(ops.linear(inner, layer.down), x), layer.norm2)
    return x


def model(
    dims: EncoderDims, context: int, weights: Encoder, spec: Attention, *, prefix: str, unused: Sequence[str] = ()
) -> Model:
    """The model of a post-norm encoder for texts of up to `context` tokens."""

    def forward(ops: Ops[Tensor]) -> Tensor:
        return post_norm(ops, weights, spec, dims.activation)

    parts = (*HEADS, POSITION_IDS, *unused)
    return Model(dims, context, weights, (), forward, None, prefix=prefix, other_parts=parts)
