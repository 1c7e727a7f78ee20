"""What is told of a row: figures in the log, so that long work never looks like a hang, and its tokens' logprobs."""

import logging
import time
from collections.abc import Callable, Iterable

from models.sampling import Drawn
from runner.engine.sequence import Sequence, SequenceStatus
from runner.engine.types import TokenLogprob

REPORT_NS = 5_000_000_000

logger = logging.getLogger("runner.engine")


def figures(row: Sequence) -> dict[str, object]:
    """A row's counts and times, for a line of the log."""
    drafting = row.drafting
    return {
        "id": row.id,
        "prompt_tokens": row.prompt_len,
        "cached_tokens": row.cached_len,
        "eval_tokens": row.generated,
        "prompt_ms": round((row.first_ns - row.admitted_ns) / 1e6) if row.first_ns else 0,
        "eval_ms": round((row.last_ns - row.first_ns) / 1e6),
        **({} if row.request.sight is None else {"images": len(row.request.sight.pictures)}),
        **({} if drafting is None else {"drafted": drafting.proposed, "accepted": drafting.accepted}),
    }


class ProgressReport:
    """Every few seconds, a line for each row that has worked for so long."""

    def __init__(self) -> None:
        self._next_ns = 0

    def look(self, rows: Iterable[Sequence]) -> None:
        """Write the lines if it is time."""
        now = time.perf_counter_ns()
        if now < self._next_ns:
            return
        self._next_ns = now + REPORT_NS
        for row in rows:
            if now - row.admitted_ns < REPORT_NS:
                continue
            if row.status is SequenceStatus.PREFILL:
                logger.info("prefill", extra={"fields": {"id": row.id, "done": row.fed, "total": len(row.tokens)}})
            else:
                logger.info("decode", extra={"fields": figures(row)})


def told(drawn: Drawn, piece: Callable[[int], bytes]) -> TokenLogprob | None:
    """A token's log-probabilities in text, where they were asked for; `piece` gives a token's bytes."""
    if drawn.logprob is None:
        return None

    def text(of: int) -> str:
        return piece(of).decode("utf-8", errors="replace")

    top = tuple(TokenLogprob(text(other), value) for other, value in drawn.top)
    return TokenLogprob(text(drawn.token), drawn.logprob, top)
