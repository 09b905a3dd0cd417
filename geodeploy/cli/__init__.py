"""The command line: one module a command, each of which parses, calls one function and prints."""

import contextlib
import logging
import os
import signal
import sys
import warnings
from types import FrameType

import typer

from geodeploy.cli import (
    data,
    demo,
    distil,
    doctor,
    evaluate,
    export,
    importing,
    inspect,
    predict,
    train,
    verify,
)
from geodeploy.errors import GeodeployError, first_line

app = typer.Typer(
    name="geodeploy",
    help="Tune a geospatial foundation model, export it, and map satellite scenes of any size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Typer's rich output costs more time than all the rest of --help.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (train, distil, evaluate, export, verify, predict, inspect, doctor, demo):
    app.command()(getattr(_command, _command.__name__.rpartition(".")[2]))
app.add_typer(data.data, name="data")
app.add_typer(importing.importing, name="import")


class _Stopped(BaseException):
    """Ctrl-C, SIGTERM or a closed terminal, made an exception: all is cleaned up on the way out.

    Not a KeyboardInterrupt: versions of Typer differ in what they make of that one.
    """


def _version(wanted: bool) -> None:
    if wanted:
        from geodeploy import __version__

        typer.echo(f"geodeploy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    pass


def main() -> None:
    """Run a command.

    Exit 0, 1 (an error to mend), 2 (wrong usage), 3 (what failed was left out), 130 or 143 (stopped).
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    # Under `torchrun` all processes would say the same.
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger("geodeploy").setLevel(logging.INFO if first else logging.CRITICAL)
    # Warnings of libraries are for developers; ours go through the log.
    warnings.simplefilter("ignore")

    def stop(number: int, _frame: FrameType | None) -> None:
        raise _Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell sets it for a background job
            signal.signal(number, stop)
    try:
        app(standalone_mode=True)
    except GeodeployError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except MemoryError as error:
        asked = f" ({first_line(error)})" if str(error) else ""
        typer.echo(f"error: Memory ran out{asked}. Give the command more, or less to do.", err=True)
        sys.exit(1)
    except _Stopped as stopped:
        typer.echo("Stopped; nothing was left half-written.", err=True)
        sys.exit(128 + stopped.args[0])
    except BrokenPipeError:
        # The reader of our output has gone, as with `| head`: nobody to tell.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
