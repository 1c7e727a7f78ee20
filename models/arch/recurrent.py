"""What architectures with recurrent layers share: how their states are numbered, and the layers of Mamba-2.

Source: Mamba-2 (arXiv 2405.21060); transformers' `modeling_mamba2` for the order of operations and the names;
llama.cpp `conversion/mamba.py` for GGUF's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from models.arch.base import Tensor
from models.arch.blocks import FILE
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata
from models.ops import Activation, LayerState, Linear, Norm, Ops, Recurrent, ShortConv, StateSpace, Vector

GGUF_BARE = ("ssm_dt",)
GGUF_RATES = ("ssm_a",)

_PARTS = {"ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_norm": "norm", "ssm_out": "out_proj"}
_NUMBERS = {"ssm_dt": "dt_bias", "ssm_a": "A_log", "ssm_d": "D"}
_LIMITLESS = (0.0, float("inf"))


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a layer of Mamba-2 is like."""

    hidden: int
    heads: int
    head_dim: int
    groups: int
    """Of b and c, and of the norm."""
    state_dim: int
    taps: int
    eps: float
    limits: tuple[float, float] = _LIMITLESS
    """Between which a time step is held."""
    in_bias: bool = False
    out_bias: bool = False
    conv_bias: bool = True
    activation: Activation = "silu"
    """Behind the convolution."""

    @property
    def inner(self) -> int:
        """The width of x, of its gate and of what comes out."""
        return self.heads * self.head_dim

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """What the input is projected to: gate, x, b, c and time steps."""
        shared = self.groups * self.state_dim
        return self.inner, self.inner, shared, shared, self.heads


@dataclass(frozen=True, slots=True)
class Mixer:
    """The weights of a layer of Mamba-2."""

    sizes: Sizes
    into: Linear
    conv: ShortConv
    space: StateSpace
    group: Norm
    """Each group is divided by its length, and all of it multiplied by"""
    norm: Vector | None
    """this. None: neither is done."""
    out: Linear
    factors: tuple[float, ...] = ()
    """On each of the five parts of the projected input. Source: Falcon-H1."""
    gated_last: bool = False
    """The gate comes behind the norm."""

    @property
    def states(self) -> tuple[LayerState, ...]:
        """What it remembers, in the order in which `mixed` looks for it."""
        return Recurrent(self.conv.shape), Recurrent(self.space.shape)


def numbered(states: Iterable[Sequence[LayerState]]) -> tuple[tuple[int, ...], tuple[LayerState, ...]]:
    """The number of each layer's first state, and all states, from those of each layer."""
    first: list[int] = []
    every: list[LayerState] = []
    for own in states:
        first.append(len(every))
        every += own
    return tuple(first), tuple(every)


