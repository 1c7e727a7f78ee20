"""A pre-norm decoder with LayerNorms, whose MLPs have a gate or none; several architectures share it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from models.arch import blocks
from models.arch.base import Model, Tensor
from models.arch.blocks import Dims
from models.ops import Activation, Attention, LayerNorm, Linear, Ops


@dataclass(frozen=True, slots=True)
class MLP:
    """The weights of an MLP without a gate, and what is between them."""

    up: Linear
    down: Linear
    activation: Activation


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention and MLP, each behind a norm and beside a residual."""

    norm1: LayerNorm
    attention: blocks.SelfAttention
    norm2: LayerNorm
    mlp: MLP | blocks.MLP


def mlp(dims: Dims, up: str, down: str, *, bias: bool) -> MLP:
    """Declare an MLP without a gate; its two matrices have these names."""
    hidden, width = dims.hidden_size, dims.intermediate_size
    return MLP(Linear(up, hidden, width, bias), Linear(down, width, hidden, bias), dims.activation)


def layer(
    dims: Dims, name: str, attention: blocks.SelfAttention, mlp: MLP | blocks.MLP, *, norm_offset: float = 0.0
) -> Layer:
    """Declare the layer of that name; `norm_offset` is added to its norms' weights as they are stored."""
    norm = partial(LayerNorm, width=dims.hidden_size, eps=dims.eps, offset=norm_offset)
    return Layer(norm(f"{name}.input_layernorm"), attention, norm(f"{name}.post_attention_layernorm"), mlp)


def model(dims: Dims, layers: Sequence[Layer], specs: Sequence[Attention], *, norm_offset: float = 0.0) -> Model:
    """The model of a decoder with these layers and attentions."""
    norm = LayerNorm("model.norm", dims.hidden_size, dims.eps, offset=norm_offset)
    weights = blocks.decoder_with(dims, layers, norm)

    def forward(ops: Ops[Tensor]) -> Tensor:
        x = ops.residual(ops.embed(weights.embed), 0)
        for index, (w, spec) in enumerate(zip(weights.layers, specs, strict=True)):
            x = ops.add(x, blocks.gqa(ops, ops.layer_norm(x, w.norm1), w.attention, index, spec))
            x = ops.residual(ops.add(x, _run(ops, ops.layer_norm(x, w.norm2), w.mlp)), index + 1)
        return ops.layer_norm(x, weights.norm)

    return blocks.model_with(dims, weights, specs, forward)


def _run(ops: Ops[Tensor], x: Tensor, w: MLP | blocks.MLP) -> Tensor:
    """Shapes: x (T, D); returns (T, D)."""
    if isinstance(w, blocks.MLP):
        return blocks.swiglu(ops, x, w)
    return ops.linear(ops.activate(ops.linear(x, w.up), w.activation), w.down)
