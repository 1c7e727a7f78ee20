"""Text requests with pictures, on an executor and a tower in miniature."""

import pytest

from models.executors.base import Step
from models.grammar import GBNF, OutputFormat
from models.vision import Vision
from runner.engine.disk_cache import DiskCache
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import InputImage, SamplingParams, TextRequest
from tests.fakes import FakeExecutor, scripted
from tests.fakes_vision import FakeEncoder, vision
from tests.runner.engine.picture_requests import CAT, DOG, PIECES_OF_PROMPT, PROMPT, asked, by_heart, image, pixels_of
from tests.runner.engine.serving import Answer, admit, make_engine, run, seeing

KINDS = {
    "causal": {},
    "two-way": {"two_way": True},
    "axes": {"axes": True, "deep": 2},
    "breaks": {"breaks": True},
    "two-way breaks": {"breaks": True, "two_way": True},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def sees(request: pytest.FixtureRequest) -> Vision:
    return vision(**request.param)


def served(sees: Vision, *requests: TextRequest, depth: int = 0, **options) -> list[Answer]:
    executor = options.pop("executor", None) or FakeExecutor(depth=depth)
    return run(make_engine(executor, eye=seeing(sees), **options), *requests)


# --- what is said


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
def test_what_is_said_depends_on_all_that_is_seen_however_the_prompt_is_cut(sees: Vision, chunk: int, depth: int):
    (got,) = served(sees, asked(PROMPT, CAT, DOG), depth=depth, prefill_chunk=chunk)
    assert got.text == by_heart(sees, PIECES_OF_PROMPT, 20)
    assert got.done.prompt_tokens == len("what is  beside  then?") + sum(
        len(sees.prepare(each).expansion) for each in PIECES_OF_PROMPT if not isinstance(each, str)
    )


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("[img-0]", [pixels_of(30)]),
        ("[img-0] first", [pixels_of(30), " first"]),
        ("[img-0][img-1]", [pixels_of(30), pixels_of(90, 3, 4)]),
        ("[img-0] twice [img-0]?", [pixels_of(30), " twice ", pixels_of(30), "?"]),
    ],
)
def test_pictures_may_stand_anywhere(sees: Vision, prompt: str, pieces: list, depth: int):
    (got,) = served(sees, asked(prompt, CAT, DOG), depth=depth)
    assert got.text == by_heart(sees, pieces, 20)


def test_rows_with_and_without_pictures_share_steps_and_say_what_they_say_alone(sees: Vision, depth: int):
    requests = [
        asked("no picture at all, but a long text" * 2),
        asked(PROMPT, CAT, DOG),
        asked("[img-0]!", InputImage(0, DOG.data)),
        asked("another text", sampling=SamplingParams(seed=3)),
        asked(PROMPT, InputImage(0, DOG.data), InputImage(1, CAT.data), sampling=SamplingParams(seed=4)),
    ]
    together = served(sees, *requests, depth=depth, parallel=3)
    assert [got.text for got in together] == [served(sees, each)[0].text for each in requests]


def test_rows_with_pictures_share_a_step(sees: Vision):
    steps: list[Step] = []
    executor = FakeExecutor("x" * 40, before_step=lambda _, step: steps.append(step))
    served(sees, asked(scripted(0), count=30), asked(PROMPT, CAT, DOG), executor=executor)
    assert any(len(step.rows) == 2 and step.rows[1].spans for step in steps)


def test_drafts_behind_pictures_change_nothing_that_is_said_and_are_no_pictures(sees: Vision, depth: int):
    # A text that repeats itself, a picture among what was repeated.
    prompt = "abcabc[img-0]abcabc[img-0]abc"
    pieces = ["abcabc", pixels_of(30), "abcabc", pixels_of(30), "abc"]
    (got,) = served(sees, asked(prompt, CAT, count=40), depth=depth, draft=8)
    assert got.text == by_heart(sees, pieces, 40)
    repeating = FakeExecutor("<" * 3 + "ab" * 20, depth=depth)
    (said,) = served(sees, asked(f"[img-0]{scripted(0)}", CAT, count=40), executor=repeating, draft=8)
    assert said.text == "<" * 3 + "ab" * 18 + "a"
    assert said.done.accepted_tokens > 0


