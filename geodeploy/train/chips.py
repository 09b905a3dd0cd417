"""Chips in folders, paired by name with their labels or rows of a table, and sorted into splits."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geodeploy.errors import LabelError, SourceError, first_line
from geodeploy.train.recipe import Chips, Data, Recipe, Scene, Split
from geodeploy.train.table import read_table

log = logging.getLogger(__name__)

_SHOWN = 5


class Chip(Scene):
    """A scene whose labels are those of its row in a table."""

    shown: tuple[int, ...]
    """For each class 1, 0 or `geodeploy.labels.IGNORED`."""


def list_scenes(recipe: Recipe) -> list[tuple[str, Scene]]:
    """The scenes of the recipe and the chips in its folders, each with its place in the recipe.

    Raises:
        SourceError: a folder or a list of chips is missing.
        LabelError: chips without labels, labels without a chip, or lists that do not fit the chips; a
            table that says other things than the recipe asks for.
    """
    data = recipe.data
    scenes = [(f"data.scene.{number}", scene) for number, scene in enumerate(data.scene)]
    for number, chips in enumerate(data.chips or ()):
        place = f"data.chips.{number}"
        listed = _list_rows(chips, recipe, place) if chips.table else _list_chips(chips, data, place)
        scenes += [(place, scene) for scene in listed]
    return scenes


def _list_rows(chips: Chips, recipe: Recipe, place: str) -> list[Chip]:
    """The chips that have a split, by name, with their rows."""
    data = recipe.data
    images = _files(data.root / chips.images, chips.image_suffix, f"{place}.images")
    splits = _read_splits(chips, data, images, place)
    table = data.find_labels(chips.labels)
    rows = read_table(table, chips, recipe.classes, f"{place}.labels")
    if without := sorted(set(splits) - set(rows)):
        raise LabelError(
            f"{place}: {_count(without, 'image')} without a row in {table.name} ({_several(without)}). "
            f"A row names its chip with or without {chips.image_suffix}: add what is missing, or leave "
            "the chip out of the split."
        )
    if unused := sorted(set(rows) - set(images)):
        log.info("%s: %s of %s without an image: left out.", place, _count(unused, "row"), table.name)
    return [
        Chip(**_about(chips, images[name], chips.labels, splits[name]), shown=rows[name])
        for name in sorted(splits)
    ]


def _list_chips(chips: Chips, data: Data, place: str) -> list[Scene]:
    """The chips that have a split, by name."""
    label_folder = data.find_labels(chips.labels)
    images = _files(data.root / chips.images, chips.image_suffix, f"{place}.images")
    labels = _files(label_folder, chips.label_suffix, f"{place}.labels")
    if (data.root / chips.images).resolve() == label_folder.resolve():
        # Of a.tif and a_label.tif in one folder, the longer suffix says what a file is.
        longer, shorter = sorted((chips.image_suffix, chips.label_suffix), key=len, reverse=True)
        if longer != shorter and longer.endswith(shorter):
            either = images if shorter == chips.image_suffix else labels
            for name in [name for name in either if f"{name}{shorter}".endswith(longer)]:
                del either[name]
    _check_pairs(images, labels, chips, place)
    splits = _read_splits(chips, data, images, place)
    return [Scene(**_about(chips, images[name], labels[name], splits[name])) for name in sorted(splits)]


def _about(chips: Chips, image: Path, labels: Path, split: Split) -> dict[str, Any]:
    told = chips.model_dump(include={"bands", "scale", "offset"})
    return told | {"image": image, "labels": labels, "split": split}


def _files(folder: Path, suffix: str, key: str) -> dict[str, Path]:
    """The files with ``suffix`` in ``folder`` and the folders in it, by their path without it."""
    if not folder.is_dir():
        raise SourceError(f"{key}: the folder {folder} does not exist. Name it relative to data.root.")
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    found = {
        name.removesuffix(suffix): path
        for name, path in names.items()
        if name.endswith(suffix) and path.is_file() and not path.name.startswith(".")
    }
    if not found:
        raise SourceError(f"{key}: no file in {folder} ends with {suffix}. Name what they end with.")
    return found


def _check_pairs(
    images: Mapping[str, Path], labels: Mapping[str, Path], chips: Chips, place: str
) -> None:
    odd = []
    if without := sorted(set(images) - set(labels)):
        odd.append(f"{_count(without, 'image')} without labels ({_several(without)})")
    if unused := sorted(set(labels) - set(images)):
        odd.append(f"{_count(unused, 'label file')} without an image ({_several(unused)})")
    if odd:
        raise LabelError(
            f"{place}: {' and '.join(odd)}. A chip and its labels have one name, but for "
            f"{chips.image_suffix} and {chips.label_suffix} at its end: add what is missing or move "
            "the rest elsewhere."
        )


def _read_splits(chips: Chips, data: Data, images: Mapping[str, Path], place: str) -> dict[str, Split]:
    """The split of each chip that has one."""
    if chips.split is not None:
        return dict.fromkeys(images, chips.split)
    splits: dict[str, Split] = {}
    for split, file in chips.lists.items():
        lines = _read_lines(data.root / file, f"{place}.{split}")
        names = [line.removesuffix(chips.image_suffix) for line in lines]
        if absent := sorted(set(names) - set(images)):
            raise LabelError(
                f"{place}.{split}: {file} names {_count(absent, 'chip')} not in {chips.images} "
                f"({_several(absent)}). One name a line is needed, with {chips.image_suffix} or not."
            )
        if twice := sorted(set(names) & set(splits)):
            raise LabelError(
                f"{place}.{split}: {file} names {_count(twice, 'chip')} of another split "
                f"({_several(twice)}). What is validated or tested on must not be trained on."
            )
        splits |= dict.fromkeys(names, split)
    if rest := sorted(set(images) - set(splits)):
        log.warning("%s: %s in no list (%s): left out.", place, _count(rest, "chip"), _several(rest))
    return splits


def _read_lines(path: Path, key: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{key}: {path} cannot be read ({first_line(error)}). A text file with the name of one "
            "chip a line is needed."
        ) from error
    return [line for line in lines if line]


def _count(names: Sequence[str], what: str) -> str:
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'}"


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
