"""The text encoder of image pipelines: a Qwen3 without its last layers, read at chosen depths.

Owns the prompt's way into the model (chat template, truncation, padding), the choice of layers, and the embeddings of
the last few prompts. The layers are run by an executor, as those of any language model. What lies behind the last layer
that is asked for is neither loaded nor computed.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from models.arch import Model, build_model
from models.chat_template import render_chat
from models.checkpoint import JSON, Checkpoint
from models.config_reader import ConfigReader
from models.errors import CheckpointError, TokenizerError
from models.executors.base import Encoder
from models.executors.footprint import Footprint
from models.image.base import LoadChoices
from models.image.encoders import LONGEST_TOKENS, load_encoder, predicted
from models.image.loading import component_view
from models.mlx_memory import give_back
from models.to_mlx import to_mlx
from models.tokenizer import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)

MAX_TOKENS = LONGEST_TOKENS

KEPT_PROMPTS = 4
"""So many prompts' embeddings are kept: a prompt, its negative one, and the pair before."""

_COMPONENT = "text_encoder"
_FILE = f"{_COMPONENT}/config.json"


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
    """A pipeline's text encoder and tokenizer. Thread: the executor's thread, but for the tokens."""

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
        self._view = view
        self._unused = unused_tensors(checkpoint, reading)[_COMPONENT]
        self.model, self._layers = _built(checkpoint, reading)
        self.tokenizer: Tokenizer = load_tokenizer(view)
        if reading.padded and self.tokenizer.pad_id is None:
            raise TokenizerError(f"{view.reference}: its tokenizer has no pad_token")
        self._embeddings: OrderedDict[str, mx.array] = OrderedDict()
        self._footprint: Footprint = predicted(view, self.model, choices, self._layers, self._unused)
        self._encoder: Encoder | None = self._load(span) if choices.keep_text_encoder else None

    @property
    def width(self) -> int:
        """The width of an embedding."""
        return len(self._layers) * self.model.config.hidden_size

    @property
    def working_bytes(self) -> int:
        """What encoding the longest prompt takes at its peak, beyond weights that are kept: scores, or the MLP."""
        config, tokens = self.model.config, MAX_TOKENS
        wide = max(config.num_heads * tokens, 2 * config.intermediate_size) + 4 * config.hidden_size
        kept = sum(self._footprint.state(tokens)) + 4 * tokens * self.width * KEPT_PROMPTS
        return 4 * tokens * wide + kept + (0 if self._encoder is not None else self._footprint.weights)

    def encode(self, *prompts: str) -> list[mx.array]:
        """The embeddings of each prompt, evaluated, in the model's type.

        Shapes: (L, width), L the prompt's tokens, or MAX_TOKENS if the family's reading is padded.

        Raises:
            TokenizerError: the chat template cannot be used, or the text is no Unicode.
        """
        loaded = self._encoder
        try:
            for prompt in prompts:
                if prompt not in self._embeddings:
                    loaded = loaded or self._load((1.0, 1.0))
                    self._embeddings[prompt] = self._run(loaded, self.tokens(prompt))
                self._embeddings.move_to_end(prompt)
        finally:
            if loaded is not None and loaded is not self._encoder:
                loaded.close()
                del loaded
                give_back()
        found = [self._embeddings[prompt] for prompt in prompts]
        while len(self._embeddings) > max(KEPT_PROMPTS, len(prompts)):
            self._embeddings.popitem(last=False)
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

    def _load(self, span: tuple[float, float]) -> Encoder:
        return load_encoder(self._view, self.model, self._choices, self._layers, span=span, unused=self._unused)

    def _run(self, encoder: Encoder, tokens: list[int]) -> mx.array:
        valid = len(tokens)
        if self._reading.padded and self.tokenizer.pad_id is not None:
            tokens = tokens + [self.tokenizer.pad_id] * (MAX_TOKENS - valid)
        found = encoder.residuals(tokens, self._layers, visible=valid if len(tokens) > valid else None)
        return mx.concatenate([to_mlx(layer) for layer in found], axis=-1)


def unused_tensors(checkpoint: Checkpoint, reading: Reading) -> dict[str, tuple[str, ...]]:
    """What is never loaded (see `Family.unused`): layers behind the last that is read, and the head. Thread: any.

    Raises:
        CheckpointError: the text encoder's configuration cannot be used.
    """
    config = _config(component_view(checkpoint, _COMPONENT).config)
    total = ConfigReader(config, _FILE).size("num_hidden_layers")
    layers = range(max(_depths(reading, total)), total)
    return {_COMPONENT: (*(f"layers.{layer}." for layer in layers), "lm_head.")}


def _built(checkpoint: Checkpoint, reading: Reading) -> tuple[Model, tuple[int, ...]]:
    """The layers that are asked, as a model of their own, and how many of them make each of the hidden states.

    Raises:
        CheckpointError: the configuration cannot be used, or has too few layers.
    """
    view = component_view(checkpoint, _COMPONENT)
    config = _config(view.config)
    total = ConfigReader(config, _FILE).size("num_hidden_layers")
    depths = _depths(reading, total)
    if not all(0 < n < total for n in depths):
        raise CheckpointError(f"its {total} layers are too few for this pipeline", file=f"{view.reference}/config.json")
    deepest = max(depths)
    kinds = ConfigReader(config, _FILE).texts("layer_types")
    # A tied head has no weights of its own, and nobody asks for logits.
    asked: dict[str, JSON] = {"num_hidden_layers": deepest, "tie_word_embeddings": True}
    if kinds is not None:
        asked["layer_types"] = list(kinds[:deepest])
    return build_model({**config, **asked}), depths


def _depths(reading: Reading, layers: int) -> tuple[int, ...]:
    """How many layers make each of the hidden states."""
    return tuple(n if n >= 0 else layers + 1 + n for n in reading.hidden_states)


def _config(config: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """The configuration of a Qwen3, by its architecture's name. Raises CheckpointError."""
    kind = ConfigReader(config, _FILE).text("model_type", "qwen3")
    if kind != "qwen3":
        raise CheckpointError(f"a text encoder of type {kind!r} is not supported, only qwen3", file=_FILE)
    return {**config, "architectures": ["Qwen3ForCausalLM"]}
