"""Z-Image's transformer: image and caption tokens in one stream, its blocks scaled and gated by the time.

Attribute names are the checkpoints' tensor names. Shapes: one picture at a time, a sequence is (L, D).

Source: diffusers' `ZImageTransformer2DModel` (v0.42.1), its basic mode at batch 1, where padding is attended to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from models.device import device
from models.image.gemm import host_gemm
from models.image.layers import axis_rotations, grid_positions, layer_norm, silu, timestep_embedding
from models.image.step_cache import StepCache
from models.image.z_image.blocks import Block, PlainStack, Stack
from models.image.z_image.config import PATCH, TransformerConfig
from models.image.z_image.host_blocks import HostStack

SEQUENCE_MULTIPLE = 32
"""Image and caption are each filled up to a multiple of it with learned tokens."""

_PATCHES = f"{PATCH}-1"


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What of a forward pass stays the same in all steps with one caption and one size."""

    caption: mx.array
    """Embedded, filled up and refined: (M, D), M a multiple of 32."""
    image_rotations: mx.array
    """complex64 (N, 1, d / 2), N a multiple of 32."""
    rotations: mx.array
    """Of image and caption: complex64 (N + M, 1, d / 2)."""


@dataclass(frozen=True, slots=True)
class Side:
    """What the steps share of the passes with one caption: the one wanted, or the one to be guided away from."""

    known: Conditioning
    cache: StepCache | None = None
    """What is remembered of earlier steps, if anything is to be."""


@dataclass(frozen=True, slots=True)
class Stacks:
    """All blocks of the transformer."""

    noise: Stack
    context: Stack
    joint: Stack
    """Of image and caption."""


class TimeEmbedder(nn.Module):
    """A small network on the sinusoids of the time."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.mlp = [nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, config.time_dim)]

    def __call__(self, t: float) -> mx.array:
        """Shape: (1, E), in the weights' type."""
        first, _, second = self.mlp
        out: mx.array = second(silu(first(timestep_embedding(t, 256).astype(first.bias.dtype))))
        return out


