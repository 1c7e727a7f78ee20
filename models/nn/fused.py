"""The decoder in the form that is fast on a CPU: few, large, float32 operations on the host (`models.nn.host_step`).

What is different from `models.nn.decoder`, and why (costs measured on MLX 0.32's CPU backend, x86-64):

- q, k and v are one matrix, gate and up another, all in panels: a product costs microseconds beside its arithmetic.
- q's and k's rows are interleaved so that a rotation is one complex multiplication (`mx.fast.rope` becomes 30 nodes),
  and q carries the attention's scale.
- The matrix behind a norm has taken in its weight and the square root of its width.
- `exp` costs 14 ns an element in MLX's CPU backend; numpy's vectorised kernels are thirty times cheaper.

Owns the weights it takes from the `Decoder`; the decoder is empty afterwards. Thread: the MLX thread.
"""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from models import backend
from models.cache import LayerCache
from models.gemm import Gemm, Matrix, few_rows_gemm
from models.host import lend
from models.llm.base import Row
from models.nn.decoder import Decoder, DecoderConfig, DecoderLayer
from models.nn.host_step import HostLayer, HostStep
from models.nn.rope import RotationTable
from models.panels import PanelMatrix


class FusedDecoder:
    """A whole decoder for the CPU; implements `models.llm.base.LanguageModel`."""

    def __init__(self, decoder: Decoder, gemm: Gemm) -> None:
        """Take the weights out of `decoder`, layer by layer, so that no more than one layer is held twice.

        Args:
            decoder: The plain form, its weights float32.
            gemm: What multiplies; it must have batches.
        """
        config = decoder.config
        self.config = config
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.num_layers = config.num_layers
        self.computes_when_called = True
        stack = decoder.model
        weight = stack.embed_tokens.weight
        del stack.embed_tokens
        if config.tie_word_embeddings:
            self._embedding: mx.array | None = None
        else:
            self._embedding, weight = weight, decoder.lm_head.weight
            del decoder.lm_head
        self._head = PanelMatrix(weight)
        del weight
        layers: list[HostLayer] = []
        while stack.layers:
            layers.append(_host_layer(stack.layers.pop(0), config))
            backend.give_back()
        self._step = HostStep(config, gemm, layers)
        self._norm = lend(stack.norm.weight * config.hidden_size**0.5)
        self._rotations = RotationTable(config.rope)

    def __call__(self, tokens: mx.array, rows: Sequence[Row]) -> mx.array:
        """Shapes: tokens (T,); returns the hidden states after the final norm (T, D)."""
        *_, last = self._run(tokens, rows)
        self._step.unit(last, last)
        last *= self._norm
        return mx.array(last)

    def residuals(self, tokens: mx.array, rows: Sequence[Row]) -> Iterator[mx.array]:
        """The embeddings, then each layer's output, before the final norm. Shapes: tokens (T,); yields (T, D)."""
        return map(mx.array, self._run(tokens, rows))

    def logits(self, hidden: mx.array) -> mx.array:
        """Shapes: hidden (N, D); returns float32 (N, V)."""
        out = np.empty((hidden.shape[0], self.vocab_size), np.float32)
        self._step.product(lend(hidden), self._head, out)
        return mx.array(out)

    def new_cache(self) -> list[LayerCache]:
        """A row's empty cache, one entry a layer."""
        return self.config.new_cache()

    def cache_nbytes(self, tokens: int) -> int:
        """The bytes that one row's cache of that many tokens takes over all layers."""
        return sum(self.config.cache_nbytes_per_layer(tokens, itemsize=4))

    def _run(self, tokens: mx.array, rows: Sequence[Row]) -> Iterator[Matrix]:
        """The residual at first and behind each layer, the same array each time."""
        rotations = self._rotations.rows([row.cache[0].offset for row in rows], [row.length for row in rows])
        x = self._head.rows(np.array(tokens)) if self._embedding is None else lend(self._embedding[tokens])
        yield x
        yield from self._step.run(x, np.array(rotations)[:, 0], rows)


def fused(decoder: Decoder) -> Decoder | FusedDecoder:
    """The decoder's fused form if its weights and the BLAS of this process allow it, else itself. For CPUs."""
    gemm = few_rows_gemm()
    return decoder if gemm is None or not decoder.is_dense_float32() else FusedDecoder(decoder, gemm)


def _host_layer(layer: DecoderLayer, config: DecoderConfig) -> HostLayer:
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
        qk_norm = mx.stack([queries] * config.num_heads + [keys] * config.num_kv_heads) * config.head_dim**0.5
        scale = 1.0

    def joined(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.concatenate([_interleaved(q * scale, config.head_dim), _interleaved(k, config.head_dim), v])

    def lent(array: mx.array | None) -> Matrix | None:
        return None if array is None else lend(array)

    return HostLayer(
        qkv=PanelMatrix(joined(*(projection.weight for projection in projections)) * input_norm),
        qkv_bias=lent(joined(*(projection.bias for projection in projections)) if config.qkv_bias else None),
        qk_norm=lent(qk_norm),
        output=PanelMatrix(attention.o_proj.weight),
        output_bias=lent(attention.o_proj.bias if config.output_bias else None),
        gate_up=PanelMatrix(mx.concatenate([mlp.gate_proj.weight, mlp.up_proj.weight]) * post_norm),
        gate_up_bias=lent(mx.concatenate([mlp.gate_proj.bias, mlp.up_proj.bias]) if config.mlp_bias else None),
        down=PanelMatrix(mlp.down_proj.weight),
        down_bias=lent(mlp.down_proj.bias if config.mlp_bias else None),
    )


def _interleaved(weight: mx.array, head_dim: int) -> mx.array:
    """Reorder each head's rows from halves (re..., im...) to pairs (re, im, re, im...). Shape: (heads * d, ...)."""
    rest = weight.shape[1:]
    return weight.reshape(-1, 2, head_dim // 2, *rest).swapaxes(1, 2).reshape(weight.shape)