def mixer(sizes: Sizes, name: str) -> Mixer:
    """Declare the layer of that name. Raises CheckpointError: the groups do not divide the heads."""
    if sizes.heads % sizes.groups:
        raise CheckpointError(
            f"{sizes.heads} heads of a state space do not divide into {sizes.groups} groups", file=FILE
        )
    _, inner, shared, _, heads = sizes.parts
    a_log, dt_bias, d = (Vector(f"{name}.{part}", heads) for part in ("A_log", "dt_bias", "D"))
    least, most = sizes.limits
    return Mixer(
        sizes,
        Linear(f"{name}.in_proj", sizes.hidden, sum(sizes.parts), sizes.in_bias),
        ShortConv(f"{name}.conv1d", inner + 2 * shared, sizes.taps, sizes.conv_bias),
        StateSpace(heads, sizes.head_dim, sizes.groups, sizes.state_dim, a_log, dt_bias, d, least, most),
        Norm("", inner // sizes.groups, sizes.eps),
        Vector(f"{name}.norm.weight", inner),
        Linear(f"{name}.out_proj", inner, sizes.hidden, sizes.out_bias),
    )


def mixed(ops: Ops[Tensor], x: Tensor, w: Mixer, state: int) -> Tensor:
    """A layer of Mamba-2, the first of whose states has that number. Shapes: x (T, D); returns (T, D)."""
    inner, *convolved, heads = w.sizes.parts
    projected = ops.linear(x, w.into)
    if w.factors:
        parts = ops.split(projected, w.sizes.parts)
        gate, *middle, dt = (ops.scale(part, factor) for part, factor in zip(parts, w.factors, strict=True))
        x = ops.join(middle, 1)
    else:
        gate, x, dt = ops.split(projected, (inner, sum(convolved), heads))
    x = ops.activate(ops.short_conv(x, w.conv, state), w.sizes.activation)
    x, b, c = ops.split(x, convolved)
    y = ops.state_space(x, b, c, dt, layer=state + 1, spec=w.space)
    if w.norm is not None and w.gated_last:
        y = ops.weigh(ops.rms_norm(y, w.group), w.norm)
    y = ops.glu(gate, y, "silu")
    if w.norm is not None and not w.gated_last:
        y = ops.weigh(ops.rms_norm(y, w.group), w.norm)
    return ops.linear(y, w.out)


def read_limits(config: Mapping[str, JSON], key: str = "time_step_limit") -> tuple[float, float]:
    """The bounds of time steps, of which the upper one may be infinite. Raises CheckpointError."""
    values = config.get(key)
    if values is None:
        return _LIMITLESS
    if isinstance(values, list):
        # JSON has no such number; newer configurations have this in its place.
        values = [float("inf") if each == {"__float__": "Infinity"} else each for each in values]
    limits = ConfigReader({key: values}).numbers(key)
    if len(limits) != 2 or not 0 <= limits[0] < limits[1]:
        raise CheckpointError(f"{key} must be two numbers in order, not {limits}", file=FILE)
    return limits[0], limits[1]


def read_sizes(config: Mapping[str, JSON], inner: int, eps: float, activation: Activation) -> Sizes:
    """A layer's sizes, of the width `inner` within, in the words that Bamba, Granite and Falcon-H1 share.

    Raises:
        CheckpointError: a value is missing or impossible.
    """
    reader = ConfigReader(config)
    heads = reader.size("mamba_n_heads", 128)
    is_derived = config.get("mamba_d_head", "auto") in ("auto", None)
    head_dim = max(inner // heads, 1) if is_derived else reader.size("mamba_d_head")
    if heads * head_dim != inner:
        raise CheckpointError(f"mamba_n_heads {heads} x {head_dim} is not the width {inner}", file=FILE)
    bias = reader.flag("mamba_proj_bias", default=False)
    return Sizes(
        reader.size("hidden_size"),
        heads,
        head_dim,
        reader.size("mamba_n_groups", 1),
        reader.size("mamba_d_state", 256),
        reader.size("mamba_d_conv", 4),
        eps,
        read_limits(config),
        in_bias=bias,
        out_bias=bias,
        conv_bias=reader.flag("mamba_conv_bias", default=True),
        activation=activation,
    )


def gguf_names(name: str) -> dict[str, str]:
    """Hugging Face's names of the tensors of a layer's part of that name, by GGUF's."""
    return {gguf: f"{name}.{ours}" for gguf, ours in (_PARTS | _NUMBERS).items()}


def gguf_sizes(metadata: GGUFMetadata) -> dict[str, JSON]:
    """What a GGUF file says of a layer, in the words of `read_sizes`. Raises CheckpointError."""
    heads, inner = metadata.count("ssm.time_step_rank"), metadata.count("ssm.inner_size")
    if inner % heads:
        raise CheckpointError(f"its metadata has {heads} heads for a state space of {inner}", file=metadata.file)
    return {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_n_groups": metadata.integer("ssm.group_count") or 1,
        "mamba_d_state": metadata.count("ssm.state_size"),
        "mamba_d_conv": metadata.count("ssm.conv_kernel"),
        "mamba_conv_bias": _has(metadata, "ssm_conv1d.bias"),
        "mamba_proj_bias": _has(metadata, "ssm_in.bias"),
    }


def gguf_layers(metadata: GGUFMetadata, kinds: Mapping[str, str], layers: int) -> list[JSON]:
    """The kind of each layer, by a tensor that only one kind has. Raises CheckpointError for a layer of none."""
    found: list[JSON] = []
    for layer in range(layers):
        kind = next((kind for name, kind in kinds.items() if f"blk.{layer}.{name}" in metadata.shapes), None)
        if kind is None:
            raise CheckpointError(f"layer {layer} is of no known kind", file=metadata.file)
        found.append(kind)
    return found


def _has(metadata: GGUFMetadata, name: str) -> bool:
    return any(shape.startswith("blk.") and shape.endswith(f".{name}") for shape in metadata.shapes)
