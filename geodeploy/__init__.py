"""Tune a geospatial foundation model, export it, and map satellite scenes of any size.

The verbs of the command line are functions here, under the same names. Each is imported when it is
first used, so that `import geodeploy` costs nothing and needs no torch.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geodeploy.arrays import predict_array
    from geodeploy.errors import GeodeployError
    from geodeploy.evaluate import evaluate
    from geodeploy.export import export, export_adapters
    from geodeploy.export.options import ExportOptions
    from geodeploy.imports import import_terratorch
    from geodeploy.imports.options import ImportOptions
    from geodeploy.model import Model
    from geodeploy.predict import PredictOptions, predict, predict_scenes
    from geodeploy.report import Failure, Report
    from geodeploy.scores import Scores
    from geodeploy.spec import ModelSpec
    from geodeploy.train import check_data, distil, train

__version__ = version("geodeploy-eo")

__all__ = [
    "ExportOptions",
    "Failure",
    "GeodeployError",
    "ImportOptions",
    "Model",
    "ModelSpec",
    "PredictOptions",
    "Report",
    "Scores",
    "check_data",
    "distil",
    "evaluate",
    "export",
    "export_adapters",
    "import_terratorch",
    "predict",
    "predict_array",
    "predict_scenes",
    "train",
]

_HOMES = {
    "ExportOptions": "export.options",
    "Failure": "report",
    "GeodeployError": "errors",
    "ImportOptions": "imports.options",
    "Model": "model",
    "ModelSpec": "spec",
    "PredictOptions": "predict",
    "Report": "report",
    "Scores": "scores",
    "check_data": "train",
    "distil": "train",
    "evaluate": "evaluate",
    "export": "export",
    "export_adapters": "export",
    "import_terratorch": "imports",
    "predict": "predict",
    "predict_array": "arrays",
    "predict_scenes": "predict",
    "train": "train",
}


class _Package(ModuleType):
    """This package, in which `predict` stays the verb when the module `predict` is imported."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'geodeploy' has no attribute {name!r}")
        return getattr(import_module(f"geodeploy.{_HOMES[name]}"), name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_HOMES]

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets each imported submodule as an attribute of its package.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
