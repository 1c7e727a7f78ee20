"""What mixtures of experts share: declaring them, and the ways in which checkpoints store them.

Source: transformers' `conversion_mapping`; mlx-lm's and Ollama's layouts of stacked experts.
"""

from collections.abc import Mapping

from models.arch.base import Stack
from models.arch.blocks import MLP
from models.config_reader import JSON, ConfigReader
from models.ops import Expert, Experts, Joined, Linear

NAMES = ("gate_proj", "up_proj", "down_proj")
GGUF_NAMES = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.*.gate_proj",
    "ffn_up_exps": "mlp.experts.*.up_proj",
    "ffn_down_exps": "mlp.experts.*.down_proj",
}

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


def is_sparse(config: Mapping[str, JSON], index: int) -> bool:
    """Whether a layer is a mixture, by `mlp_only_layers` and `decoder_sparse_step`. Raises CheckpointError."""
    reader = ConfigReader(config)
    return index not in reader.integers("mlp_only_layers") and (index + 1) % reader.size("decoder_sparse_step", 1) == 0
