"""What a quantised cache costs: how far logits move, and how much worse a text is foreseen."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.cache import CacheType
from models.checkpoint import open_checkpoint
from models.errors import QuantizationError
from models.llm import LanguageModel, Row, load_language_model
from models.tokenizer import load_tokenizer

PARAGRAPH = (
    "Rayleigh scattering is the scattering of light by particles much smaller than its wavelength. In the air these "
    "are the molecules of nitrogen and oxygen. The strength of the scattering grows with the fourth power of the "
    "frequency, so that blue light is scattered about ten times as much as red. This is why the sky is blue during the "
    "day, and why the sun looks red when it sets: its light then has a long way through the air, on which most of the "
    "blue is lost. Clouds are white because their droplets are larger than the wavelength of any visible light."
)
Load = Callable[..., LanguageModel]


def logits(model: LanguageModel, tokens: list[int], chunk: int) -> np.ndarray:
    """Shapes: (T, V), the logits behind each token; the prompt cut into chunks."""
    cache, found = model.new_cache(), []
    for begin in range(0, len(tokens), chunk):
        own = mx.array(tokens[begin : begin + chunk], dtype=mx.int32)
        found.append(np.array(model.logits(model(own, [Row(len(own), cache)]))))
    return np.concatenate(found)


def perplexity(found: np.ndarray, tokens: list[int]) -> float:
    wide = found[:-1].astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return float(np.exp(-wide[np.arange(len(tokens) - 1), tokens[1:]].mean()))


@pytest.fixture
def load(wide_llama: Path) -> Load:
    def start(cache_type: CacheType, **more: bool) -> LanguageModel:
        return load_language_model(open_checkpoint(str(wide_llama), store=wide_llama), cache_type=cache_type, **more)

    return start


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(("cache_type", "bound"), [("q8_0", 0.02), ("q4_0", 0.3)])
def test_a_tiny_models_logits_move_little(load: Load, cache_type: CacheType, bound: float, fuse: bool):
    tokens = [3 + (7 * n) % 250 for n in range(60)]
    exact = logits(load("f16", fuse=fuse), tokens, 60)
    moved = np.abs(logits(load(cache_type, fuse=fuse), tokens, 60) - exact).mean()
    assert 0 < moved < bound * exact.std()


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
def test_chunks_do_not_change_what_a_quantised_cache_says(load: Load, cache_type: CacheType):
    tokens = [3 + (7 * n) % 250 for n in range(60)]
    model = load(cache_type)
    np.testing.assert_allclose(logits(model, tokens, 60), logits(model, tokens, 7), atol=2e-3)


def test_a_model_says_what_its_cache_takes(load: Load):
    plain, packed = load("f16"), load("q8_0")
    assert packed.cache_nbytes(1000) < plain.cache_nbytes(1000) / 3
    cache = packed.new_cache()
    packed(mx.array([1, 2, 3], dtype=mx.int32), [Row(3, cache)])
    assert sum(layer.nbytes for layer in cache) == packed.cache_nbytes(3)


def test_heads_too_narrow_are_refused_before_a_weight_is_read(tiny_llama: Path):
    with pytest.raises(QuantizationError, match="choose the cache type f16"):
        load_language_model(open_checkpoint(str(tiny_llama), store=tiny_llama), cache_type="q8_0")


@pytest.mark.model
def test_a_real_text_is_foreseen_about_as_well(default_model: Path):
    checkpoint = open_checkpoint(str(default_model), store=default_model.parent)
    tokens = load_tokenizer(checkpoint).encode(PARAGRAPH, add_bos=True)
    exact = logits(load_language_model(checkpoint), tokens, 64)
    before = perplexity(exact, tokens)
    for cache_type, most_moved, most_lost in (("q8_0", 0.1, 0.01), ("q4_0", 1.5, 0.25)):
        found = logits(load_language_model(checkpoint, cache_type=cache_type), tokens, 64)
        moved, after = float(np.abs(found - exact).mean()), perplexity(found, tokens)
        print(f"{cache_type}: mean |logit difference| {moved:.4f}, perplexity {before:.3f} to {after:.3f}")
        assert moved < most_moved
        assert after < before * (1 + most_lost)
