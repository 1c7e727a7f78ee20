"""The decoder in the form that is fast on a CPU: few, large, float32 operations.

What is different from `models.nn.decoder`, and why (costs measured on MLX 0.32's CPU backend, x86-64):

- q, k and v are one matrix, gate and up another, transposed once: every node of a step's graph costs microseconds.
- q's and k's rows are interleaved so that a rotation is one complex multiplication (`mx.fast.rope` becomes 30 nodes),
  and q carries the attention's scale.
- The norm and the softmax are written out with the fewest nodes (`mx.fast.rms_norm` becomes 15); the matrix behind a
  norm has taken in its weight and the square root of its width.
- `exp` costs 14 ns an element there. Small steps use `power`, three times cheaper; large ones leave the graph and let
  numpy's vectorised kernels work in place on the evaluated array, thirty times cheaper than `exp`.

Owns the weights it takes from the `Decoder`; the decoder is empty afterwards. Thread: the MLX thread.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from models.cache import LayerCache
from models.gemm import host_gemm
from models.host import lend
from models.llm.base import Row
from models.nn.decoder import Decoder, DecoderConfig, DecoderLayer, causal_mask
from models.nn.host_step import HostLayer, HostStep
from models.nn.rope import RotationTable

HOST_ELEMENTS = 32768
"""From this many elements on, leaving the graph for numpy costs less than it saves."""

HOST_ROWS = 64
"""Up to so many rows the vocabulary is projected to at once: it keeps the BLAS's threads with those of `HostStep`."""

POWER_ELEMENTS = 2048
"""From this many elements on, `power` in several nodes is cheaper than one node with `exp`."""

E = 2.718281828459045


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One layer's weights, float32; matrices are (in, out). Shapes: heads H, key-value heads K, head dimension d."""

    qkv: mx.array
    """(D, (H + 2K) * d)"""
    qkv_bias: mx.array | None
    qk_norm: mx.array | None
    """(H + K, 1, d): each head's norm weight."""
    output: mx.array
    output_bias: mx.array | None
    gate_up: mx.array
    """(D, 2F)"""
    gate_up_bias: mx.array | None
    down: mx.array
    down_bias: mx.array | None

    def arrays(self) -> list[mx.array]:
        """All that there are."""
        biases = (self.qkv_bias, self.qk_norm, self.output_bias, self.gate_up_bias, self.down_bias)
        matrices = [self.qkv, self.output, self.gate_up, self.down]
        return matrices + [bias for bias in biases if bias is not None]

    def on_host(self) -> HostLayer:
        """The same arrays, lent to numpy."""

        def lent(array: mx.array | None) -> npt.NDArray[np.float32] | None:
            return None if array is None else lend(array)

        return HostLayer(
            qkv=lend(self.qkv).T,
            qkv_bias=lent(self.qkv_bias),
            qk_norm=None if self.qk_norm is None else lend(self.qk_norm)[:, 0],
            output=lend(self.output).T,
            output_bias=lent(self.output_bias),
            gate_up=lend(self.gate_up).T,
            gate_up_bias=lent(self.gate_up_bias),
            down=lend(self.down).T,
            down_bias=lent(self.down_bias),
        )


