"""The tensors of a checkpoint, out of a file that may hold a pickle of anything: none of it is run."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from geodeploy.errors import WeightsError, first_line

_ADVICE = (
    "A checkpoint of Lightning (.ckpt), or its weights alone (TerraTorch writes *_state_dict.ckpt), is "
    "needed."
)


class _Inert:
    """Stands for every class and function that a pickle names: takes anything and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is read of a file."""

    tensors: dict[str, Tensor]
    told: Mapping[str, Any]
    """Lightning's hyper-parameters: what the model was made with. Empty in a file of weights alone."""


def is_plain(value: Any) -> bool:
    """Whether it is of numbers, words, lists and tables, and of nothing that a class had to make."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the file ``path``, by name: see `load_checkpoint`."""
    return load_checkpoint(path).tensors


def load_checkpoint(path: Path) -> Checkpoint:
    """The Lightning checkpoint, or the state dict, in the file ``path``.

    Optimizers and callbacks are left aside. Classes and functions that it names are neither imported
    nor called.

    Raises:
        WeightsError: the file is missing or broken, or its weights are anything but tensors.
    """
    if not path.is_file():
        raise WeightsError(f"The checkpoint {path} does not exist. {_ADVICE}")
    try:
        with safe_globals([(_Inert, name) for name in get_unsafe_globals_in_checkpoint(path)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds, beside tensors, what only a call of foreign code makes: none is called. "
            f"{_ADVICE}"
        ) from error
    except (zipfile.BadZipFile, *_BROKEN) as error:
        raise WeightsError(f"{path} cannot be read ({first_line(error)}). {_ADVICE}") from error
    tensors: Any = content.get("state_dict", content) if isinstance(content, dict) else content
    odd = _not_tensors(tensors)
    if odd:
        raise WeightsError(f"{path} holds {odd} where tensors by name are needed. {_ADVICE}")
    told: Any = content.get("hyper_parameters") if isinstance(content, dict) else None
    return Checkpoint(dict(tensors), told if isinstance(told, Mapping) else {})


_BROKEN = (AttributeError, EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError)
"""What torch raises of files that are no checkpoints, or cut off."""


def _not_tensors(tensors: object) -> str | None:
    if not isinstance(tensors, Mapping) or not tensors:
        return f"a {type(tensors).__name__}"
    for name, value in tensors.items():
        if not isinstance(name, str) or type(value) is not Tensor:
            kind = "an object of a class" if isinstance(value, _Inert) else f"a {type(value).__name__}"
            return f"{kind} ({name!s:.100})"
    return None
