"""The text encoder of image pipelines: a Qwen3 without its last layers, read at chosen depths.

Owns the prompt's way into the model (chat template, truncation, padding), the choice of layers, and the embeddings of
the last few prompts. The layers themselves are `models.nn`'s. What lies behind the last layer that is asked for is
neither loaded nor computed.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx

from models.backend import device, give_back
from models.chat_template import render_chat
from models.checkpoint import JSON, Checkpoint
from models.config_reader import ConfigReader
from models.errors import CheckpointError, TokenizerError
from models.host import wait
from models.image.base import LoadChoices
from models.image.loading import component_nbytes, component_view, load_component
from models.llm.base import Row
from models.llm.qwen3 import read_config
from models.nn.decoder import Decoder, DecoderConfig
from models.nn.fused import FusedDecoder, fused
from models.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)

MAX_TOKENS = 512
"""A longer prompt is cut there, template and all, as the reference pipelines do."""

KEPT_PROMPTS = 4
"""So many prompts' embeddings are kept: a prompt, its negative one, and the pair before."""

_COMPONENT = "text_encoder"


@dataclass(frozen=True, slots=True)
class Reading:
    """How a family reads its text encoder."""

    hidden_states: tuple[int, ...]
    """Those that are the embeddings, side by side, numbered as in transformers: n is what the first n layers make, and
    -2 what all but the last make."""
    enable_thinking: bool
    """A variable of Qwen3's chat template; False puts an empty think block before the answer."""
    padded: bool = False
    """Fill up to MAX_TOKENS; the fill sees the prompt and is seen by nobody. Else only the prompt's tokens are run."""


class TextEncoder:
    """A pipeline's text encoder and tokenizer. Thread: the MLX thread, but for the tokens."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        reading: Reading,
        choices: LoadChoices,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """Load the tokenizer, and the weights if they are to be kept.

        Args:
            checkpoint: the pipeline.
            reading: how the family reads it.
            choices: `keep_text_encoder` decides whether the weights stay.
            span: which part of the whole load this is, 0 to 1.

        Raises:
            ModelError: the text encoder or the tokenizer cannot be used.
        """
        view = component_view(checkpoint, _COMPONENT, tokenizer="tokenizer")
        self._checkpoint, self._reading, self._choices = checkpoint, reading, choices
        config = _read_config(view.config)
        self._unused = unused_tensors(checkpoint, reading)[_COMPONENT]
        self._layers = _depths(reading, config)
        if not all(0 < n < config.num_layers for n in self._layers):
            raise CheckpointError(
                f"its {config.num_layers} layers are too few for this pipeline", file=f"{view.reference}/config.json"
            )
        # A tied head has no weights of its own, and nobody asks for logits.
        self.config = replace(config, num_layers=max(self._layers), tie_word_embeddings=True)
        self.tokenizer: Tokenizer = load_tokenizer(view)
        if reading.padded and self.tokenizer.pad_id is None:
            raise TokenizerError(f"{view.reference}: its tokenizer has no pad_token")
        self._embeddings: OrderedDict[str, mx.array] = OrderedDict()
        self._model: Decoder | FusedDecoder | None = None
        self._weight_bytes = 0
        if choices.keep_text_encoder:
            self._model = self._load(span)
        else:
            self._weight_bytes = component_nbytes(checkpoint, _COMPONENT, choices.policy, unused=self._unused)

    @property
    def width(self) -> int:
        """The width of an embedding."""
        return len(self._layers) * self.config.hidden_size

    @property
    def working_bytes(self) -> int:
        """What encoding the longest prompt takes at its peak, beyond weights that are kept: scores, or the MLP."""
        config, tokens = self.config, MAX_TOKENS
        wide = max(config.num_heads * tokens, 2 * config.intermediate_size) + 4 * config.hidden_size
        kept = sum(config.cache_nbytes_per_layer(tokens, itemsize=4)) + 4 * tokens * self.width * KEPT_PROMPTS
        return 4 * tokens * wide + kept + self._weight_bytes

    def encode(self, *prompts: str) -> list[mx.array]:
        """The embeddings of each prompt, evaluated, in the model's type.

        Shapes: (L, width), L the prompt's tokens, or MAX_TOKENS if the family's reading is padded.

        Raises:
            TokenizerError: the chat template cannot be used, or the text is no Unicode.
        """
        loaded = self._model
        for prompt in prompts:
            if prompt not in self._embeddings:
                loaded = loaded or self._load((1.0, 1.0))
                self._embeddings[prompt] = self._run(loaded, self.tokens(prompt))
            self._embeddings.move_to_end(prompt)
        found = [self._embeddings[prompt] for prompt in prompts]
        while len(self._embeddings) > max(KEPT_PROMPTS, len(prompts)):
            self._embeddings.popitem(last=False)
        if loaded is not self._model:
            del loaded
            give_back()
        return found

    def tokens(self, prompt: str) -> list[int]:
        """The tokens of a prompt in its chat template, cut at MAX_TOKENS. Thread: any. Raises TokenizerError."""
        if self.tokenizer.chat_template is None:
            raise TokenizerError(f"{self._checkpoint.reference}: its tokenizer has no chat template")
        text = render_chat(
            self.tokenizer.chat_template,
            [{"role": "user", "content": prompt}],
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
            enable_thinking=self._reading.enable_thinking,
        )
        tokens = self.tokenizer.encode(text, add_bos=True)
        if len(tokens) > MAX_TOKENS:
            _log.warning("prompt cut", extra={"fields": {"tokens": len(tokens), "read": MAX_TOKENS}})
        return tokens[:MAX_TOKENS]

    def _load(self, span: tuple[float, float]) -> Decoder | FusedDecoder:
        model = Decoder(self.config)
        load_component(model, self._checkpoint, _COMPONENT, self._choices, span, unused=self._unused)
        return fused(model) if device().kind == "cpu" else model

    def _run(self, model: Decoder | FusedDecoder, tokens: list[int]) -> mx.array:
        valid = len(tokens)
        if self._reading.padded and self.tokenizer.pad_id is not None:
            tokens = tokens + [self.tokenizer.pad_id] * (MAX_TOKENS - valid)
        row = Row(len(tokens), model.new_cache(), hidden_from=valid if len(tokens) > valid else None)
        outputs = list(model.residuals(mx.array(tokens, dtype=mx.int32), [row]))
        embeddings = mx.concatenate([outputs[layer] for layer in self._layers], axis=-1)
        wait([embeddings])
        return embeddings


def unused_tensors(checkpoint: Checkpoint, reading: Reading) -> dict[str, tuple[str, ...]]:
    """What is never loaded (see `Family.unused`): layers behind the last that is read, and the head. Thread: any.

    Raises:
        CheckpointError: the text encoder's configuration cannot be used.
    """
    config = _read_config(component_view(checkpoint, _COMPONENT).config)
    layers = range(max(_depths(reading, config)), config.num_layers)
    return {_COMPONENT: (*(f"layers.{layer}." for layer in layers), "lm_head.")}


def _depths(reading: Reading, config: DecoderConfig) -> tuple[int, ...]:
    """How many layers make each of the hidden states."""
    return tuple(n if n >= 0 else config.num_layers + 1 + n for n in reading.hidden_states)


def _read_config(config: Mapping[str, JSON]) -> DecoderConfig:
    """Read the configuration of a Qwen3. Raises CheckpointError."""
    file = f"{_COMPONENT}/config.json"
    kind = ConfigReader(config, file).text("model_type", "qwen3")
    if kind != "qwen3":
        raise CheckpointError(f"a text encoder of type {kind!r} is not supported, only qwen3", file=file)
    return read_config(config)
