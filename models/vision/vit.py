"""The layers of vision transformers: attention and an MLP, each behind a norm and beside a residual.

Families differ in names, in what a head turns by, in who looks at whom, and in whether the MLP has a gate. Source: ViT
(arXiv 2010.11929); CLIP (arXiv 2103.00020) for its quick GELU.
"""

from dataclasses import dataclass

from models.arch import blocks
from models.arch.base import Tensor
from models.ops import Activation, Attention, Joined, LayerNorm, Linear, Norm
from models.ops.vision import TowerOps

_QUICK = 1.702


@dataclass(frozen=True, slots=True)
class Names:
    """What a layer's tensors are called, behind the layer's own name."""

    norms: tuple[str, str]
    qkv: tuple[str, ...]
    """Three matrices, or one of all three."""
    out: str
    mlp: tuple[str, ...]
    """Up and down, of an MLP with a gate that first."""


@dataclass(frozen=True, slots=True)
class SelfAttention:
    """The weights of a layer's attention."""

    qkv: Joined
    out: Linear


@dataclass(frozen=True, slots=True)
class Layer:
    """One whose MLP has no gate, with LayerNorms and biases."""

    norm1: LayerNorm
    attention: SelfAttention
    norm2: LayerNorm
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class GatedLayer:
    """One whose MLP has a gate, with RMSNorms."""

    norm1: Norm
    attention: SelfAttention
    norm2: Norm
    mlp: blocks.MLP


def attention_of(width: int, heads: int) -> Attention:
    """What the attention of heads that share a width is like."""
    return Attention(heads, heads, width // heads, (width // heads) ** -0.5)


def layer(name: str, names: Names, width: int, inner: int, eps: float) -> Layer:
    """Declare the layer of that name."""
    norm1, norm2 = (LayerNorm(f"{name}.{norm}", width, eps) for norm in names.norms)
    up, down = names.mlp
    return Layer(
        norm1,
        _attention(name, names, width, bias=True),
        norm2,
        Linear(f"{name}.{up}", width, inner, bias=True),
        Linear(f"{name}.{down}", inner, width, bias=True),
    )


def gated_layer(
    name: str,
    names: Names,
    width: int,
    inner: int,
    eps: float,
    *,
    activation: Activation,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> GatedLayer:
    """Declare the layer of that name."""
    norm1, norm2 = (Norm(f"{name}.{norm}", width, eps) for norm in names.norms)
    *raising, down = names.mlp
    gate_up = Joined(tuple(Linear(f"{name}.{part}", width, inner, mlp_bias) for part in raising))
    mlp = blocks.MLP(gate_up, Linear(f"{name}.{down}", inner, width, mlp_bias), activation)
    return GatedLayer(norm1, _attention(name, names, width, bias=attention_bias), norm2, mlp)


def _attention(name: str, names: Names, width: int, *, bias: bool) -> SelfAttention:
    each = 3 * width // len(names.qkv)
    qkv = Joined(tuple(Linear(f"{name}.{part}", width, each, bias) for part in names.qkv), precise=True)
    return SelfAttention(qkv, Linear(f"{name}.{names.out}", width, width, bias))


def block(
    ops: TowerOps[Tensor],
    x: Tensor,
    w: Layer,
    spec: Attention,
    activation: Activation | None,
    *,
    groups: str = "",
    angles: str = "",
) -> Tensor:
    """One layer. Shapes: x (T, width); returns the same.

    Args:
        ops: the operations of a pass.
        x: what the layer is given.
        w: its weights.
        spec: its attention.
        activation: of its MLP; None: see `activated`.
        groups: tokens look at their own of these alone; empty: at all.
        angles: what heads turn by; empty: nothing.
    """
    x = ops.add(x, _looked(ops, ops.layer_norm(x, w.norm1), w.attention, spec, groups=groups, angles=angles))
    raised = activated(ops, ops.linear(ops.layer_norm(x, w.norm2), w.up), activation)
    return ops.add(x, ops.linear(raised, w.down))


def gated_block(
    ops: TowerOps[Tensor], x: Tensor, w: GatedLayer, spec: Attention, *, groups: str = "", angles: str = ""
) -> Tensor:
    """One layer; see `block`. Shapes: x (T, width); returns the same."""
    x = ops.add(x, _looked(ops, ops.rms_norm(x, w.norm1), w.attention, spec, groups=groups, angles=angles))
    return ops.add(x, blocks.swiglu(ops, ops.rms_norm(x, w.norm2), w.mlp))


def _looked(ops: TowerOps[Tensor], x: Tensor, w: SelfAttention, spec: Attention, *, groups: str, angles: str) -> Tensor:
    q, k, v = ops.split(ops.linear(x, w.qkv), (spec.heads * spec.head_dim,) * 3)
    if angles:
        q, k = (ops.turn(each, spec.heads, angles) for each in (q, k))
    return ops.linear(ops.look_around(q, k, v, spec, groups), w.out)


def activated(ops: TowerOps[Tensor], x: Tensor, activation: Activation | None) -> Tensor:
    """The activation, or where it is None x * sigmoid(1.702 * x). Shapes: x (T, F); returns the same."""
    if activation is not None:
        return ops.activate(x, activation)
    return ops.mul(x, ops.activate(ops.scale(x, _QUICK), "sigmoid"))
