"""The web application: one dialect's routes, errors as plain text, and the server's options.

Refuses to know routes and wire formats (the dialects do) and how to load or stop (the process does). `SERVER_OPTIONS`
must be given to the `AppRunner` in production and in tests alike: aiohttp's defaults would let a request run on after
its client has gone, and a silent connection stay for an hour.
"""

import logging
from collections.abc import AsyncIterator
from typing import Final, TypedDict, assert_never

from aiohttp import web
from aiohttp.typedefs import Handler

from models.device import device
from models.errors import ModelError
from runner.config import DialectName, RunnerConfig
from runner.dialects.base import TIMEOUTS, Dialect, Timeouts
from runner.dialects.imagegen import ImagegenDialect
from runner.dialects.mlxrunner import MLXDialect
from runner.dialects.ollamarunner import OllamaRunnerDialect
from runner.engine.load import ModelLoader
from runner.engine.loop import EngineLoop
from runner.errors import RunnerError, status_of

logger = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 64 * 1024 * 1024
"""Four photos of 12 MB as input pictures, in base64; no prompt is as long."""


class ServerOptions(TypedDict):
    """Keyword arguments of `aiohttp.web.AppRunner`."""

    handler_cancellation: bool
    shutdown_timeout: float
    keepalive_timeout: float
    lingering_time: float
    access_log: None


SERVER_OPTIONS: Final[ServerOptions] = {
    # A client that goes away cancels its handler, and with it the request in the engine.
    "handler_cancellation": True,
    # The engine has given running requests their time before the server is shut down.
    "shutdown_timeout": 0.5,
    # Also how long a connection may take to say what it wants. Longer than Go's 90 s for idle connections, so that the
    # parent is the one to close them and no request is sent into a closing one.
    "keepalive_timeout": 120.0,
    # How long the rest of a refused body is read, so that its sender gets to see the answer.
    "lingering_time": 5.0,
    "access_log": None,
}

DIALECT: Final = web.AppKey("dialect", Dialect)


def make_app(
    config: RunnerConfig, loop: EngineLoop, loader: ModelLoader, *, timeouts: Timeouts | None = None
) -> web.Application:
    """The application for the configured dialect."""
    app = web.Application(middlewares=[plain_errors], client_max_size=MAX_BODY_BYTES)
    dialect = _dialect(config, loop, loader)
    app[TIMEOUTS] = timeouts or Timeouts()
    app[DIALECT] = dialect
    app.add_routes(dialect.routes())
    app.cleanup_ctx.append(_close_dialect)
    return app


def _dialect(config: RunnerConfig, loop: EngineLoop, loader: ModelLoader) -> Dialect:
    match config.dialect:
        case DialectName.IMAGEGEN:
            return ImagegenDialect(loop)
        case DialectName.MLX:
            return MLXDialect(loop)
        case DialectName.CLASSIC:
            return OllamaRunnerDialect(config.model, loop, loader, device, check_memory=config.check_memory)
        case _:
            assert_never(config.dialect)


async def _close_dialect(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[DIALECT].close()


@web.middleware
async def plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what a request may cause into a status and one line of plain text, which the parent shows its user.

    Anything else is a bug of ours: aiohttp logs it with its traceback, answers 500 and goes on.
    """
    try:
        return await handler(request)
    except (RunnerError, ModelError) as error:
        status, reason, headers = status_of(error), str(error), {}
    except web.HTTPError as error:
        status, reason = error.status, error.text or error.reason
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    logger.warning(
        "request refused",
        extra={"fields": {"method": request.method, "path": request.path, "status": status, "reason": reason}},
    )
    response = web.Response(text=f"{reason}\n", status=status, headers=headers)
    if status in (408, 413):
        # The rest of the body is still to come and nobody wants it.
        response.force_close()
    return response
