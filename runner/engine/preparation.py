"""From a text request to one that the engine can run: checked, tokenised, cut to what fits.

Needs no device, so it is done outside the executor's thread. Thread: any.
"""

import secrets

from models.errors import TokenizerError
from models.vision import Vision
from runner.engine.constraint import Constraints
from runner.engine.picture_prompt import Prompt, read_prompt, truncate
from runner.engine.sequence import PreparedText, Vocabulary
from runner.engine.stop import build_stops
from runner.engine.types import EmbeddingRequest, Request, SamplingParams, TextRequest
from runner.errors import BadRequest, NotImplementedHere

QUICK_CHARACTERS = 1024
"""As many are tokenised in less time than it takes to hand them to a thread and back."""


def is_quick(request: Request) -> bool:
    """Whether preparing a request takes less time than handing it to a thread."""
    if not isinstance(request, TextRequest) or request.format or request.images:
        return False
    return len(request.prompt) <= QUICK_CHARACTERS


def encode(tokenizer: Vocabulary, text: str, *, add_bos: bool) -> list[int]:
    """Token ids of `text`; BOS only if the model has its prompts begin with it.

    Raises:
        BadRequest: the text is not Unicode.
    """
    try:
        return tokenizer.encode(text, add_bos=add_bos and tokenizer.adds_bos)
    except TokenizerError as error:
        raise BadRequest(str(error)) from None


def prepare_text(
    request: Request,
    tokenizer: Vocabulary,
    constraints: Constraints,
    *,
    vocab_size: int,
    context_length: int,
    draft: int,
    vision: Vision | None = None,
) -> PreparedText:
    """Check and tokenise; decode pictures and make them ready.

    Args:
        request: As it came.
        tokenizer: Of the model.
        constraints: What holds answers to a format.
        vocab_size: Tokens that the model has an embedding for; some vocabularies have more.
        context_length: Tokens a row may hold; the request may ask for fewer.
        draft: Tokens a row may draft at once; the request may ask for fewer.
        vision: How the model sees; None: it does not.

    Raises:
        BadRequest: the request cannot be served; a format may still prove to be none that can be enforced.
        NotImplementedHere: it is for pictures or embeddings.
        PromptTooLong: prompt and one token do not fit, and truncation is not allowed.
    """
    if isinstance(request, EmbeddingRequest):
        raise NotImplementedHere("this model does not support embeddings")
    if not isinstance(request, TextRequest):
        raise NotImplementedHere("the loaded model generates text, not images")
    params = request.sampling
    stops = build_stops(request.stop)
    limit = context_length if request.num_ctx is None else min(request.num_ctx, context_length)
    prompt = _read(request, tokenizer, limit, vision)
    if not prompt.tokens:
        raise BadRequest("the prompt is empty")
    if (unknown := max(prompt.tokens)) >= vocab_size:
        piece = tokenizer.piece(unknown).decode(errors="replace")
        raise BadRequest(f"the prompt has the token {piece!r}, for which the model has no embedding")
    keep = len(prompt.tokens) if request.num_keep < 0 else request.num_keep
    if len(prompt.tokens) >= limit:
        prompt = truncate(prompt, limit, keep=keep, allowed=request.truncate)
    return PreparedText(
        tokens=prompt.tokens,
        sight=prompt.sight,
        sampling=params.sampling,
        penalty_window=_penalty_window(params, limit),
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        limit=limit,
        # A shift drops something and yet leaves the newest token.
        keep=min(keep, limit - 2),
        num_predict=_budget(request, limit),
        shift=request.shift,
        stops=stops,
        logprobs=request.logprobs,
        top_logprobs=request.top_logprobs,
        draft=draft if request.draft is None else min(request.draft, draft),
        constraint=None if request.format is None else constraints.prepare(request.format),
    )


def _penalty_window(params: SamplingParams, limit: int) -> int:
    """Tokens the penalties look back on: those that were asked for, or as many as the context has."""
    if not params.sampling.has_penalties:
        return 0
    return limit if params.repeat_last_n < 0 else params.repeat_last_n


def _read(request: TextRequest, tokenizer: Vocabulary, limit: int, vision: Vision | None) -> Prompt:
    """The prompt's tokens; of a hopelessly long text, which would take gigabytes to encode, those of its ends."""

    def encoded(text: str, *, add_bos: bool) -> list[int]:
        # It is never more than the characters, and to ask takes long the first time.
        fewest = tokenizer.fewest_tokens(text) if len(text) >= limit else 0
        if fewest >= limit and not request.truncate:
            raise BadRequest(
                f"input length (at least {fewest} tokens) exceeds the model's maximum context length ({limit} tokens)"
            )
        if fewest < 4 * limit:
            return encode(tokenizer, text, add_bos=add_bos)
        # Each end has more tokens than truncation may leave of it.
        end = len(text) * 2 * limit // fewest
        return encode(tokenizer, text[:end], add_bos=add_bos) + encode(tokenizer, text[-end:], add_bos=False)

    return read_prompt(request.prompt, request.images, vision, encoded, limit=limit, truncates=request.truncate)


def _budget(request: TextRequest, limit: int) -> int | None:
    """Tokens to generate at most; None is until the context is full.

    A context that shifts is never full; the end is then at ten times the context, as in Ollama.
    """
    if not request.shift:
        return request.num_predict
    return min(request.num_predict or 10 * limit, 10 * limit)
