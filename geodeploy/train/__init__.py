"""Tune a backbone on labelled scenes, or distil a small one from it: a recipe in, a RUN folder out.

Needs the extra ``train``, but for `check_data`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from geodeploy.errors import require

if TYPE_CHECKING:
    from geodeploy.train.findings import DataReport
    from geodeploy.train.report import TrainReport

NEEDED = (
    "torch", "timm", "peft", "accelerate", "safetensors", "segmentation_models_pytorch", "tqdm",
)  # fmt: skip


def train(
    recipe: Path | str,
    output: Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    progress: bool = False,
    resume: bool = False,
    processes: int = 1,
) -> "TrainReport":
    """Train what the TOML file ``recipe`` says and write the RUN folder ``output``.

    Args:
        recipe: See `geodeploy.train.recipe.Recipe` for its keys.
        output: Must not exist; its parent must. None makes ``runs`` and takes the recipe's name in
            it. The folder appears whole, at the end, or not at all.
        overrides: ``key.sub=value`` each, in place of what the file says.
        progress: Show a bar on stderr if that is a terminal.
        resume: Keep the training's state beside ``output`` at every validation, and go on from it if
            there is one: to the weights that an undisturbed run would have had.
        processes: That share every batch, each on a GPU of its own, or on the CPU where there is none;
            new ones, which import the calling script as `multiprocessing` does. Under `torchrun`, which
            begins them itself, leave it at 1.

    Raises:
        GeodeployError: of the kind that fits, before any work is done where that can be known.
    """
    require_packages()
    if processes > 1:
        from geodeploy.train.processes import run_in_processes

        return run_in_processes(
            processes,
            partial(train, recipe, output, overrides=overrides, progress=progress, resume=resume),
        )
    from geodeploy.train.tuning import tune

    run = None if output is None else Path(output)
    return tune(Path(recipe), run, overrides=overrides, progress=progress, resume=resume)


def distil(
    recipe: Path | str,
    output: Path | str | None = None,
    *,
    teachers: Sequence[Path | str] = (),
    overrides: Sequence[str] = (),
    progress: bool = False,
    resume: bool = False,
    processes: int = 1,
) -> "TrainReport":
    """Train what ``recipe`` says to answer like ``teachers`` do, and write the RUN folder ``output``.

    The teachers map every scene of the recipe first, those without labels too. The student then learns
    their probabilities, and the labels where there are any, under the recipe's augmentations: what the
    teachers see in plain light it must see in any.

    Args:
        recipe: As for `train`, and ``[distillation]``.
        output: As for `train`.
        teachers: RUN folders of the same bands and classes; their probabilities are averaged. None
            takes those that the recipe names.
        overrides: ``key.sub=value`` each, in place of what the file says.
        progress: Show bars on stderr if that is a terminal.
        resume: As for `train`.
        processes: As for `train`; the teachers map the scenes in each of them.

    Raises:
        GeodeployError: of the kind that fits, before any work is done where that can be known.
    """
    require_packages()
    if processes > 1:
        from geodeploy.train.processes import run_in_processes

        return run_in_processes(
            processes,
            partial(
                distil,
                recipe,
                output,
                teachers=teachers,
                overrides=overrides,
                progress=progress,
                resume=resume,
            ),
        )
    from geodeploy.train.tuning import distil_run

    run = None if output is None else Path(output)
    return distil_run(
        Path(recipe),
        run,
        teachers=[Path(teacher) for teacher in teachers],
        overrides=overrides,
        progress=progress,
        resume=resume,
    )


def check_data(recipe: Path | str, *, overrides: Sequence[str] = ()) -> "DataReport":
    """What is or may be wrong with the data of ``recipe``: all of it at once, before any training.

    Reads every image and its labels in stripes; needs no torch.

    Args:
        recipe: As for `train`.
        overrides: ``key.sub=value`` each, in place of what the file says.

    Raises:
        RecipeError: the recipe itself is no good.
    """
    from geodeploy.train.check import check_recipe
    from geodeploy.train.recipe import load_recipe

    return check_recipe(load_recipe(Path(recipe), overrides))


def require_packages() -> None:
    """Refuse to go on without the packages of the extra ``train``.

    Raises:
        MissingExtraError: names the first that is absent.
    """
    require("train", NEEDED)
