"""The YAML that TerraTorch trained by: the network, its bands and statistics, its images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from geodeploy.errors import RecipeError, first_line
from geodeploy.imports.checkpoint import is_plain
from geodeploy.spec import Task

Value = TypeVar("Value")

_TASKS: dict[str, Task] = {
    "SemanticSegmentationTask": "segmentation",
    "PixelwiseRegressionTask": "regression",
}
_FACTORIES = ("EncoderDecoderFactory", "PrithviModelFactory")
_OLD_NAMES = {"bands": "backbone_bands", "num_frames": "backbone_num_frames"}
"""Of PrithviModelFactory, and of the other one."""


@dataclass(frozen=True, slots=True)
class Config:
    """The parts of the file that say what the model is."""

    path: Path
    kind: Task
    task: Mapping[str, Any]
    """``model.init_args``"""
    network: "Arguments"
    """``model.init_args.model_args``, under the names of EncoderDecoderFactory."""
    data: Mapping[str, Any]
    """``data.init_args``"""
    is_generic: bool
    """Whether the data module is TerraTorch's for any images, which has no statistics or scale of its
    own."""

    def told(self, *keys: str) -> Any:
        """The first of ``keys`` that the data module is given; None if it is given none of them."""
        return next((self.data[key] for key in keys if self.data.get(key) is not None), None)


class Arguments:
    """Keyword arguments, each to be taken once; those that are left at the end are not understood."""

    def __init__(self, source: str, given: Any) -> None:
        if not isinstance(given, Mapping):
            raise RecipeError(f"{source} must be a table, found {given!r}.")
        self.source = source
        self.given = given
        """All of them, taken or not."""
        self._left = dict(given)

    def take(self, key: str, default: Value) -> Value | Any:
        """The argument ``key``, or ``default`` where it is not given or None."""
        found = self._left.pop(key, None)
        return default if found is None else found

    def number(self, key: str, default: int) -> int:
        """The whole number ``key``."""
        return _whole(self.take(key, default), f"{self.source}.{key}")

    def numbers(self, key: str, default: Sequence[int] | int | None) -> tuple[int, ...]:
        """The whole numbers ``key``, of which one may stand alone."""
        found = listed(self.take(key, default))
        if not found and default != []:
            raise RecipeError(f"{self.source}.{key} must have a whole number, found [].")
        return tuple(_whole(item, f"{self.source}.{key}") for item in found)

    def only(self, key: str, *allowed: Any) -> None:
        """Take ``key``, and refuse anything but what changes nothing here."""
        found = self._left.pop(key, None)
        if found is not None and found not in allowed:
            raise RecipeError(
                f"{self.source}.{key}: {found!r} cannot be imported; "
                f"{' or '.join(map(repr, allowed)) or 'nothing'} can."
            )

    def drop(self, *keys: str) -> None:
        """Leave aside what matters in a training alone."""
        for key in keys:
            self._left.pop(key, None)

    def end(self) -> None:
        """Refuse what was not taken."""
        for key, value in self._left.items():
            if value is not None:
                raise RecipeError(
                    f"{self.source}.{key} is not known here: the model cannot be imported."
                )


def read_config(path: Path) -> Config:
    """What the file at ``path`` says.

    Raises:
        RecipeError: it is no configuration of a segmentation or a regression by TerraTorch.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read ({error.strerror}). Name TerraTorch's YAML."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not plain YAML ({first_line(error)}).") from error
    model, data = _part(document, "model", path), _part(document, "data", path)
    kind = str(model.get("class_path", "")).rpartition(".")[2]
    if kind not in _TASKS:
        raise RecipeError(
            f"{path}: model.class_path is {kind or 'absent'}; {' and '.join(_TASKS)} can be imported."
        )
    task = _part(model, "init_args", path)
    factory = task.get("model_factory")
    if factory not in _FACTORIES:
        raise RecipeError(
            f"{path}: model_factory is {factory}; {' and '.join(_FACTORIES)} can be imported."
        )
    network = Arguments(
        f"{path}: model_args", _of_one_factory(factory, _part(task, "model_args", path))
    )
    generic = "Generic" in str(data.get("class_path", ""))
    return Config(path, _TASKS[kind], task, network, _part(data, "init_args", path), generic)


def as_trained(config: Config, told: Mapping[str, Any], source: str) -> Config | None:
    """``config`` with the network that a checkpoint says it was ``told``; None where it does not say.

    What only a class can make, such as the names of bands, is taken from ``config``.
    """
    arguments = told.get("model_args")
    if not isinstance(arguments, Mapping) or not arguments:
        return None
    given = _of_one_factory(told.get("model_factory"), arguments)
    ours = config.network.given
    known = {key: value if is_plain(value) else ours.get(key) for key, value in given.items()}
    network = Arguments(f"{source}: hyper_parameters.model_args", known)
    return replace(config, network=network)


def _of_one_factory(factory: Any, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """``given`` under the names of EncoderDecoderFactory."""
    if factory != "PrithviModelFactory":
        return given
    return {_OLD_NAMES.get(key, key): value for key, value in given.items()}


def necks(config: Config) -> Iterator[tuple[str, Arguments]]:
    """Name and arguments of each of the network's necks."""
    for number, neck in enumerate(listed(config.network.take("necks", []))):
        if not isinstance(neck, Mapping) or "name" not in neck:
            raise RecipeError(f"{config.path}: necks.{number} has no name.")
        arguments = {key: value for key, value in neck.items() if key != "name"}
        yield str(neck["name"]), Arguments(f"{config.path}: necks.{number}", arguments)


def _part(document: Any, key: str, path: Path) -> Mapping[str, Any]:
    found = document.get(key) if isinstance(document, Mapping) else None
    if not isinstance(found, Mapping):
        raise RecipeError(
            f"{path} has no table {key}: TerraTorch's YAML, with model and data, is needed."
        )
    return found


def listed(value: Any) -> list[Any]:
    """The items of a list, or the one thing that stands for a list of one."""
    return list(value) if isinstance(value, list | tuple | range) else [value]


def _whole(value: Any, place: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecipeError(f"{place} must be a whole number, found {value!r}.")
    return value
