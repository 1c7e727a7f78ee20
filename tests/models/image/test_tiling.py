import pytest

from models.image.tiling import Tiling


@pytest.mark.parametrize(
    ("side", "height", "width", "applies"),
    [
        (64, 64, 64, False),
        (64, 64, 65, True),
        (64, 32, 128, False),
        (64, 128, 128, True),
        (0, 512, 512, False),
        (1, 2, 1, True),
    ],
)
def test_a_picture_of_more_latents_than_the_square_has_is_cut(side: int, height: int, width: int, applies: bool):
    assert Tiling(side).applies(height, width) == applies


def test_strips_are_about_equal_on_all_levels():
    tiling = Tiling(64)
    sizes = [tiling.strip_rows(width, channels) * width * channels for width, channels in ((1024, 256), (512, 512))]
    assert sizes == [4096 * 4096, 4096 * 4096]


def test_a_strip_has_a_row_at_least():
    assert Tiling(1).strip_rows(4096, 512) == 1
