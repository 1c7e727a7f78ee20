"""Layers that remember a row in arrays of a fixed size, instead of keys and values of every token."""

from dataclasses import dataclass

from models.ops.weights import Vector


@dataclass(frozen=True, slots=True)
class DeltaRule:
    """What one layer's gated delta rule is like. Source: gated delta networks (arXiv 2412.06464).

    With q and k divided by their lengths, and q by the root of `key_dim` besides, each of `heads` heads remembers S,
    (key_dim, value_dim), and for each token t, with decay g = exp(-exp(a_log) * softplus(a + dt_bias)) and rate
    beta = sigmoid(b): S = g S; S = S + beta k (v - S^T k)^T; the output is S^T q.
    """

    key_heads: int
    """Of queries and keys; each serves as many of the `heads` in a row."""
    heads: int
    """Of values, rates, decays and outputs."""
    key_dim: int
    value_dim: int
    a_log: Vector
    """Shape (heads,)."""
    dt_bias: Vector
    """Shape (heads,)."""
    eps: float = 1e-6
    """Added to the squared lengths of q and k."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it remembers of a row, S transposed."""
        return (self.heads, self.value_dim, self.key_dim)


@dataclass(frozen=True, slots=True)
class StateSpace:
    """What one layer's selective state space is like. Source: Mamba-2 (arXiv 2405.21060).

    Each head remembers S, (head_dim, state_dim), and for each token t, with dt = softplus(dt + dt_bias) between its
    bounds and the decay g = exp(-exp(a_log) * dt): S = g S + dt x b^T; the output is S c + d x.
    """

    heads: int
    """Of x, dt and outputs."""
    head_dim: int
    groups: int
    """Of b and c; each serves as many heads in a row."""
    state_dim: int
    a_log: Vector
    """Shape (heads,)."""
    dt_bias: Vector
    """Shape (heads,)."""
    d: Vector
    """Shape (heads,)."""
    least_dt: float = 0.0
    most_dt: float = float("inf")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it remembers of a row."""
        return (self.heads, self.head_dim, self.state_dim)