def test_penalties_and_constraints_work_behind_pictures(sees: Vision, depth: int):
    sampling = SamplingParams(temperature=0, repeat_penalty=1.5, repeat_last_n=-1)
    (got,) = served(sees, asked(PROMPT, CAT, DOG, sampling=sampling), depth=depth)
    assert len(got.text) > 0
    wanted = OutputFormat(GBNF('root ::= "yes" | "no"'))
    (held,) = served(sees, asked(PROMPT, CAT, DOG, format=wanted), depth=depth)
    assert held.text in ("yes", "no")


# --- the prefix cache


def caching(sees: Vision, executor: FakeExecutor, encoder: FakeEncoder | None = None, **options) -> TextEngine:
    disk = options.pop("disk", None)
    cache_bytes = options.pop("image_cache_bytes", 1 << 20)
    return make_engine(
        executor,
        prefix_cache=PrefixCache(executor, 1 << 20, disk),
        eye=seeing(sees, encoder, cache_bytes=cache_bytes),
        **options,
    )


def test_a_second_turn_takes_up_the_picture_and_runs_no_tower(sees: Vision, depth: int):
    executor, encoder = FakeExecutor(depth=depth), FakeEncoder()
    engine = caching(sees, executor, encoder, image_cache_bytes=0)
    (first,) = run(engine, asked(PROMPT, CAT, DOG))
    assert encoder.finished == 2
    longer = asked(PROMPT + " And now?", CAT, DOG)
    (second,) = run(engine, longer)
    assert encoder.finished == 2
    assert second.done.cached_tokens >= first.done.prompt_tokens
    assert second.text == by_heart(sees, [*PIECES_OF_PROMPT[:-1], " then? And now?"], 20)


def test_another_picture_in_the_same_place_is_never_taken_for_it(sees: Vision, depth: int):
    executor = FakeExecutor(depth=depth)
    engine = caching(sees, executor)
    run(engine, asked("what is [img-0]?", CAT))
    (other,) = run(engine, asked("what is [img-0]?", image(0, 31)))
    assert other.text == by_heart(sees, ["what is ", pixels_of(31), "?"], 20)
    assert other.done.cached_tokens <= len("what is <")


def test_of_a_picture_of_which_a_part_is_cached_a_two_way_run_is_run_whole(depth: int):
    for sees in (vision(two_way=True), vision(axes=True)):
        executor = FakeExecutor(depth=depth)
        engine = caching(sees, executor)
        run(engine, asked("ab[img-0]", image(0, 30, 2, 3), count=1))
        store = engine._store._prefixes
        # What is left of it ends within the picture.
        tokens = engine.prepare(asked("ab[img-0]c", image(0, 30, 2, 3))).tokens
        segment = store._tree.match(tokens[:6])[1][0]
        store.clear()
        store._tree.insert(tokens[:6], 0, segment)
        (got,) = run(engine, asked("ab[img-0]c", image(0, 30, 2, 3)))
        assert got.done.cached_tokens == (3 if sees.longest_run else 6)
        assert got.text == by_heart(sees, ["ab", pixels_of(30, 2, 3), "c"], 20)


def test_a_request_that_is_repeated_says_the_same(sees: Vision, depth: int):
    executor = FakeExecutor(depth=depth)
    engine = caching(sees, executor, image_cache_bytes=0)
    texts = [run(engine, asked("what? [img-0]", CAT))[0].text for _ in range(3)]
    assert texts == [by_heart(sees, ["what? ", pixels_of(30)], 20)] * 3


def test_recurrent_rows_rest_at_places_that_cut_no_run(sees: Vision, depth: int):
    executor = FakeExecutor(depth=depth, recurrent=True)
    engine = caching(sees, executor, context_length=2000)
    pieces = ["x" * 50, pixels_of(30, 4, 6), "y" * 60]
    prompt = "x" * 50 + "[img-0]" + "y" * 60
    for end in ("1", "2"):
        (got,) = run(engine, asked(prompt + end, image(0, 30, 4, 6)))
        assert got.text == by_heart(sees, [*pieces, end], 20)
    assert got.done.cached_tokens > 0


