from collections.abc import Iterable, Mapping

import pytest

from models.errors import CheckpointError
from models.ops import Embedding, Joined, Linear, Norm, ShortConv, Vector
from models.sources.base import TensorInfo
from models.weights.matching import matched

Shapes = Mapping[str, tuple[int, ...]]
LAYER = "model.layers.0"
WEIGHTS = (
    Embedding("model.embed_tokens", 11, 4),
    Joined((Linear(f"{LAYER}.q", 4, 6, bias=True), Linear(f"{LAYER}.k", 4, 2))),
    Norm("model.norm", 4, 1e-6),
)
WANTED: Shapes = dict(tensor for weight in WEIGHTS for tensor in weight.tensors())
HEAD = Linear("lm_head", 4, 11)


def infos(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[TensorInfo]:
    return [
        TensorInfo(name, shape, 4, quantized=False, file="w.safetensors", kind="F32", spec=None)
        for name, shape in shapes
    ]


def matching(shapes: Shapes, *, weights: tuple = WEIGHTS, unused: tuple[str, ...] = ()) -> dict[str, str]:
    """The checkpoint's name for each declared one."""
    return {name: info.name for name, info in matched(weights, infos(shapes.items()), "m", unused).items()}


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in WANTED.items() if name not in names}


def test_every_declared_name_finds_its_tensor():
    assert matching(WANTED) == {name: name for name in WANTED}


def test_a_checkpoint_may_leave_out_the_leading_model():
    found = matching({name.removeprefix("model."): shape for name, shape in WANTED.items()})
    assert found == {name: name.removeprefix("model.") for name in WANTED}


def test_a_checkpoint_may_have_a_leading_model_that_is_not_declared():
    bare = (Norm("norm", 4, 1e-6), Embedding("embed_tokens", 11, 4))
    shapes = {"model.norm.weight": (4,), "embed_tokens.weight": (11, 4)}
    expected = {"norm.weight": "model.norm.weight", "embed_tokens.weight": "embed_tokens.weight"}
    assert matching(shapes, weights=bare) == expected


@pytest.mark.parametrize(
    ("layer", "head"),
    [
        ("language_model.model.", "language_model."),
        ("model.language_model.", ""),
        ("language_model.", "language_model."),
    ],
)
def test_a_multimodal_checkpoint_says_first_that_it_is_the_language_model(layer: str, head: str):
    stored = {name: layer + name.removeprefix("model.") for name in WANTED} | {
        "lm_head.weight": f"{head}lm_head.weight"
    }
    shapes = WANTED | {"lm_head.weight": (11, 4)}
    assert matching({stored[name]: shapes[name] for name in stored}, weights=(*WEIGHTS, HEAD)) == stored


@pytest.mark.parametrize("shape", [(6,), (6, 1), (1, 6), (2, 3)])
def test_a_vector_may_be_stored_as_a_matrix_of_as_many_numbers(shape: tuple[int, ...]):
    assert matching({"d": shape}, weights=(Vector("d", 6),)) == {"d": "d"}


@pytest.mark.parametrize("shape", [(6, 1, 4), (6, 4, 1), (6, 4)])
def test_a_kernel_may_have_its_axis_of_one_anywhere(shape: tuple[int, ...]):
    assert matching({"c.weight": shape}, weights=(ShortConv("c", 6, 4),)) == {"c.weight": "c.weight"}


@pytest.mark.parametrize(("name", "shape"), [("d", (7,)), ("d", (2, 4)), ("c.weight", (4, 6)), ("c.weight", (24,))])
def test_neither_may_have_other_sizes(name: str, shape: tuple[int, ...]):
    shapes = {"d": (6,), "c.weight": (6, 1, 4)} | {name: shape}
    with pytest.raises(CheckpointError, match=rf"tensor {name}: its shape is"):
        matching(shapes, weights=(Vector("d", 6), ShortConv("c", 6, 4)))


def test_a_tensor_under_both_names_is_refused():
    with pytest.raises(CheckpointError, match=r"w\.safetensors: tensor norm\.weight: is there twice"):
        matching({**WANTED, "norm.weight": (4,)})


def test_a_missing_tensor_is_named():
    with pytest.raises(CheckpointError, match=r"^m: tensor model\.norm\.weight: is missing$"):
        matching(without("model.norm.weight"))


def test_of_several_missing_tensors_the_first_are_named_and_all_are_counted():
    missing = rf"tensor {LAYER}\.q\.weight: is missing \(and 2 more: {LAYER}\.q\.bias, model\.norm\.weight, \.\.\.\)"
    with pytest.raises(CheckpointError, match=missing):
        matching(without(f"{LAYER}.q.weight", f"{LAYER}.q.bias", "model.norm.weight"))


def test_an_extra_tensor_is_named_with_its_file():
    extra = r"w\.safetensors: tensor model\.layers\.1\.q\.weight: the architecture has no such tensor"
    with pytest.raises(CheckpointError, match=extra):
        matching({**WANTED, "model.layers.1.q.weight": (6, 4)})


@pytest.mark.parametrize("shape", [(4, 6), (6,), (6, 4, 1), (6, 5)])
def test_a_misshaped_tensor_is_named_with_both_shapes(shape: tuple[int, ...]):
    words = ", ".join(map(str, shape))
    with pytest.raises(
        CheckpointError, match=rf"q\.weight: its shape is \[{words}\], and config\.json asks for \[6, 4\]"
    ):
        matching({**WANTED, f"{LAYER}.q.weight": shape})


@pytest.mark.parametrize("name", [f"{LAYER}.self_attn.rotary_emb.inv_freq", "transformer.attn.masked_bias"])
def test_constants_that_are_computed_are_passed_over(name: str):
    assert matching({**WANTED, name: (8,)}) == matching(WANTED)


def test_the_copy_of_a_tied_head_is_passed_over_and_a_head_is_not():
    tied = matching({**WANTED, "lm_head.weight": (11, 4)})
    assert tied == matching(WANTED)
    untied = matching({**WANTED, "lm_head.weight": (11, 4)}, weights=(*WEIGHTS, HEAD))
    assert untied["lm_head.weight"] == "lm_head.weight"
    with pytest.raises(CheckpointError, match=r"lm_head\.bias: the architecture has no such tensor"):
        matching({**WANTED, "lm_head.bias": (11,)})


@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_nobody_asks_for_is_passed_over_where_it_is_named(prefix: str):
    more = {**WANTED, f"{prefix}layers.7.q.weight": (1, 1), f"{prefix}layers.7.q.bias": (1,)}
    assert matching(more, unused=("layers.6.", "layers.7.")) == matching(WANTED)
    with pytest.raises(CheckpointError, match=r"layers\.7\.q\.weight: the architecture has no such tensor"):
        matching(more, unused=("layers.6.",))