class FusedDecoder:
    """A whole decoder for the CPU; implements `models.llm.base.LanguageModel`."""

    def __init__(self, decoder: Decoder) -> None:
        """Take the weights out of `decoder`, layer by layer, so that no more than one layer is held twice."""
        config = decoder.config
        self.config = config
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.num_layers = config.num_layers
        stack = decoder.model
        self._embedding = stack.embed_tokens.weight
        self._layers: list[FusedLayer] = []
        while stack.layers:
            self._layers.append(_fused(stack.layers.pop(0), config))
        self._norm = stack.norm.weight * config.hidden_size**0.5
        head = stack.embed_tokens if config.tie_word_embeddings else decoder.lm_head
        self._head = head.weight.T
        self._rotations = RotationTable(config.rope)
        self._epsilon = mx.array(config.rms_norm_eps * config.hidden_size)
        self._head_epsilon = mx.array(config.rms_norm_eps * config.head_dim)
        self._heads_rotated = config.num_heads + config.num_kv_heads
        mx.eval(self._head, self._norm, self._epsilon, self._head_epsilon)
        self._host: HostStep | None = None
        if (gemm := host_gemm()) is not None and gemm.has_batches:
            layers = [layer.on_host() for layer in self._layers]
            self._host = HostStep(config, gemm, layers, lend(self._head).T)
        self.computes_when_called = self._host is not None

    def __call__(self, tokens: mx.array, rows: Sequence[Row]) -> mx.array:
        """Shapes: tokens (T,); returns the hidden states after the final norm (T, D)."""
        if self._host is not None and self._host.takes(rows):
            rotations = self._rotations.rows([row.cache[0].offset for row in rows], [1] * len(rows))
            x = self._host.run(lend(self._embedding[tokens]), np.array(rotations)[:, 0], rows)
            scaled: mx.array = mx.array(x) * self._norm
            return scaled
        *_, last = self.residuals(tokens, rows)
        hidden: mx.array = _unit(last, self._epsilon) * self._norm
        return hidden

    def residuals(self, tokens: mx.array, rows: Sequence[Row]) -> Iterator[mx.array]:
        """The embeddings, then each layer's output, before the final norm. Shapes: tokens (T,); yields (T, D)."""
        x = self._embedding[tokens]
        yield x
        offsets = [row.cache[0].offset for row in rows]
        lengths = [row.length for row in rows]
        positions = _Positions(self._rotations.rows(offsets, lengths), lengths)
        for index, layer in enumerate(self._layers):
            attended = self._attention(_unit(x, self._epsilon), index, rows, positions)
            x = _plus_product(x, attended, layer.output, layer.output_bias)
            x = _plus_product(x, _swiglu(_unit(x, self._epsilon), layer), layer.down, layer.down_bias)
            yield x

    def logits(self, hidden: mx.array) -> mx.array:
        """Shapes: hidden (N, D); returns float32 (N, V)."""
        if self._host is not None and hidden.shape[0] <= HOST_ROWS:
            return mx.array(self._host.logits(lend(hidden)))
        return hidden @ self._head

    def new_cache(self) -> list[LayerCache]:
        """A row's empty cache, one entry a layer."""
        return self.config.new_cache()

    def cache_nbytes(self, tokens: int) -> int:
        """The bytes that one row's cache of that many tokens takes over all layers."""
        return sum(self.config.cache_nbytes_per_layer(tokens, itemsize=4))

    def _attention(self, x: mx.array, index: int, rows: Sequence[Row], positions: "_Positions") -> mx.array:
        """Softmax attention, the query heads of one key head stacked into one matrix product.

        Shapes: x (T, D); returns (T, H * d).
        """
        config, rotated, layer = self.config, self._heads_rotated, self._layers[index]
        qkv = x @ layer.qkv if layer.qkv_bias is None else mx.addmm(layer.qkv_bias, x, layer.qkv)
        heads = qkv.reshape(x.shape[0], -1, 1, config.head_dim)
        qk = heads[:, :rotated]
        if layer.qk_norm is not None:
            qk = _unit(qk, self._head_epsilon) * layer.qk_norm
        qk = (qk.view(mx.complex64) * positions.rotations).view(mx.float32)
        queries = qk[:, : config.num_heads].reshape(x.shape[0], config.num_kv_heads, -1, config.head_dim)
        parts = positions.by_row(queries, qk[:, config.num_heads :], heads[:, rotated:])
        seen, scores, masks = [], [], []
        for row, query, key, value in zip(rows, *parts, strict=True):
            keys, values = row.cache[index].update(_by_head(key), _by_head(value))
            seen.append(values)
            scores.append(_by_head(query) @ keys.swapaxes(2, 3))
            masks.append(positions.mask(row, keys.shape[2], config.window(index)))
        weights = _softmax_on_host(scores, masks) if _is_large(scores) else list(map(_softmax, scores, masks))
        outputs = [_by_token(w @ values, row.length) for row, w, values in zip(rows, weights, seen, strict=True)]
        attended = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        return attended.reshape(x.shape[0], -1)


class _Positions:
    """What all layers of one step share: how its tokens belong to rows, their rotations and the rows' masks."""

    __slots__ = ("_bounds", "_masks", "rotations")

    def __init__(self, rotations: mx.array, lengths: Sequence[int]) -> None:
        """Shapes: rotations complex64 (T, 1, 1, d / 2); the lengths add up to T."""
        self.rotations = rotations
        self._bounds = list(accumulate(lengths))[:-1]
        self._masks: dict[tuple[int, int, int | None, int | None], mx.array] = {}

    def by_row(self, *arrays: mx.array) -> list[list[mx.array]]:
        """Each array's parts, one a row. Shapes: (T, ...) to (L, ...)."""
        return [list(mx.split(array, self._bounds)) if self._bounds else [array] for array in arrays]

    def mask(self, row: Row, visible: int, window: int | None) -> mx.array | None:
        """Additive, float32 (L, S); None where a row's only query sees everything."""
        if row.length == 1:
            return None
        key = (row.length, visible, window, row.hidden_from)
        if key not in self._masks:
            self._masks[key] = mx.where(causal_mask(*key), 0.0, -mx.inf)
        return self._masks[key]


def _unit(x: mx.array, epsilon: mx.array) -> mx.array:
    """Scale to a sum of squares of 1: RMSNorm without its weight and the square root of its width."""
    return x * mx.rsqrt(mx.sum(mx.square(x), axis=-1, keepdims=True) + epsilon)


def _by_head(x: mx.array) -> mx.array:
    """Shapes: (L, K, G, d) to (1, K, G * L, d), the tokens of one head of a group together."""
    length, heads, group, dim = x.shape
    return x if length == 1 else x.transpose(1, 2, 0, 3).reshape(1, heads, group * length, dim)


