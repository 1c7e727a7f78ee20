import pytest

from models.errors import CheckpointError
from models.gguf_metadata import GGUFMetadata, GGUFValue


def metadata(**values: GGUFValue) -> GGUFMetadata:
    named = {f"llama.{name}": value for name, value in values.items()}
    return GGUFMetadata({"general.architecture": "llama", **named}, {}, lambda _: None, "m.gguf")


def test_a_file_that_does_not_say_what_it_is_is_refused():
    with pytest.raises(CheckpointError, match=r"no general\.architecture"):
        GGUFMetadata({}, {}, lambda _: None, "m.gguf")


def test_values_are_read_by_their_names_without_the_architectures():
    read = metadata(layers=3, theta=5e5, kind="yarn", causal=False)
    assert (read.integer("layers"), read.count("layers")) == (3, 3)
    assert (read.real("theta"), read.text("kind"), read.flag("causal")) == (5e5, "yarn", False)
    assert (read.integer("absent"), read.real("absent"), read.text("absent"), read.flag("absent")) == (None,) * 4


def test_one_value_stands_for_every_layer_and_a_list_for_each():
    assert metadata(heads=4).each("heads", 3) == [4, 4, 4]
    assert metadata(heads=[4, 0, 8]).each("heads", 3) == [4, 0, 8]
    assert metadata().each("heads", 3) is None


def test_flags_are_read_from_a_list_alone():
    assert metadata(slides=[True, False, True]).flags("slides", 2) == [True, False]
    assert metadata(slides=6).flags("slides", 2) is None
    assert metadata().flags("slides", 2) is None


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (lambda read: read.count("x"), 0),
        (lambda read: read.integer("x"), True),
        (lambda read: read.integer("x"), -1),
        (lambda read: read.real("x"), float("nan")),
        (lambda read: read.text("x"), 3),
        (lambda read: read.flag("x"), 1),
        (lambda read: read.each("x", 3), [1, 2]),
        (lambda read: read.each("x", 2), [1, "2"]),
        (lambda read: read.integer("x"), [1, 2]),
        (lambda read: read.flags("x", 3), [True, False]),
        (lambda read: read.flags("x", 2), [1, 2]),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_name(read, value: GGUFValue):
    with pytest.raises(CheckpointError, match=r"llama\.x = .*, which makes no sense"):
        read(metadata(x=value))
