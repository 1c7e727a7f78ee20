"""JSON as Go's encoding/json writes it: what decides the bytes, hence the digest, of what Ollama's `create` stores."""

import json
import math

from models.sources.base import JSON

# What Go escapes so that its JSON may stand in HTML and JavaScript.
_ESCAPES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"})


def go_json(value: JSON, *, sort: bool = False, indent: int | None = None) -> bytes:
    """The encoding of a value; `sort` orders keys as Go does those of a map."""
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(_numbers(value), ensure_ascii=False, separators=separators, sort_keys=sort, indent=indent)
    return text.translate(_ESCAPES).encode("utf-8", "surrogateescape")


def _numbers(value: JSON) -> JSON:
    """Go writes a whole float without its fraction."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 1e21:
        return int(value)
    return value
