"""When a picture is too large to be decoded or encoded as a whole, and in what pieces it is then.

Cutting latents into tiles and decoding each by itself, as is customary, gives each tile group norms and attention of
its own: on a picture that is dark on one side and light on the other that was measured to be 30/255 away from the whole
on average, and statistics estimated from samples of the picture still up to 3/255. So statistics and attention are
those of the whole picture here. What is cut are the convolutions, which see no further than a pixel: each goes over the
picture in strips, exactly. The levels of high resolution are held in bfloat16 between them, and the widest map, an
upsampler's result, is never held at all. Nothing overlaps but a row, so nothing has to be blended.
"""

from dataclasses import dataclass

STRIP_FLOATS_PER_LATENT = 1 << 12
"""A strip holds so many numbers for each latent of the tile: an eighth of what the decoder holds of such a tile at its
widest, with FLUX.1's channels."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """The largest picture that is taken as a whole, as a square of `side` latents; 0 takes every one as a whole."""

    side: int = 64

    def applies(self, height: int, width: int) -> bool:
        """Whether a picture of so many latents is taken in strips."""
        return self.side > 0 and height * width > self.side**2

    def strip_rows(self, width: int, channels: int) -> int:
        """Rows of a strip of a map, so that its strips are of about equal size on all levels."""
        return max(1, self.side**2 * STRIP_FLOATS_PER_LATENT // (width * channels))
