"""The tower's work beside that of the executor, and the memory for both."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from runner.engine import admission as admission_module
from runner.engine.admission import MAX_WAITING_BYTES, Admission
from runner.engine.text import TextEngine
from runner.engine.types import Failed, InputImage, RequestId, TextChunk, TextDone
from runner.errors import Busy, GenerationError, InsufficientMemory
from tests.fakes import FakeExecutor, scripted
from tests.fakes_vision import PIECES, FakeEncoder, failing, vision
from tests.runner.engine.picture_requests import CAT, DOG, PIECES_OF_PROMPT, PROMPT, asked, by_heart, pixels_of
from tests.runner.engine.serving import admit, answer, make_engine, run, seeing, to_the_end

# --- the tower's work


def waiting(engine: TextEngine, number: RequestId) -> Iterator[list]:
    while not engine.idle:
        yield engine.step()
        engine.proceed()


def test_others_decode_while_a_picture_is_looked_at_a_piece_a_tick(depth: int):
    said: list[str] = []
    pieces: list[int] = []
    encoder = FakeEncoder(before_piece=lambda _, piece: pieces.append(len(said)))
    executor = FakeExecutor("x" * 60, depth=depth)
    engine = make_engine(executor, eye=seeing(vision(), encoder))
    admit(engine, 1, asked(scripted(0), count=50))
    for _ in range(4):
        said += [output.text for output in engine.step() if isinstance(output, TextChunk)]
        engine.proceed()
    admit(engine, 2, asked(PROMPT, CAT, DOG))
    while not engine.idle:
        said += [output.text for output in engine.step() if isinstance(output, TextChunk) and output.id == 1]
        engine.proceed()
    assert len(pieces) == 2 * PIECES
    assert all(later > earlier for earlier, later in itertools.pairwise(pieces)), "a token between two pieces"


def test_prompts_without_pictures_do_not_wait_for_the_tower(depth: int):
    order: list[int] = []
    encoder = FakeEncoder()
    engine = make_engine(FakeExecutor(depth=depth), eye=seeing(vision(), encoder))
    admit(engine, 1, asked(PROMPT, CAT, DOG, count=1))
    admit(engine, 2, asked("quick", count=1))
    for outputs in waiting(engine, 1):
        order += [output.id for output in outputs if isinstance(output, TextDone)]
    assert order == [2, 1]


def test_a_cancelled_request_takes_its_picture_with_it_and_the_next_is_looked_at(depth: int):
    encoder = FakeEncoder()
    executor = FakeExecutor(depth=depth)
    engine = make_engine(executor, eye=seeing(vision(), encoder, cache_bytes=0))
    admit(engine, 1, asked(PROMPT, CAT, DOG))
    engine.step()
    engine.proceed()
    assert encoder.begun == 1
    engine.cancel(1)
    assert encoder.given_up == 1
    (got,) = run(engine, asked(PROMPT, CAT, DOG))
    assert got.text == by_heart(vision(), PIECES_OF_PROMPT, 20)
    assert engine.status().image_cache_bytes == 0
    assert executor.living_slots() == 0


def test_a_picture_that_fails_fails_its_request_alone(depth: int):
    encoder = FakeEncoder(before_piece=failing(1))
    engine = make_engine(FakeExecutor(depth=depth), eye=seeing(vision(), encoder), parallel=3)
    requests = [asked("a text"), asked(PROMPT, CAT, DOG), asked("[img-0]", InputImage(0, DOG.data))]
    text, failed, other = run(engine, *requests)
    assert text.text == answer(FakeExecutor(), requests[0]).text
    assert isinstance(failed.error, GenerationError)
    assert str(failed.error) == "the image could not be looked at: the tower fell"
    assert other.text == by_heart(vision(), [pixels_of(90, 3, 4)], 20)
    (again,) = run(engine, requests[1])
    assert again.text == by_heart(vision(), PIECES_OF_PROMPT, 20)


def test_whatever_else_goes_wrong_in_a_tower_fails_its_request_alone_too(depth: int):
    def bug(number: int, piece: int) -> None:
        if number == 0 and piece == 1:
            raise ZeroDivisionError

    engine = make_engine(FakeExecutor(depth=depth), eye=seeing(vision(), FakeEncoder(before_piece=bug)))
    admit(engine, 1, asked("a text"))
    admit(engine, 2, asked(PROMPT, CAT, DOG))
    outputs = []
    while not engine.idle:
        try:
            outputs += engine.step()
            engine.proceed()
        except ZeroDivisionError as error:
            outputs += engine.abandon(error)
    ends = {output.id: output for output in outputs if isinstance(output, TextDone | Failed)}
    assert isinstance(ends[1], TextDone)
    assert isinstance(ends[2], Failed)
    assert "".join(output.text for output in outputs if isinstance(output, TextChunk)) == (
        answer(FakeExecutor(), asked("a text")).text
    )


def test_an_engine_that_is_closed_gives_up_what_the_tower_is_at():
    encoder = FakeEncoder()
    engine = make_engine(FakeExecutor(), eye=seeing(vision(), encoder))
    admit(engine, 1, asked(PROMPT, CAT, DOG))
    engine.step()
    engine.close()
    assert (encoder.given_up, encoder.closed) == (1, True)


# --- memory


class Machine:
    """A machine of so many free bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, **options) -> None:
        monkeypatch.setattr(admission_module, "NEGLIGIBLE_BYTES", 0)
        self.free = free
        self.executor = FakeExecutor()
        self.engine = make_engine(
            self.executor,
            eye=seeing(vision(), **options),
            admission=Admission(self.executor.state_nbytes, lambda: self.free, working_bytes=0),
        )


