from itertools import pairwise

import pytest

from runner.engine.drafting import PRICE, PromptLookup, RowDrafting, StepCosts


def propose(tokens: str, limit: int = 8) -> str:
    """What a fresh drafter guesses after those bytes."""
    return bytes(PromptLookup().propose(tokens.encode(), limit)).decode()


# --- prompt lookup


def test_what_followed_before_is_guessed_again():
    assert propose("one two three; one tw") == "o thre"
    assert propose("one two three; one tw", 3) == "o t"


@pytest.mark.parametrize("tokens", ["", "a", "ab", "abcdef", "abcb"])
def test_without_a_repetition_of_two_tokens_nothing_is_guessed(tokens: str):
    assert propose(tokens) == ""


def test_a_short_repetition_carries_few_guesses():
    assert propose("abcdefgh ab") == "cd"
    assert propose("abcdefgh abc") == "def"


def test_the_longest_repetition_goes_before_a_more_recent_one():
    assert propose("in the sea. on the hill. in the ", 2) == "se"


def test_of_equally_long_repetitions_the_most_recent_counts():
    assert propose("-ab1 +ab2 *ab", 1) == "2"


def test_a_repetition_that_reaches_the_end_goes_round():
    assert propose("....", 6) == "..."
    assert propose("xyzxyzxyz", 5) == "xyzxy"


def test_no_limit_is_no_guess():
    assert propose("abcabc", 0) == ""


def test_tokens_may_come_one_by_one_or_many_at_once():
    text = ("the cat sat on the mat, the dog sat on the cat; " * 3).encode()
    grown = PromptLookup()
    for end in range(len(text)):
        if end % 7 < 4:
            assert grown.propose(text[:end], 5) == PromptLookup().propose(text[:end], 5)


def test_a_long_monotonous_prompt_is_not_searched_all_over():
    class Watched(list[int]):
        read = 0

        def __getitem__(self, index):
            Watched.read += 1
            return super().__getitem__(index)

    drafter = PromptLookup()
    tokens = Watched([1, 2, 3] * 10_000 + [4, 1, 2])
    drafter.propose(tokens, 4)
    tokens.append(3)
    Watched.read = 0
    assert drafter.propose(tokens, 2) == [4, 1]
    assert Watched.read < 1000


# --- costs


def test_a_price_is_the_stated_one_until_both_kinds_of_step_were_seen():
    costs = StepCosts()
    assert costs.price(1, 4) == PRICE
    costs.observe(1, 0.1)
    assert costs.price(1, 4) == PRICE
    costs.observe(5, 0.18)
    assert costs.price(1, 4) == pytest.approx(0.2)


def test_a_price_is_in_tokens_that_the_step_yields_without_drafts():
    costs = StepCosts()
    costs.observe(4, 0.2)
    costs.observe(8, 0.4)
    assert costs.price(4, 4) == pytest.approx(1.0)


def test_steps_that_got_no_longer_make_drafts_free():
    costs = StepCosts()
    costs.observe(1, 0.1)
    costs.observe(3, 0.09)
    assert costs.price(1, 2) == 0


def test_measurements_follow_the_times_and_shrug_at_an_outlier():
    costs = StepCosts()
    costs.observe(1, 0.1)
    for _ in range(40):
        costs.observe(2, 0.12)
    costs.observe(2, 100.0)
    assert costs.price(1, 1) == pytest.approx(0.2)
    for _ in range(3):
        costs.observe(2, 0.15)
    assert costs.price(1, 1) == pytest.approx(0.5)


def test_a_size_is_measured_a_few_times_and_again_after_a_while():
    costs = StepCosts()
    needed = []
    for _ in range(72):
        needed.append(costs.needs_measuring(2))
        costs.observe(2 if needed[-1] else 6, 0.1)
    assert [step for step, need in enumerate(needed) if need] == [0, 1, 2, 68]


def test_a_clock_that_stands_still_is_no_measurement():
    costs = StepCosts()
    costs.observe(1, 0.0)
    costs.observe(2, 0.0)
    assert costs.price(1, 1) == PRICE


# --- whether it pays


class Noted:
    """Guesses always the same and notes what it is told."""

    def __init__(self) -> None:
        self.limits: list[int] = []
        self.seen: list[tuple[int, int]] = []

    def propose(self, tokens, limit):
        self.limits.append(limit)
        return [7] * limit

    def observe(self, proposed, accepted):
        self.seen.append((proposed, accepted))


def steps_awake(accepted: int, *, price: float = PRICE, steps: int = 200) -> list[int]:
    """At which tokens a row drafted of whose four guesses so many are right."""
    row, generated, awake = RowDrafting(Noted(), 4), 0, []
    for _ in range(steps):
        generated += 1
        if row.is_awake(generated):
            awake.append(generated)
            generated += accepted
            row.observe(4, accepted, price=price, generated=generated)
    return awake


def test_guesses_that_are_mostly_right_are_never_stopped():
    assert len(steps_awake(3)) == 200
    assert len(steps_awake(1, price=0.2)) == 200


def test_guesses_that_are_always_wrong_soon_stop_and_are_tried_again_ever_more_rarely():
    awake = steps_awake(0, steps=2000)
    pauses = [later - earlier for earlier, later in pairwise(awake) if later - earlier > 1]
    assert pauses == [16, 32, 64, 128, 256, 512, 512]
    assert len(awake) < 30


def test_the_same_guesses_pay_or_not_by_their_price():
    assert len(steps_awake(2, price=0.3)) == 200
    assert len(steps_awake(2, price=0.9)) < 30


def test_a_drafter_that_earns_again_is_forgiven():
    row = RowDrafting(Noted(), 4)
    for generated in range(30):
        row.observe(4, 0, price=PRICE, generated=generated)
    for _ in range(20):
        row.observe(4, 4, price=PRICE, generated=1000)
    while row.is_awake(2000):
        row.observe(4, 0, price=PRICE, generated=2000)
    assert row.is_awake(2016)


def test_counts_limits_and_lessons():
    drafter = Noted()
    row = RowDrafting(drafter, 4)
    assert row.propose([1, 2], 9) == [7] * 4
    assert row.propose([1, 2], 2) == [7] * 2
    assert row.propose([1, 2], 0) == row.propose([1, 2], -3) == []
    row.observe(4, 3, price=PRICE, generated=4)
    row.observe(2, 0, price=PRICE, generated=5)
    assert (row.proposed, row.accepted, drafter.limits, drafter.seen) == (6, 3, [4, 2], [(4, 3), (2, 0)])


def test_another_drafter_takes_over_where_the_tokens_are_others():
    row, second = RowDrafting(Noted(), 4), Noted()
    row.restart(second)
    row.propose([1], 1)
    assert second.limits == [1]
