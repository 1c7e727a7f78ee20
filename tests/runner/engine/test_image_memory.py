"""Whether a picture fits, and which size would."""

from dataclasses import replace

import pytest

from models.image.base import PictureRequest
from runner.engine.image_memory import NEGLIGIBLE_BYTES, ImageMemory, largest_size
from runner.errors import InsufficientMemory
from tests.fakes_image import FakePipeline

GIB = 2**30


class HungryPipeline(FakePipeline):
    """Takes 2 KiB a pixel and 100 MiB besides."""

    def working_bytes(self, request: PictureRequest) -> int:
        return (100 << 20) + 2048 * request.width * request.height


def picture(width: int, height: int) -> PictureRequest:
    return PictureRequest("a fox", width, height, steps=4, seed=1)


def test_a_picture_that_fits_to_the_last_byte_is_let_through():
    needed = HungryPipeline().working_bytes(picture(1024, 1024))
    ImageMemory(lambda: needed).check(HungryPipeline(), picture(1024, 1024))
    with pytest.raises(InsufficientMemory):
        ImageMemory(lambda: needed - 1).check(HungryPipeline(), picture(1024, 1024))


def test_what_does_not_fit_is_refused_with_figures_and_the_largest_size_that_fits():
    message = (
        r"^insufficient memory: 2048x2048 needs 8\.1 GiB and 4\.0 GiB are available; the largest size that fits is "
        r"1424x1424, or start the runner with --check-memory=false to try all the same$"
    )
    with pytest.raises(InsufficientMemory, match=message):
        ImageMemory(lambda: 4 * GIB).check(HungryPipeline(), picture(2048, 2048))
    # It does fit, and the next one does not.
    memory = ImageMemory(lambda: 4 * GIB)
    memory.check(HungryPipeline(), picture(1424, 1424))
    with pytest.raises(InsufficientMemory):
        memory.check(HungryPipeline(), picture(1440, 1440))


@pytest.mark.parametrize(("width", "height"), [(2048, 1024), (1024, 2048), (4096, 256), (1776, 1328), (16, 4096)])
@pytest.mark.parametrize("available", [150 << 20, 500 << 20, GIB, 4 * GIB])
def test_the_largest_size_has_the_aspect_asked_for_and_the_next_larger_does_not_fit(width, height, available):
    pipeline = HungryPipeline()
    wanted = picture(width, height)
    found = largest_size(pipeline, wanted, available)
    assert found is not None
    assert all(side % 16 == 0 for side in found)
    assert pipeline.working_bytes(replace(wanted, width=found[0], height=found[1])) <= available
    longer, shorter = max(found), min(found)
    aspect = min(width, height) / max(width, height)
    assert abs(shorter - aspect * longer) <= 8 or shorter == 16
    assert (found[0] >= found[1]) == (width >= height) or found[0] == found[1]
    if longer < max(width, height):
        next_shorter = max(1, round(aspect * (longer + 16) / 16)) * 16
        assert pipeline.working_bytes(picture(longer + 16, next_shorter)) > available


def test_where_no_size_fits_that_is_said():
    assert largest_size(HungryPipeline(), picture(512, 512), 100 << 20) is None
    with pytest.raises(InsufficientMemory, match=r"512x512 needs 0.6 GiB and 10 MiB are available; no size fits, or"):
        ImageMemory(lambda: 10 << 20).check(HungryPipeline(), picture(512, 512))


def test_little_is_dared_whatever_the_figures_say():
    class Modest(FakePipeline):
        def working_bytes(self, request):
            return NEGLIGIBLE_BYTES

    ImageMemory(lambda: 0).check(Modest(), picture(512, 512))


def test_nothing_is_refused_where_nobody_wants_it_checked():
    ImageMemory(lambda: 0, enforced=False).check(HungryPipeline(), picture(4096, 4096))


def test_what_the_running_picture_will_give_back_counts_as_free():
    memory = ImageMemory(lambda: GIB)
    with pytest.raises(InsufficientMemory, match=r"1\.0 GiB are available"):
        memory.check(HungryPipeline(), picture(1024, 1024))
    memory.check(HungryPipeline(), picture(1024, 1024), held=2 * GIB)


def test_memory_that_the_process_keeps_is_given_back_before_a_refusal():
    free = [GIB]
    memory = ImageMemory(lambda: free[0], give_back=lambda: free.__setitem__(0, 4 * GIB))
    memory.check(HungryPipeline(), picture(512, 512))
    assert free == [GIB]
    memory.check(HungryPipeline(), picture(1024, 1024))
    assert free == [4 * GIB]
