"""Which numbers of ranks can share a model, and what a refusal says."""

import pytest

from models.checkpoint import open_checkpoint
from models.errors import ShareError
from models.weights.matching import model_of, tensors_of
from models.weights.shares import plans_of


def planned(parity, name, ranks, sharding="tensor"):
    checkpoint = open_checkpoint(str(parity / name), parity)
    model = model_of(checkpoint)
    return plans_of(model, tensors_of(model, checkpoint), name, ranks, sharding)


@pytest.mark.parametrize(
    ("name", "ranks", "reason"),
    [
        ("smollm2", 2, "9 attention heads do not divide; 3 or 9 ranks can, --shard=pipeline shares it by layers"),
        ("laguna", 4, "6 attention heads do not divide; 2 ranks can, --shard=pipeline shares it by layers"),
        ("nemotron_h", 2, "3 groups of a state space do not divide; --shard=pipeline shares it by layers"),
        ("qwen3_next", 4, "2 key heads of a delta rule do not divide; 2 ranks can, --shard=pipeline"),
        (
            "llama_gqa-Q4_0.gguf",
            4,
            "32 inputs of model.layers.0.self_attn.o_proj, quantised in groups of 32, do not divide; --shard",
        ),
        ("llama_gqa", 3, "4 attention heads do not divide; 2 or 4 ranks can"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers_that_do(parity, name, ranks, reason):
    with pytest.raises(ShareError) as caught:
        planned(parity, name, ranks)
    assert f"{name} cannot be shared by {ranks} ranks: " in str(caught.value)
    assert reason in str(caught.value)


def test_fewer_layers_than_ranks_are_refused(parity):
    with pytest.raises(ShareError, match="layers that end at 2 places do not divide; 2 ranks can"):
        planned(parity, "llama_gqa", 4, "pipeline")


def test_a_dense_model_says_two_sums_a_layer_one_for_its_words_and_one_gathering(parity):
    plan = planned(parity, "llama_gqa", 2)[0]
    kinds = [message.kind for message in plan.messages]
    layers = 2
    assert kinds == ["sum"] * (2 * layers + 1) + ["gather"]


def test_a_mixture_beside_an_mlp_costs_one_sum(parity):
    plan = planned(parity, "qwen2_moe", 2)[0]
    assert [message.kind for message in plan.messages].count("sum") == 2 * 2 + 1


def test_attention_and_mlp_of_one_norm_cost_one_sum(parity):
    plan = planned(parity, "cohere", 2)[0]
    assert [message.kind for message in plan.messages].count("sum") == 4 + 1


def test_stages_take_all_layers_once_and_their_states(parity):
    plans = planned(parity, "lfm2", 2, "pipeline")
    states = sum(len(plan.state) for plan in plans)
    checkpoint = open_checkpoint(str(parity / "lfm2"), parity)
    assert states == len(model_of(checkpoint).state)
    assert [message.kind for message in plans[0].messages] == ["send", "send"]
