"""Noise levels beyond what the parity tests compare with diffusers."""

from itertools import pairwise

import pytest

from models.config_reader import ConfigReader
from models.errors import CheckpointError
from models.image.schedulers import FlowMatchEuler, first_step, flow_match_sigmas, read_scheduler


@pytest.mark.parametrize("steps", [1, 2, 9, 100])
@pytest.mark.parametrize("scheduler", [FlowMatchEuler(shift=3.0), FlowMatchEuler(dynamic=True, shift_terminal=0.1)])
def test_the_levels_fall_from_pure_noise_to_none(scheduler: FlowMatchEuler, steps: int):
    sigmas = scheduler.sigmas(steps, scheduler.mu(1024))
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1.0
    assert sigmas[-1] == 0.0
    assert all(high > low for high, low in pairwise(sigmas))


def test_a_shift_of_three_puts_the_middle_at_three_quarters():
    assert flow_match_sigmas(2, shift=3.0) == (1.0, 0.75, 0.0)


def test_the_last_level_can_be_chosen():
    assert flow_match_sigmas(5, shift=2.0, shift_terminal=0.25)[-2] == pytest.approx(0.25)


def test_mu_is_on_a_line_through_two_sizes():
    scheduler = FlowMatchEuler(base_shift=0.5, max_shift=1.5, base_tokens=100, max_tokens=300)
    assert [scheduler.mu(tokens) for tokens in (100, 200, 300, 500)] == pytest.approx([0.5, 1.0, 1.5, 2.5])


def test_mu_counts_only_where_the_shift_is_dynamic():
    assert FlowMatchEuler(shift=3.0).sigmas(4, 1.0) == FlowMatchEuler(shift=3.0).sigmas(4)
    assert FlowMatchEuler(dynamic=True).sigmas(4, 1.0) != FlowMatchEuler(dynamic=True).sigmas(4, 2.0)


@pytest.mark.parametrize(
    ("steps", "strength", "skipped"),
    [(10, 1.0, 0), (10, 0.6, 4), (10, 0.55, 4), (4, 0.6, 1), (4, 0.1, 3), (1, 0.01, 0), (50, 1e-9, 49)],
)
def test_less_strength_skips_more_steps_but_never_all(steps: int, strength: float, skipped: int):
    assert first_step(steps, strength) == skipped


def test_a_configuration_is_read_with_the_defaults_of_diffusers():
    assert read_scheduler(ConfigReader({})) == FlowMatchEuler()
    settings = {"shift": 6.0, "use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": None}
    expected = FlowMatchEuler(shift=6.0, dynamic=True, time_shift="linear")
    assert read_scheduler(ConfigReader(settings)) == expected


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"time_shift_type": "cubic"}, "cubic"),
        ({"shift": 0.0}, "impossible"),
        ({"max_image_seq_len": 256}, "impossible"),
        ({"shift_terminal": 1.0}, "impossible"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(settings: dict[str, bool | float | str], named: str):
    with pytest.raises(CheckpointError, match=named):
        read_scheduler(ConfigReader(settings))
