"""What whole chips show, by a table: a row a chip, a column a class or one that lists them."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from geodeploy.errors import LabelError, SourceError, first_line
from geodeploy.labels import IGNORED
from geodeploy.spec import SegmentationClass
from geodeploy.train.recipe import Chips

_FLAGS = {"0": 0, "1": 1, "": IGNORED}
"""What a column of a class may say; nothing where nobody knows."""


def read_table(
    path: Path, chips: Chips, classes: Sequence[SegmentationClass], key: str
) -> dict[str, tuple[int, ...]]:
    """What each chip shows, by its name without ``chips.image_suffix``: 1, 0 or `IGNORED` a class.

    Raises:
        SourceError: the table cannot be read; ``key`` is what named it.
        LabelError: a column is missing, a chip has two rows, or a field says what it must not.
    """
    shown: dict[str, tuple[int, ...]] = {}
    lines: dict[str, int] = {}
    for line, row in _rows(path, key):
        name_column = chips.name_column or next(iter(row))
        wanted = [chips.label_column] if chips.label_column else [item.name for item in classes]
        if absent := [column for column in (name_column, *wanted) if column not in row]:
            raise LabelError(
                f"{key}: {path.name} has no column {', '.join(absent)}; it has {', '.join(row)}. A "
                "column for each class, by its name, or label_column that lists them is needed."
            )
        name = row[name_column].removesuffix(chips.image_suffix)
        if name in lines:
            raise LabelError(
                f"{key}: {path.name} has two rows for {name}, in lines {lines[name]} and {line}. "
                "Remove one."
            )
        lines[name], where = line, f"{key}: {path.name}, line {line}"
        if chips.label_column:
            listed = row[chips.label_column].split(chips.label_separator)
            shown[name] = _listed(listed, classes, where)
        else:
            shown[name] = _flags(row, classes, where)
    return shown


def _rows(path: Path, key: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """The number of each line but the first, and what it says in each column."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            columns = [column.strip() for column in next(reader, [])]
            if len(set(columns)) != len(columns):
                raise LabelError(
                    f"{key}: {path.name} has two columns of one name: {', '.join(columns)}."
                )
            for fields in filter(None, reader):
                if len(fields) != len(columns):
                    raise LabelError(
                        f"{key}: {path.name}, line {reader.line_num} has {len(fields)} fields, the "
                        f"first line has {len(columns)}. Mend it."
                    )
                yield (
                    reader.line_num,
                    dict(zip(columns, (field.strip() for field in fields), strict=True)),
                )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        if isinstance(error, LabelError):
            raise
        raise SourceError(
            f"{key}: {path} cannot be read ({first_line(error)}). A CSV file with the name of a chip "
            "and its labels in each line is needed."
        ) from error


def _flags(row: Mapping[str, str], classes: Sequence[SegmentationClass], where: str) -> tuple[int, ...]:
    for item in classes:
        if row[item.name] not in _FLAGS:
            raise LabelError(
                f"{where} says {row[item.name]!r} of {item.name}; 1, 0 or nothing, where nobody knows, "
                "is needed."
            )
    return tuple(_FLAGS[row[item.name]] for item in classes)


def _listed(listed: Sequence[str], classes: Sequence[SegmentationClass], where: str) -> tuple[int, ...]:
    names = {name for name in map(str.strip, listed) if name}
    known = {name for item in classes for name in (item.name, str(item.value))}
    if unknown := sorted(names - known):
        raise LabelError(
            f"{where} names {', '.join(unknown)}, which is none of the classes "
            f"({', '.join(item.name for item in classes)}). Add it to the recipe's classes, or take it "
            "out."
        )
    return tuple(int(bool({item.name, str(item.value)} & names)) for item in classes)
