import numpy as np
import pytest

from tests.demo_model import world
from tests.demo_model.judge import NOTHING, judge


def _drawn(combination: world.Combination, seed: int) -> np.ndarray:
    return world.draw(combination, world.place(np.random.default_rng(seed), 1))[0]


@pytest.mark.parametrize("shape", world.SHAPES)
def test_it_names_what_was_drawn(shape):
    for i, colour in enumerate(world.COLOURS):
        ground = list(world.GROUNDS)[i % len(world.GROUNDS)]
        verdict = judge(_drawn((shape, colour, ground), i))
        assert (verdict.shape, verdict.colour, verdict.ground) == (shape, colour, ground)


def test_it_names_what_was_drawn_under_noise_and_blur():
    picture = _drawn(("heart", "blue", "pink"), 3).astype(float)
    soft = (picture + np.roll(picture, 1, 0) + np.roll(picture, 1, 1) + np.roll(picture, -1, 0)) / 4
    noisy = soft + np.random.default_rng(4).normal(0, 6, picture.shape)
    verdict = judge(np.clip(noisy, 0, 255).astype(np.uint8))
    assert verdict.agrees("heart", "blue", "pink") == (True, True, True)


def test_an_empty_picture_has_a_ground_and_nothing_on_it():
    verdict = judge(np.full((64, 64, 3), world.GROUNDS["pink"], np.uint8))
    assert (verdict.shape, verdict.colour, verdict.ground) == (NOTHING, NOTHING, "pink")


def test_noise_shows_nothing():
    picture = np.random.default_rng(5).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert judge(picture).shape == NOTHING


def test_two_shapes_are_none():
    left = world.Placement(*(np.array([v]) for v in (18.0, 32.0, 13.0, 0.0)))
    right = world.Placement(*(np.array([v]) for v in (46.0, 32.0, 13.0, 0.0)))
    combination = ("circle", "red", "white")
    both = np.minimum(world.draw(combination, left), world.draw(combination, right))[0]
    assert judge(both).shape == NOTHING


def test_a_colour_between_two_names_is_none():
    picture = _drawn(("circle", "red", "white"), 6)
    picture[(picture == world.COLOURS["red"]).all(axis=2)] = (110, 110, 60)
    assert judge(picture).colour == NOTHING


def test_a_bite_taken_out_of_a_circle_is_seen():
    picture = _drawn(("circle", "red", "white"), 7)
    picture[:32, :32] = world.GROUNDS["white"]
    assert judge(picture).shape != "circle"
