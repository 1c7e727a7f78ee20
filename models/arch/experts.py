"""What mixtures of experts share: declaring them, and the ways in which checkpoints store them.

Source: transformers' `conversion_mapping`; mlx-lm's and Ollama's layouts of stacked experts.
"""

from collections.abc import Mapping

from models.arch.base import Stack
from models.arch.blocks import FILE, MLP, Dims, MoE
from models.config_reader import JSON, ConfigReader
from models.errors import CheckpointError
from models.ops import Expert, Experts, Joined, Linear, Routing, Vector

NAMES = ("gate_proj", "up_proj", "down_proj")
GGUF_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}
GGUF_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
}

_FLOOR = 1e-20
"""What keeps the sum of no weights from being divided by."""

STACKS = (
    # As GGUF's reader tells of them; by projection; gate and up in one; under the parameter's bare name.
    Stack(r"(.*\.experts)\.\*\.(.+)", ("{0}.{n}.{1}",)),
    Stack(r"(.*)\.(?:switch_mlp|experts)\.((?:gate|up|down)_proj)\.(weight|bias)", ("{0}.experts.{n}.{1}.{2}",)),
    Stack(
        r"(.*)\.(?:switch_mlp|experts)\.gate_up_proj(?:\.weight)?",
        ("{0}.experts.{n}.gate_proj.weight", "{0}.experts.{n}.up_proj.weight"),
    ),
    Stack(r"(.*)\.experts\.down_proj", ("{0}.experts.{n}.down_proj.weight",)),
)


def stacks_of(gate: str, up: str, down: str) -> tuple[Stack, ...]:
    """The same of experts whose matrices go by other names: stacked under theirs, or under the usual ones."""
    own = dict(zip(NAMES, (gate, up, down), strict=True))
    matrices = tuple(
        Stack(
            rf"(.*)\.(?:switch_mlp|experts)\.(?:{usual}|{name})\.(weight|bias)", (f"{{0}}.experts.{{n}}.{name}.{{1}}",)
        )
        for usual, name in own.items()
    )
    parameters = (
        Stack(r"(.*)\.experts\.gate_up_proj", tuple(f"{{0}}.experts.{{n}}.{name}.weight" for name in (gate, up))),
        Stack(r"(.*)\.experts\.down_proj", (f"{{0}}.experts.{{n}}.{down}.weight",)),
    )
    return (STACKS[0], *matrices, *parameters)


def experts(
    name: str, count: int, hidden: int, width: int, *, names: tuple[str, str, str] = NAMES, bias: bool = False
) -> Experts:
    """Declare gated MLPs `NAME.experts.N`, each of `width`; `names` are those of gate, up and down."""
    gate, up, down = names

    def expert(place: str) -> Expert:
        joined = Joined(tuple(Linear(f"{place}.{part}", hidden, width, bias) for part in (gate, up)))
        return Expert(joined, Linear(f"{place}.{down}", width, hidden, bias))

    return Experts(tuple(expert(f"{name}.experts.{number}") for number in range(count)))


def shared_expert(name: str, hidden: int, width: int) -> MLP:
    """Declare the MLP of that name that all tokens go through."""
    gate_up = Joined(tuple(Linear(f"{name}.{part}_proj", hidden, width) for part in ("gate", "up")))
    return MLP(gate_up, Linear(f"{name}.down_proj", width, hidden))


def mixture_beside_one(config: Mapping[str, JSON], dims: Dims, name: str, *, normalized: bool) -> MoE:
    """Declare a mixture and an MLP that all tokens go through, which has a gate of its own.

    `normalized`: what `norm_topk_prob` is where the config does not say.

    Raises:
        CheckpointError: a value is missing or impossible.
    """
    reader, hidden = ConfigReader(config), dims.hidden_size
    count = reader.size("num_experts")
    return MoE(
        Linear(f"{name}.gate", hidden, count),
        experts(name, count, hidden, reader.size("moe_intermediate_size")),
        Routing(
            reader.count("num_experts_per_tok", count), normalized=reader.flag("norm_topk_prob", default=normalized)
        ),
        shared=shared_expert(f"{name}.shared_expert", hidden, reader.size("shared_expert_intermediate_size")),
        shared_gate=Linear(f"{name}.shared_expert_gate", hidden, 1),
    )


def is_sparse(config: Mapping[str, JSON], index: int) -> bool:
    """Whether a layer is a mixture, by `mlp_only_layers` and `decoder_sparse_step`. Raises CheckpointError."""
    reader = ConfigReader(config)
    return index not in reader.integers("mlp_only_layers") and (index + 1) % reader.size("decoder_sparse_step", 1) == 0


def sigmoid_moe(config: Mapping[str, JSON], dims: Dims, name: str) -> MoE:
    """Declare a mixture whose experts are chosen by sigmoid scores, a bias and groups. Raises CheckpointError."""
    reader, hidden = ConfigReader(config), dims.hidden_size
    count, width = reader.size("n_routed_experts"), reader.size("moe_intermediate_size")
    shared = reader.integer("n_shared_experts", 1)
    return MoE(
        Linear(f"{name}.gate", hidden, count),
        experts(name, count, hidden, width),
        sigmoid_routing(reader, count, Vector(f"{name}.gate.e_score_correction_bias", count)),
        shared=shared_expert(f"{name}.shared_experts", hidden, shared * width) if shared else None,
    )


def sigmoid_routing(reader: ConfigReader, count: int, bias: Vector) -> Routing:
    """How one of `count` experts is chosen by sigmoid scores, a bias and groups. Raises CheckpointError."""
    for key, value, wanted in (
        ("scoring_func", reader.text("scoring_func", "sigmoid"), "sigmoid"),
        ("topk_method", reader.text("topk_method", "noaux_tc"), "noaux_tc"),
        ("moe_layer_freq", reader.integer("moe_layer_freq", 1), 1),
    ):
        if value != wanted:
            raise CheckpointError(f"{key} {value!r} is not supported", file=FILE)
    groups = reader.count("n_group", count, 1)
    if count % groups or count // groups < min(2, count):
        raise CheckpointError(f"{count} experts do not divide into {groups} groups of two or more", file=FILE)
    return Routing(
        reader.count("num_experts_per_tok", count),
        score="sigmoid",
        normalized=reader.flag("norm_topk_prob", default=True),
        floor=_FLOOR,
        scale=reader.number("routed_scaling_factor", 1.0),
        bias=bias,
        groups=groups,
        kept_groups=reader.count("topk_group", groups, 1),
        best_of_group=2,
    )
