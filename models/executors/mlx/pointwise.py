"""What is computed token by token and is no product with a weight: unusual activations, streams mixed."""

import mlx.core as mx


def scaled(x: mx.array, factors: mx.array) -> mx.array:
    """Each group of neighbours times its factor. Shapes: x (T, n * d), factors (T, n); returns (T, n * d)."""
    return (x.reshape(*factors.shape, -1) * factors[..., None]).reshape(x.shape)


def xielu(x: mx.array, above: mx.array, below: mx.array, slope: mx.array, least: mx.array) -> mx.array:
    """See `Xielu`. Shapes: x (T, F), the others numbers; returns (T, F)."""
    rises, falls = mx.logaddexp(above, mx.array(0, above.dtype)), slope + mx.logaddexp(below, mx.array(0, below.dtype))
    curve = mx.where(x > 0, rises * x * x, (mx.expm1(mx.minimum(x, least)) - x) * falls)
    return curve + slope * x


def mixed(x: mx.array, weights: mx.array, parts: int) -> mx.array:
    """See `Ops.mix`. Shapes: x (T, parts * D), weights (T, made * parts); returns (T, made * D)."""
    tokens = len(x)
    return (weights.reshape(tokens, -1, parts) @ x.reshape(tokens, parts, -1)).reshape(tokens, -1)


def matched(x: mx.array, like: mx.array, floor: float) -> mx.array:
    """See `Ops.match_size`. Shapes: both (T, D); returns (T, D)."""
    ratio = mx.sqrt(_mean_square(like) / mx.maximum(_mean_square(x), floor))
    return x * ratio.astype(x.dtype)


def risen(x: mx.array, deviations: float) -> mx.array:
    """See `Ops.rise_above`. Shapes: (T, F) both ways."""
    wide = x.astype(mx.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    return mx.maximum(centred - deviations * mx.sqrt(_mean_square(centred)), 0).astype(x.dtype)


def _mean_square(x: mx.array) -> mx.array:
    return mx.square(x.astype(mx.float32)).mean(axis=-1, keepdims=True)
