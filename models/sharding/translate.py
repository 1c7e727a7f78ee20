"""The rules by which a recorded operation becomes a rank's: one for each kind, most of them for several operations."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from models.ops import (
    KV,
    Attention,
    DeltaRule,
    Embedding,
    Experts,
    Joined,
    LatentAttention,
    LatentUp,
    LayerNorm,
    Linear,
    Norm,
    Recurrent,
    ShortConv,
    StateSpace,
    Vector,
)
from models.sharding import cuts
from models.sharding.builder import Builder, Indivisible
from models.sharding.cuts import key_of
from models.sharding.demand import is_whole as is_wholly_asked
from models.sharding.layout import Layout, Span, cut, divided, is_whole, joined, local_width, whole
from models.sharding.record import Call, Value

Rule = Callable[[Builder, Call], None]


def translate(output_table: str) -> Rule:
    """What translates each call; `output_table` is the first tensor of what makes words of hidden states."""

    def one(builder: Builder, call: Call) -> None:
        if call.op in ("linear", "embed"):
            _RULES[call.op](builder, replace(call, named={"is_output": _is(call, output_table)}))
        else:
            _RULES.get(call.op, _wholly)(builder, call)

    return one


def _is(call: Call, table: str) -> bool:
    return any(key_of(weight) == table for weight in call.weights)


def _wholly(builder: Builder, call: Call) -> None:
    """On every rank, with all of everything."""
    outputs = builder.emit(
        call.op, [builder.whole(value) for value in call.inputs], *call.args, count=len(call.outputs), named=call.named
    )
    for value, number in zip(call.outputs, outputs, strict=True):
        builder.bind(value, number)


def _each(builder: Builder, call: Call) -> None:
    """An elementwise operation of one value: it stays as it lies."""
    held = builder.settled(call.inputs[0])
    (number,) = builder.emit(call.op, [held.number], *call.args)
    builder.bind(call.outputs[0], number, held.layout)


def _proportional(builder: Builder, call: Call) -> None:
    """A factor: a sum's parts may be multiplied one by one."""
    held = builder.held(call.inputs[0])
    (number,) = builder.emit(call.op, [held.number], *call.args)
    builder.bind(call.outputs[0], number, held.layout, is_part=held.is_part)


def _residual(builder: Builder, call: Call) -> None:
    held = builder.settled(call.inputs[0])
    builder.bind(call.outputs[0], held.number, held.layout)


def _common(builder: Builder, values: tuple[Value, ...]) -> Layout:
    """The layout of the first value that is cut, if one is."""
    layouts = [builder.settled(value).layout for value in values]
    return next((layout for layout in layouts if not is_whole(layout)), layouts[0])


def _pair(builder: Builder, call: Call) -> None:
    """An elementwise operation of values of one width: both lie alike."""
    layout = _common(builder, call.inputs)
    numbers = [builder.cut(value, layout) for value in call.inputs]
    builder.bind(call.outputs[0], builder.emit(call.op, numbers, *call.args)[0], layout)


def _add(builder: Builder, call: Call) -> None:
    helds = [builder.held(value) for value in call.inputs]
    if all(held.is_part for held in helds):
        (number,) = builder.emit("add", [held.number for held in helds])
        builder.bind(call.outputs[0], number, is_part=True)
    else:
        _pair(builder, call)


def _mul(builder: Builder, call: Call) -> None:
    x, y = call.inputs
    held = builder.held(x)
    if held.is_part:
        # A whole factor may be taken to each part of a sum.
        (number,) = builder.emit("mul", [held.number, builder.whole(y)])
        builder.bind(call.outputs[0], number, is_part=True)
        return
    if y.width == x.width:
        _pair(builder, call)
        return
    layout, factors = held.layout, whole(y.width)
    if not is_whole(layout) and y.width > 1:
        one = len(layout) == 1 and y.width % layout[0].pieces == 0
        layout, factors = (layout, cut(y.width, layout[0].pieces)) if one else (whole(x.width), factors)
    (number,) = builder.emit("mul", [builder.cut(x, layout), builder.cut(y, factors)])
    builder.bind(call.outputs[0], number, layout)


