"""The command `asyncq`: its subcommands, and what their errors look like and exit with."""

from __future__ import annotations

import sys
from typing import Annotated, Final, NoReturn

import typer

from asyncq import AsyncqError, OptionError
from asyncq.cli.enqueue import EnqueueCommand, enqueue
from asyncq.cli.importer import ImportFromStringError, ModuleFailedError, traceback_of
from asyncq.cli.stats import stats
from asyncq.cli.terminal import complain, say
from asyncq.cli.version import version
from asyncq.cli.worker import worker

__all__ = ["app", "main"]

FAILED: Final = 1
WRONG_USAGE: Final = 2
INTERRUPTED: Final = 130  # as shells say: 128, and the number of SIGINT

app = typer.Typer(
    name="asyncq",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes leave help a third of the line, and break errors in the middle
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(worker)
app.command(cls=EnqueueCommand)(enqueue)
app.command()(stats)


def main() -> NoReturn:
    """Run the command that the arguments name, and exit with its code."""
    try:
        app()
    except (OptionError, ImportFromStringError) as error:
        if isinstance(error, ModuleFailedError):
            typer.echo(traceback_of(error), err=True, nl=False)
        complain(str(error))
        sys.exit(WRONG_USAGE)
    except AsyncqError as error:
        complain(str(error))
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    sys.exit()


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"asyncq {version()}")
        raise typer.Exit


@app.callback()
def asyncq(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run workers, and put tasks on queues that Python and Go Asynq share.

    A setting comes from its option, else from its variable, else from its default. Variables:
    ASYNCQ_REDIS_URL, ASYNCQ_QUEUES, ASYNCQ_STRICT_PRIORITY, ASYNCQ_CONCURRENCY,
    ASYNCQ_PREFETCH, ASYNCQ_PROCESSES, ASYNCQ_SHUTDOWN_TIMEOUT, ASYNCQ_LOG_LEVEL, ASYNCQ_LOG_FORMAT.

    \b
    Examples:
      asyncq worker shop.tasks:mux --queue critical=6 --queue default=3
      asyncq enqueue email:welcome '{"user_id": 1}' --wait 10
      asyncq stats

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 ended by Ctrl-C.
    """
