"""What a tower's graph on ONNX Runtime looks like."""

from models.executors.onnx.attention import AttentionNodes
from models.executors.onnx.graph import Graph, Node
from models.executors.onnx.products import ProductNodes
from models.executors.onnx.tower_recorder import TowerRecorder
from models.ops import Attention

SPEC = Attention(4, 4, 16, 0.25)
MASK, BIAS = 4, 5
"""Where MultiHeadAttention has its mask, and what is added to its scores."""


def attention_of(groups: str) -> Node:
    graph = Graph()
    recorder = TowerRecorder(graph, ProductNodes(graph, {}), AttentionNodes(graph, (), "f16"))
    q, k, v = (recorder.given(name, 64) for name in "qkv")
    assert recorder.look_around(q, k, v, SPEC, groups).name
    (node,) = [node for node in graph.nodes if node.op == "MultiHeadAttention"]
    return node


def test_attention_to_all_tokens_has_no_mask_so_that_scores_are_never_held():
    """The library goes through the keys in blocks where there is neither (1.32, with 4,096 tokens and 16 heads)."""
    assert not any(attention_of("").inputs[MASK:])


def test_attention_in_groups_has_a_mask_and_nothing_is_added():
    inputs = attention_of("groups").inputs
    assert inputs[MASK] == "groups.visible"
    assert not any(inputs[BIAS:])
