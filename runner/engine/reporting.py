"""Signs of life in the log: what a row has done so far, so that long work never looks like a hang."""

import logging
import time
from collections.abc import Iterable

from runner.engine.sequence import Sequence, SequenceStatus

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
