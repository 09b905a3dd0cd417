"""RUN -> merged model -> ONNX, with the proof on real tiles that nothing changed on the way."""

from pathlib import Path
from typing import TYPE_CHECKING

from geodeploy.errors import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from geodeploy.export.drift import Bisection
    from geodeploy.export.options import ExportOptions
    from geodeploy.export.parity import ParityReport

__all__ = ["bisect", "export", "export_adapters", "verify"]


def export(
    run: Path | str,
    output: Path | str | None = None,
    *,
    overwrite: bool = False,
    options: "ExportOptions | None" = None,
) -> "ParityReport":
    """Write the model of ``run``, as ONNX unless told, its description inside, if it does the same.

    Beside it go ``<name>.parity.json`` and ``<name>.stac.json``, a STAC item. Outside the tolerances no
    model is written, only that report, as ``<name>.refused.json``, and a picture of the worst tile.

    Args:
        run: A folder that `geodeploy.train` made.
        output: The file, or the folder for Triton. None for ``<name of the run>.onnx``,
            ``<name of the run>.pt2`` or ``models/<name of the run>`` in the current folder.
        overwrite: Replace a model that exists.
        options: None for plain ONNX.

    Raises:
        ParityError: the merged or the exported model differs from the tuned one.
        RecipeError: an option asks for what the model cannot give.
        DeviceError: TensorRT is asked for, and there is no GPU.
        OutputError: ``output`` cannot or must not be written.
        GeodeployError: the RUN cannot be loaded.
    """
    _needs_the_extra()
    from geodeploy.export.onnx import export_run
    from geodeploy.export.options import ExportOptions

    run = Path(run)
    options = options or ExportOptions()
    name = run.resolve().name
    places = {"triton": f"models/{name}", "torch-export": f"{name}.pt2"}
    place = Path(output or places.get(options.to, f"{name}.onnx"))
    return export_run(run, place, overwrite=overwrite, options=options)


def export_adapters(
    runs: "Sequence[Path | str]", folder: Path | str = "adapters", *, overwrite: bool = False
) -> "list[ParityReport]":
    """Write the RUNs of one backbone as ``base.onnx`` and an adapter each, if they do the same.

    ``predict`` takes both, ``<name of the run>.onnx_adapter`` for the task. Beside each adapter go
    ``<name>.parity.json`` and ``<name>.stac.json``. RUNs of the same backbone that are exported later,
    into the same folder, find the same base there. Outside the tolerances nothing is written but the
    report, as ``<name>.refused.json``.

    Args:
        runs: Folders that `geodeploy.train` made, of one backbone, weights and tile. Bands, classes,
            decoder and method may differ; methods must change layers by products of low rank, or change
            vectors alone.
        folder: Where base and adapters go.
        overwrite: Replace adapters that exist, and another base.

    Raises:
        RecipeError: the RUNs have no common base, or a method does not fit into an adapter.
        ParityError: a base with its adapter differs from the tuned model.
        OutputError: ``folder`` cannot be written, holds another base, or the adapters exist.
        GeodeployError: a RUN cannot be loaded.
    """
    _needs_the_extra()
    from geodeploy.export.adapters import export_runs

    return export_runs([Path(run) for run in runs], Path(folder), overwrite=overwrite)


def verify(
    run: Path | str,
    model: Path | str,
    *,
    adapter: Path | str | None = None,
    picture: Path | str | None = None,
) -> "ParityReport":
    """Compare ``model`` with the tuned one in ``run``, on the real tiles that the RUN keeps.

    A base is compared with the ``adapter`` that the RUN became. Of a whole model the tile that differs
    most is drawn into ``picture``, a PNG, whether it is accepted or not.

    Raises:
        ParityError: it lies outside the tolerances; the message says how far, and from which layer on.
        OutputError: ``picture`` cannot be written, or is the model.
    """
    _needs_the_extra()
    if adapter is not None:
        from geodeploy.export.adapters import verify_adapter

        return verify_adapter(Path(run), Path(model), Path(adapter))
    from geodeploy.export.proof import verify_model

    return verify_model(Path(run), Path(model), Path(picture) if picture else None)


def bisect(run: Path | str, model: Path | str, *, tolerance: float | None = None) -> "list[Bisection]":
    """Find in each runtime the first value of an ONNX file that is not what the RUN computes.

    The file may be one that `verify` accepts or refuses; it is run on the tile in which it is furthest
    off. Each layer is fed with what the RUN has for its inputs, so that it answers for itself alone.

    Args:
        run: The RUN that the model was made of.
        model: An ONNX file that `geodeploy export` made; values are known by the names it gives.
        tolerance: Of the root mean square of a value's difference over that of the RUN's value. None
            for the relative difference of the release, and for no bound where the outputs hold.

    Raises:
        RecipeError: ``tolerance`` is no number from 0 up.
        ModelError: ``model`` is no ONNX file.
    """
    _needs_the_extra()
    from geodeploy.export.proof import bisect_model

    return bisect_model(Path(run), Path(model), tolerance)


def _needs_the_extra() -> None:
    require("export", ("torch", "timm", "peft", "onnx", "onnxscript"))
