"""The pre-norm decoder that Llama, Mistral, Qwen2, Qwen3 and their kin share; they differ by data, not by code.

Attribute names are the checkpoints' tensor names. This is the form in which weights are loaded and in which GPUs
compute (`mx.fast` kernels, weights of any kind); `models.nn.fused` turns it into the form that is fast on a CPU.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from models.cache import CacheType, LayerCache, cache_nbytes, check_cache_type, layer_cache
from models.checkpoint import JSON
from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.llm.base import Row
from models.nn.rope import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that tells one of these decoders from another."""

    vocab_size: int
    context_length: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    """The sliding window of each layer, None where a layer sees everything; empty: none has one."""
    cache_type: CacheType = "f16"
    """How keys and values are held."""

    def with_cache(self, cache_type: CacheType) -> Self:
        """The same with another kind of cache. Raises QuantizationError if the heads do not allow it."""
        check_cache_type(cache_type, self.head_dim)
        return replace(self, cache_type=cache_type)

    def new_cache(self) -> list[LayerCache]:
        """A row's empty cache, one entry a layer. Thread: the MLX thread."""
        return [layer_cache(self.cache_type, self.window(layer)) for layer in range(self.num_layers)]

    def window(self, layer: int) -> int | None:
        """The sliding window of that layer, in tokens."""
        return self.windows[layer] if self.windows else None

    def cache_nbytes_per_layer(self, tokens: int, *, itemsize: int) -> list[int]:
        """The bytes of one row's cache of that many tokens, a number a layer."""
        return [
            cache_nbytes(
                tokens,
                window=self.window(layer),
                kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                itemsize=itemsize,
                cache_type=self.cache_type,
            )
            for layer in range(self.num_layers)
        ]


