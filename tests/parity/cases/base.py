"""What a fixture is, and what most configurations begin with.

A configuration is written here as published checkpoints write theirs, not as the reference library would save it: old
and new spellings, absent keys, nulls and keys nobody reads are part of what a loader has to live with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf_twin import Arrays, Twin, as_they_are
from tiny_tokenizer import BOS, EOS, PAD, VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Case:
    """One fixture.

    `matters` lists changes of the configuration; each must change the logits, else the fixture could not see an
    implementation that ignores the feature.
    """

    name: str
    config: Mapping[str, object]
    matters: tuple[Mapping[str, object], ...] = ()
    shards: int = 1
    stray: bool = False
    """Carry tensors that published checkpoints carry and a loader must pass over."""
    gguf: Twin | None = None
    """How llama.cpp's converter writes it; None: no GGUF file is made."""
    quantized: tuple[str, ...] = ()
    published: Callable[[Arrays, Mapping[str, Any]], Arrays] = as_they_are
    """The weights as published checkpoints name and shape them, from those of the reference library's modules."""
    norms_add: float = 0.0
    """What the model adds to a norm's weight as stored,"""
    adds_to: str = ""
    """of those norms whose names end so."""
    whole: Mapping[str, object] = field(default_factory=dict)
    """The config.json of a multimodal checkpoint around, whose other parts the reference library cannot make here."""
    plain_norms: tuple[str, ...] = ()
    """Ends of names of the norms to which it adds nothing."""
    renamed: tuple[tuple[str, str], ...] = ()
    """How published checkpoints begin names otherwise than the reference library: what it says, and what they say."""

    generates: bool = True
    """The reference library's generate() does, with its cache, what its whole passes do."""

    def name_in_file(self, name: str) -> str:
        """A tensor's name in the checkpoint."""
        for ours, theirs in self.renamed:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name


def base(architecture: str, model_type: str, **more: object) -> dict[str, object]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **more,
    }


def without(config: Mapping[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in config.items() if key not in keys}
