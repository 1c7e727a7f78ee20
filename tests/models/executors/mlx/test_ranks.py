"""Ranks as threads of one process, which meet at each collective: what needs no connections to be seen."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from models.arch import Model
from models.checkpoint import open_checkpoint
from models.errors import ShareError
from models.executors import orders
from models.executors.base import Row, Step
from models.executors.mlx import ranks as mlx_ranks
from models.executors.mlx.communication import MLXCommunication
from models.executors.mlx.ranks import Options, RankExecutor, load_rank, rank_footprint
from models.ops import Ops, Weight, weights_in
from models.sharding import tensor
from models.sharding.cuts import Place, TensorCut, key_of
from models.sharding.layout import Layout
from models.sharding.program import RankPlan
from models.sources.base import NamedTensor
from models.weights.matching import model_of, tensors_of
from models.weights.parts import taken
from models.weights.shares import plans_of
from tests.parity.executors import REACH
from tests.parity.test_llm_parity import TOLERANCE, read_prompts
from tests.parity_ranks.fixtures import ONE_EACH
from tests.parity_vision import rows as vision_rows

OPTIONS = Options("float32", "f16", vision_rows.LONGEST_STEP, REACH, 0)


@dataclass(slots=True)
class Meeting:
    """Where ranks leave what they have, and take what all have left."""

    count: int
    left: dict[int, np.ndarray] = field(default_factory=dict)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=60)

    def exchange(self, rank: int, own: np.ndarray) -> list[np.ndarray]:
        self.left[rank] = own
        self.barrier.wait()
        every = [self.left[each] for each in range(self.count)]
        self.barrier.wait()
        return every


@dataclass(frozen=True, slots=True)
class Group:
    """What `mx.distributed.Group` says of itself."""

    own: int
    meeting: Meeting

    def rank(self) -> int:
        return self.own

    def size(self) -> int:
        return self.meeting.count


class Meeters(MLXCommunication):
    """Collectives by meeting; all else is MLX's own."""

    def sum(self, ops: Ops[mx.array], x: mx.array) -> mx.array:
        every = self.group.meeting.exchange(self.group.rank(), np.array(x))
        return mx.array(np.sum(every, axis=0))

    def gather(self, ops: Ops[mx.array], x: mx.array, layout: Layout) -> mx.array:
        every = np.concatenate(self.group.meeting.exchange(self.group.rank(), np.array(x)))
        real = mx.distributed.all_gather
        mx.distributed.all_gather = lambda _, group: mx.array(every)
        try:
            return MLXCommunication.gather(self, ops, x, layout)
        finally:
            mx.distributed.all_gather = real


def each_rank(count: int, work: Callable[[Group], Any]) -> list[Any]:
    """What every rank's work gives. MLX's graphs belong to their thread, so all of it is done in one."""
    meeting = Meeting(count)

    def one(rank: int) -> Any:
        try:
            return work(Group(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., RankExecutor]:
    """Loads a rank of a folder as planned, or by the plans that a function makes."""
    monkeypatch.setattr(mlx_ranks, "MLXCommunication", Meeters)

    def loaded(folder: Path, group: Group, plans: Sequence[RankPlan] | None = None) -> RankExecutor:
        checkpoint = open_checkpoint(str(folder), folder)
        model = model_of(checkpoint)
        if plans is None:
            plans = plans_of(model, tensors_of(model, checkpoint), folder.name, group.size(), "tensor")
        return load_rank(checkpoint, model, plans, group, OPTIONS)

    return loaded


def run(executor: RankExecutor, *rows: Row) -> np.ndarray:
    logits = executor.forward(Step(rows))
    assert logits is not None
    return logits.read()


@pytest.mark.parametrize(("name", "ranks"), [("mixtral", 2), ("gpt_oss", 2), ("olmoe", 2)])
def test_experts_whose_groups_do_not_divide_are_spread(parity, load, name: str, ranks: int):
    checkpoint = open_checkpoint(str(parity / name), parity)
    model = model_of(checkpoint)
    plans = [
        tensor.plan(model, Place(rank, ranks), lambda matrix: 4096 if ".experts." in matrix else 1)
        for rank in range(ranks)
    ]
    assert "own_picks" in {step.op for step in plans[0].forward.instructions}
    prompt = read_prompts(name)[0]
    made = each_rank(
        ranks, lambda group: run(load(parity / name, group, plans), Row(0, 0, tuple(prompt.tokens), len(prompt.tokens)))
    )
    for logits in made:
        np.testing.assert_allclose(logits, prompt.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ONE_EACH)
def test_four_ranks_say_what_the_reference_says(parity, load, name: str):
    """Beside those of `tests/parity_ranks`, which are processes and fewer."""
    prompts = read_prompts(name)
    rows = [Row(slot, 0, tuple(prompt.tokens), len(prompt.tokens)) for slot, prompt in enumerate(prompts)]
    checkpoint = open_checkpoint(str(parity / name), parity)
    model = model_of(checkpoint)
    try:
        plans = plans_of(model, tensors_of(model, checkpoint), name, 4, "tensor")
    except ShareError:
        # Refused, as `tests/models/weights/test_shares.py` has it.
        return
    made = each_rank(4, lambda group: run(load(parity / name, group, plans), *rows))
    for logits in made:
        np.testing.assert_allclose(
            logits, np.concatenate([prompt.logits for prompt in prompts]), rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "llava"])