class FinalLayer(nn.Module):
    """A norm that the time scales, and the way back to patches."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, PATCH * PATCH * config.channels)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(config.time_dim, config.dim)]

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        """Shapes: x (L, D), time (1, E); returns (L, 4 * C)."""
        return self.linear(layer_norm(x) * (1.0 + self.adaLN_modulation[1](silu(time))))


class Transformer(nn.Module):
    """The whole model. Thread: the MLX thread."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._config = config
        dim = config.dim
        self.all_x_embedder = {_PATCHES: nn.Linear(PATCH * PATCH * config.channels, dim)}
        self.all_final_layer = {_PATCHES: FinalLayer(config)}
        self.t_embedder = TimeEmbedder(config)
        self.cap_embedder = [nn.RMSNorm(config.caption_dim, eps=config.norm_eps), nn.Linear(config.caption_dim, dim)]
        self.x_pad_token = mx.zeros((1, dim))
        self.cap_pad_token = mx.zeros((1, dim))
        refiners = range(config.num_refiner_layers)
        self.noise_refiner = [Block(config, modulated=True) for _ in refiners]
        self.context_refiner = [Block(config, modulated=False) for _ in refiners]
        self.layers = [Block(config, modulated=True) for _ in range(config.num_layers)]
        self.stacks = Stacks(*(PlainStack(blocks, config) for blocks in self._blocks()))

    @property
    def config(self) -> TransformerConfig:
        """What it was built from. Thread: any."""
        return self._config

    def prepare(self, *, on_host: bool | None = None) -> None:
        """Bring the loaded weights to the form that is computed in.

        Args:
            on_host: on numpy arrays, which a CPU with a fast BLAS is best at if no weight is quantised, or in MLX's
                graph; None lets device and weights decide.
        """
        if on_host is None:
            weights = cast("list[tuple[str, mx.array]]", tree_flatten(self.parameters()))
            on_host = device().kind == "cpu" and all(array.dtype == mx.float32 for _, array in weights)
        if on_host and (gemm := host_gemm()) is not None:
            self.stacks = Stacks(*(HostStack(gemm, blocks, self._config) for blocks in self._blocks()))

    def condition(self, caption: mx.array, height: int, width: int) -> Conditioning:
        """Do what need not be done again in each step.

        Args:
            caption: the prompt's embeddings, (T, caption_dim).
            height: of the latents; even.
            width: of the latents; even.
        """
        norm, embed = self.cap_embedder
        # Whatever the text encoder computed in, everything behind here is in this model's type.
        x = _filled(embed(norm(caption.astype(norm.weight.dtype))), self.cap_pad_token)
        length = x.shape[0]
        caption_positions = grid_positions(range(1, length + 1), range(1), range(1))
        image_positions = grid_positions(range(length + 1, length + 2), range(height // PATCH), range(width // PATCH))
        filling = np.zeros((-len(image_positions) % SEQUENCE_MULTIPLE, 3), dtype=np.int32)
        ours = self._rotations(np.concatenate([image_positions, filling]))
        theirs = self._rotations(caption_positions)
        x = self.stacks.context(x, theirs, None)
        return Conditioning(x, ours, mx.concatenate([ours, theirs]))

    def __call__(self, latents: mx.array, t: float, sides: Sequence[Side]) -> list[mx.array]:
        """The predicted picture - noise for each side, the negative of what a flow-matching step takes.

        Args:
            latents: float32 (h, w, C).
            t: the model's time, 1 - sigma.
            sides: by `condition`, for latents of this size, and the memory of each.

        Shapes: (h, w, C), in the weights' type.
        """
        time = self.t_embedder(t * self._config.time_scale)
        x = self.embed(latents, time.dtype)
        final = self.all_final_layer[_PATCHES]
        # What sides with captions of the same length have in common: their image's tokens have the same places.
        refined: dict[int, mx.array] = {}
        predictions = []
        for known, cache in ((side.known, side.cache) for side in sides):
            added = None if cache is None else cache.lookup(self.stacks.noise.first_input(x, time))
            if added is None:
                length = known.caption.shape[0]
                if length not in refined:
                    refined[length] = self.refine(x, time, known)
                hidden = self.joint(refined[length], time, known, wanted=x.shape[0])
                if cache is not None:
                    cache.keep(hidden - x)
            else:
                hidden = x + added
            predictions.append(unpatchify(final(hidden, time), latents.shape[0], latents.shape[1]))
        return predictions

    def working_bytes(self, height: int, width: int, caption: int) -> int:
        """A step's peak beyond the weights. Thread: any.

        Args:
            height: of the latents.
            width: of the latents.
            caption: tokens.
        """
        length = sum(tokens + -tokens % SEQUENCE_MULTIPLE for tokens in (height * width // PATCH**2, caption))
        rotations = 2 * 4 * length * self._config.head_dim
        return self.stacks.joint.working_bytes(length) + rotations

    def embed(self, latents: mx.array, dtype: mx.Dtype) -> mx.array:
        """The image's tokens. Shapes: (h, w, C); returns (h * w / 4, D)."""
        tokens: mx.array = self.all_x_embedder[_PATCHES](patchify(latents).astype(dtype))
        return tokens

    def refine(self, x: mx.array, time: mx.array, known: Conditioning) -> mx.array:
        """The image's tokens among themselves, filled up. Shapes: x (h * w / 4, D), time (1, E); returns (N, D)."""
        return self.stacks.noise(_filled(x, self.x_pad_token), known.image_rotations, time)

    def joint(self, x: mx.array, time: mx.array, known: Conditioning, wanted: int | None = None) -> mx.array:
        """Image and caption together. Shapes: x (N, D), time (1, E); returns (N + M, D), or the first rows of it."""
        return self.stacks.joint(mx.concatenate([x, known.caption]), known.rotations, time, wanted)

    def _blocks(self) -> tuple[list[Block], list[Block], list[Block]]:
        return self.noise_refiner, self.context_refiner, self.layers

    def _rotations(self, positions: np.ndarray) -> mx.array:
        return mx.array(axis_rotations(positions, self._config.axes_dims, self._config.theta)[:, None])


def patchify(latents: mx.array) -> mx.array:
    """Tokens row by row, each a patch's rows, columns, channels. Shapes: (h, w, C); returns (h * w / 4, 4 * C)."""
    height, width, channels = latents.shape
    patches = latents.reshape(height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.swapaxes(1, 2).reshape(-1, PATCH * PATCH * channels)


def unpatchify(tokens: mx.array, height: int, width: int) -> mx.array:
    """The inverse of `patchify`."""
    patches = tokens.reshape(height // PATCH, width // PATCH, PATCH, PATCH, -1)
    return patches.swapaxes(1, 2).reshape(height, width, -1)


def _filled(x: mx.array, token: mx.array) -> mx.array:
    """With copies of `token` behind it up to the next multiple of 32 rows. Shapes: x (L, D), token (1, D)."""
    missing = -x.shape[0] % SEQUENCE_MULTIPLE
    return mx.concatenate([x, mx.broadcast_to(token, (missing, x.shape[1]))]) if missing else x
