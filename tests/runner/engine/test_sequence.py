from models.sampling import Draw, Sampling, uniform
from runner.engine.drafting import PromptLookup
from runner.engine.sequence import PreparedText, Sequence, SequenceStatus
from runner.engine.stop import build_stops
from runner.engine.types import FinishReason, TextChunk, TokenLogprob
from tests.fakes import EOS, ByteTokenizer


def sequence(prompt: str = "ab", *, limit: int = 100, stop: tuple[str, ...] = (), **more) -> Sequence:
    tokenizer = more.pop("tokenizer", None) or ByteTokenizer()
    settings = {
        "sampling": Sampling(), "seed": 0, "penalty_window": 0, "keep": 0, "num_predict": None, "shift": False,
        "logprobs": False, "top_logprobs": 0,
    }  # fmt: skip
    prepared = PreparedText(tokens=list(prompt.encode()), limit=limit, stops=build_stops(stop), **(settings | more))
    return Sequence(1, prepared, tokenizer)


def say(row: Sequence, text: str) -> list[FinishReason | None]:
    return [row.accept(token) for token in text.encode()]


def test_a_token_that_ends_nothing_goes_on():
    row = sequence()
    assert say(row, "xy") == [None, None]
    assert row.take_chunk() == TextChunk(1, "xy")
    assert row.take_chunk() is None
    assert (row.generated, bytes(row.tokens)) == (2, b"abxy")


def test_a_stop_token_ends_with_stop():
    row = sequence()
    assert row.accept(EOS) is FinishReason.STOP
    assert row.status is SequenceStatus.DONE
    assert (row.done().eval_tokens, row.done().stop_token) == (0, True)


def test_a_stop_string_ends_with_stop():
    row = sequence(stop=("--",))
    assert say(row, "x--") == [None, None, FinishReason.STOP]
    assert row.take_chunk() == TextChunk(1, "x")


def test_the_last_allowed_token_ends_with_length():
    assert say(sequence(num_predict=2), "xy") == [None, FinishReason.LENGTH]
    assert say(sequence(limit=4), "xy") == [None, FinishReason.LENGTH]


def test_a_full_context_that_may_shift_does_not_end():
    row = sequence(limit=6, shift=True, keep=2)
    assert say(row, "wxyz") == [None] * 4
    assert row.full
    row.shift()
    assert (bytes(row.tokens), row.fed) == (b"abyz", 0)
    assert (row.prompt_len, row.generated) == (2, 4)


def test_a_draw_is_told_its_place_in_the_row_and_behind_which_tokens_it_stands():
    row = sequence(seed=7)
    assert row.draw() == Draw(Sampling(), uniform(7, 0), row.slot)
    say(row, "xy")
    row.unread = 1
    assert row.draw() == Draw(Sampling(), uniform(7, 3), row.slot, unread=True)
    row.unread = 0
    assert row.draw((1, 2)) == Draw(Sampling(), uniform(7, 4), row.slot, drafted=(1, 2))


def test_logprobs_are_asked_for_with_the_draw():
    assert sequence(logprobs=True).draw().top_logprobs == 0
    assert sequence(logprobs=True, top_logprobs=3).draw().top_logprobs == 3
    assert sequence(top_logprobs=3).draw().top_logprobs is None


def test_penalties_look_back_on_the_window_of_prompt_and_answer():
    row = sequence("aabbc", penalty_window=3)
    row.begin(PromptLookup)
    counts = row.draw().counts
    assert dict(zip(counts.ids().tolist(), counts.counts().tolist(), strict=True)) == {ord("b"): 2, ord("c"): 1}
    say(row, "xx")
    counts = row.draw().counts
    assert dict(zip(counts.ids().tolist(), counts.counts().tolist(), strict=True)) == {ord("c"): 1, ord("x"): 2}


def test_without_penalties_nothing_is_counted():
    row = sequence()
    row.begin(PromptLookup)
    assert row.draw().counts is None


def test_running_ahead_is_not_allowed_where_the_next_token_may_end_the_row():
    row = sequence(num_predict=3)
    assert row.may_run_ahead
    say(row, "x")
    assert row.may_run_ahead
    say(row, "y")
    assert not row.may_run_ahead
    assert not sequence("abc", limit=4).may_run_ahead
    assert sequence("ab", limit=4).may_run_ahead


class WordTokenizer(ByteTokenizer):
    """One token that is several characters."""

    def piece(self, token: int) -> bytes:
        return b"ab<" if token == 1 else super().piece(token)


def test_the_logprob_of_a_token_that_is_cut_comes_with_what_is_left_of_it():
    row = sequence(stop=("<s>",), tokenizer=WordTokenizer())
    told = TokenLogprob("ab<", -1.0)
    row.accept(1, told)
    assert row.take_chunk() == TextChunk(1, "ab", (told,))
    row.accept(ord("s"), TokenLogprob("s", -1.0))
    assert row.take_chunk() is None
    assert row.accept(ord(">"), TokenLogprob(">", -1.0)) is FinishReason.STOP
    assert row.take_chunk() is None


def test_logprobs_come_with_the_text_they_belong_to():
    row = sequence()
    told = [TokenLogprob(str(n), -1.0) for n in range(3)]
    for token, logprob in zip("aü".encode(), told, strict=True):
        row.accept(token, logprob)
    assert row.take_chunk() == TextChunk(1, "aü", tuple(told))
