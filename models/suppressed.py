"""Tokens that a model is never to say, though it may want to: what its makers found out behind its training.

Gemma 4's generation_config.json names those that end a picture and a sound. Source: transformers' `suppress_tokens`.
"""

from models.checkpoint import Checkpoint
from models.config_reader import ConfigReader
from models.sources.hf import parse_config

_FILE = "generation_config.json"


def suppressed_tokens(checkpoint: Checkpoint, vocab_size: int) -> tuple[int, ...]:
    """Their ids, rising. Ids that the vocabulary does not have are passed over, as in transformers. Thread: any.

    Raises:
        CheckpointError: generation_config.json is no JSON object, or has something else than a list of numbers there.
    """
    raw = checkpoint.read(_FILE)
    reader = ConfigReader({} if raw is None else parse_config(raw, _FILE), _FILE)
    return tuple(sorted({token for token in reader.integers("suppress_tokens") if 0 <= token < vocab_size}))
