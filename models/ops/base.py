"""The operations. One `Ops` stands for one step: it knows the tokens, their positions and the rows' state.

A step's tokens lie one after another in one flat axis T, row behind row; `T` is symbolic for an executor that records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from models.ops.recurrent import DeltaRule, StateSpace
from models.ops.rope import RopeConfig
from models.ops.routing import Routing
from models.ops.weights import Embedding, Experts, LatentUp, LayerNorm, Matrix, Norm, ShortConv, Vector, Xielu

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "softplus", "tanh"]
"""`gelu` is the exact one, `gelu_tanh` its usual approximation (arXiv 1606.08415); `relu2` is squared (2109.08668)."""

Tensor = TypeVar("Tensor")


@dataclass(frozen=True, slots=True)
class ClampedSwish:
    """A gate of its own kind: with g = min(gate, limit), u = up within +-limit: g * sigmoid(alpha * g) * (u + shift).

    Source: gpt-oss (arXiv 2508.10925).
    """

    limit: float
    alpha: float
    shift: float


Gate: TypeAlias = Activation | ClampedSwish


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """What is added to each head's scores by how far a key is behind or before its query. Source: arXiv 1910.10683.

    Half of the table's rows are for keys before the query or at it, half for those behind: the near ones have a row
    each, the others share them by the logarithm of their distance, and those from `max_distance` on have the last.
    """

    table: Embedding
    """Rows are buckets, columns heads."""
    max_distance: int

    def buckets(self, length: int) -> npt.NDArray[np.int64]:
        """The table's row of each pair of a query and a key. Shapes: returns (length, length). Thread: any."""
        distance = np.arange(length)[None, :] - np.arange(length)[:, None]
        half = self.table.rows // 2
        near = half // 2
        far = np.abs(distance)
        with np.errstate(divide="ignore"):
            steps = np.log(far.astype(np.float32) / np.float32(near)) / np.float32(np.log(self.max_distance / near))
        shared = near + (np.maximum(steps, 0) * np.float32(half - near)).astype(np.int64)
        buckets: npt.NDArray[np.int64] = np.where(far < near, far, np.minimum(shared, half - 1)) + np.where(
            distance > 0, half, 0
        )
        return buckets


@dataclass(frozen=True, slots=True)
class Attention:
    """What one layer's softmax attention is like. Source: grouped-query attention (arXiv 2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    """On the scores, before the softmax."""
    rope: RopeConfig | None = None
    """None: the layer has no positions."""
    window: int | None = None
    """A query sees itself and the `window - 1` tokens before it; None: all of them."""
    chunk: int | None = None
    """A text is divided into runs of so many tokens, and a query sees its own run alone. There is no window then."""
    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap). Source: Gemma 2 (arXiv 2408.00118)."""
    sinks: Vector | None = None
    """A score for each head that takes part in the softmax and brings no value. Source: arXiv 2309.17453."""
    bidirectional: bool = False
    """A query sees the tokens behind it as well; of a window, `window - 1` of them. There is no state then."""
    relative: RelativeBias | None = None
    """Only where it is bidirectional."""
    two_way: bool = False
    """Tokens of one picture see those behind them as well, and within a window alone what is before them.

    Source: Gemma 3 (arXiv 2503.19786).
    """


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """What one layer's attention to latents is like; its state is one head of keys that hold the values.

    Source: multi-head latent attention, DeepSeek-V2 (arXiv 2405.04434).
    """

    heads: int
    rank: int
    """Of the latent that stands for all heads' keys and values."""
    rope_dim: int
    """Of the part of a key that carries the position and is the same for all heads."""
    scale: float


