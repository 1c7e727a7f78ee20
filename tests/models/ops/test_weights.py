from dataclasses import dataclass

from models.ops import Embedding, Joined, Linear, Norm, weights_in

EMBED, HEAD = Embedding("embed", 11, 4), Linear("head", 4, 11)
Q, K = Linear("q", 4, 6, bias=True), Linear("k", 4, 2)
NORM = Norm("norm", 4, 1e-6)


@dataclass(frozen=True)
class Inner:
    norm: Norm
    joined: Joined
    nothing: Norm | None = None


@dataclass(frozen=True)
class Outer:
    head: Linear
    layers: tuple[Inner, ...]
    embed: Embedding
    tied: Linear | Embedding
    width: int = 4


def layer(index: int) -> Inner:
    return Inner(Norm(f"{index}.norm", 4, 1e-6), Joined((Linear(f"{index}.q", 4, 6), K)))


def test_declarations_come_in_order_out_of_dataclasses_and_tuples():
    layers = (layer(0), layer(1))
    found = list(weights_in(Outer(HEAD, layers, EMBED, NORM)))
    assert found == [HEAD, layers[0].norm, layers[0].joined, layers[1].norm, layers[1].joined, EMBED, NORM]


def test_what_is_declared_twice_comes_once():
    assert list(weights_in(Outer(HEAD, (), EMBED, EMBED))) == [HEAD, EMBED]
    assert list(weights_in(((NORM, HEAD), Norm("norm", 4, 1e-6)))) == [NORM, HEAD]


def test_what_is_no_declaration_is_passed_over():
    assert list(weights_in(layer(0))) == [layer(0).norm, layer(0).joined]
    assert list(weights_in(("norm", 4, None, NORM))) == [NORM]


def test_each_kind_of_weight_has_its_tensors():
    assert list(Q.tensors()) == [("q.weight", (6, 4)), ("q.bias", (6,))]
    assert list(K.tensors()) == [("k.weight", (2, 4))]
    assert list(EMBED.tensors()) == [("embed.weight", (11, 4))]
    assert list(NORM.tensors()) == [("norm.weight", (4,))]
    joined = Joined((Q, K))
    assert list(joined.tensors()) == [*Q.tensors(), *K.tensors()]
    assert joined.sizes == (6, 2)
