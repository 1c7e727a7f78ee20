"""Which texts share a pass, whose turn it is, and what becomes of those that fail or leave."""

import asyncio

import pytest

from runner.engine.embedding import EmbeddingEngine
from runner.engine.executor_thread import ExecutorThread
from runner.engine.loop import EngineLoop
from runner.engine.preparation import QUICK_CHARACTERS
from runner.engine.types import EmbeddingDone, EmbeddingRequest, Failed, ImageRequest, TextRequest
from runner.errors import BadRequest, GenerationError, NoInput, NotImplementedHere, TextTooLong
from tests.fakes import POISON, ByteTokenizer, Gate
from tests.fakes_embedding import FakeEmbeddingModel

WIDTH = FakeEmbeddingModel.width


def make_engine(model: FakeEmbeddingModel | None = None, **options) -> EmbeddingEngine:
    tokenizer = ByteTokenizer(adds_bos=options.pop("adds_bos", False))
    settings = {"context_length": 64, "width": WIDTH, "pass_tokens": 32} | options
    return EmbeddingEngine(model or FakeEmbeddingModel(), tokenizer, **settings)


def add(engine: EmbeddingEngine, number: int, *texts: str, **fields) -> None:
    engine.add(number, engine.prepare(EmbeddingRequest(texts, **fields)))


def to_the_end(engine: EmbeddingEngine) -> dict[int, EmbeddingDone | Failed]:
    ended = {}
    while not engine.idle:
        ended |= {output.id: output for output in engine.step()}
        engine.proceed()
    return ended


def vector(text: str) -> tuple[float, ...]:
    encoded = text.encode()
    return (float(len(encoded)), float(encoded[0]), float(encoded[-1]), 0.5)


def test_a_requests_vectors_come_in_the_order_of_its_texts_with_all_their_tokens():
    engine, texts = make_engine(), ("ab", "a much longer text", "c", "another long text.")
    add(engine, 1, *texts)
    done = to_the_end(engine)[1]
    assert done == EmbeddingDone(1, tuple(map(vector, texts)), sum(map(len, texts)))


def test_texts_that_are_padded_alike_share_a_pass_whoever_asked_for_them():
    model = FakeEmbeddingModel()
    engine = make_engine(model)
    add(engine, 1, "a", "a text of more than 8")
    add(engine, 2, "bb")
    to_the_end(engine)
    assert model.passes == [[b"a text of more than 8"], [b"bb", b"a"]]


def test_a_pass_has_so_many_tokens_at_most_padding_included():
    model = FakeEmbeddingModel()
    engine = make_engine(model, pass_tokens=32)
    add(engine, 1, *"abcdefghi")
    to_the_end(engine)
    assert [len(texts) for texts in model.passes] == [4, 4, 1]


def test_a_text_longer_than_a_pass_runs_alone():
    model = FakeEmbeddingModel()
    engine = make_engine(model, pass_tokens=16)
    add(engine, 1, "x" * 60, "y" * 60)
    assert len(to_the_end(engine)[1].vectors) == 2
    assert [len(texts) for texts in model.passes] == [1, 1]


def test_a_request_of_many_texts_does_not_hold_up_one_of_a_few():
    model = FakeEmbeddingModel()
    engine = make_engine(model, pass_tokens=32)
    add(engine, 1, *(f"text {n:02}" for n in range(40)))
    engine.step()
    add(engine, 2, "a text of another length")
    ended = {}
    while 2 not in ended:
        ended |= {output.id: output for output in engine.step()}
    assert len(model.passes) <= 3
    assert 1 not in ended


def test_a_cancelled_request_leaves_no_text_behind():
    model = FakeEmbeddingModel()
    engine = make_engine(model, pass_tokens=8)
    add(engine, 1, *"abcd")
    add(engine, 2, "e")
    engine.step()
    engine.cancel(1)
    assert set(to_the_end(engine)) == {2}
    assert not any(b"b" in texts for texts in model.passes)
    engine.cancel(99)
    assert engine.idle


def test_a_vector_that_is_not_finite_fails_its_request_and_no_other():
    engine = make_engine()
    add(engine, 1, "fine", f"not {chr(POISON)}")
    add(engine, 2, "fine")
    ended = to_the_end(engine)
    assert isinstance(ended[1], Failed)
    assert "not finite" in str(ended[1].error)
    assert ended[2].vectors == (vector("fine"),)


def test_a_pass_that_raises_fails_its_requests_and_the_next_one_runs():
    def explode(number, texts):
        if number == 0:
            raise MemoryError("no room")

    model = FakeEmbeddingModel(before_pass=explode)
    engine = make_engine(model)
    add(engine, 1, "a")
    add(engine, 2, "a longer text")
    with pytest.raises(MemoryError) as raised:
        engine.step()
    (failed,) = engine.abandon(raised.value)
    assert (failed.id, isinstance(failed.error, GenerationError)) == (1, True)
    assert "no room" in str(failed.error)
    assert model.given_back == 1
    assert to_the_end(engine)[2].vectors == (vector("a longer text"),)


