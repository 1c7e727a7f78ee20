from models.executors.base import Row, Step
from models.sampling import Drawn, Sampling, uniform
from runner.engine.batch import Batch, Run
from runner.engine.constraint import MaskWorker
from runner.engine.scheduler import Chunk
from runner.engine.sequence import PreparedText, Sequence, SequenceStatus
from tests.fakes import ByteTokenizer, FakeExecutor, scripted

GREEDY = Sampling(temperature=0)


MASKS = MaskWorker()


def row(slot: int, prompt: str) -> Sequence:
    prepared = PreparedText(
        tokens=list(prompt.encode()), sampling=GREEDY, seed=5, penalty_window=0, limit=100, keep=0, num_predict=None,
        shift=False, stops=None, logprobs=False, top_logprobs=0,
    )  # fmt: skip
    sequence = Sequence(slot, prepared, ByteTokenizer())
    sequence.status = SequenceStatus.PREFILL
    sequence.slot = slot
    return sequence


def chunk(of: Sequence, length: int) -> Chunk:
    return Chunk(of, length, is_last=length == of.unfed)


def read(batch: Batch, executor: FakeExecutor) -> list[bytes]:
    """Begin a step and wait for it."""
    return [bytes(each.token for each in drawn) for drawn in batch.begin(executor, MASKS).read()]


def take(of: Sequence, token: str) -> None:
    """As the engine does with what it has read."""
    of.unread -= 1
    of.accept(ord(token))


def test_a_chunk_that_does_not_complete_the_prompt_yields_nothing():
    one = row(3, scripted(0, "abcd"))
    batch = Batch((), chunk(one, 3))
    assert batch.step() == Step((Row(3, 0, tuple(b"abc"), 0),))
    assert (batch.runs, batch.draws(), batch.rows) == ((), [], [one])
    assert read(batch, FakeExecutor("yes")) == []
    assert (one.fed, one.status, one.unread) == (3, SequenceStatus.PREFILL, 0)


def test_where_steps_are_under_way_such_a_chunk_has_something_to_wait_for_that_nobody_looks_at():
    one = row(0, scripted(0, "abcd"))
    executor = FakeExecutor("yes", depth=1)
    under_way = Batch((), chunk(one, 3)).begin(executor, MASKS)
    assert under_way.sampled is not None
    assert under_way.read() == []
    assert (one.fed, one.status, one.unread) == (3, SequenceStatus.PREFILL, 0)
    assert read(Batch((), chunk(one, 2)), executor) == [b"y"]


def test_the_last_chunk_yields_the_first_token():
    one = row(0, scripted(0, "abcd"))
    assert read(Batch((), chunk(one, 5)), FakeExecutor("yes")) == [b"y"]
    assert (one.fed, one.status, one.unread) == (5, SequenceStatus.DECODE, 1)


def test_decoding_rows_and_a_chunk_share_a_step():
    executor = FakeExecutor("yes", "no")
    first, second = row(0, scripted(0)), row(1, scripted(1, "ab"))
    assert read(Batch((), chunk(first, 1)), executor) == [b"y"]
    take(first, "y")
    batch = Batch((Run(first),), chunk(second, 2))
    assert batch.step() == Step((Row(0, 1, tuple(b"y"), 1), Row(1, 0, tuple(b"ab"), 0)))
    assert read(batch, executor) == [b"e"]
    take(first, "e")
    batch = Batch((Run(first),), chunk(second, 1))
    assert batch.rows == [first, second]
    assert read(batch, executor) == [b"s", b"n"]
    assert (first.fed, second.fed, executor.steps) == (3, 3, 3)


def test_a_token_that_nobody_has_read_is_not_named():
    one = row(0, scripted(0))
    executor = FakeExecutor("yes", depth=1)
    first = Batch((), chunk(one, 1)).begin(executor, MASKS)
    ahead = Batch((Run(one),), None)
    assert ahead.step() == Step((Row(0, 1, (), 1),))
    (draw,) = ahead.draws()
    assert (draw.unread, draw.uniform, draw.drafted) == (True, uniform(5, 1), ())
    second = ahead.begin(executor, MASKS)
    assert (one.fed, one.unread) == (2, 2)
    assert [[each.token for each in drawn] for step in (first, second) for drawn in step.read()] == [
        [ord("y")],
        [ord("e")],
    ]


def test_drafts_share_a_step_with_other_rows_and_each_place_gets_its_own_token():
    executor = FakeExecutor("yes", "no")
    first, second, third = row(0, scripted(0)), row(1, scripted(1)), row(2, "abc")
    for each, said in ((first, "y"), (second, "n")):
        Batch((), chunk(each, 1)).begin(executor, MASKS).read()
        take(each, said)
    batch = Batch((Run(first, tuple(b"ex")), Run(second)), chunk(third, 2))
    assert batch.step().rows[0] == Row(0, 1, tuple(b"yex"), 3)
    draws = batch.draws()
    assert [(draw.slot, draw.drafted) for draw in draws] == [(0, ()), (0, tuple(b"e")), (0, tuple(b"ex")), (1, ())]
    assert [draw.uniform for draw in draws[:3]] == [uniform(5, place) for place in (1, 2, 3)]
    under_way = batch.begin(executor, MASKS)
    assert under_way.must_be_read_first
    sampled, other = under_way.read()
    assert bytes(each.token for each in (sampled[0], sampled[1], other[0])) == b"eso"
    assert batch.decode[0].accepted(sampled) == 1
    assert (first.fed, second.fed, third.fed) == (2, 2, 2), "drafts count when they are known to be right"


def test_a_step_without_drafts_may_be_followed_before_it_is_read():
    assert not Batch((), chunk(row(0, scripted(0)), 1)).begin(FakeExecutor("yes", depth=1), MASKS).must_be_read_first


def test_nothing_is_accepted_behind_the_first_wrong_draft():
    run = Run(row(0, "x"), (5, 6, 7))
    sampled = ([5, 6, 7, 8], [5, 0, 7, 8], [0, 6, 7, 8], [5, 6, 0, 7])
    assert [run.accepted([Drawn(token) for token in tokens]) for tokens in sampled] == [3, 1, 0, 2]
