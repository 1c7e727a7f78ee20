"""A quick look at latents: one linear map from a latent's channels to a colour, fitted for the autoencoder at hand.

It costs nothing beside a step, and a picture of one pixel a latent is what a progress display shows. The fit encodes
and decodes a few small pictures once, when the first preview is asked for.
"""

from typing import cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from models.host import lend
from models.image.autoencoder import Autoencoder
from models.image.base import Pixels

PICTURES, LATENTS = 4, 8
"""The map is fitted on so many pictures of so many latents a side: 256 equations for each colour."""

STRONG = 0.9
"""Drawn colours have each primary near plus or minus this: an autoencoder of few colours snaps others to its own."""

SEED = 3
"""Of these pictures; chosen, among a few, for the demonstration model's autoencoder."""

RIDGE = 1e-3
"""Of the channels' mean square: keeps coefficients small where channels say the same."""

Floats = npt.NDArray[np.float32]


class Preview:
    """Previews of one autoencoder's latents. Thread: the MLX thread."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self._colours: Floats | None = None

    def __call__(self, latents: mx.array) -> Pixels:
        """What the latents will about be.

        Shapes: latents as `Autoencoder.decode` takes them; returns (h, w, 3), a pixel for each latent of the decoder's.
        """
        if self._colours is None:
            self._colours = fit_colours(self._autoencoder)
        decoder_latents = lend(self._autoencoder.unscaled(latents))[0]
        return to_bytes(with_constant(decoder_latents) @ self._colours)


def fit_colours(autoencoder: Autoencoder) -> Floats:
    """The map that best tells the decoder's picture, averaged over each latent's pixels. Shapes: returns (C + 1, 3).

    Fitted on the latents of a drawn picture, for these are what a model's are like; noise decodes to something else.
    """
    scale = autoencoder.config.downscale
    given, wanted = [], []
    for number in range(PICTURES):
        latents = autoencoder.encode(mx.array(drawn_picture(LATENTS * scale, number)[None]))
        decoded = lend(autoencoder.decode(latents))[0]
        wanted.append(decoded.reshape(LATENTS, scale, LATENTS, scale, 3).mean(axis=(1, 3)).reshape(-1, 3))
        given.append(lend(autoencoder.unscaled(latents))[0].reshape(LATENTS**2, -1))
    inputs = with_constant(np.concatenate(given)).astype(np.float64)
    square = inputs.T @ inputs
    square += RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    return cast("Floats", np.linalg.solve(square, inputs.T @ np.concatenate(wanted)).astype(np.float32))


def drawn_picture(side: int, number: int) -> Floats:
    """A disc on a ground, both of one colour; always the same. Shapes: returns (side, side, 3), -1 to 1."""
    rng = np.random.default_rng([SEED, number])
    ground, _, disc = np.clip(rng.choice((-STRONG, STRONG), (3, 3)) + rng.normal(0, 0.1, (3, 3)), -1, 1)
    left, top = rng.uniform(0.4, 0.6, 2)
    radius = rng.uniform(0.25, 0.4)
    y, x = np.mgrid[:side, :side] / side
    picture: Floats = np.where(np.hypot(x - left, y - top)[..., None] < radius, disc, ground).astype(np.float32)
    return picture


def with_constant(values: Floats) -> Floats:
    """A last channel of ones. Shapes: (..., C) to (..., C + 1)."""
    return np.concatenate([values, np.ones((*values.shape[:-1], 1), np.float32)], axis=-1)


def to_bytes(picture: Floats) -> Pixels:
    """From -1..1 to 0..255, rounded."""
    return cast("Pixels", np.rint(np.clip(picture * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(np.uint8))
