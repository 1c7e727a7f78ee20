"""Log-probabilities as Ollama writes them (llm.Logprob), in the mlx and the classic dialect."""

from typing import Annotated

from protocol.gojson import OMIT_EMPTY, GoModel, Str


class TokenLogprob(GoModel):
    """An alternative token and its natural-log probability."""

    token: Str
    logprob: float


class Logprob(GoModel):
    """A generated token, its natural-log probability and the likeliest alternatives."""

    token: Str
    logprob: float
    top_logprobs: Annotated[tuple[TokenLogprob, ...], OMIT_EMPTY] = ()
