"""A token that a mask rules out is as one whose logit is -inf, on both samplers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from models.sampling import INVALID_TOKEN, Draw, Drawn, Sampling, device, host
from tests.models.sampling.reference import OFF, agrees, distribution
from tests.models.sampling.test_device import GREEDY, varied_rows

Sample = Callable[[np.ndarray, Sequence[Draw]], list[Drawn]]


def on_device(logits: np.ndarray, draws: Sequence[Draw]) -> list[Drawn]:
    return device.sample(mx.array(logits), draws)[1].read()


@pytest.fixture(params=[host.sample, on_device], ids=["host", "device"])
def sample(request: pytest.FixtureRequest) -> Sample:
    return request.param


def packed(possible: np.ndarray, spare: int = 0) -> bytes:
    """A mask; its last bits, behind the vocabulary, are set."""
    bits = np.concatenate([possible, np.ones(spare, dtype=np.bool_)])
    return np.packbits(bits, bitorder="little").tobytes()


@pytest.mark.parametrize("share", [0.9, 0.3, 0.02])
@pytest.mark.parametrize("size", [20, 700, 10_007])
def test_a_mask_is_as_logits_of_minus_infinity(sample: Sample, size: int, share: float):
    random = np.random.default_rng(size)
    for seed in range(4):
        logits, draws = varied_rows(size, seed)
        possible = random.random(logits.shape) < share
        possible[:, seed] = True
        logits[:, seed] = 1.0
        masked = [replace(draw, mask=packed(row, spare=40)) for draw, row in zip(draws, possible, strict=True)]
        wanted = sample(np.where(possible, logits, -np.inf).astype(np.float32), draws)
        for draw, row, got, want in zip(draws, possible, sample(logits, masked), wanted, strict=True):
            assert (got.token, [token for token, _ in got.top]) == (want.token, [token for token, _ in want.top])
            assert row[got.token]
            if draw.top_logprobs is not None:
                assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
                assert [value for _, value in got.top] == pytest.approx([value for _, value in want.top], abs=1e-4)


@pytest.mark.parametrize(
    "sampling", [OFF, Sampling(), replace(OFF, top_k=3), replace(OFF, top_p=0.5), Sampling(temperature=1.5, top_p=0.9)]
)
def test_what_is_allowed_is_drawn_by_its_own_distribution(sample: Sample, sampling: Sampling):
    random = np.random.default_rng(3)
    logits = random.normal(size=900).astype(np.float32)
    possible = random.random(900) < 0.05
    expected = distribution(np.where(possible, logits, -np.inf), sampling)
    for number in np.linspace(0, 1 - 2**-53, 40):
        drawn = sample(logits[None], [Draw(sampling, float(number), 0, mask=packed(possible))])[0]
        assert agrees(drawn.token, expected, float(number), 1e-5)


def test_logprobs_are_those_of_the_allowed_tokens(sample: Sample):
    logits = np.array([[5.0, 1.0, 1.0, 1.0, 0.0]], dtype=np.float32)
    mask = packed(np.array([False, True, True, False, False]))
    drawn = sample(logits, [Draw(GREEDY, 0.5, 0, mask=mask, top_logprobs=5)])[0]
    assert (drawn.token, drawn.logprob) == (1, pytest.approx(np.log(0.5)))
    assert drawn.top == ((1, pytest.approx(np.log(0.5))), (2, pytest.approx(np.log(0.5))))


def test_a_row_without_a_mask_is_not_touched_by_one_beside_it(sample: Sample):
    logits, draws = varied_rows(700, 5)
    beside = [replace(draw, mask=None if row % 2 else packed(np.arange(700) < 9)) for row, draw in enumerate(draws)]
    logits[::2, :9] = 1.0
    assert sample(logits, beside)[1::2] == sample(logits, draws)[1::2]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(), OFF])
def test_where_nothing_is_allowed_or_finite_there_is_no_token(sample: Sample, sampling: Sampling):
    finite = np.zeros((1, 50), dtype=np.float32)
    unknown = finite.copy()
    unknown[0, 7] = np.nan
    some, none = packed(np.arange(50) < 5), packed(np.zeros(50, dtype=np.bool_))
    assert sample(finite, [Draw(sampling, 0.5, 0, mask=none)])[0].token == INVALID_TOKEN
    assert sample(unknown, [Draw(sampling, 0.5, 0, mask=some)])[0].token == INVALID_TOKEN
    assert sample(np.full((1, 50), -np.inf, np.float32), [Draw(sampling, 0.5, 0, mask=some)])[0].token == INVALID_TOKEN
