"""Bring in models that others' programs tuned. Needs the extra ``train``."""

from pathlib import Path
from typing import TYPE_CHECKING

from geodeploy.errors import require
from geodeploy.train import NEEDED

if TYPE_CHECKING:
    from geodeploy.imports.options import ImportOptions
    from geodeploy.imports.terratorch import ImportReport


def import_terratorch(
    checkpoint: Path | str,
    config: Path | str,
    output: Path | str,
    *,
    options: "ImportOptions | None" = None,
) -> "ImportReport":
    """Make a RUN of a segmentation or regression model that TerraTorch fine-tuned, whole or with LoRA.

    Nothing of the checkpoint but its tensors is read; no code in it is run.

    Args:
        checkpoint: Lightning's (.ckpt), or its weights alone.
        config: The YAML it was trained by, with ``model`` and ``data``.
        output: The RUN folder; must not exist.
        options: What the configuration leaves out; None for nothing.

    Raises:
        RecipeError: the configuration describes what cannot be built here just like it, or leaves out
            what is needed; the message says which option gives it.
        WeightsError: the checkpoint cannot be read, or is of another model.
        GeodeployError: an image cannot be read, or ``output`` not be written.
    """
    require("train", (*NEEDED, "yaml"))
    from geodeploy.imports.options import ImportOptions
    from geodeploy.imports.terratorch import import_checkpoint

    return import_checkpoint(Path(checkpoint), Path(config), Path(output), options or ImportOptions())
