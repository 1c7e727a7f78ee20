"""Eye: has the vision tower look at pictures when a row comes to them, a piece of work at a time.

Owns the encoder, the one picture under way and what was made of others; refuses to know where pictures stand. Rows
run between two pieces; one that leaves takes its picture with it. Thread: the executor's, but for what says otherwise.
"""

import logging
import time
from collections.abc import Generator
from dataclasses import dataclass

from models.executors.base import EncodedPicture, PictureEncoder
from models.vision import Vision
from runner.engine.picture_cache import PictureCache
from runner.engine.sequence import Sequence
from runner.engine.sight import PreparedPicture

logger = logging.getLogger("runner.engine")


@dataclass(slots=True)
class _Look:
    """A picture that the tower is at, for a row."""

    row: Sequence
    digest: bytes
    work: Generator[None, None, EncodedPicture]
    begun_ns: int


class Eye:
    """What a model sees with. Without an encoder it is blind, and nobody asks it to look."""

    def __init__(
        self, vision: Vision | None = None, encoder: PictureEncoder | None = None, cache: PictureCache | None = None
    ) -> None:
        self.vision = vision
        """Thread: any."""
        self._encoder = encoder
        self._cache = cache or PictureCache(0)
        self._look: _Look | None = None

    @property
    def spare_bytes(self) -> int:
        """What is kept of pictures that no row needs at present."""
        return self._cache.spare_bytes

    @property
    def cache_bytes(self) -> int:
        """What is kept of pictures in all."""
        return self._cache.nbytes

    def memory_bytes(self) -> int:
        """What weights and pictures take."""
        return self._cache.nbytes + (0 if self._encoder is None else self._encoder.memory_bytes())

    def sees(self, row: Sequence, end: int) -> bool:
        """Whether a row may run its tokens up to `end`: all that it comes to there was looked at."""
        return not self._unseen(row, end)

    def misses(self, row: Sequence, end: int) -> bool:
        """Whether it may not."""
        return not self.sees(row, end)

    def look(self, row: Sequence, end: int) -> None:
        """Go on with what a row has to see before it runs its tokens up to `end`: with one piece of it at most.

        Raises:
            ExecutionError: the device could not; nothing of the picture is under way then.
        """
        for picture in self._unseen(row, end):
            if (known := self._cache.hold(picture.digest)) is None:
                self._work(row, picture)
                return
            row.seen[picture.digest] = known

    def forget(self, row: Sequence, *, behind: int | None = None) -> None:
        """Let go of the pictures of a row that stand in front of its token `behind`; None: it leaves with all."""
        if self._look is not None and self._look.row is row and behind is None:
            self._give_up()
        if row.sight is None:
            return
        needed = set() if behind is None else {p.digest for p in row.sight.looked_at(behind, row.sight.end)}
        for digest in set(row.seen) - needed:
            del row.seen[digest]
            self._cache.let_go(digest)

    def give_back(self, nbytes: int) -> int:
        """Let go of so many bytes of pictures that no row needs, as far as there are any; how many they were."""
        before = self._cache.nbytes
        self._cache.shrink(max(0, before - nbytes))
        return before - self._cache.nbytes

    def close(self) -> None:
        """Free everything."""
        self._give_up()
        self._cache.shrink(0)
        if self._encoder is not None:
            self._encoder.close()
        self._encoder = None

    @staticmethod
    def _unseen(row: Sequence, end: int) -> list[PreparedPicture]:
        if row.sight is None:
            return []
        return [picture for picture in row.sight.looked_at(row.fed, end) if picture.digest not in row.seen]

    def _work(self, row: Sequence, picture: PreparedPicture) -> None:
        """A piece of what the tower does with a picture."""
        if self._look is None or self._look.row is not row or self._look.digest != picture.digest:
            self._give_up()
            assert self._encoder is not None
            work = self._encoder.encode(picture.prepared.passes)
            self._look = _Look(row, picture.digest, work, time.perf_counter_ns())
        # Whatever ends it, it is not under way then.
        look, self._look = self._look, None
        try:
            next(look.work)
        except StopIteration as end:
            row.seen[look.digest] = self._cache.put(look.digest, end.value)
            milliseconds = round((time.perf_counter_ns() - look.begun_ns) / 1e6)
            fields = {"id": row.id, "patches": picture.prepared.patches, "rows": picture.rows, "ms": milliseconds}
            logger.info("image encoded", extra={"fields": fields})
        else:
            self._look = look

    def _give_up(self) -> None:
        if self._look is not None:
            self._look.work.close()
            self._look = None
