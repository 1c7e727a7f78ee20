"""A row's bits do not depend on its company: exact equality, whatever the weights are and whoever runs beside."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from models.arch import build_model
from models.executors.base import Row, Step
from models.executors.onnx import OnnxExecutor, OnnxOptions, load
from tests.models.executors.checkpoints import CONFIG, KINDS, SHARED, RandomCheckpoint

TOKENS = np.random.default_rng(0).integers(0, 320, 400).tolist()
PROMPT, ANSWER = 70, 12


MIXTURE = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}


def executor(kind: str, config: Mapping[str, object] = CONFIG, **options: object) -> OnnxExecutor:
    checkpoint = RandomCheckpoint(kind, config)
    model = build_model(checkpoint.config)
    settings = OnnxOptions(**({"slots": 16, "capacity": 512, "threads": 2, "drafts": True} | options))
    return OnnxExecutor(load(checkpoint, model, settings), model.config.vocab_size)


def tokens_of(row: int) -> list[int]:
    """Rows differ from the first token on."""
    return TOKENS[row * 7 : row * 7 + PROMPT + ANSWER]


def read(model: OnnxExecutor, *rows: Row) -> np.ndarray:
    logits = model.forward(Step(rows))
    assert logits is not None
    return logits.read().copy()


def prefill(model: OnnxExecutor, slot: int, tokens: Sequence[int], chunk: int = 64) -> None:
    for begin in range(0, len(tokens), chunk):
        model.forward(Step((Row(slot, begin, tuple(tokens[begin : begin + chunk]), 0),)))


def alone(model: OnnxExecutor, row: int = 0, slot: int = 0) -> np.ndarray:
    """The logits of each token of the answer, token by token, by itself. Shapes: (ANSWER, V)."""
    tokens = tokens_of(row)
    prefill(model, slot, tokens[:PROMPT])
    said = [read(model, Row(slot, PROMPT + n, (tokens[PROMPT + n],))) for n in range(ANSWER)]
    return np.concatenate(said)


LATENT = CONFIG | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "q_lora_rank": 64,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
RECURRENT = CONFIG | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}
ALL_SHARED = SHARED | {"layer_types": ["full_attention"] * 5}
MIXTURES = [f"experts {kind}" for kind in ("F32", "Q4_K", "affine4", "mxfp4", "exact", "large")]


ALONE = {
    "int8": ("F32", {"weights": "int8"}),
    "int4": ("F32", {"weights": "int4"}),
    "exact": ("Q4_1", {"activations": "float32"}),
    "q8_0": ("Q4_1", {"cache_type": "q8_0"}),
    "q8_0 even": ("Q4_1", {"cache_type": "q8_0"}),
    "large": ("affine4", {}),
    "without drafts": ("Q4_1", {"drafts": False}),
    "latent": ("Q4_1", {"config": LATENT}),
    "shared": ("Q4_1", {"config": ALL_SHARED}),
    "recurrent": ("Q4_0", {"config": RECURRENT}),
    "recurrent even": ("Q4_0", {"config": RECURRENT}),
    "experts exact": ("Q4_1", {"config": MIXTURE, "activations": "float32"}),
    "experts large": ("affine4", {"config": MIXTURE}),
}


@pytest.fixture(scope="module", params=[*KINDS, *(name for name in ALONE if "experts" not in name), *MIXTURES])
def model(request: pytest.FixtureRequest) -> Iterator[OnnxExecutor]:
    name = request.param
    mixture = {"config": MIXTURE} if name.startswith("experts") else {}
    kind, options = ALONE.get(name, (name.removeprefix("experts "), mixture))
    with pytest.MonkeyPatch.context() as patch:
        if name.endswith("large"):
            patch.setattr("models.executors.onnx.forms.LARGE_BYTES", 0)
        if name.endswith("even"):
            patch.setattr("models.executors.onnx.products.treats_rows_alike", lambda *_: False)
        made = executor(kind, **options)
    yield made
    made.close()


@pytest.mark.parametrize("others", [1, 7, 15])
def test_a_row_says_the_same_beside_others(model: OnnxExecutor, others: int):
    expected = alone(model)
    for slot in range(others + 1):
        prefill(model, slot, tokens_of(slot)[:PROMPT])
    said = [
        read(model, *(Row(slot, PROMPT + n, (tokens_of(slot)[PROMPT + n],)) for slot in range(others + 1)))[0]
        for n in range(ANSWER)
    ]
    np.testing.assert_array_equal(np.stack(said), expected)


def test_a_row_says_the_same_in_any_slot_with_idle_ones_between(model: OnnxExecutor):
    expected = alone(model)
    prefill(model, 3, tokens_of(2)[:40])
    prefill(model, 9, tokens_of(0)[:PROMPT])
    said = [
        read(model, Row(3, 40 + n, (5,)), Row(9, PROMPT + n, (tokens_of(0)[PROMPT + n],)))[1] for n in range(ANSWER)
    ]
    np.testing.assert_array_equal(np.stack(said), expected)


def test_rows_that_join_and_leave_in_mid_flight_change_nothing(model: OnnxExecutor):
    expected = alone(model)
    prefill(model, 0, tokens_of(0)[:PROMPT])
    said = []
    for n in range(ANSWER):
        own = Row(0, PROMPT + n, (tokens_of(0)[PROMPT + n],))
        joined = [Row(1, 20 * n, tuple(tokens_of(1)[20 * n : 20 * n + 20]), 0)] if n < 3 else []
        at = n - (n + 3) // 4
        decoding = [Row(2, at, (tokens_of(2)[at],))] if n % 4 else []
        said.append(read(model, own, *decoding, *joined)[0])
        if n == 8:
            model.release(1)
    np.testing.assert_array_equal(np.stack(said), expected)


def test_drafting_and_others_that_draft_change_nothing(model: OnnxExecutor):
    """Tokens are verified three at a time, wrong ones taken back, beside a row that drafts five."""
    if not model._loaded.looks_twice:
        pytest.skip("this executor was not told that there are drafts")
    expected, tokens = alone(model), tokens_of(0)
    prefill(model, 0, tokens[:PROMPT])
    prefill(model, 1, tokens_of(1)[:30])
    said = []
    for n in range(0, ANSWER, 3):
        drafts = (*tokens[PROMPT + n : PROMPT + n + 3], 9, 9)
        other = Row(1, 30 + n, tuple(tokens_of(1)[30 + n : 36 + n]), 6)
        said.append(read(model, Row(0, PROMPT + n, drafts, 5), other)[:3])
    np.testing.assert_array_equal(np.concatenate(said), expected)


def test_a_prompt_says_the_same_however_it_is_cut(model: OnnxExecutor):
    if not model._loaded.looks_twice:
        pytest.skip("this executor was not told that there are drafts")
    tokens = tokens_of(0)
    whole = read(model, Row(0, 0, tuple(tokens), len(tokens)))
    pieces, begin = [], 0
    for length in (1, 2, 17, 1, 33, 16, len(tokens)):
        piece = tuple(tokens[begin : begin + length])
        pieces.append(read(model, Row(0, begin, piece, len(piece))))
        begin += len(piece)
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_a_windowed_row_says_the_same_beside_others_and_past_its_window():
    config = CONFIG | {"architectures": ["MistralForCausalLM"], "sliding_window": 24}
    checkpoint = RandomCheckpoint("Q4_1", config)
    built = build_model(checkpoint.config)
    made = OnnxExecutor(load(checkpoint, built, OnnxOptions(slots=4, capacity=1024, threads=2)), 320)
    tokens = (TOKENS * 2)[:700]
    prefill(made, 0, tokens[:600])
    expected = [read(made, Row(0, 600 + n, (tokens[600 + n],)))[0] for n in range(40)]
    prefill(made, 1, tokens[:600])
    prefill(made, 2, tokens[3:200])
    said = [read(made, Row(1, 600 + n, (tokens[600 + n],)), Row(2, 197 + n, (7, 8), 2))[0] for n in range(40)]
    np.testing.assert_array_equal(np.stack(said), np.stack(expected))
    made.close()
