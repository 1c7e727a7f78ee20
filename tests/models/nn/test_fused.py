"""The fused decoder against the plain one where a published model goes and tests/parity's fixtures do not."""

import subprocess
import sys
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path

from models.gemm import Gemm
from models.llm.base import Row
from models.nn.decoder import Decoder, DecoderConfig, read_decoder_config
from models.nn.fused import FusedDecoder

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]

Change = Callable[[str, np.ndarray], np.ndarray]


def config(**changes: bool) -> DecoderConfig:
    sizes = {
        "vocab_size": 11,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    }
    return read_decoder_config(sizes, **changes)


def decoder(of: DecoderConfig, change: Change = lambda _, weight: weight) -> Decoder:
    """A decoder with the same random weights for the same configuration."""
    rng = np.random.default_rng(7)

    def random(path: str, old: mx.array) -> mx.array:
        centre, spread = (1.0, 0.3) if "norm" in path else (0.0, old.shape[-1] ** -0.5)
        return mx.array(change(path, rng.normal(centre, spread, old.shape).astype(np.float32)))

    model = Decoder(of)
    model.update(tree_map_with_path(random, model.parameters()))
    return model


def logits(model: Decoder | FusedDecoder, *lengths: int) -> np.ndarray:
    """The logits of TOKENS, run in pieces of these lengths and the rest."""
    cache, start, found = model.new_cache(), 0, []
    for length in (*lengths, len(TOKENS) - sum(lengths)):
        tokens = mx.array(TOKENS[start : start + length])
        found.append(np.array(model.logits(model(tokens, [Row(length, cache)]))))
        start += length
    return np.concatenate(found)


def times(factor: float, *parts: str) -> Change:
    return lambda path, weight: weight * np.float32(factor) if any(part in path for part in parts) else weight


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(times(400.0, "gate_proj"), id="gates in the hundreds"),
        pytest.param(times(40000.0, "gate_proj"), id="gates beyond the range of exp"),
        pytest.param(times(30.0, "q_proj", "k_proj"), id="attention that is all or nothing"),
        pytest.param(times(1e-4, "q_proj", "k_proj"), id="attention that is even"),
        pytest.param(times(300.0, "embed_tokens"), id="a residual in the hundreds"),
        pytest.param(times(1e-6, "embed_tokens"), id="a residual below the norm's epsilon"),
    ],
)
def test_extreme_activations_come_out_as_from_the_plain_form(change: Change, gemm: Gemm):
    expected = logits(decoder(config(), change), 5, 1, 1)
    assert np.isfinite(expected).all()
    found = logits(FusedDecoder(decoder(config(), change), gemm), 5, 1, 1)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"output_bias": True, "mlp_bias": True}]
)
def test_each_option_comes_out_as_from_the_plain_form(options: dict[str, bool], gemm: Gemm):
    expected = logits(decoder(config(**options)), 3, 7, 1)
    np.testing.assert_allclose(logits(FusedDecoder(decoder(config(**options)), gemm), 3, 7, 1), expected, atol=2e-5)


def test_the_same_step_twice_gives_the_same(gemm: Gemm):
    """No arithmetic in borrowed memory reaches a weight, a mask or a rotation."""
    model = FusedDecoder(decoder(config(qkv_bias=True, output_bias=True, mlp_bias=True)), gemm)
    first = logits(model, 6, 6)
    np.testing.assert_array_equal(logits(model, 6, 6), first)


def test_many_steps_may_be_built_before_one_is_read(gemm: Gemm):
    model = FusedDecoder(decoder(config()), gemm)
    expected = logits(model, 5, 4)
    cache = model.new_cache()
    pieces = [TOKENS[:5], TOKENS[5:9], TOKENS[9:]]
    lazy = [model.logits(model(mx.array(piece), [Row(len(piece), cache)])) for piece in pieces]
    mx.eval(lazy)
    np.testing.assert_allclose(np.concatenate([np.array(part) for part in lazy]), expected, atol=1e-5)


def test_the_decoder_gives_its_layers_away(gemm: Gemm):
    plain = decoder(config())
    FusedDecoder(plain, gemm)
    assert len(plain.model.layers) == 0


def test_both_forms_promise_the_same(gemm: Gemm):
    plain = decoder(config())
    said = (plain.vocab_size, plain.context_length, plain.num_layers, plain.cache_nbytes(1000))
    model = FusedDecoder(plain, gemm)
    assert (model.vocab_size, model.context_length, model.num_layers, model.cache_nbytes(1000)) == said


def test_padding_sees_the_text_and_is_seen_by_nobody(gemm: Gemm):
    """In both forms, and before the final norm as well as behind it."""
    valid, length = 5, len(TOKENS)
    plain, fused = decoder(config(qk_norm=True)), FusedDecoder(decoder(config(qk_norm=True)), gemm)

    def states(model: Decoder | FusedDecoder, tokens: list[int], hidden_from: int | None) -> list[np.ndarray]:
        row = Row(len(tokens), model.new_cache(), hidden_from=hidden_from)
        return [np.array(each) for each in model.residuals(mx.array(tokens), [row])]

    padded = states(plain, TOKENS, valid)
    for ours, theirs in zip(states(fused, TOKENS, valid), padded, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    for whole, alone in zip(padded, states(plain, TOKENS[:valid], None), strict=True):
        np.testing.assert_allclose(whole[:valid], alone, atol=2e-5)
    other = states(plain, [*TOKENS[:-1], 9 - TOKENS[-1]], valid)
    same = states(plain, [*TOKENS[:valid], 9 - TOKENS[valid], *TOKENS[valid + 1 :]], valid)
    assert len(padded) == plain.num_layers + 1
    np.testing.assert_allclose(other[-1][: length - 1], padded[-1][: length - 1], atol=2e-5)
    np.testing.assert_allclose(same[-1][valid + 1 :], padded[-1][valid + 1 :], atol=2e-5)
    assert not np.allclose(same[-1][valid], padded[-1][valid], atol=1e-3)


FUSING = """
from pathlib import Path
from models import backend
backend.prepare()
import mlx.core as mx
import psutil
import models.llm
from models.nn.decoder import Decoder, read_decoder_config
from models.nn.fused import fused

sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
more = {"num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
decoder = Decoder(read_decoder_config(sizes | more))
mx.eval(decoder.parameters())
backend.give_back()
before = psutil.Process().memory_info().rss
decoder = fused(decoder)
now = psutil.Process().memory_info().rss
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
# getrusage would count what the parent of this process held when it started it.
peak = int(status["VmHWM"].split()[0]) << 10
print(mx.get_active_memory() >> 20, (now - before) >> 20, (peak - before) >> 20)
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_than_a_layer_is_held_twice_and_nothing_is_kept():
    done = subprocess.run([sys.executable, "-c", FUSING], capture_output=True, text=True, timeout=60, check=True)
    model, kept, peak = map(int, done.stdout.split())
    layer = head = 16
    assert model > 200
    assert kept < head
    assert peak < head + 3 * layer