def _weigh(builder: Builder, call: Call) -> None:
    factors = call.args[0]
    assert isinstance(factors, Vector)
    held = builder.held(call.inputs[0])
    if factors.width > 1 and not is_whole(held.layout):
        factors = _part_of(builder, factors, held.layout)
    (number,) = builder.emit("weigh", [held.number], factors)
    builder.bind(call.outputs[0], number, held.layout, is_part=held.is_part)


def _part_of(builder: Builder, vector: Vector, layout: Layout) -> Vector:
    local = builder.share(vector, cuts.vector(vector, layout, builder.place))
    assert isinstance(local, Vector)
    return local


def _embed(builder: Builder, call: Call) -> None:
    table = call.args[0]
    assert isinstance(table, Embedding)
    layout = cut(table.rows, builder.ranks)
    share = cuts.table(table, layout, builder.place)
    local = builder.share(table, share)
    first, _ = layout[0].range(builder.place.rank, builder.ranks)
    (number,) = builder.emit("embed_part", [], local, first, table.rows)
    builder.bind(call.outputs[0], number, is_part=True)


def _linear(builder: Builder, call: Call) -> None:
    (x,), (made,), matrix = call.inputs, call.outputs, call.args[0]
    held = builder.settled(x)
    if isinstance(matrix, Embedding):
        layout = cut(matrix.rows, builder.ranks)
        local = builder.share(matrix, cuts.table(matrix, layout, builder.place))
        builder.bind(made, builder.emit("linear", [builder.whole(x)], local)[0], layout)
        return
    assert isinstance(matrix, Linear | Joined)
    if all(span.pieces == builder.ranks for span in held.layout):
        _check_groups(builder, matrix, held.layout)
        local = builder.share(matrix, cuts.by_inputs(matrix, held.layout, builder.place))
        builder.bind(made, builder.emit("linear", [held.number], local)[0], is_part=True)
        return
    layout = _columns(builder, made, matrix, is_output=bool(call.named["is_output"]))
    if is_whole(layout):
        builder.bind(made, builder.emit("linear", [builder.whole(x)], matrix)[0])
        return
    local = builder.share(matrix, cuts.by_outputs(matrix, layout, builder.place))
    builder.bind(made, builder.emit("linear", [builder.whole(x)], local)[0], layout)


def _check_groups(builder: Builder, matrix: Linear | Joined, layout: Layout) -> None:
    """Raise Indivisible where a group of quantised inputs would be cut."""
    for part in matrix.parts if isinstance(matrix, Joined) else (matrix,):
        group, start = builder.group_of(part.name), 0
        for span in layout:
            if start % group or span.local % group or span.width % span.pieces:
                raise Indivisible(
                    f"{span.width} inputs of {part.name}"
                    + (f", quantised in groups of {group}, do not divide" if group > 1 else " do not divide")
                )
            start += span.width


def _columns(builder: Builder, made: Value, matrix: Linear | Joined, *, is_output: bool) -> Layout:
    """How what a matrix makes of a whole value shall lie."""
    asked = builder.demands.of(made)
    if is_wholly_asked(asked):
        return whole(made.width)
    if is_output:
        return cut(made.width, builder.ranks)
    # What a narrow matrix saves is not worth another sum.
    soft = not any(wish.is_hard for wish in asked)
    if soft and made.width * 4 < builder.hidden:
        return whole(made.width)
    if isinstance(matrix, Joined):
        layout = builder.layout_of(asked)
        if divided(layout, matrix.sizes) is None:
            if not soft or len(asked) > 1:
                return whole(made.width)
            layout = joined([(Span(size, builder.ranks),) for size in matrix.sizes])
        return layout
    return builder.layout_of(asked)


def _split(builder: Builder, call: Call) -> None:
    (x,), (sizes, heads) = call.inputs, call.args
    assert isinstance(sizes, tuple)
    assert isinstance(heads, int)
    held = builder.settled(x)
    layout: Layout = held.layout
    if heads == 1:
        parts = divided(layout, sizes)
        layout, parts = (layout, parts) if parts is not None else (whole(x.width), [whole(size) for size in sizes])
        local_sizes, local_heads = tuple(local_width(part) for part in parts), 1
    else:
        pieces = _pieces_of_heads(layout, heads)
        layout = cut(x.width, pieces)
        parts = [cut(value.width, pieces) for value in call.outputs]
        local_sizes, local_heads = sizes, heads // pieces
    numbers = builder.emit("split", [builder.cut(x, layout)], local_sizes, local_heads, count=len(sizes))
    for value, number, part in zip(call.outputs, numbers, parts, strict=True):
        builder.bind(value, number, part)


