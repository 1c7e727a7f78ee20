"""ImageEngine: pictures from an image pipeline, one at a time.

Owns the queue and the picture in the making. A step is one `next` of the pipeline's iterator: the prompt, a denoising
step, a decode or a tile of one; between two of them a request can be given up. Several pictures of one request are
made one after another, each as it would have been made alone. An error ends its request and nothing else.
"""

import gc
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace

import mlx.core as mx

from models.image.base import ImagePipeline, ImageResult, ImageStep, Phase, PictureError, PictureRequest
from runner.engine.image_memory import ImageMemory
from runner.engine.image_preparation import PreparedImage, prepare_image
from runner.engine.reporting import REPORT_NS
from runner.engine.step_times import PATIENCE_S, StepTimes
from runner.engine.types import (
    EngineState,
    EngineStatus,
    Failed,
    ImageDone,
    ImageMade,
    ImageProgress,
    ImageQueued,
    Output,
    Picture,
    Request,
    RequestId,
)
from runner.errors import BadRequest, GenerationError, InsufficientMemory, NotImplementedHere, NotReady, RunnerError

logger = logging.getLogger("runner.engine")


@dataclass(slots=True)
class _Waiting:
    """A request that is not running yet. Times in ns."""

    id: RequestId
    prepared: PreparedImage
    added_ns: int
    told: int = 0
    """The place in the queue that its reader knows of."""
    warned: bool = False
    """The log says that it will take too long."""


@dataclass(slots=True)
class _Run:
    """The picture in the making. Times in ns."""

    request: _Waiting
    index: int
    units: Iterator[ImageStep | ImageResult]
    begun_ns: int
    step: int = 0
    total: int = 0
    spent_ns: dict[Phase, int] = field(default_factory=lambda: {"encode": 0, "denoise": 0, "decode": 0})

    @property
    def picture(self) -> PictureRequest:
        """What is being made."""
        return self.request.prepared.pictures[self.index]

    @property
    def is_last(self) -> bool:
        """No other picture of the request follows."""
        return self.index + 1 == len(self.request.prepared.pictures)


