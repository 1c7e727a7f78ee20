"""Requests and answers for embeddings, the same in all dialects.

Parents send `content` alone and read `embedding`, newer ones `prompt_eval_count` as well. All else is an addition.

Source: ollama v0.24.0 llm/server.go and runner/ollamarunner/runner.go; x/imagegen/server.go at v0.17.0.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import orjson

from protocol.gojson import Bool, GoModel, Int
from protocol.options import Options


class EmbeddingRequest(GoModel):
    """POST /embedding. `content` is a text or a list of texts."""

    content: object = None
    options: Options | None = None
    dimensions: Int = 0
    """Values that are left of each vector; 0: all."""
    truncate: Bool = False


def embedding_line(vectors: Sequence[npt.NDArray[np.float32]], tokens: int, *, several: bool) -> bytes:
    """The answer: `embedding` of one text, `embeddings` of a list of them, and how many tokens they had.

    Values are finite, and written with as few digits as tell float32's apart: a tenth of the time that Python takes.
    """
    vector = {"embeddings": vectors} if several else {"embedding": vectors[0]}
    # Of the arrays no lists are made on the way.
    options = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps(vector | {"prompt_eval_count": tokens}, option=options)
