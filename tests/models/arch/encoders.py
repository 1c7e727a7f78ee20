"""Encoders built from the parity fixtures' configurations, changed."""

import json
from pathlib import Path

from models.arch import Model, build_model

FIXTURES = Path(__file__).parents[2] / "parity_embedding"


def build(fixture: str, **changes: object) -> Model:
    """A fixture's model with some keys changed; None removes a key."""
    config = json.loads((FIXTURES / fixture / "config.json").read_text()) | changes
    return build_model({key: value for key, value in config.items() if value is not None})
