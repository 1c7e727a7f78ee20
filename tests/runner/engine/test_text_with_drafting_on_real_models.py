"""Drafting changes nothing that real architectures say, and nothing that their slots hold."""

from pathlib import Path

import numpy as np
import pytest

from models.arch import build_model
from models.checkpoint import open_checkpoint
from models.executors.base import Executor, Row, Step
from models.executors.onnx import OnnxExecutor, OnnxOptions
from models.executors.onnx import load as load_onnx
from models.tokenizer import load_tokenizer
from runner.engine import row_store
from runner.engine.prefix_cache import PrefixCache
from runner.engine.text import TextEngine
from runner.engine.types import TextRequest
from tests.fakes import ByteTokenizer
from tests.runner.engine.oracle import DRAFT, KINDS, LIES, Oracle, Poisoner, assert_same, measured, streams
from tests.runner.engine.serving import GREEDY, Answer, real_executor, run

pytestmark = pytest.mark.usefixtures("drafts_are_free")

REAL = [
    (name, kind)
    for name in ("llama_gqa", "mistral_window", "qwen3_layer_types", "lfm2")
    for kind in ("onnx", "mlx ahead")
]
WINDOW = 1024
"""Tokens that no window of theirs holds."""


@pytest.fixture(scope="module", params=REAL, ids=" on ".join)
def real(request: pytest.FixtureRequest, parity: Path) -> Executor:
    name, kind = request.param
    return real_executor(parity / name, kind, slots=3)


REQUESTS = [
    TextRequest(prompt, params, num_predict=32, num_ctx=60 if n % 2 else None, shift=True, logprobs=True)
    for n, (prompt, params) in enumerate(zip(["a tale", "some more " * 3, "zyx", "!" * 40] * 2, KINDS, strict=False))
]


def real_engine(real: Executor, **options) -> TextEngine:
    settings = {"context_length": 256, "parallel": 3, "prefill_chunk": 8}
    return TextEngine(real, ByteTokenizer(), prefix_cache=PrefixCache(real, 1 << 24), **(settings | options))


@pytest.fixture(scope="module")
def undrafted(real: Executor) -> tuple[list[Answer], list[list[int]]]:
    """What a real model answers without drafts, and what its rows hold in the end."""
    return run(real_engine(real), *REQUESTS), streams(real_engine(real), *REQUESTS)


@pytest.mark.parametrize("lies", LIES)
def test_real_models_say_the_same_with_drafts(
    real: Executor, undrafted: tuple[list[Answer], list[list[int]]], lies: str, monkeypatch: pytest.MonkeyPatch
):
    # Rows are stored while drafts are in flight.
    monkeypatch.setattr(row_store, "STORE_TOKENS", 4)
    # ONNX Runtime sums in an order that depends on the row alone, but for layers with a window.
    rounding = 0 if isinstance(real, OnnxExecutor) and real.first_held(WINDOW) == 0 else 1e-4
    plain, said = undrafted
    serving = measured(real_engine(real, draft=DRAFT, make_drafter=lambda: Oracle(said, LIES[lies])))
    for _ in range(2):
        drafted = run(serving, *REQUESTS)
        assert [each.text for each in drafted] == [each.text for each in plain]
        for one, other in zip(drafted, plain, strict=True):
            assert one.done.eval_tokens == other.done.eval_tokens
            assert [each.token for each in one.logprobs] == [each.token for each in other.logprobs]
            assert [each.logprob for each in one.logprobs] == pytest.approx(
                [each.logprob for each in other.logprobs], abs=rounding
            )
    assert sum(each.done.drafted_tokens for each in drafted) > 100
    if lies != "always":
        assert sum(each.done.accepted_tokens for each in drafted) > 50


def test_rejected_tokens_leave_a_real_slot_as_if_they_had_never_been(real: Executor):
    engine = TextEngine(
        real, ByteTokenizer(), context_length=256, parallel=1, prefill_chunk=8, draft=DRAFT, make_drafter=Poisoner
    )
    measured(engine).add(1, engine.prepare(TextRequest("hello " * 5, GREEDY, num_predict=40)))
    row = engine._rows[1]
    while row.generated < 20 or not engine._drafted_tokens:
        assert not engine.idle, "the row ended too soon"
        engine.step()
        engine.proceed()
    tokens, following = row.tokens[: row.fed], (7, 8, 9)

    def logits(slot: int) -> np.ndarray:
        made = real.forward(Step((Row(slot, len(tokens), following, 3),)))
        assert made is not None
        return made.read()

    ours = logits(row.slot)
    for begin in range(0, len(tokens), 8):
        real.forward(Step((Row(2, begin, tuple(tokens[begin : begin + 8]), 0),)))
    assert np.allclose(ours, logits(2), atol=1e-4)
    for slot in (row.slot, 2):
        real.release(slot)


@pytest.mark.model
def test_a_text_that_is_edited_takes_half_the_steps(default_model: Path):
    checkpoint = open_checkpoint(str(default_model), default_model.parent)
    model, tokenizer = build_model(checkpoint.config), load_tokenizer(checkpoint)
    loaded = load_onnx(checkpoint, model, OnnxOptions(capacity=1200, threads=2, drafts=True))
    executor = OnnxExecutor(loaded, model.config.vocab_size)
    request = TextRequest(
        "<|im_start|>user\nRepeat the following text word for word, but write 1875 instead of 1874.\n\n"
        "The lighthouse stands on a rocky point at the north end of the island. It was built in 1874 by a crew of "
        "forty men, who carried the granite blocks up from the harbour on sleds drawn by oxen. The keeper, Thomas "
        "Hale, lived there with his wife and three daughters.<|im_end|>\n<|im_start|>assistant\n",
        GREEDY,
        num_predict=60,
    )

    def engine(draft: int) -> TextEngine:
        return TextEngine(executor, tokenizer, context_length=1024, parallel=1, prefill_chunk=128, draft=draft)

    (plain,), (drafted,) = run(engine(0), request), run(engine(DRAFT), request)
    assert_same([drafted], [plain])
    assert drafted.done.accepted_tokens > 0.5 * drafted.done.eval_tokens