def test_windows_and_long_runs_are_stored_before_they_slide_out(depth: int):
    sees = vision(two_way=True)
    executor = FakeExecutor(depth=depth, window=300)
    engine = caching(sees, executor, context_length=2000)
    picture = image(0, 30, 14, 20)
    for end in ("1", "2"):
        (got,) = run(engine, asked("x" * 200 + "[img-0]" + "y" * 20 + end, picture))
    assert got.done.cached_tokens >= 200 + 280
    assert got.text == by_heart(sees, ["x" * 200, pixels_of(30, 14, 20), "y" * 20 + "2"], 20)


def test_a_row_with_pictures_outlives_the_process_on_disk(sees: Vision, tmp_path):
    def blank(path) -> DiskCache:
        return DiskCache(path, "model", limit_bytes=1 << 20)

    pieces = ["x" * 90, pixels_of(30, 5, 6), "y" * 60]
    for turn in range(2):
        executor = FakeExecutor()
        engine = caching(sees, executor, disk=blank(tmp_path), context_length=1000)
        (got,) = run(engine, asked("x" * 90 + "[img-0]" + "y" * 60, image(0, 30, 5, 6)))
        assert got.text == by_heart(sees, pieces, 20)
        assert (got.done.cached_tokens > 100) is bool(turn)
        other = caching(sees, FakeExecutor(), disk=blank(tmp_path), context_length=1000)
        (foreign,) = run(other, asked("x" * 90 + "[img-0]" + "y" * 60, image(0, 31, 5, 6)))
        assert foreign.text == by_heart(sees, ["x" * 90, pixels_of(31, 5, 6), "y" * 60], 20)
        other.close()
        engine.close()


# --- context shift


def test_a_context_that_shifts_keeps_whole_pictures_with_their_positions(sees: Vision, depth: int):
    executor = FakeExecutor(depth=depth)
    for keep in (1, 4, 9):
        engine = make_engine(executor, eye=seeing(sees, cache_bytes=0), context_length=40)
        pictures = image(0, 30, 1, 2), image(1, 90, 2, 3)
        (got,) = run(engine, asked("ab[img-0]cdefgh[img-1]ij", *pictures, count=60, shift=True, num_keep=keep))
        pieces = ["ab", pixels_of(30, 1, 2), "cdefgh", pixels_of(90, 2, 3), "ij"]
        assert got.text == by_heart(sees, pieces, 60, limit=40, keep=keep)
        assert executor.living_slots() == 0
    assert engine.status().image_cache_bytes == 0


# --- what is kept of pictures


def test_a_picture_is_looked_at_once_and_kept_for_later_requests(sees: Vision):
    encoder = FakeEncoder(deep=sees.tower.deep)
    engine = make_engine(FakeExecutor(), eye=seeing(sees, encoder))
    run(engine, asked(PROMPT, CAT, DOG), asked("[img-0] [img-0]", CAT))
    assert encoder.begun == 2
    run(engine, asked("again: [img-0]", CAT))
    assert encoder.begun == 2
    held = 4 * 4 * (6 + 12) * (1 + sees.tower.deep)
    assert engine.status().image_cache_bytes == held
    assert engine.status().memory_bytes == 77 + held


def test_what_is_kept_keeps_to_its_bound_and_what_is_needed_is_held_beyond_it():
    encoder = FakeEncoder()
    most = []
    engine = make_engine(FakeExecutor(), eye=seeing(vision(), encoder, cache_bytes=100))
    admit(engine, 1, asked(PROMPT, CAT, DOG))
    while not engine.idle:
        engine.step()
        engine.proceed()
        most.append(engine.status().image_cache_bytes)
    assert max(most) > 100, "both are needed for one step"
    assert engine.status().image_cache_bytes <= 100
