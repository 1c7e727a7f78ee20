"""A convolution over pictures, loaded as checkpoints store it and computed as MLX wants it."""

import mlx.core as mx
from mlx import nn


class Conv2d(nn.Module):
    """A two-dimensional convolution with a bias. Pictures are NHWC, the checkpoint's weight is (O, I, kh, kw).

    `prepare` must have run before the first call.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = mx.zeros((outputs, inputs, kernel, kernel))
        self.bias = mx.zeros((outputs,))
        self._stride = stride
        self._padding = padding

    def prepare(self) -> None:
        """Bring the loaded weight to (O, kh, kw, I). Thread: the MLX thread."""
        self.weight = mx.contiguous(self.weight.transpose(0, 2, 3, 1))
        mx.eval(self.weight)

    def __call__(self, x: mx.array, *, padded: bool = False) -> mx.array:
        """Shapes: x (B, H, W, I); returns (B, H', W', O). `padded` says that x has its padding above and below."""
        padding = (0, self._padding) if padded else self._padding
        return mx.conv2d(x, self.weight, stride=self._stride, padding=padding) + self.bias
