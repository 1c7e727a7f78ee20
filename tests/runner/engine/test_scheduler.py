from dataclasses import replace

import numpy as np

from models.sampling import Sampling
from runner.engine.scheduler import MIN_CHUNK, STEP_BOUND_S, Scheduler
from runner.engine.sequence import NO_SLOT, PreparedText, Sequence, SequenceStatus
from runner.engine.sight import PlacedPicture, Sight, identified
from tests.fakes import ByteTokenizer
from tests.fakes_vision import SIDE, vision


def row(number: int, length: int = 100) -> Sequence:
    prepared = PreparedText(
        tokens=[65] * length,
        sampling=Sampling(),
        seed=0,
        penalty_window=0,
        limit=256,
        keep=4,
        num_predict=None,
        shift=False,
        stops=None,
        logprobs=False,
        top_logprobs=0,
    )
    return Sequence(number, prepared, ByteTokenizer())


def test_rows_are_let_in_first_come_first_served_as_far_as_there_is_room():
    scheduler = Scheduler(parallel=2, prefill_chunk=16)
    rows = [row(n) for n in range(3)]
    for each in rows:
        scheduler.add(each)
    assert [scheduler.admit() for _ in range(3)] == [*rows[:2], None]
    scheduler.remove(rows[0])
    scheduler.free(rows[0])
    assert scheduler.admit() is rows[2]
    assert scheduler.admit() is None


def test_who_may_not_run_is_not_overtaken():
    scheduler = Scheduler(parallel=2, prefill_chunk=16)
    rows = [row(n) for n in range(2)]
    for each in rows:
        scheduler.add(each)
    assert scheduler.admit(lambda each: each is rows[1]) is None
    assert scheduler.admit(lambda each: each is rows[0]) is rows[0]


def test_a_row_has_the_lowest_slot_that_is_free_until_it_is_let_go():
    scheduler = Scheduler(parallel=3, prefill_chunk=16)
    rows = [row(n) for n in range(5)]
    for each in rows:
        scheduler.add(each)
    while scheduler.admit() is not None:
        pass
    assert [each.slot for each in rows] == [0, 1, 2, NO_SLOT, NO_SLOT]
    for each in (rows[2], rows[1]):
        scheduler.remove(each)
    assert scheduler.admit() is None, "what they leave is not stored yet"
    scheduler.free(rows[2])
    scheduler.free(rows[1])
    scheduler.admit()
    scheduler.admit()
    assert [each.slot for each in rows] == [0, NO_SLOT, NO_SLOT, 1, 2]


def test_one_prompt_after_the_other_gets_its_chunk():
    scheduler = Scheduler(parallel=2, prefill_chunk=16)
    first, second = row(0, length=20), row(1)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.admit()
    scheduler.admit()
    chunk = scheduler.next_chunk()
    assert (chunk.row, chunk.length, chunk.is_last) == (first, 16, False)
    first.fed = 16
    chunk = scheduler.next_chunk()
    assert (chunk.row, chunk.length, chunk.is_last) == (first, 4, True)
    first.status = SequenceStatus.DECODE
    assert scheduler.next_chunk().row is second


def test_a_waiting_row_can_be_taken_out_of_the_queue():
    scheduler = Scheduler(parallel=1, prefill_chunk=16)
    first, second = row(0), row(1)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.admit()
    scheduler.remove(second)
    scheduler.remove(first)
    assert scheduler.idle


def test_a_step_that_took_too_long_makes_the_next_chunk_smaller():
    scheduler = Scheduler(parallel=1, prefill_chunk=128)
    scheduler.observe(128, 4 * STEP_BOUND_S)
    assert scheduler.chunk == 32
    scheduler.observe(20, STEP_BOUND_S * 0.9)
    assert scheduler.chunk == 32


def test_a_chunk_never_shrinks_to_nothing():
    scheduler = Scheduler(parallel=1, prefill_chunk=128)
    scheduler.observe(128, 1000)
    assert scheduler.chunk == MIN_CHUNK
    small = Scheduler(parallel=1, prefill_chunk=4)
    small.observe(4, 1000)
    assert small.chunk == 4


def test_a_chunk_grows_back_once_steps_are_short_but_not_beyond_its_setting():
    scheduler = Scheduler(parallel=1, prefill_chunk=128)
    scheduler.observe(128, 4 * STEP_BOUND_S)
    sizes = []
    for _ in range(4):
        scheduler.observe(scheduler.chunk, STEP_BOUND_S / 10)
        sizes.append(scheduler.chunk)
    assert sizes == [64, 128, 128, 128]


def test_a_short_rest_of_a_prompt_says_nothing_about_larger_chunks():
    scheduler = Scheduler(parallel=1, prefill_chunk=128)
    scheduler.observe(128, 4 * STEP_BOUND_S)
    scheduler.observe(3, 0.001)
    assert scheduler.chunk == 32


def seeing(*placed: tuple[int, int], length: int = 100) -> Sequence:
    """A row in which pictures of so many places that look both ways begin at such tokens."""
    own = vision(two_way=True, around=False)
    pictures = []
    tokens = [65] * length
    for begin, places in placed:
        picture = identified(own.prepare(np.full((SIDE, places * SIDE, 3), begin, np.uint8)))
        tokens[begin : begin + places] = picture.tokens
        pictures.append(PlacedPicture(begin, picture))
    prepared = replace(row(0).request, tokens=tokens, sight=Sight(own, tuple(pictures)))
    return Sequence(0, prepared, ByteTokenizer())


def ends(of: Sequence, scheduler: Scheduler, begin: int = 0) -> list[int]:
    scheduler.add(of)
    assert scheduler.admit() is of
    of.fed, found = begin, []
    while of.unfed:
        found.append(scheduler.next_chunk().end)
        of.fed = found[-1]
    return found


def test_no_piece_of_a_prompt_has_a_part_of_what_looks_both_ways():
    whole = ends(seeing((10, 30), (40, 5), (60, 8)), Scheduler(parallel=1, prefill_chunk=16))
    assert whole == [10, 40, 48, 60, 68, 80, 96, 100]
    for begin in (10, 40, 48, 57, 60, 70):
        later = ends(seeing((10, 30), (40, 5), (60, 8)), Scheduler(parallel=1, prefill_chunk=16), begin)
        assert later == [end for end in whole if end > begin], "wherever it is taken up"


def test_where_prefill_rests_counts_as_long_as_nothing_is_cut():
    own = seeing((10, 30))
    own.rests = (5, 10)
    assert ends(own, Scheduler(parallel=1, prefill_chunk=64)) == [5, 10, 64, 100]


def test_the_oldest_piece_that_may_run_is_next():
    scheduler = Scheduler(parallel=3, prefill_chunk=16)
    rows = [row(n) for n in range(3)]
    for each in rows:
        scheduler.add(each)
        scheduler.admit()
    assert scheduler.next_chunk(lambda each, end: each is not rows[0] and end == 16).row is rows[1]
    assert scheduler.next_chunk(lambda each, end: False) is None