def test_pictures_that_only_the_first_rank_has_are_seen_by_all(load, name: str):
    prompt = vision_rows.read_prompts(name)[0]
    sight = vision_rows.sight_of(name)
    plan = vision_rows.planned(sight, prompt.text)

    def see(group: Group) -> np.ndarray:
        row = plan.row(0, 0, plan.tokens)
        if group.rank():
            told = orders.from_json(json.loads(json.dumps(orders.to_json(orders.Forward(Step((row,)))))))
            assert isinstance(told, orders.Forward)
            row = told.step.rows[0]
            assert not any(span.picture.rows.any() for span in row.spans)
        return run(load(vision_rows.HERE / name, group), row)

    for logits in each_rank(2, see):
        np.testing.assert_allclose(logits, prompt.logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["llama_gqa", "gemma3n", "deepseek_v3", "bamba", "gpt_oss", "qwen3_next"])
@pytest.mark.parametrize("sharding", ["tensor", "pipeline"])
def test_a_rank_holds_what_was_predicted_and_no_more_than_its_share_of_what_can_be_cut(
    parity, load, name: str, sharding: str
):
    checkpoint = open_checkpoint(str(parity / name), parity)
    model = model_of(checkpoint)
    found = tensors_of(model, checkpoint)
    plans = plans_of(model, found, name, 2, sharding)
    predicted = [rank_footprint(model, plan, found, "float32", "f16").weights for plan in plans]
    held = each_rank(2, lambda group: load(parity / name, group, plans).weights.nbytes)
    # Latents are held in another order, and rates in float32 wherever they lie.
    np.testing.assert_allclose(held, predicted, rtol=0.01)
    if sharding == "tensor":
        nbytes = {key: 4 * sum(int(np.prod(shape)) for _, shape in weight.tensors()) for key, weight in declared(model)}
        whole = sum(size for key, size in nbytes.items() if key not in plans[0].shares)
        assert max(held) <= (sum(nbytes.values()) - whole) / 2 * 1.06 + whole


def declared(model: Model) -> list[tuple[str, Weight]]:
    return [(key_of(weight), weight) for weight in weights_in(model.weights)]


def test_nothing_of_a_tensor_is_read_but_the_rank_s_part(parity):
    checkpoint = open_checkpoint(str(parity / "llama_gqa"), parity)

    def unread() -> None:
        raise AssertionError("all of it is read")

    for tensor_ in checkpoint.tensors():
        whole = tensor_.value
        sealed: NamedTensor = replace(tensor_, read=unread)
        half = len(whole) // 2
        np.testing.assert_array_equal(taken(sealed, TensorCut(rows=((half, len(whole)),))), whole[half:])
        if whole.ndim > 1:
            some = taken(sealed, TensorCut(columns=((0, 8), (16, 24))))
            np.testing.assert_array_equal(some, np.concatenate([whole[:, :8], whole[:, 16:24]], axis=1))


@pytest.mark.parametrize("name", ["llama_gqa-Q4_0", "llama_gqa-Q8_0", "qwen3_moe-Q4_1", "llama_gqa"])
def test_blocks_are_taken_in_the_bits_that_are_stored(parity, name: str):
    checkpoint = open_checkpoint(str(parity / f"{name}.gguf"), parity)
    infos = {info.name: info for info in checkpoint.infos()}
    for tensor_ in checkpoint.tensors():
        if not infos[tensor_.name].quantized or len(infos[tensor_.name].shape) > 2:
            continue
        whole = tensor_.value
        half = whole.shape[0] // 2
        part = taken(tensor_, TensorCut(rows=((half, whole.shape[0]),), padding=2))
        assert part.kind == whole.kind
        assert part.shape == (whole.shape[0] - half + 2, whole.shape[1])
        np.testing.assert_array_equal(part.rows[:-2], whole.rows[half:])
        assert not part.rows[-2:].any()
        if whole.shape[1] >= 64:
            some = taken(tensor_, TensorCut(columns=((32, 64),)))
            each = whole.rows.shape[1] * 32 // whole.shape[1]
            np.testing.assert_array_equal(some.rows, whole.rows[:, each : 2 * each])