def read_decoder_config(
    config: Mapping[str, JSON],
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int | None, ...] = (),
) -> DecoderConfig:
    """Read what all these architectures' config.json have in common.

    Raises:
        CheckpointError: a value is missing, of the wrong kind or impossible.
    """
    reader = ConfigReader(config)
    heads, hidden = reader.size("num_attention_heads"), reader.size("hidden_size")
    kv_heads = reader.size("num_key_value_heads", heads)
    head_dim = reader.size("head_dim", max(hidden // heads, 1))
    if heads % kv_heads:
        raise CheckpointError(f"{heads} attention heads cannot share {kv_heads} key-value heads", file="config.json")
    if head_dim % 2:
        raise CheckpointError(f"head_dim must be even, not {head_dim}", file="config.json")
    if reader.text("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"hidden_act {reader.text('hidden_act', '')!r} is not supported", file="config.json")
    rope = read_rope(config, dims=head_dim)
    return DecoderConfig(
        vocab_size=reader.size("vocab_size"),
        context_length=max(reader.size("max_position_embeddings", 2048), rope.extended_context),
        hidden_size=hidden,
        intermediate_size=reader.size("intermediate_size"),
        num_layers=reader.size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=rope,
        tie_word_embeddings=reader.flag("tie_word_embeddings", default=False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=windows,
    )


def read_windows(config: Mapping[str, JSON], *, first_windowed_layer: int = 0) -> tuple[int | None, ...]:
    """The sliding window of each layer: by `layer_types` where the config has them, else from a first layer on.

    Raises:
        CheckpointError: `layer_types` does not name one known kind for each layer.
    """
    reader = ConfigReader(config)
    layers, window = reader.size("num_hidden_layers"), reader.integer("sliding_window", 0)
    if window <= 0:
        return ()
    kinds = reader.texts("layer_types")
    if kinds is None:
        return tuple(window if layer >= first_windowed_layer else None for layer in range(layers))
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise CheckpointError(f"layer_types must name {layers} known kinds of attention", file="config.json")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def causal_mask(length: int, visible: int, window: int | None, hidden_from: int | None = None) -> mx.array:
    """True where a query may look. Shape: bool (L, S); the last L of the S keys are the queries' own."""
    queries = mx.arange(visible - length, visible)[:, None]
    keys = mx.arange(visible)[None]
    mask = keys <= queries if hidden_from is None else (keys <= queries) & (keys < hidden_from)
    return mask if window is None else mask & (keys > queries - window)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, row by row."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._config = config
        heads_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads_dim, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        # A private array: its wavelengths are computed, not loaded.
        self._wavelengths = mx.array(1.0 / config.rope.frequencies())

    def __call__(self, x: mx.array, rows: Sequence[Row], layer: int) -> mx.array:
        """Shapes: x (T, D); returns (T, D)."""
        dim = self._config.head_dim
        queries = self.q_proj(x).reshape(-1, self._config.num_heads, dim)
        keys = self.k_proj(x).reshape(-1, self._config.num_kv_heads, dim)
        values = self.v_proj(x).reshape(-1, self._config.num_kv_heads, dim)
        if self._config.qk_norm:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        outputs, start = [], 0
        for row in rows:
            own = slice(start, start + row.length)
            outputs.append(self._attend(queries[own], keys[own], values[own], row, layer))
            start += row.length
        return self.o_proj(outputs[0] if len(outputs) == 1 else mx.concatenate(outputs))

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, row: Row, layer: int) -> mx.array:
        """Shapes: queries (L, H, D), keys and values (L, H_kv, D); returns (L, H * D)."""
        cache, length, window = row.cache[layer], queries.shape[0], self._config.window(layer)
        q = self._rotate(queries.swapaxes(0, 1)[None], cache.offset)
        k = self._rotate(keys.swapaxes(0, 1)[None], cache.offset)
        k, v = cache.update(k, values.swapaxes(0, 1)[None])
        mask: mx.array | str | None = None
        if length > 1:
            visible = k.shape[2]
            plain = row.hidden_from is None and (window is None or visible <= window)
            mask = "causal" if plain else causal_mask(length, visible, window, row.hidden_from)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._config.head_dim**-0.5, mask=mask)
        return out[0].swapaxes(0, 1).reshape(length, -1)

    def _rotate(self, x: mx.array, offset: int) -> mx.array:
        magnitude = self._config.rope.magnitude
        scaled = x if magnitude == 1.0 else x * magnitude
        return mx.fast.rope(
            scaled,
            self._config.head_dim,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._wavelengths,
        )


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        # One kernel instead of three. The CPU backend would call a C++ compiler at run time, which may not be there.
        on_gpu = mx.default_device() == mx.Device(mx.gpu)
        self._activate = mx.compile(_swiglu, shapeless=True) if on_gpu else _swiglu

    def __call__(self, x: mx.array) -> mx.array:
        """Shapes: x (T, D); returns (T, D)."""
        return self.down_proj(self._activate(self.gate_proj(x), self.up_proj(x)))


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, rows: Sequence[Row], layer: int) -> mx.array:
        """Shapes: x (T, D); returns (T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rows, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderStack(nn.Module):
    """Embedding, layers, final norm: what checkpoints call `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, tokens: mx.array, rows: Sequence[Row]) -> mx.array:
        """Shapes: tokens (T,); returns (T, D)."""
        *_, last = self.residuals(tokens, rows)
        hidden: mx.array = self.norm(last)
        return hidden

    def residuals(self, tokens: mx.array, rows: Sequence[Row]) -> Iterator[mx.array]:
        """The embeddings, then what each layer makes of them. Shapes: tokens (T,); yields (T, D)."""
        x = self.embed_tokens(tokens)
        yield x
        for index, layer in enumerate(self.layers):
            x = layer(x, rows, index)
            yield x


class Decoder(nn.Module):
    """A whole decoder; implements `models.llm.base.LanguageModel`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.context_length = config.context_length
        self.num_layers = config.num_layers
        self.computes_when_called = False
        self.model = DecoderStack(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, rows: Sequence[Row]) -> mx.array:
        """Shapes: tokens (T,); returns the hidden states after the final norm (T, D)."""
        return self.model(tokens, rows)

    def residuals(self, tokens: mx.array, rows: Sequence[Row]) -> Iterator[mx.array]:
        """The embeddings, then each layer's output, before the final norm. Shapes: tokens (T,); yields (T, D)."""
        return self.model.residuals(tokens, rows)

    def logits(self, hidden: mx.array) -> mx.array:
        """Shapes: hidden (N, D); returns float32 (N, V)."""
        tied = self.config.tie_word_embeddings
        logits = self.model.embed_tokens.as_linear(hidden) if tied else self.lm_head(hidden)
        result: mx.array = logits.astype(mx.float32)
        return result

    def new_cache(self) -> list[LayerCache]:
        """A row's empty cache, one entry a layer."""
        return self.config.new_cache()

    def cache_nbytes(self, tokens: int) -> int:
        """The bytes that one row's cache of that many tokens takes over all layers."""
        itemsize: int = self.model.norm.weight.dtype.size
        return sum(self.config.cache_nbytes_per_layer(tokens, itemsize=itemsize))

    def is_dense_float32(self) -> bool:
        """Whether every weight is plain float32: no quantised matrix, no half precision."""
        parameters = cast("list[tuple[str, mx.array]]", tree_flatten(self.parameters()))
        return all(array.dtype == mx.float32 for _, array in parameters)
