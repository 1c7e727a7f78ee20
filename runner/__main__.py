"""The process's entry: argv and environment in, exit code out.

Owns what a user sees last. Exit codes: 0 stopped as asked, 1 failed, 2 wrong usage, 130 interrupted `try` or `create`.
Heavy imports wait until they are needed: wrong usage and a taken port are answered in milliseconds.
"""

import asyncio
import logging
import os
import sys
from typing import assert_never

from models.errors import ModelError
from runner import logs
from runner.config import (
    CreateConfig,
    FetchConfig,
    HelpCommand,
    RunnerConfig,
    TryConfig,
    TryImageConfig,
    VersionCommand,
    parse,
)
from runner.errors import RankLost, RunnerError
from runner.flags import UsageError
from runner.rank_flags import RankConfig
from runner.socket_binding import bind
from runner.stopping import leave_at_once_on_signals

logger = logging.getLogger(__name__)


def main() -> None:
    """Run the command that argv names, and exit."""
    parent = os.getppid()
    try:
        code = _dispatch(parent)
    except UsageError as error:
        logs.fatal(str(error))
        code = 2
    except RankLost as error:
        logs.fatal_after_all(str(error))
        # The executor's thread waits in MLX for a rank that does not come.
        os._exit(1)
    except (RunnerError, ModelError) as error:
        logs.fatal(str(error))
        code = 1
    except OSError as error:
        known = f"{error.filename}: {error.strerror}; check that the file is there and may be read"
        logs.fatal(known if error.filename else str(error))
        code = 1
    except KeyboardInterrupt:
        code = 130
    except Exception as error:  # the last line and the exit code are owed for a bug of ours too
        logger.exception("this is a bug")
        logs.fatal(f"{_first_line(error)}; this is a bug, please report it with the lines above")
        code = 1
    sys.exit(code)


def _first_line(error: Exception) -> str:
    """What happened, with the word that parents look for if memory ran out."""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"insufficient memory: {text}" if isinstance(error, MemoryError) else text


def _dispatch(parent: int) -> int:
    command = parse(sys.argv[1:], os.environ)
    match command:
        case RunnerConfig():
            leave_at_once_on_signals()
            logs.configure(command.debug)
            if command.ranks.launched:
                _follow(command)
            else:
                _run(command, parent)
        case RankConfig():
            leave_at_once_on_signals()
            logs.configure(command.debug)
            from runner.ranks.rank import run  # noqa: PLC0415

            run(command.store)
        case TryConfig():
            from runner import try_command  # noqa: PLC0415 - see above

            logs.configure(command.runner.debug)
            return try_command.run(command)
        case TryImageConfig():
            from runner import try_image  # noqa: PLC0415

            logs.configure(command.runner.debug)
            return try_image.run(command)
        case CreateConfig():
            from runner import create_command  # noqa: PLC0415

            logs.configure(command.debug)
            create_command.run(command)
        case FetchConfig():
            from runner import try_command  # noqa: PLC0415

            sys.stdout.write(f"{try_command.fetch_with_progress(command.cache)}\n")
        case HelpCommand():
            sys.stdout.write(command.text)
        case VersionCommand():
            from importlib.metadata import version  # noqa: PLC0415

            sys.stdout.write(f"ollama-mlx-runner {version('ollama-mlx-runner')}\n")
        case _:
            assert_never(command)
    return 0


def _run(config: RunnerConfig, parent: int) -> None:
    """Serve until asked to stop."""
    listener = bind(config.host, config.port)
    from runner.serve import serve  # noqa: PLC0415 - imports what serves, which wrong usage does not need

    ranks = None
    if config.ranks.is_shared:
        from runner.ranks.opening import open_ranks  # noqa: PLC0415 - few ask for it

        ranks = open_ranks(config.ranks, os.environ)
    asyncio.run(serve(config, listener, parent, ranks))


def _follow(config: RunnerConfig) -> None:
    """Be one of the ranks that mlx.launch has started, not the first."""
    from runner.ranks.launched import follow_launched  # noqa: PLC0415 - few ask for it

    follow_launched(os.environ, config.store)


if __name__ == "__main__":
    main()
