import numpy as np

from tests.demo_model import world


def test_each_pair_of_names_is_trained_and_some_triples_are_not():
    held_out = {c for c in world.combinations() if world.is_held_out(c)}
    trained = set(world.combinations()) - held_out
    assert len(held_out) == 24
    for keep in ((0, 1), (0, 2), (1, 2)):
        pairs = {tuple(c[i] for i in keep) for c in world.combinations()}
        assert {tuple(c[i] for i in keep) for c in trained} == pairs


def test_the_48_prompts_ask_for_every_held_out_combination_twice():
    prompts = world.held_out_prompts()
    asked = [(p.shape, p.colour, p.ground) for p in prompts]
    assert len(prompts) == 48
    assert sorted(asked) == sorted(2 * [c for c in world.combinations() if world.is_held_out(c)])
    assert len({p.seed for p in prompts}) == 48
    for p in prompts:
        assert all(word in p.text for word in (p.shape, p.colour, p.ground))


def test_no_caption_of_training_has_the_words_of_an_unseen_phrasing():
    rng = np.random.default_rng(0)
    said = {world.caption(rng, ("star", "red", "grey")).lower().rstrip(".") for _ in range(2000)}
    unseen = {t.format(a="a", b="a", c="red", s="star", g="grey", back=b) for t in world.UNSEEN for b in world.BACKS}
    assert not said & unseen


def test_a_drawing_is_the_ground_at_its_border_and_the_colour_in_its_middle():
    rng = np.random.default_rng(1)
    for combination in world.combinations():
        _, colour, ground = combination
        picture = world.draw(combination, world.place(rng, 1))[0]
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert tuple(picture[32, 32]) == world.COLOURS[colour]
        border = np.concatenate((picture[0], picture[-1], picture[:, 0], picture[:, -1]))
        assert tuple(np.median(border, axis=0)) == world.GROUNDS[ground]


def test_colours_are_far_apart_from_each_other_and_from_every_ground():
    entries = [*world.COLOURS.values(), *world.GROUNDS.values()]
    for i, one in enumerate(entries):
        for other in entries[:i]:
            assert np.linalg.norm(np.subtract(one, other)) > 75


def test_a_turned_square_covers_as_much_as_a_straight_one():
    middle, radius = np.full(2, 32.0), np.full(2, 20.0)
    straight, turned = world.cover("square", world.Placement(middle, middle, radius, np.radians([0.0, 10.0])))
    assert abs(straight.sum() / turned.sum() - 1) < 0.01
    assert abs(straight.sum() - (2 * 0.82 * 20) ** 2) < 10