def test_the_tower_and_the_rows_are_counted_before_a_request_is_queued(monkeypatch: pytest.MonkeyPatch):
    # Pictures of 6 and 12 places: the largest pass takes 12,000 bytes, their rows 288, the state some hundred.
    machine = Machine(monkeypatch, 12_000)
    with pytest.raises(InsufficientMemory, match=r"need .* for their keys, values and images, .* send fewer"):
        machine.engine.prepare(asked(PROMPT, CAT, DOG))
    machine.free = 13_000
    assert machine.engine.prepare(asked(PROMPT, CAT, DOG))
    assert machine.engine.prepare(asked("text"))


def test_a_row_with_pictures_waits_for_those_that_look(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, 13_500)
    running = []
    for number in range(2):
        admit(machine.engine, number, asked(PROMPT + str(number), CAT, DOG, count=4))
    while not machine.engine.idle:
        machine.engine.step()
        machine.engine.proceed()
        running.append(machine.engine.status().running)
    assert max(running) == 2
    assert running[0] == 1, "one looks while the other waits"


def test_kept_pictures_make_room_before_anybody_waits(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, 100_000)
    run(machine.engine, asked(PROMPT, CAT, DOG))
    kept = machine.engine.status().image_cache_bytes
    assert kept > 0
    machine.free = 8 * 40 - 100
    run(machine.engine, asked("a text", count=34))
    assert machine.engine.status().image_cache_bytes < kept


def test_requests_that_wait_may_hold_only_so_much(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, 1 << 40)
    request = asked(PROMPT, CAT, DOG)
    size = machine.engine.prepare(request).sight.held_bytes
    assert size < MAX_WAITING_BYTES
    monkeypatch.setattr(admission_module, "MAX_WAITING_BYTES", 3 * size)
    for number in range(4 + 2):
        machine.engine.add(number, machine.engine.prepare(replace(request, prompt=PROMPT + str(number))))
    machine.engine.step()
    machine.engine.proceed()
    machine.engine.add(9, machine.engine.prepare(request))
    machine.engine.step()
    machine.engine.proceed()
    with pytest.raises(Busy, match="the images of the requests that wait take too much memory"):
        machine.engine.prepare(request)
    assert machine.engine.prepare(asked("a text"))
    to_the_end(machine.engine)
    assert machine.engine.prepare(request)
