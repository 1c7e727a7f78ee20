"""What is kept of pictures, and for whom."""

import numpy as np

from models.executors.base import EncodedPicture
from runner.engine.picture_cache import PictureCache

SIZE = 4 * 10


def picture() -> EncodedPicture:
    return EncodedPicture(np.zeros((5, 2), np.float32))


def kept(cache: PictureCache, *names: bytes) -> None:
    """Put pictures in that nobody needs."""
    for name in names:
        cache.put(name, picture())
        cache.let_go(name)


def is_there(cache: PictureCache, name: bytes) -> bool:
    if cache.hold(name) is None:
        return False
    cache.let_go(name)
    return True


def test_the_longest_unused_goes_first():
    cache = PictureCache(2 * SIZE)
    kept(cache, b"a", b"b")
    assert is_there(cache, b"a")
    kept(cache, b"c")
    assert [is_there(cache, name) for name in (b"a", b"b", b"c")] == [True, False, True]
    assert (cache.nbytes, cache.spare_bytes) == (2 * SIZE, 2 * SIZE)


def test_what_is_held_stays_beyond_the_limit_until_all_have_let_go():
    cache = PictureCache(0)
    first = cache.put(b"a", picture())
    assert cache.hold(b"a") is first
    cache.put(b"b", picture())
    assert (cache.nbytes, cache.spare_bytes) == (2 * SIZE, 0)
    cache.let_go(b"a")
    assert cache.nbytes == 2 * SIZE
    cache.let_go(b"a")
    assert (cache.nbytes, cache.hold(b"a")) == (SIZE, None)
    cache.shrink(0)
    assert cache.nbytes == SIZE, "somebody needs it"


def test_a_picture_that_two_made_is_kept_once():
    cache = PictureCache(SIZE)
    first = cache.put(b"a", picture())
    assert cache.put(b"a", picture()) is first
    assert cache.nbytes == SIZE
    cache.let_go(b"a")
    assert cache.spare_bytes == 0
    cache.let_go(b"a")
    assert cache.spare_bytes == SIZE


def test_room_is_made_by_what_nobody_needs_alone():
    cache = PictureCache(10 * SIZE)
    cache.put(b"held", picture())
    kept(cache, b"a", b"b", b"c")
    cache.shrink(2 * SIZE)
    assert [is_there(cache, name) for name in (b"a", b"b", b"c", b"held")] == [False, False, True, True]