def _pieces_of_heads(layout: Layout, heads: int) -> int:
    """Into how many pieces a value is cut between heads; 1: it is not, or not there."""
    pieces = layout[0].pieces if len(layout) == 1 else 1
    return pieces if heads % pieces == 0 else 1


def _join(builder: Builder, call: Call) -> None:
    heads = call.args[0]
    assert isinstance(heads, int)
    if heads == 1:
        layouts = [builder.settled(value).layout for value in call.inputs]
        numbers = [builder.held(value).number for value in call.inputs]
        builder.bind(call.outputs[0], builder.emit("join", numbers, 1)[0], joined(layouts))
        return
    pieces = _pieces_of_heads(_common(builder, call.inputs), heads)
    numbers = [builder.cut(value, cut(value.width, pieces)) for value in call.inputs]
    builder.bind(call.outputs[0], builder.emit("join", numbers, heads // pieces)[0], cut(call.outputs[0].width, pieces))


def _rotate(builder: Builder, call: Call) -> None:
    (x,), (heads, rope) = call.inputs, call.args
    assert isinstance(heads, int)
    pieces = _pieces_of_heads(builder.settled(x).layout, heads)
    layout = cut(x.width, pieces)
    (number,) = builder.emit("rotate", [builder.cut(x, layout)], heads // pieces, rope)
    builder.bind(call.outputs[0], number, layout)


def _norm(builder: Builder, call: Call) -> None:
    (x,), norm = call.inputs, call.args[0]
    assert isinstance(norm, Norm | LayerNorm)
    held = builder.settled(x)
    layout = held.layout
    groups_fit = norm.width < x.width and all(
        span.local % norm.width == 0 and span.width % span.pieces == 0 for span in layout
    )
    if is_whole(layout) or groups_fit:
        (number,) = builder.emit(call.op, [held.number], norm)
    elif isinstance(norm, Norm) and norm.width == x.width and all(span.pieces == builder.ranks for span in layout):
        local = builder.share(norm, cuts.vector(norm, layout, builder.place)) if norm.name else norm
        (number,) = builder.emit("norm_part", [held.number], local, x.width)
        builder.note("sum", 1)
    else:
        (normed,) = builder.emit(call.op, [builder.whole(x)], norm)
        number = builder.again_cut(normed, layout)
    builder.bind(call.outputs[0], number, layout)


def _attention(builder: Builder, call: Call) -> None:
    layer, spec = call.args
    assert isinstance(layer, int)
    assert isinstance(spec, Attention)
    own = builder.heads(spec.heads, "attention heads")
    pieces = builder.repeated(spec.kv_heads, "key-value heads")
    sinks = spec.sinks and _part_of(builder, spec.sinks, cut(spec.heads, builder.ranks))
    local = replace(spec, heads=own, kv_heads=spec.kv_heads // pieces, sinks=sinks)
    q, *kv = call.inputs
    numbers = [builder.cut(q, cut(q.width, builder.ranks)), *(builder.cut(x, cut(x.width, pieces)) for x in kv)]
    (number,) = builder.emit(call.op, numbers, layer, local)
    builder.bind(call.outputs[0], number, cut(call.outputs[0].width, builder.ranks))
    state = builder.state[layer]
    if kv and isinstance(state, KV):
        builder.state[layer] = replace(state, heads=local.kv_heads)


def _latent(builder: Builder, call: Call) -> None:
    up, layer, spec = call.args
    assert isinstance(up, LatentUp)
    assert isinstance(spec, LatentAttention)
    own = builder.heads(spec.heads, "attention heads")
    local = builder.share(up, cuts.vector(up, cut(up.heads, builder.ranks), builder.place))
    q, latent = call.inputs
    numbers = [builder.cut(q, cut(q.width, builder.ranks)), builder.whole(latent)]
    (number,) = builder.emit(call.op, numbers, local, layer, replace(spec, heads=own))
    builder.bind(call.outputs[0], number, cut(call.outputs[0].width, builder.ranks))


def _conv(builder: Builder, call: Call) -> None:
    conv, layer = call.args
    assert isinstance(conv, ShortConv)
    assert isinstance(layer, int)
    held = builder.settled(call.inputs[0])
    local = conv
    if not is_whole(held.layout):
        shared = builder.share(conv, cuts.vector(conv, held.layout, builder.place))
        assert isinstance(shared, ShortConv)
        local = shared
        builder.state[layer] = Recurrent(local.shape)
    builder.bind(call.outputs[0], builder.emit(call.op, [held.number], local, layer)[0], held.layout)


def _delta(builder: Builder, call: Call) -> None:
    spec, layer = call.named["spec"], call.named["layer"]
    assert isinstance(spec, DeltaRule)
    assert isinstance(layer, int)
    own = builder.heads(spec.heads, "heads of a delta rule")
    pieces = builder.repeated(spec.key_heads, "key heads of a delta rule")
    by_heads = cut(spec.heads, builder.ranks)
    local = replace(
        spec,
        heads=own,
        key_heads=spec.key_heads // pieces,
        a_log=_part_of(builder, spec.a_log, by_heads),
        dt_bias=_part_of(builder, spec.dt_bias, by_heads),
    )
    _recur(builder, call, (pieces, pieces, *(builder.ranks,) * 3), local.shape, {"layer": layer, "spec": local})


def _space(builder: Builder, call: Call) -> None:
    spec, layer = call.named["spec"], call.named["layer"]
    assert isinstance(spec, StateSpace)
    assert isinstance(layer, int)
    own = builder.heads(spec.heads, "heads of a state space")
    pieces = builder.repeated(spec.groups, "groups of a state space")
    by_heads = cut(spec.heads, builder.ranks)
    local = replace(
        spec,
        heads=own,
        groups=spec.groups // pieces,
        a_log=_part_of(builder, spec.a_log, by_heads),
        dt_bias=_part_of(builder, spec.dt_bias, by_heads),
        d=_part_of(builder, spec.d, by_heads),
    )
    cuts_of = (builder.ranks, pieces, pieces, builder.ranks)
    _recur(builder, call, cuts_of, local.shape, {"layer": layer, "spec": local})


def _recur(
    builder: Builder, call: Call, pieces: tuple[int, ...], shape: tuple[int, ...], named: Mapping[str, object]
) -> None:
    numbers = [builder.cut(value, cut(value.width, count)) for value, count in zip(call.inputs, pieces, strict=True)]
    (number,) = builder.emit(call.op, numbers, named=named)
    builder.bind(call.outputs[0], number, cut(call.outputs[0].width, builder.ranks))
    layer = named["layer"]
    assert isinstance(layer, int)
    builder.state[layer] = Recurrent(shape)


def _experts(builder: Builder, call: Call) -> None:
    experts, activation = call.args
    assert isinstance(experts, Experts)
    x, picks, weights = (builder.whole(value) for value in call.inputs)
    width, count = experts.each[0].down.inputs, len(experts.each)
    group = max(builder.group_of(expert.down.name) for expert in experts.each)
    if width % (builder.ranks * group) == 0:
        share = cuts.experts_by_width(experts, cut(width, builder.ranks), builder.place)
    elif count % builder.ranks == 0:
        share = cuts.experts_spread(experts, builder.place)
        own = count // builder.ranks
        picks, weights = builder.emit("own_picks", [picks, weights], builder.place.rank * own, own, count=2)
    else:
        raise Indivisible(f"{count} experts of {width} columns in groups of {group} do not divide")
    local = builder.share(experts, share)
    (number,) = builder.emit("experts", [x, picks, weights], local, activation, named=call.named)
    builder.bind(call.outputs[0], number, is_part=True)


_RULES: Mapping[str, Rule] = {
    "embed": _embed,
    "linear": _linear,
    "split": _split,
    "join": _join,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "rotate": _rotate,
    "attention": _attention,
    "look_again": _attention,
    "latent_attention": _latent,
    "short_conv": _conv,
    "delta_rule": _delta,
    "state_space": _space,
    "experts": _experts,
    "residual": _residual,
    "add": _add,
    "mul": _mul,
    "weigh": _weigh,
    "scale": _proportional,
    **dict.fromkeys(("position_scale", "activate", "softcap", "xielu"), _each),
    "glu": _pair,
}
