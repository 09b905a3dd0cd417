"""What several commands need: options with the library's defaults, JSON, a progress bar."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from geodeploy.errors import RecipeError
from geodeploy.spec import first_problem

Options = TypeVar("Options", bound=BaseModel)


def with_defaults(kind: type[Options], **given: Any) -> Options:
    """Options of ``kind`` from what the user gave; None means the library's default."""
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        place, _, complaint = first_problem(error).partition(": ")
        name = place.partition(".")[0]  # one of several types that are possible
        flag = name.replace("_", "-")
        raise RecipeError(f"--{flag} {given[name]}: {complaint}.") from error


def split_names(text: str | None) -> tuple[str, ...] | None:
    """The names in ``red, nir``; none in an empty text, and None where nothing was given."""
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",")) if text.strip() else ()


def one_adapter(named: Sequence[Path] | None) -> Path | None:
    """What ``--adapter`` names; of two the last would win, and nobody would know."""
    if named and len(named) > 1:
        raise typer.BadParameter(
            f"--adapter is given {len(named)} times, and a base takes one at a time. Run once for each."
        )
    return named[0] if named else None


def print_json(reports: Sequence[BaseModel]) -> None:
    """One document on stdout: an object, or a list of several."""
    documents = [report.model_dump(mode="json") for report in reports]
    typer.echo(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1))


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr, on a terminal only: a function of what is done and of all there is."""
    if not sys.stderr.isatty():
        yield None
        return
    shown = -1

    def show(done: int, whole: int) -> None:
        nonlocal shown
        percent = 100 * done // whole
        if percent != shown:
            shown = percent
            filled = "#" * (percent // 4)
            sys.stderr.write(f"\r[{filled:<25}] {percent:3d} %")
            sys.stderr.flush()

    try:
        yield show
    finally:
        if shown >= 0:
            sys.stderr.write("\n")
