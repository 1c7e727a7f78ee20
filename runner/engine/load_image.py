"""An image pipeline's figures, and its engine.

Owns the memory prediction, the choice of how weights are held, and whether the text encoder stays between prompts;
knows no tensor and no wire.

*Weights* are the components', each at the width it will be held in. *Graph* is what a picture takes besides: a rough
figure for the default size, or whatever is left if that is less, for a smaller picture can be made then. Each request
is measured by its own figure (`image_memory`).
"""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from models.checkpoint import Checkpoint, TensorInfo
from models.device import Device, device
from models.image import blas, find_family, load_image_pipeline
from models.image.autoencoder_config import read_autoencoder_config
from models.image.autoencoder_memory import peak_bytes
from models.image.base import Abilities, LoadChoices, Lora
from models.image.loading import FLOAT32_COMPONENTS, component_config
from models.image.lora import check_loras
from models.image.tiling import Tiling
from models.image.weights import is_unused
from models.mlx_memory import configure, give_back
from models.quantization import WeightPolicy
from runner.config import RunnerConfig
from runner.engine.blueprint import (
    FLOAT32_BYTES,
    DeviceMemory,
    MemoryPlan,
    allocation_failures,
)
from runner.engine.image import ImageEngine
from runner.engine.image_memory import ImageMemory
from runner.engine.loop import Progress
from runner.engine.memory_limits import available_bytes, in_words
from runner.engine.types import Engine
from runner.errors import LoadError

logger = logging.getLogger(__name__)

TEXT_ENCODER = "text_encoder"
LEAST_SIDE = 256
"""Pixels a side: a pipeline that has no room for this is refused."""
PROMPT_TOKENS = 512
TOKEN_SIDE = 16
"""Pixels a side that a token of the transformer stands for, in all families so far."""


@dataclass(frozen=True, slots=True)
class ImageBlueprint:
    """A pipeline's plan with the choices it rests on (see `blueprint.Blueprint`)."""

    config: RunnerConfig
    checkpoint: Checkpoint
    choices: LoadChoices
    components: dict[str, int]
    """What each holds while a picture is made, in bytes."""
    memory: MemoryPlan

    def fields(self) -> dict[str, object]:
        """See `Blueprint.fields`."""
        held = {f"{name}_mib": nbytes >> 20 for name, nbytes in self.components.items()}
        return {
            "model": self.checkpoint.reference,
            "device": self.memory.device.name,
            "weights_held": "float32" if self.choices.policy == "float32" else "as stored",
            **held,
            "text_encoder": "kept" if self.choices.keep_text_encoder else "freed",
            "graph_mib": self.memory.device.graph >> 20,
            "available_mib": self.memory.available >> 20,
            "loras": len(self.choices.loras),
        }

    def refusal(self) -> str:
        """See `Blueprint.refusal`."""
        memory = self.memory
        parts = ", ".join(f"{name} {in_words(nbytes)}" for name, nbytes in self.components.items())
        return (
            f"insufficient memory: {self.checkpoint.reference} needs {in_words(memory.total)} "
            f"({parts}, working space {in_words(memory.device.graph)}) and {in_words(memory.available)} are "
            f"available; {self._remedy()}, or --check-memory=false to try all the same"
        )

    def build(self, progress: Progress) -> Engine:
        """See `Blueprint.build`."""
        configure()
        with allocation_failures(self._remedy()):
            pipeline = load_image_pipeline(self.checkpoint, replace(self.choices, progress=progress))
        _settle_threads(self.config.threads)
        memory = ImageMemory(_free_bytes, enforced=self.config.check_memory, give_back=give_back)
        return ImageEngine(pipeline, name=_told_name(self.checkpoint.reference), memory=memory)

    def _remedy(self) -> str:
        keep = "--weights=keep, " if self.choices.policy == "float32" else ""
        free = "--text-encoder=free, " if self.choices.keep_text_encoder else ""
        return f"choose {keep}{free}a smaller or quantised model"


def plan_image(checkpoint: Checkpoint, config: RunnerConfig) -> ImageBlueprint:
    """Plan a pipeline's load.

    Raises:
        ModelError: this package cannot run it, or a LoRA file does not belong to it.
    """
    return _Planner(checkpoint, config).blueprint()


