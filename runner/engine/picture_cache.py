"""PictureCache: what the vision tower made of pictures, by their digests, for the next turn that shows them again.

Owns the bytes and the order in which they go. What a row needs is held for it and goes beyond the limit if it must: it
is in use, not kept. Thread: the executor's.
"""

from collections import Counter, OrderedDict

from models.executors.base import EncodedPicture


class PictureCache:
    """Keeps at most `limit_bytes` of encoded pictures beside those that are held; the longest unused goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._pictures: OrderedDict[bytes, EncodedPicture] = OrderedDict()
        self._holders: Counter[bytes] = Counter()
        self.nbytes = 0
        """Of all that are here."""

    @property
    def spare_bytes(self) -> int:
        """Of those that nobody needs at present."""
        return sum(picture.nbytes for digest, picture in self._pictures.items() if not self._holders[digest])

    def hold(self, digest: bytes) -> EncodedPicture | None:
        """What was made of a picture, kept until it is let go as often as it was held; None: it is not here."""
        picture = self._pictures.get(digest)
        if picture is not None:
            self._pictures.move_to_end(digest)
            self._holders[digest] += 1
        return picture

    def put(self, digest: bytes, picture: EncodedPicture) -> EncodedPicture:
        """Take in what was made of a picture, and hold it; what is here already is as good."""
        if (known := self.hold(digest)) is not None:
            return known
        self._pictures[digest] = picture
        self._holders[digest] += 1
        self.nbytes += picture.nbytes
        self.shrink(self._limit_bytes)
        return picture

    def let_go(self, digest: bytes) -> None:
        """One who held a picture does not need it any more."""
        self._holders[digest] -= 1
        if not self._holders[digest]:
            del self._holders[digest]
            self.shrink(self._limit_bytes)

    def shrink(self, limit_bytes: int) -> None:
        """Drop what nobody holds, the longest unused first, until no more than that is here."""
        for digest in list(self._pictures):
            if self.nbytes <= limit_bytes:
                return
            if not self._holders[digest]:
                self.nbytes -= self._pictures.pop(digest).nbytes
