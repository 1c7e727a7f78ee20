"""Requests and answers for embeddings, the same in all dialects.

Parents send `content` alone and read `embedding`, newer ones `prompt_eval_count` as well. All else is an addition.

Source: ollama v0.24.0 llm/server.go and runner/ollamarunner/runner.go; x/imagegen/server.go at v0.17.0.
"""

import json
from collections.abc import Sequence
from typing import Final

from protocol.gojson import Bool, GoModel, Int
from protocol.options import Options


class EmbeddingRequest(GoModel):
    """POST /embedding. `content` is a text or a list of texts."""

    content: object = None
    options: Options | None = None
    dimensions: Int = 0
    """Values that are left of each vector; 0: all."""
    truncate: Bool = False


def embedding_line(vectors: Sequence[Sequence[float]], tokens: int, *, several: bool) -> bytes:
    """The answer: `embedding` of one text, `embeddings` of a list of them, and how many tokens they had.

    Values are float32's, written with as many digits as tell them apart.
    """
    name = "embeddings" if several else "embedding"
    written = ",".join(map(_written, vectors))
    body = f"[{written}]" if several else written
    return f'{{"{name}":{body},"prompt_eval_count":{json.dumps(tokens)}}}\n'.encode()


_DIGITS: Final = "%.9g"


def _written(vector: Sequence[float]) -> str:
    return "[" + ",".join([_DIGITS] * len(vector)) % tuple(vector) + "]"
