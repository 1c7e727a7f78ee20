"""The configuration of the process. `from_args` is the only reader of argv and of the environment."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from models.quantization import WeightPolicy


class DialectName(Enum):
    """The launch flag that chose how the parent speaks."""

    IMAGEGEN = "imagegen"
    MLX = "mlx"
    CLASSIC = "ollama"


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """Everything the process was told at launch."""

    dialect: DialectName
    model: str | None
    """A store name, a folder or a GGUF file. None only for the classic dialect, where POST /load may follow."""
    port: int
    store: Path
    host: str = "127.0.0.1"
    debug: int = 0
    """0 info, 1 debug, 2 trace: OLLAMA_DEBUG."""
    weights: WeightPolicy = "auto"
    threads: int | None = None
    """BLAS threads on the CPU; None lets models.backend choose."""
    context: int | None = None
    """Tokens one row may hold; None is the model's own limit."""
    parallel: int = 4
    """Rows in the batch."""
    prefill_chunk: int = 128
    """Prompt tokens of one step."""
    check_memory: bool = True
    verify_digests: bool = False