class ImageEngine:
    """An Engine for pictures. Thread: the executor's, except where a method says otherwise."""

    def __init__(
        self,
        pipeline: ImagePipeline,
        *,
        name: str,
        memory: ImageMemory | None = None,
        max_waiting: int = 64,
        clock: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        """Serve `pipeline`.

        Args:
            pipeline: The pipeline, loaded.
            name: What pictures say they were made by.
            memory: Refuses a picture that will not fit; None: none is refused.
            max_waiting: Requests that may queue behind the running one.
            clock: Counts ns.
        """
        self._pipeline: ImagePipeline | None = pipeline
        self._name = name
        self._memory = memory
        self._max_requests = 1 + max_waiting
        self._clock = clock
        self._queue: deque[_Waiting] = deque()
        self._run: _Run | None = None
        self._outputs: list[Output] = []
        self._only_told = False
        self._times = StepTimes()
        self._next_report_ns = 0

    @property
    def max_requests(self) -> int:
        """How many requests may be running and waiting at once. Thread: any."""
        return self._max_requests

    @property
    def idle(self) -> bool:
        """No request is queued or running."""
        return self._run is None and not self._queue

    def status(self) -> EngineStatus:
        """The present figures."""
        run = self._run
        return EngineStatus(
            state=EngineState.READY,
            progress=1.0,
            memory_bytes=mx.get_active_memory() + mx.get_cache_memory(),
            makes_pictures=True,
            step=0 if run is None else run.step,
            total_steps=0 if run is None else run.total,
            running=0 if run is None else 1,
            waiting=len(self._queue),
        )

    def tokenize(self, text: str, *, add_bos: bool) -> list[int]:  # noqa: ARG002 - the protocol's
        """Not for an image model, as in Ollama. Thread: any. Raises NotImplementedHere."""
        raise NotImplementedHere("tokenization is not supported for image generation models")

    def prepare(self, request: Request) -> PreparedImage:
        """Check, fill in, decode the input pictures. Thread: any.

        Raises:
            BadRequest: the request cannot be served.
            NotImplementedHere: it is for text.
            InsufficientMemory: there is none for it, and will not be when the running picture is done.
            NotReady: the engine is closed.
        """
        if (pipeline := self._pipeline) is None:
            raise NotReady("the model is being unloaded")
        prepared = prepare_image(request, pipeline)
        if self._memory is not None:
            run = self._run
            held = 0 if run is None else pipeline.working_bytes(run.picture)
            self._memory.check(pipeline, prepared.pictures[0], held=held)
        return prepared

    def is_quick(self, request: Request) -> bool:  # noqa: ARG002 - pictures may have to be decoded
        """See `Engine.is_quick`. Thread: any."""
        return False

    def completion(self, prepared: object) -> None:
        """Nothing is left. Thread: any."""

    def add(self, request_id: RequestId, prepared: object) -> None:
        """Queue what `prepare` returned."""
        assert isinstance(prepared, PreparedImage)
        self._queue.append(_Waiting(request_id, prepared, self._clock()))

    def cancel(self, request_id: RequestId) -> None:
        """Drop a request wherever it is."""
        if self._run is not None and self._run.request.id == request_id:
            logger.info("image cancelled", extra={"fields": _figures(self._run)})
            self._end_run()
        else:
            self._queue = deque(waiting for waiting in self._queue if waiting.id != request_id)

    def step(self) -> list[Output]:
        """One unit of work of the running picture; or, where there is news of the queue, no more than that.

        But not twice in a row: those who come and go shall not hold up a picture.
        """
        if self._run is None and self._queue:
            self._begin(self._queue.popleft(), 0)
        self._only_told = self._tell_places() and not self._only_told
        if not self._only_told and self._run is not None:
            self._advance(self._run)
        return self._taken()

    def proceed(self) -> None:
        """Nothing is left over by a step."""

    def abandon(self, error: Exception) -> list[Output]:
        """After `step` raised: fail the running request and free what it held.

        Returns what had been said before, then its Failed.
        """
        _let_go(error)
        if (run := self._run) is not None:
            reason = _failure(error, run.picture)
            self._outputs.append(Failed(run.request.id, reason))
            logger.error("image failed", extra={"fields": {**_figures(run), "error": str(reason)}})
            self._end_run()
        # It may have been for want of memory.
        gc.collect()
        mx.clear_cache()
        return self._taken()

    def close(self) -> None:
        """Free everything; the engine is of no use afterwards."""
        self._queue.clear()
        self._outputs = []
        self._pipeline = None
        self._end_run()
        mx.synchronize()
        gc.collect()
        mx.clear_cache()

    def _taken(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _tell_places(self) -> bool:
        """Tell those who wait where they stand, if that is news; whether it was."""
        before = len(self._outputs)
        for place, waiting in enumerate(self._queue, start=1):
            if waiting.told != place:
                waiting.told = place
                self._outputs.append(ImageQueued(waiting.id, place))
        return len(self._outputs) > before

    def _begin(self, request: _Waiting, index: int) -> None:
        assert self._pipeline is not None
        picture = request.prepared.pictures[index]
        self._run = _Run(request, index, iter(()), self._clock(), total=picture.steps)
        # Whatever is raised from here on ends this request: see `abandon`.
        if self._memory is not None:
            self._memory.check(self._pipeline, picture)
        self._run.units = self._pipeline.generate(picture)
        logger.info("image begun", extra={"fields": {**_figures(self._run), "seed": picture.seed}})
        self._warn_if_long(self._run)

    def _advance(self, run: _Run) -> None:
        """One `next`: whatever it raises ends the request, by way of `abandon`."""
        before = self._clock()
        unit = next(run.units, None)
        now = self._clock()
        match unit:
            case ImageStep():
                run.spent_ns[unit.phase] += now - before
                run.step, run.total = unit.step, unit.total
                if unit.phase == "denoise":
                    self._report_step(run, unit, now - before)
                self._give_sign_of_life(run, unit.phase, now)
            case ImageResult():
                run.spent_ns["decode"] += now - before
                self._finish(run, unit)
            case None:
                raise GenerationError("the pipeline ended without a picture")

    def _give_sign_of_life(self, run: _Run, phase: Phase, now_ns: int) -> None:
        if now_ns >= max(self._next_report_ns, run.begun_ns + REPORT_NS):
            self._next_report_ns = now_ns + REPORT_NS
            logger.info("image", extra={"fields": {**_figures(run), "phase": phase}})

    def _report_step(self, run: _Run, unit: ImageStep, spent_ns: int) -> None:
        self._outputs.append(ImageProgress(run.request.id, unit.step, unit.total, run.index, unit.preview))
        self._times.observe_step(run.picture, spent_ns / 1e9)
        if unit.step == 1 and run.index == 0:
            self._warn_if_long(run)

    def _warn_if_long(self, run: _Run) -> None:
        """Say so if the parent is expected to lose its patience, at the start and once a step has been measured."""
        if run.request.warned:
            return
        pictures = run.request.prepared.pictures[run.index :]
        predicted = self._times.predict_s(run.picture, (len(pictures) - 1) * run.picture.steps + run.total - run.step)
        if predicted is None:
            return
        total_s = (self._clock() - run.request.added_ns) / 1e9 + predicted
        if total_s > PATIENCE_S:
            run.request.warned = True
            logger.warning(
                "this request is expected to take longer than its parent waits",
                extra={
                    "fields": {
                        "id": run.request.id,
                        "estimate_s": round(total_s),
                        "parent_waits_s": round(PATIENCE_S),
                        "remedy": "fewer steps, a smaller size, a smaller n",
                    }
                },
            )

    def _finish(self, run: _Run, result: ImageResult) -> None:
        assert self._pipeline is not None
        before = run.request.added_ns if run.index == 0 else run.begun_ns
        picture = Picture(
            pixels=result.pixels,
            request=replace(run.picture, images=()),
            noised=bool(run.picture.images) and self._pipeline.abilities.takes_strength,
            model=self._name,
            format=run.request.prepared.format,
            index=run.index,
            steps_computed=result.steps_computed,
            wait_ns=run.begun_ns - before,
            encode_ns=run.spent_ns["encode"],
            denoise_ns=run.spent_ns["denoise"],
            decode_ns=run.spent_ns["decode"],
        )
        self._times.observe_rest(run.picture, (picture.encode_ns + picture.decode_ns) / 1e9)
        logger.info("image done", extra={"fields": _figures(run)})
        request, following = run.request, run.index + 1
        is_last = run.is_last
        self._end_run()
        if is_last:
            self._outputs.append(ImageDone(request.id, picture))
        else:
            self._outputs.append(ImageMade(request.id, picture))
            self._begin(request, following)

    def _end_run(self) -> None:
        """Close the pipeline's iterator and give its memory back."""
        run, self._run = self._run, None
        if run is not None and isinstance(run.units, Generator):
            run.units.close()
        del run
        mx.clear_cache()


def _figures(run: _Run) -> dict[str, object]:
    """What a line of the log says of a picture."""
    picture, count = run.picture, len(run.request.prepared.pictures)
    return {
        "id": run.request.id,
        **({"picture": f"{run.index + 1}/{count}"} if count > 1 else {}),
        "size": f"{picture.width}x{picture.height}",
        "step": f"{run.step}/{run.total}",
        **{f"{phase}_ms": round(spent / 1e6) for phase, spent in run.spent_ns.items() if spent},
    }


def _failure(error: Exception, picture: PictureRequest) -> RunnerError:
    """What whoever asked for the picture is told."""
    match error:
        case RunnerError():
            return error.with_traceback(None)
        case PictureError():
            return BadRequest(str(error))
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or "allocate" in str(error):
            return InsufficientMemory(
                f"insufficient memory while making a picture of {picture.width}x{picture.height} ({error}); "
                "ask for a smaller one"
            )
        case _:
            return GenerationError(f"{type(error).__name__}: {error}")


def _let_go(error: BaseException | None) -> None:
    """Empty the frames that an error remembers: they hold arrays, which must not outlive the step."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