def _by_token(x: mx.array, length: int) -> mx.array:
    """The inverse of `_by_head`. Shapes: (1, K, G * L, d) to (L, K, G, d)."""
    _, heads, stacked, dim = x.shape
    return x if length == 1 else x.reshape(heads, stacked // length, length, dim).transpose(2, 0, 1, 3)


def _is_large(scores: Sequence[mx.array]) -> bool:
    return sum(array.size for array in scores) >= HOST_ELEMENTS


def _softmax(scores: mx.array, mask: mx.array | None) -> mx.array:
    """Shapes: scores (1, K, G * L, S), mask (L, S) or None."""
    if mask is not None:
        scores = (scores.reshape(-1, *mask.shape) + mask).reshape(scores.shape)
    if scores.size < POWER_ELEMENTS:
        return mx.softmax(scores, axis=-1)
    powers = mx.power(E, scores - mx.max(scores, axis=-1, keepdims=True))
    return powers / mx.sum(powers, axis=-1, keepdims=True)


def _softmax_on_host(scores: list[mx.array], masks: Sequence[mx.array | None]) -> list[mx.array]:
    """In place, all rows after one wait. Shapes: as for `_softmax`, an entry a row."""
    mx.eval(scores)
    for array, mask in zip(scores, masks, strict=True):
        values = lend(array)
        if mask is not None:
            by_query = values.reshape(-1, *mask.shape)
            by_query += lend(mask)
        values -= values.max(axis=-1, keepdims=True)
        np.exp(values, out=values)
        values /= values.sum(axis=-1, keepdims=True)
    return scores


def _swiglu(x: mx.array, layer: FusedLayer) -> mx.array:
    """Shapes: x (T, D); returns (T, F)."""
    width = layer.down.shape[0]
    bias = layer.gate_up_bias
    if x.shape[0] * width >= HOST_ELEMENTS:
        gate, up = x @ layer.gate_up[:, :width], x @ layer.gate_up[:, width:]
        if bias is not None:
            gate, up = gate + bias[:width], up + bias[width:]
        return _swiglu_on_host(gate, up)
    gate_up = x @ layer.gate_up if bias is None else mx.addmm(bias, x, layer.gate_up)
    gate, up = gate_up[:, :width], gate_up[:, width:]
    if gate.size < POWER_ELEMENTS:
        return gate * mx.sigmoid(gate) * up
    return gate / (1.0 + mx.power(1.0 / E, gate)) * up


def _swiglu_on_host(gate: mx.array, up: mx.array) -> mx.array:
    """silu(g) * u, with silu(g) = h + h * tanh(h), h = g / 2. Shapes: both (T, F)."""
    mx.eval(gate, up)
    half = lend(gate)
    half *= np.float32(0.5)
    scale = np.tanh(half)
    scale += np.float32(1.0)
    half *= scale
    half *= lend(up)
    return gate


def _plus_product(x: mx.array, inputs: mx.array, matrix: mx.array, bias: mx.array | None) -> mx.array:
    return mx.addmm(x if bias is None else x + bias, inputs, matrix)


def _fused(layer: DecoderLayer, config: DecoderConfig) -> FusedLayer:
    """Build and evaluate one layer's fused weights."""
    attention, mlp = layer.self_attn, layer.mlp
    input_norm, post_norm = (
        norm.weight * config.hidden_size**0.5 for norm in (layer.input_layernorm, layer.post_attention_layernorm)
    )
    scale = config.head_dim**-0.5
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    qk_norm = None
    if config.qk_norm:
        # A norm undoes any scale before it, so the scale goes into its weight.
        queries = _interleaved(attention.q_norm.weight * scale, config.head_dim)
        keys = _interleaved(attention.k_norm.weight, config.head_dim)
        qk_norm = mx.stack([queries] * config.num_heads + [keys] * config.num_kv_heads)[:, None]
        qk_norm = qk_norm * config.head_dim**0.5
        scale = 1.0

    def joined(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.concatenate([_interleaved(q * scale, config.head_dim), _interleaved(k, config.head_dim), v])

    fused = FusedLayer(
        qkv=(joined(*(projection.weight for projection in projections)) * input_norm).T,
        qkv_bias=joined(*(projection.bias for projection in projections)) if config.qkv_bias else None,
        qk_norm=qk_norm,
        output=attention.o_proj.weight.T,
        output_bias=attention.o_proj.bias if config.output_bias else None,
        gate_up=(mx.concatenate([mlp.gate_proj.weight, mlp.up_proj.weight]) * post_norm).T,
        gate_up_bias=mx.concatenate([mlp.gate_proj.bias, mlp.up_proj.bias]) if config.mlp_bias else None,
        down=mlp.down_proj.weight.T,
        down_bias=mlp.down_proj.bias if config.mlp_bias else None,
    )
    mx.eval(fused.arrays())
    return fused


def _interleaved(weight: mx.array, head_dim: int) -> mx.array:
    """Reorder each head's rows from halves (re..., im...) to pairs (re, im, re, im...). Shape: (heads * d, ...)."""
    rest = weight.shape[1:]
    return weight.reshape(-1, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(weight.shape)
