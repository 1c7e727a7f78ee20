import mlx.core as mx

from runner.engine.batch import Batch, Run, settle
from runner.engine.sampler import RowSampler
from runner.engine.scheduler import Chunk
from runner.engine.sequence import PreparedText, Sequence, SequenceStatus
from runner.engine.types import SamplingParams
from tests.fakes import ByteTokenizer, FakeModel, scripted


def row(model: FakeModel, number: int, prompt: str) -> Sequence:
    params = SamplingParams(temperature=0)
    tokens = list(prompt.encode())
    prepared = PreparedText(
        tokens=tokens, params=params, seed=0, limit=100, keep=0, num_predict=None, shift=False, stops=None,
        logprobs=False, top_logprobs=0,
    )  # fmt: skip
    sequence = Sequence(number, prepared, ByteTokenizer())
    sequence.status = SequenceStatus.PREFILL
    sequence.cache = model.new_cache()
    sequence.sampler = RowSampler(params, seed=0, prompt=tokens, context=100)
    return sequence


def test_a_chunk_that_does_not_complete_the_prompt_yields_nothing():
    model = FakeModel("yes")
    one = row(model, 1, scripted(0, "abcd"))
    step = Batch([], None, Chunk(one, 3)).build(model)
    assert ([run.row for run in step.runs], step.sampled, one.fed, one.status) == ([], None, 3, SequenceStatus.PREFILL)
    assert step.held == [one]
    assert len(step.marker) == 1


def test_the_last_chunk_yields_the_first_token():
    model = FakeModel("yes")
    one = row(model, 1, scripted(0, "abcd"))
    step = Batch([], None, Chunk(one, 5)).build(model)
    assert step.sampled.read()[0] == [ord("y")]
    assert ([run.row for run in step.runs], one.fed, one.status) == ([one], 5, SequenceStatus.DECODE)


def test_decoding_rows_and_a_chunk_share_a_step():
    model = FakeModel("yes", "no")
    first, second = row(model, 1, scripted(0)), row(model, 2, scripted(1, "ab"))
    step = Batch([], None, Chunk(first, 1)).build(model)
    step = Batch([Run(first)], step.sampled.tokens, Chunk(second, 2)).build(model)
    assert ([run.row for run in step.runs], step.sampled.read()[0]) == ([first], [ord("e")])
    step = Batch([Run(first)], step.sampled.tokens, Chunk(second, 1)).build(model)
    assert ([run.row for run in step.runs], step.sampled.read()[0]) == ([first, second], [ord("s"), ord("n")])
    assert (first.fed, second.fed, model.steps) == (3, 3, 3)


def test_a_prompts_marker_is_not_overwritten_by_the_next_step():
    model = FakeModel("yes")
    one = row(model, 1, scripted(0, "abcd"))
    step = Batch([], None, Chunk(one, 3)).build(model)
    Batch([], None, Chunk(one, 2)).build(model)
    assert mx.array_equal(step.marker[0], mx.array(ord("a"))).item()


def test_a_step_is_set_off_once_however_often_it_is_asked_to():
    model = FakeModel("yes")
    one = row(model, 1, scripted(0))
    step = Batch([], None, Chunk(one, 1)).build(model)
    assert not step.is_set_off
    step.set_off()
    step.set_off()
    assert step.is_set_off
    assert step.pending == []
    assert step.sampled.read()[0] == [ord("y")]


def test_drafts_share_a_step_with_other_rows_and_each_place_gets_its_own_token():
    model = FakeModel("yes", "no")
    first, second, third = row(model, 1, scripted(0)), row(model, 2, scripted(1)), row(model, 3, "abc")
    for each in (first, second):
        Batch([], None, Chunk(each, 1)).build(model)
    runs = [Run(first, tuple(b"ex")), Run(second)]
    step = Batch(runs, mx.array(list(b"yexn"), dtype=mx.int32), Chunk(third, 2)).build(model)
    sampled = step.sampled.read()[0]
    assert bytes([sampled[0], sampled[3]]) == b"eo"
    assert sampled[1] == ord("s")
    assert runs[0].accepted(sampled[:3]) == 1
    assert (first.fed, first.unverified, second.fed, second.unverified, third.fed) == (2, 2, 2, 0, 2)
    assert step.must_be_read_first
    settle(first, 1)
    assert (first.fed, first.unverified) == (3, 0)
    assert first.cache[0].tokens.tolist() == [*scripted(0).encode(), *b"ye"]


def test_a_step_without_drafts_may_be_followed_before_it_is_read():
    model = FakeModel("yes")
    one = row(model, 1, scripted(0))
    assert not Batch([], None, Chunk(one, 1)).build(model).must_be_read_first


def test_nothing_is_accepted_behind_the_first_wrong_draft():
    run = Run(row(FakeModel(), 1, "x"), (5, 6, 7))
    assert [run.accepted(sampled) for sampled in ([5, 6, 7, 8], [5, 0, 7, 8], [0, 6, 7, 8], [5, 6, 0, 7])] == [
        3,
        1,
        0,
        2,
    ]