class _Planner:
    """The figures of one pipeline on this device."""

    def __init__(self, checkpoint: Checkpoint, config: RunnerConfig) -> None:
        family = find_family(checkpoint.config)
        self._checkpoint = checkpoint
        self._config = config
        self._abilities: Abilities = family.abilities(checkpoint)
        unused = family.unused(checkpoint)
        self._infos = {
            name: tuple(info for info in checkpoint.infos(name) if not is_unused(info.name, unused.get(name, ())))
            for name in family.components
        }
        self._loras = tuple(Lora(lora.path, lora.scale) for lora in config.loras)
        check_loras(checkpoint, family.components, self._loras)
        self._device = device()
        self._available = available_bytes(self._device)

    def blueprint(self) -> ImageBlueprint:
        """The first plan that leaves room for a picture of the default size, else the most sparing one."""
        plans = [
            self._under(policy, keep_text_encoder=keep) for policy in self._policies() for keep in self._keepings()
        ]
        wanted = self._picture_nbytes(self._abilities.width, self._abilities.height)
        return next((plan for plan in plans if plan.memory.device.graph >= wanted and plan.memory.fits), plans[-1])

    def _policies(self) -> tuple[WeightPolicy, ...]:
        if self._config.weights in ("int8", "int4"):
            raise LoadError(
                f"--weights={self._config.weights} is for text models; leave it out, or make a quantised pipeline with "
                "`ollama-mlx-runner create --quantize`"
            )
        if self._config.weights in {"keep", "float32"}:
            return (self._config.weights,)
        return ("float32", "keep") if self._device.kind == "cpu" else ("keep",)

    def _keepings(self) -> tuple[bool, ...]:
        match self._config.text_encoder:
            case "keep":
                return (True,)
            case "free":
                return (False,)
            case "auto":
                return (True, False)

    def _under(self, policy: WeightPolicy, *, keep_text_encoder: bool) -> ImageBlueprint:
        components = {name: self._held(name, policy) for name in self._infos}
        largest = max(
            (info.nbytes + self._held_one(name, info, policy) for name, infos in self._infos.items() for info in infos),
            default=0,
        )
        least = max(self._picture_nbytes(LEAST_SIDE, LEAST_SIDE), largest)
        if not keep_text_encoder:
            # It is there while the prompt is encoded, and the picture's arrays only after that.
            least = max(least, components.pop(TEXT_ENCODER, 0))
        wanted = max(self._picture_nbytes(self._abilities.width, self._abilities.height), least)
        graph = min(wanted, max(least, self._available - sum(components.values())))
        device = DeviceMemory("0", self._device.kind, self._device.name, tuple(components.values()), (), graph)
        choices = LoadChoices(
            policy=policy, loras=self._loras, keep_text_encoder=keep_text_encoder, vae_tile=self._config.vae_tile
        )
        memory = MemoryPlan(input_weights=0, device=device, available=self._available)
        return ImageBlueprint(self._config, self._checkpoint, choices, components, memory)

    def _held(self, component: str, policy: WeightPolicy) -> int:
        return sum(self._held_one(component, info, policy) for info in self._infos[component])

    def _held_one(self, component: str, info: TensorInfo, policy: WeightPolicy) -> int:
        return held_nbytes(info, policy, self._device, widened=component in FLOAT32_COMPONENTS)

    def _picture_nbytes(self, width: int, height: int) -> int:
        """About what a picture takes: the arrays on both sides of the transformer's widest matrix, or the decoder's."""
        tokens = width * height // TOKEN_SIDE**2 + PROMPT_TOKENS
        matrices = [info.shape for info in self._infos.get("transformer", ()) if len(info.shape) == 2]
        step = FLOAT32_BYTES * 3 * tokens * max((sum(shape) for shape in matrices), default=0)
        vae = read_autoencoder_config(component_config(self._checkpoint, "vae"))
        tiling = Tiling(self._config.vae_tile)
        return max(step, peak_bytes(vae, tiling, height, width, on_host=self._device.kind == "cpu"))


def _told_name(reference: str) -> str:
    """What a picture says it was made by: a model's name, or its folder's. Where that lies is nobody's business."""
    folder = Path(reference)
    return folder.resolve().name if folder.is_dir() else reference


def held_nbytes(info: TensorInfo, policy: WeightPolicy, here: Device, *, widened: bool = False) -> int:
    """The bytes of a tensor once loaded: the CPU computes in float32 but for weights that stay quantised.

    Args:
        info: the tensor.
        policy: what becomes of quantised weights.
        here: what computes with them.
        widened: it is held in float32 on every device.
    """
    if info.quantized and policy == "keep":
        return info.nbytes
    if here.kind == "cpu" or policy == "float32" or widened:
        return math.prod(info.shape) * FLOAT32_BYTES
    return info.nbytes


def _free_bytes() -> int:
    """What the process may still take, with what MLX keeps for it. Thread: any."""
    return available_bytes(device()) + mx.get_cache_memory()


def _settle_threads(asked: int | None) -> None:
    """Fix the BLAS's threads now that the model is there; `asked` is what a user said. Thread: the executor's."""
    if library := blas.prepare(threads=asked).blas:
        logger.info("threads settled", extra={"fields": {"blas": library.name, "threads": library.settle()}})