@dataclass(frozen=True, slots=True)
class PositionScale:
    """A factor for each position p: 1 + beta * log(1 + floor((p + shift) / period))."""

    beta: float
    period: int
    shift: int = 0

    def factors(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Shapes: positions (T,); returns (T, 1). Thread: any."""
        periods = np.floor((positions + self.shift) / self.period)
        return (1 + self.beta * np.log1p(periods)).astype(np.float32)[:, None]


class Ops(Protocol[Tensor]):
    """Operations on (T, …) values of one step. Thread: the executor's."""

    def embed(self, table: Embedding) -> Tensor:
        """The embeddings of the step's tokens. Shapes: returns (T, width)."""
        ...

    def linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """The product with a matrix, its bias added. Shapes: x (T, inputs); returns (T, sum of outputs)."""
        ...

    def split(self, x: Tensor, sizes: Sequence[int], heads: int = 1) -> tuple[Tensor, ...]:
        """Parts of each head. Shapes: x (T, heads * sum of sizes); returns (T, heads * size) each."""
        ...

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """RMSNorm over the last axis; where `norm.width` is smaller than that, over each group of as many.

        Shapes: x (T, n * width); returns the same.
        """
        ...

    def layer_norm(self, x: Tensor, norm: LayerNorm) -> Tensor:
        """LayerNorm over the last axis; where `norm.width` is smaller than that, over each group of as many.

        Shapes: x (T, n * width); returns the same.
        """
        ...

    def rotate(self, x: Tensor, heads: int, rope: RopeConfig) -> Tensor:
        """Rotate each head by its token's position. Shapes: x (T, heads * d); returns the same."""
        ...

    def position_scale(self, x: Tensor, scale: PositionScale) -> Tensor:
        """Multiply each token by its position's factor. Shapes: x (T, D); returns the same."""
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, layer: int, spec: Attention) -> Tensor:
        """Rotate queries and keys, append keys and values to the layer's state, and look at it, causally.

        `layer` is the state's number in `Model.state`.

        Shapes: q (T, heads * head_dim), k and v (T, kv_heads * head_dim); returns (T, heads * head_dim).
        """
        ...

    def look_again(self, q: Tensor, layer: int, spec: Attention) -> Tensor:
        """Rotate queries and look at a layer's state, to which `attention` has appended this step's keys and values.

        The state holds all tokens, so its declaration has no window; the spec may have one, and differs from the other
        in nothing else. Shapes: q (T, heads * head_dim); returns the same. Source: arXiv 2405.12981.
        """
        ...

    def latent_attention(self, q: Tensor, latent: Tensor, up: LatentUp, layer: int, spec: LatentAttention) -> Tensor:
        """Append latents to the layer's state and look at it, causally.

        A head's query is its part without a position, then the rotated one; a token's latent is normed, then comes its
        rotated key. An executor may take `up` to the queries and the outputs instead of to every latent.

        Shapes: q (T, heads * (key_dim + rope_dim)), latent (T, rank + rope_dim); returns (T, heads * value_dim).
        """
        ...

    def short_conv(self, x: Tensor, conv: ShortConv, layer: int) -> Tensor:
        """Each channel's last inputs weighed, those of earlier steps from the layer's state. Shapes: (T, C) both ways.

        `layer` is the number in `Model.state` of a `Recurrent` of the shape `conv.shape`.
        """
        ...

    def delta_rule(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, layer: int, spec: DeltaRule
    ) -> Tensor:
        """The gated delta rule from the layer's state on, a `Recurrent` of the shape `spec.shape`.

        Shapes: q and k (T, key_heads * key_dim), v (T, heads * value_dim), a and b (T, heads); returns as v.
        """
        ...

    def state_space(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, *, layer: int, spec: StateSpace) -> Tensor:
        """The selective state space from the layer's state on, a `Recurrent` of the shape `spec.shape`.

        Shapes: x (T, heads * head_dim), b and c (T, groups * state_dim), dt (T, heads); returns as x.
        """
        ...

    def join(self, parts: Sequence[Tensor], heads: int) -> Tensor:
        """Parts of each head, one behind the other. Shapes: (T, heads * size) each; returns (T, heads * sum)."""
        ...

    def glu(self, gate: Tensor, up: Tensor, activation: Gate) -> Tensor:
        """The activated gate times `up`. Shapes: both (T, F); returns (T, F). Source: arXiv 2002.05202."""
        ...

    def route(self, logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """The picked experts and their weights. Shapes: logits (T, E); returns whole numbers and floats (T, picked)."""
        ...

    def experts(
        self, x: Tensor, picks: Tensor, weights: Tensor, experts: Experts, activation: Gate, *, on_input: bool = False
    ) -> Tensor:
        """The weighted sum of what the picked experts make; `on_input`: the sum of what they make of a weighted input.

        Those without a gate take an `Activation` alone. Shapes: x (T, D), picks, weights (T, k); returns (T, D).
        """
        ...

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """Shapes: x (T, F); returns the same."""
        ...

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """Where `y` is narrower, each of its values is for as many neighbours.

        Shapes: x (T, D), y (T, D) or (T, n), n a divisor of D; returns (T, D).
        """
        ...

    def weigh(self, x: Tensor, factors: Vector) -> Tensor:
        """Multiply each token by what is stored.

        Shapes: x (T, D) and factors of width D or 1, or x (T, 1) and factors of any width D; returns (T, D).
        """
        ...

    def scale(self, x: Tensor, factor: float) -> Tensor:
        """Shapes: x (T, D); returns the same."""
        ...

    def xielu(self, x: Tensor, numbers: Xielu) -> Tensor:
        """Shapes: x (T, F); returns the same."""
        ...

    def mix(self, x: Tensor, weights: Tensor, parts: int) -> Tensor:
        """Sums of parts that lie side by side, by weights that are each token's own.

        Shapes: x (T, parts * D), weights (T, n * parts), those of one sum behind each other; returns (T, n * D).
        Source: AltUp (arXiv 2301.13310).
        """
        ...

    def match_size(self, x: Tensor, like: Tensor, floor: float) -> Tensor:
        """Each token scaled so that its mean square is that of `like`; its own counts as `floor` at least.

        Shapes: both (T, D); returns (T, D).
        """
        ...

    def rise_above(self, x: Tensor, deviations: float) -> Tensor:
        """What rises above the token's mean by so many standard deviations, less both, and 0 for the rest.

        Shapes: (T, F); returns the same. Source: Spark Transformer (arXiv 2506.06644).
        """
        ...

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """The value cap * tanh(x / cap). Shapes: x (T, D); returns the same."""
        ...

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Shapes: both (T, D); returns (T, D)."""
        ...

    def residual(self, x: Tensor, layers: int) -> Tensor:
        """Say that `x` (T, D) is what the first so many layers make, so that a client can ask for it; returns it."""
        ...

    def deepen(self, x: Tensor, layers: int) -> Tensor:
        """Add what pictures say behind so many layers (from 1 on) at their tokens. Shapes: x (T, D); returns the same.

        Source: DeepStack (arXiv 2406.04334).
        """
        ...

    def embed_positions(self, table: Embedding, first: int = 0) -> Tensor:
        """The row of each token's position, the first one's being row `first`. Shapes: returns (T, width)."""
        ...

    def embed_kind(self, table: Embedding) -> Tensor:
        """The first row for every token: the kind of a text alone (BERT's segment A). Shapes: returns (T, width)."""
        ...