@pytest.mark.parametrize("text", ["x" * 65, "x" * 100_000])
def test_a_text_that_is_too_long_is_refused_in_the_words_a_parent_cuts_it_at(text):
    with pytest.raises(TextTooLong, match=r"^the input length exceeds the context length$"):
        make_engine().prepare(EmbeddingRequest(("fine", text)))


@pytest.mark.parametrize("texts", [("x" * QUICK_CHARACTERS,), ("x",) * QUICK_CHARACTERS])
def test_short_texts_are_prepared_in_no_time_and_longer_ones_are_not(texts: tuple[str, ...]):
    assert make_engine().is_quick(EmbeddingRequest(texts))
    assert not make_engine().is_quick(EmbeddingRequest((*texts, "x")))
    assert not make_engine().is_quick(TextRequest("x"))


def test_a_text_of_just_the_context_is_taken():
    engine = make_engine(adds_bos=True)
    add(engine, 1, "x" * 63)
    assert to_the_end(engine)[1].tokens == 64
    with pytest.raises(TextTooLong):
        engine.prepare(EmbeddingRequest(("x" * 64,)))


def test_a_request_may_ask_for_a_smaller_context_but_not_for_a_larger_one():
    engine = make_engine()
    with pytest.raises(TextTooLong):
        engine.prepare(EmbeddingRequest(("x" * 11,), num_ctx=10))
    with pytest.raises(TextTooLong):
        engine.prepare(EmbeddingRequest(("x" * 65,), num_ctx=1000))


def test_a_text_without_tokens_is_refused_as_ollamas_runner_does():
    with pytest.raises(NoInput, match=r"^failed to create new sequence: no input provided$"):
        make_engine().prepare(EmbeddingRequest(("a", "")))


def test_a_text_that_is_no_unicode_is_refused():
    with pytest.raises(BadRequest, match="surrogate"):
        make_engine().prepare(EmbeddingRequest(("\ud800",)))


def test_vectors_are_cut_as_the_model_allows():
    engine = make_engine()
    add(engine, 1, "abc", dimensions=2)
    assert to_the_end(engine)[1].vectors == ((3.0, 97.0),)
    for dimensions in (0, WIDTH + 1):
        with pytest.raises(BadRequest, match=f"dimensions must be from 1 to {WIDTH}"):
            engine.prepare(EmbeddingRequest(("a",), dimensions=dimensions))
    with pytest.raises(BadRequest, match="dimensions must be one of 2, 4, not 3"):
        make_engine(widths=(2, 4)).prepare(EmbeddingRequest(("a",), dimensions=3))


def test_texts_are_put_into_lower_case_where_the_model_wants_it():
    model = FakeEmbeddingModel()
    engine = make_engine(model, lower_case=True)
    add(engine, 1, "ÄBC")
    to_the_end(engine)
    assert model.passes == [["äbc".encode()]]


@pytest.mark.parametrize("request_", [TextRequest("a"), ImageRequest("a")])
def test_requests_of_other_kinds_are_refused(request_):
    with pytest.raises(NotImplementedHere, match="the loaded model makes embeddings"):
        make_engine().prepare(request_)


def test_the_status_counts_those_who_run_and_wait():
    engine = make_engine(pass_tokens=8)
    add(engine, 1, "a", "b")
    add(engine, 2, "a longer text")
    assert (engine.status().running, engine.status().waiting) == (0, 2)
    engine.step()
    status = engine.status()
    assert (status.running, status.waiting, status.context_length, status.memory_bytes) == (1, 1, 64, 123)


async def test_a_client_that_leaves_between_passes_frees_its_texts():
    gate = Gate(0)
    model = FakeEmbeddingModel(before_pass=gate)
    thread = ExecutorThread()
    loop = EngineLoop(thread)
    await loop.load(lambda progress: make_engine(model, pass_tokens=8))

    async def ask() -> None:
        async with loop.submit(EmbeddingRequest(tuple("abcdefgh"))) as outputs:
            await anext(outputs)

    try:
        asking = asyncio.create_task(ask())
        await gate.reached()
        asking.cancel()
        await asyncio.wait([asking])
        gate.open()
        async with loop.submit(EmbeddingRequest(("next",))) as outputs:
            assert (await anext(outputs)).vectors == (vector("next"),)
        assert len(model.passes) <= 3
    finally:
        await loop.close(0)
        await thread.close()
    assert model.closed
