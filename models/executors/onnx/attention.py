"""Attention's nodes: GroupQueryAttention over rows in slabs.

A step's tokens are flat (T, …); attention wants rows, right-padded to the longest (B, S, …). `pad` and `unpad` are the
indices that lead there and back. Where drafts are on, a row that runs one token runs it twice for layers that see
everything, at its place and behind it: the kernel sums a single query's scores in another order than several, so that
decoding and drafting would differ in the last bits; what the second writes is overwritten by the row's next step.

Keys and values are plain float32 in slabs (slots, heads, capacity, dim), written in place, or for a quantised cache
codes of 8 or 4 bits with a scale and an offset for 32 values, dequantised for each look.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from models.executors.onnx.graph import CONTRIB, Graph, TensorType
from models.executors.onnx.quantized_kv import QuantizedKV
from models.executors.onnx.slabs import HEAD_STEP, CacheType, SlabSpec, slab_specs
from models.executors.onnx.two_way import Layout, TwoWayNodes
from models.ops import KV, Attention, LayerState, PositionScale, RopeConfig

FLOAT, INT32, INT64 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.int64)

STEP_INPUTS = {
    "pad": TensorType(INT64, ("B", "S")),
    "unpad": TensorType(INT64, ("T", 2)),
    "last": TensorType(INT32, ("B",)),
    "valid": TensorType(INT32, ("B",)),
    "last.window": TensorType(INT32, ("B",)),
    "valid.window": TensorType(INT32, ("B",)),
    "total": TensorType(INT32, ()),
    "bias": TensorType(FLOAT, (1, 1, "S", "total")),
    "wanted": TensorType(INT64, ("N",)),
    "positions": TensorType(INT64, (1, "T")),
    "past": TensorType(INT64, (1,)),
    "places": TensorType(INT64, ("B", "S")),
}


class AttentionNodes:
    """Records attention and the state it needs. Thread: any."""

    def __init__(
        self,
        graph: Graph,
        state: Sequence[LayerState],
        cache_type: CacheType,
        *,
        masked: bool = False,
        sees: bool = False,
    ) -> None:
        """Record into `graph`, with the state that each layer declares.

        Where `masked`, an input `bias` (1, 1, S, total) is added to the scores. Where it `sees`, rows may hold
        pictures: their tokens may look both ways, and may have positions along several axes.
        """
        self._graph = graph
        self._state = state
        self._cache_type = cache_type
        self._masked = masked
        self.sees = sees
        """See above."""
        self.two_way = TwoWayNodes(graph)
        self._held: dict[int, tuple[list[str], list[str]]] = {}
        self.chunks: set[int] = set()
        """Lengths of the runs that layers see alone; each has an input `chunk.LENGTH`."""
        self.again: dict[str, str] = {}
        """Outputs that are a slab once more, by name: what is written there is what it holds."""
        self.ropes: list[RopeConfig] = []
        self.scales: list[PositionScale] = []

    def record(self, qkv: str, layer: int, spec: Attention, sinks: str = "") -> str:
        """The attention of a layer. Shapes: qkv (T, (H + 2K) * d), sinks (H,); the result's name, (T, H * d)."""
        if self._cache_type != "f16":
            return self._quantized(qkv, layer, spec, sinks)
        graph = self._graph
        width = -(-spec.head_dim // HEAD_STEP) * HEAD_STEP
        heads, inside = spec.heads + 2 * spec.kv_heads, _rotates_inside(spec)
        if not inside and spec.rope is not None:
            qkv = graph.add("Concat", [*self._rotated(qkv, spec, spec.rope)], axis=1)[0]
        rows = self.padded(self._widened(qkv, heads, spec.head_dim, width))
        slabs = slab_specs(self._kv(layer), layer, self._cache_type)
        if f"past.{slabs[0].name}" in graph.inputs:
            names = [f"{slab.name}.{graph.name('again')}" for slab in slabs]
            for slab, name in zip(slabs, names, strict=True):
                self.again[f"present.{name}"] = slab.name
                graph.outputs[f"present.{name}"] = graph.outputs[f"present.{slab.name}"]
            pasts = [f"present.{slab.name}" for slab in slabs]
            looked = self.look([rows, "", ""], pasts, spec, sinks, outputs=names, rotate=inside)
            return self._or_both_ways(qkv, self.flat(looked, spec, width), slabs, spec, rotate=inside)
        for slab in slabs:
            capacity = "C" if slab.window is None else f"C.{layer}"
            graph.inputs[f"past.{slab.name}"] = TensorType(slab.dtype, ("B", slab.heads, capacity, slab.width))
            for name in filter(None, (slab.name, slab.stands_for)):
                graph.outputs[f"present.{name}"] = graph.inputs[f"past.{slab.name}"]
        presents = [name for slab in slabs for name in (slab.name, slab.stands_for) if name]
        pasts = [f"past.{slab.name}" for slab in slabs] * (len(presents) // len(slabs))
        if self._kv(layer).window is None:
            looked = self.look([rows, "", ""], pasts, spec, sinks, outputs=presents, rotate=inside)
            return self._or_both_ways(qkv, self.flat(looked, spec, width), slabs, spec, rotate=inside)
        look = partial(self.look, [rows, "", ""], pasts, spec, sinks, outputs=presents, rotate=inside, moves=True)
        if not (spec.two_way and self.sees):
            return self.flat(look(), spec, width)
        own = self._both_ways(qkv, slabs, spec, rotate=inside)
        first, last = self.two_way.looked_first(own, spec.heads * spec.head_dim, self._input("last.window"))
        plain = self.flat(look(last=last), spec, width)
        return self.two_way.chosen(lambda: self.two_way.passed(first), plain)

    def _or_both_ways(self, qkv: str, plain: str, slabs: Sequence[SlabSpec], spec: Attention, *, rotate: bool) -> str:
        """What the kernel made, unless the step has a run that looks both ways. Shapes: see `record`."""
        if not (spec.two_way and self.sees):
            return plain
        return self.two_way.chosen(self._both_ways(qkv, slabs, spec, rotate=rotate), plain)

    def _both_ways(self, qkv: str, slabs: Sequence[SlabSpec], spec: Attention, *, rotate: bool) -> Callable[[], str]:
        """What records attention of a step with such a run, over slabs as they were before or, if whole, are behind."""
        keys, window = slabs[0], slabs[0].window

        def record() -> str:
            turns = spec.rope if rotate else None
            parts = self._parts(qkv, spec) if turns is None else self._rotated(qkv, spec, turns)
            heads = (spec.heads, spec.kv_heads, spec.kv_heads)
            q, *news = (
                self.padded(self._widened(part, count, spec.head_dim, keys.width))
                for part, count in zip(parts, heads, strict=True)
            )
            if window is None:
                k, v = (self.two_way.present(f"present.{slab.name}") for slab in slabs)
            else:
                k, v = (
                    self.two_way.window(f"past.{slab.name}", window, self._by_head(new, spec.kv_heads, slab.width))
                    for slab, new in zip(slabs, news, strict=True)
                )
            layout: Layout = "slab" if window is None else "window"
            return self.flat(self.two_way.looked((q, k, v), spec, keys.width, layout), spec, keys.width)

        return record

    def _by_head(self, x: str, heads: int, width: int) -> str:
        """Shapes: (1, S, heads * width); (1, heads, S, width)."""
        graph = self._graph
        (parts,) = graph.add("Reshape", [x, graph.constant(np.array([1, -1, heads, width], np.int64))])
        return graph.add("Transpose", [parts], perm=[0, 2, 1, 3])[0]

    def padded(self, x: str) -> str:
        """From flat tokens to rows. Shapes: (T, W); (B, S, W)."""
        return self._graph.add("Gather", [x, self._input("pad")], axis=0)[0]

    def flat(self, looked: str, spec: Attention, width: int) -> str:
        """From rows to flat tokens. Shapes: (B, S, H * width); (T, H * head_dim)."""
        graph = self._graph
        (picked,) = graph.add("GatherND", [looked, self._input("unpad")])
        if width == spec.head_dim:
            return picked
        (parts,) = graph.add("Reshape", [picked, graph.constant(np.array([-1, spec.heads, width], np.int64))])
        ends = [graph.constant(np.array([value], np.int64)) for value in (0, spec.head_dim, 2)]
        (cut,) = graph.add("Slice", [parts, *ends])
        return graph.add("Reshape", [cut, graph.constant(np.array([-1, spec.heads * spec.head_dim], np.int64))])[0]

    def look(
        self,
        qkv: list[str],
        pasts: list[str],
        spec: Attention,
        sinks: str,
        *,
        outputs: list[str],
        rotate: bool,
        moves: bool = False,
        last: str = "",
    ) -> str:
        """The node itself; its present keys and values are `present.NAME` for each of `outputs`, or nobody's.

        `moves`: the slab holds a window's tokens, and no others. `last`: in place of the input of that name.
        """
        graph, windowed = self._graph, spec.window is not None
        suffix = ".window" if windowed else ""
        rotations = self._rotations(spec.rope) if spec.rope is not None and rotate else ["", ""]
        places = self._input("places") if rotations[0] and self.has_axes else ""
        inputs = [*qkv, *pasts, last or self._input(f"last{suffix}"), self._input("total"), *rotations, places]
        inputs += [self._added(spec), sinks, "", "", "", "", self._input(f"valid{suffix}")]
        looked = graph.name("attention")
        presents = [f"present.{name}" for name in outputs] or [graph.name("present") for _ in pasts]
        attributes: dict[str, int | float | str | list[int]] = {
            "num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "scale": spec.scale,
            "do_rotary": int(bool(rotations[0])),
            "rotary_interleaved": int(bool(rotations[0]) and spec.rope is not None and spec.rope.interleaved),
            "softcap": spec.softcap or 0.0,
            "local_window_size": spec.window or -1,
            "sliding_window_cache": int(moves),
        }
        graph.append_node("GroupQueryAttention", inputs, [looked, *presents], CONTRIB, attributes)
        return looked

    def _added(self, spec: Attention) -> str:
        """What is added to the scores, if anything."""
        if spec.chunk is None:
            return self._input("bias") if self._masked else ""
        assert not self._masked
        self.chunks.add(spec.chunk)
        name = f"chunk.{spec.chunk}"
        self._graph.inputs[name] = TensorType(FLOAT, ("B", 1, "S", "total"))
        return name

    def _widened(self, qkv: str, heads: int, dim: int, width: int) -> str:
        """Heads filled up with zeros, which change no score. Shapes: (T, heads * dim); (T, heads * width)."""
        if width == dim:
            return qkv
        graph = self._graph
        (parts,) = graph.add("Reshape", [qkv, graph.constant(np.array([-1, heads, dim], np.int64))])
        pads = graph.constant(np.array([0, 0, 0, 0, 0, width - dim], np.int64))
        (filled,) = graph.add("Pad", [parts, pads])
        return graph.add("Reshape", [filled, graph.constant(np.array([-1, heads * width], np.int64))])[0]

    @property
    def has_axes(self) -> bool:
        """Positions may have several axes: rotations are found by `places` and `positions`, not by tokens' order."""
        return self.sees and any(rope.axes for rope in self.ropes)

    def _rotations(self, rope: RopeConfig) -> list[str]:
        """The inputs with the cosines and sines of a rope."""
        if rope not in self.ropes:
            self.ropes.append(rope)
        index = self.ropes.index(rope)
        for kind in ("cos", "sin"):
            self._graph.inputs[f"{kind}.{index}"] = TensorType(FLOAT, ("positions", rope.dims // 2))
        return [f"cos.{index}", f"sin.{index}"]

    def _quantized(self, qkv: str, layer: int, spec: Attention, sinks: str) -> str:
        q, k, v = self._rotated(qkv, spec, spec.rope) if spec.rope is not None else self._parts(qkv, spec)
        if layer not in self._held:
            self._held[layer] = self._quantized_kv(k, v, layer, spec)
        seen, pasts = self._held[layer]
        rows = self.padded(q)
        looked = self.flat(self.look([rows, *seen], pasts, spec, sinks, outputs=[], rotate=False), spec, spec.head_dim)
        if not (spec.two_way and self.sees):
            return looked

        def both_ways() -> str:
            news = [self._by_head(new, spec.kv_heads, spec.head_dim) for new in seen]
            k, v = (self._graph.add("Concat", [past, new], axis=2)[0] for past, new in zip(pasts, news, strict=True))
            return self.flat(self.two_way.looked((rows, k, v), spec, spec.head_dim, "past"), spec, spec.head_dim)

        return self.two_way.chosen(both_ways, looked)

    def _quantized_kv(self, k: str, v: str, layer: int, spec: Attention) -> tuple[list[str], list[str]]:
        """Append keys and values; as they are held, what the step brings (B, S, K * d) and what was (B, K, P, d)."""
        graph = self._graph
        kv = QuantizedKV(graph, 8 if self._cache_type == "q8_0" else 4, spec.kv_heads, spec.head_dim)
        self._input("past")
        specs = slab_specs(self._kv(layer), layer, self._cache_type)
        seen, pasts = [], []
        for part, new in (("k", k), ("v", v)):
            slabs = [slab for slab in specs if slab.name.startswith(f"{part}.")]
            held = kv.append(slabs, new)
            seen.append(self.padded(held.new))
            pasts.append(held.past)
        return seen, pasts

    def _parts(self, qkv: str, spec: Attention) -> list[str]:
        """Queries, keys and values. Shapes: (T, (H + 2K) * d); (T, H * d), (T, K * d) twice."""
        sizes = [count * spec.head_dim for count in (spec.heads, spec.kv_heads, spec.kv_heads)]
        return self._graph.add("Split", [qkv, self._graph.constant(np.array(sizes, np.int64))], outputs=3, axis=1)

    def _rotated(self, qkv: str, spec: Attention, rope: RopeConfig) -> list[str]:
        """The same, queries and keys rotated."""
        q, k, v = self._parts(qkv, spec)
        turned = [self.rotated(q, spec.heads, spec.head_dim, rope), self.rotated(k, spec.kv_heads, spec.head_dim, rope)]
        return [*turned, v]

    def rotated(self, x: str, heads: int, dim: int, rope: RopeConfig) -> str:
        """Each head turned by its token's position. Shapes: (T, heads * dim) both ways."""
        graph, row = self._graph, self._graph.constant(np.array([0], np.int64))
        (whole,) = graph.add("Unsqueeze", [x, row])
        (turned,) = graph.add(
            "RotaryEmbedding",
            [whole, self._input("positions"), *self._rotations(rope)],
            domain=CONTRIB,
            num_heads=heads,
            rotary_embedding_dim=0 if rope.dims == dim else rope.dims,
            interleaved=int(rope.interleaved),
        )
        return graph.add("Squeeze", [turned, row])[0]

    def scaling(self, scale: PositionScale) -> str:
        """The factor of each token, made on the host. Shapes: the input's name, (T, 1)."""
        if scale not in self.scales:
            self.scales.append(scale)
        name = f"scale.{self.scales.index(scale)}"
        self._graph.inputs[name] = TensorType(FLOAT, ("T", 1))
        return name

    def _kv(self, layer: int) -> KV:
        state = self._state[layer]
        assert isinstance(state, KV)
        return state

    def _input(self, name: str) -> str:
        self._graph.inputs[name] = STEP_INPUTS[name]
        return name


def _rotates_inside(spec: Attention) -> bool:
    """Whether the kernel can rotate: it wants widths of a multiple of 16."""
    return spec.rope is not None and spec.rope.dims % HEAD_STEP == 0 and spec.head_dim % HEAD_STEP == 0
