"""The main flow of a training: from the recipe to the RUN folder."""

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geodeploy.errors import RecipeError
from geodeploy.labels import IGNORED
from geodeploy.products import SCALE
from geodeploy.scores import AnyScores
from geodeploy.spec import Backbone as BackboneSpec
from geodeploy.spec import Band, ModelSpec, Target
from geodeploy.spec import Method as MethodSpec
from geodeploy.train.adapters import as_plain_lora, initialise, state_of
from geodeploy.train.augment import training_batches
from geodeploy.train.backbone import Backbone, build_backbone
from geodeploy.train.card import model_card
from geodeploy.train.checkpoint import Checkpoint
from geodeploy.train.data import (
    LabelledTile,
    check_folder,
    check_scaling,
    compute_statistics,
    compute_targets,
    open_scenes,
    sample_tiles,
)
from geodeploy.train.goals import goal_of
from geodeploy.train.leaks import check_leaks
from geodeploy.train.loop import Fit, check_training, fit
from geodeploy.train.method_options import Adapter
from geodeploy.train.methods import ParameterCounts
from geodeploy.train.model import TunedModel, assemble
from geodeploy.train.pictures import (
    SHOWN,
    draw_curves,
    draw_labels,
    draw_predictions,
    draw_split,
    draw_values,
)
from geodeploy.train.processes import is_first
from geodeploy.train.recipe import Recipe, Statistics, load_recipe
from geodeploy.train.report import Metrics, TrainReport
from geodeploy.train.run import (
    SPEC,
    new_run,
    save_recipe,
    save_tiles,
    save_weights,
)
from geodeploy.train.seen import compute_seen
from geodeploy.train.teaching import check_teachers, teach
from geodeploy.train.validation import score_held_out
from geodeploy.writer import check_new_folder

log = logging.getLogger(__name__)

_TILES = 16
_TILES_SHOWN = 4


def tune(
    recipe_file: Path,
    output: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    progress: bool = False,
    resume: bool = False,
) -> TrainReport:
    """Train what the recipe says and write the RUN folder ``output``. See `geodeploy.train.train`."""
    recipe = load_recipe(recipe_file, overrides)
    return tune_recipe(recipe, output, progress=progress and is_first(), resume=resume)


def distil_run(
    recipe_file: Path,
    output: Path | None = None,
    *,
    teachers: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    progress: bool = False,
    resume: bool = False,
) -> TrainReport:
    """Train a student of ``teachers``, or of those the recipe names. See `geodeploy.train.distil`."""
    recipe = load_recipe(recipe_file, overrides)
    named = tuple(teacher.resolve() for teacher in teachers) or recipe.distillation.teachers
    if not named:
        raise RecipeError(
            f"{recipe_file} names no teacher. Give a RUN with --teacher, or distillation.teachers."
        )
    distillation = recipe.distillation.model_copy(update={"teachers": named})
    recipe = recipe.model_copy(update={"distillation": distillation})
    return tune_recipe(recipe, output, progress=progress and is_first(), resume=resume)


def tune_recipe(
    recipe: Recipe, output: Path | None = None, *, progress: bool = False, resume: bool = False
) -> TrainReport:
    """Train ``recipe`` and write the RUN folder ``output``.

    Of several processes the first alone writes, shows, and scores what is held out.
    """
    output = output or Path("runs") / recipe.name
    check_new_folder(output)
    check_teachers(recipe)
    check_folder(recipe.data)
    torch.manual_seed(recipe.seed)
    backbone = build_backbone(recipe.model, recipe.data.bands, gsd_m=recipe.data.gsd_m)
    start = _copy_start(recipe, backbone)
    bands, planes = len(recipe.data.bands), recipe.planes
    # What the pixels are normalised by is known once they are read, which may take an hour.
    model = assemble(recipe, backbone, mean=[0.0] * planes, std=[1.0] * planes, targets=recipe.targets)
    check_training(model, recipe)
    with open_scenes(recipe) as scenes:
        check_leaks(scenes)
        checkpoint = Checkpoint(output, recipe, scenes, backbone.sha256) if resume else None
        statistics = recipe.data.statistics or compute_statistics(scenes, bands)
        check_scaling(recipe, statistics)
        targets = compute_targets(scenes, recipe.targets)
        seen = compute_seen(scenes, bands)
        dates = recipe.model.timesteps
        model.set_statistics(statistics.mean * dates, statistics.std * dates, targets)
        mean = np.array(statistics.mean * dates, np.float32)
        taught = teach(scenes, recipe, progress=progress) if recipe.distillation.teachers else scenes
        if isinstance(recipe.method, Adapter):
            batches = (batch.pixels for batch in training_batches(taught, recipe, mean))
            initialise(model, batches, recipe.method)
            initial = state_of(model.backbone)
        counts = model.counts()
        log.info("%s", counts)
        result = fit(model, taught, recipe, progress=progress, checkpoint=checkpoint)
        held_out = score_held_out(
            model, scenes if is_first() else [], recipe, mean=mean, device=result.device
        )
        if isinstance(recipe.method, Adapter) and recipe.method.changes_base:
            model.backbone = as_plain_lora(model.backbone, recipe.method, start, initial)
        tiles = sample_tiles(scenes, recipe, mean, _TILES)
        areas = [(scene.raster.name, scene.part, scene.codes != IGNORED) for scene in scenes[:SHOWN]]
    spec = describe(recipe, statistics, targets, seen, backbone)
    metrics = _measure(result, counts, recipe, held_out)
    if not is_first():
        return TrainReport(run=output, metrics=metrics)
    with new_run(output) as folder:
        save_weights(folder, model, recipe, start)
        save_recipe(folder, recipe)
        save_tiles(folder, tiles, spec)
        (folder / SPEC).write_text(spec.to_json() + "\n", encoding="utf-8")
        (folder / "metrics.json").write_text(metrics.model_dump_json(indent=1) + "\n")
        draw_curves(folder / "curves.png", result.losses, result.history, result.best.step, spec)
        draw_split(folder / "split.png", areas, of=len(scenes))
        _draw_tiles(folder / "predictions.png", model, tiles, spec, recipe)
        card = model_card(
            spec,
            recipe,
            counts,
            metrics.scores,
            held_out=held_out,
            steps=metrics.steps,
            pyramid=model.taps.pyramid,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    if checkpoint is not None:
        checkpoint.remove()
    return TrainReport(run=output, metrics=metrics)


def describe(
    recipe: Recipe,
    statistics: Statistics,
    targets: Sequence[Target],
    seen: Sequence[tuple[float, float] | None],
    backbone: Backbone,
) -> ModelSpec:
    """The spec of the model that ``recipe`` makes."""
    data, weights = recipe.data, recipe.model.weights
    options = recipe.method.model_dump()
    r = options.get("r") or None
    return ModelSpec(
        name=recipe.name,
        bands=tuple(
            Band(name=name, mean=mean, std=std, valid_range=limits, seen=span)
            for name, mean, std, limits, span in zip(
                data.bands, statistics.mean, statistics.std, data.valid_ranges, seen, strict=True
            )
        ),
        units=data.units,
        tile=recipe.model.tile,
        overlap=recipe.model.overlap,
        timesteps=recipe.model.timesteps,
        gsd_m=data.gsd_m,
        task=recipe.task,
        output="values" if targets else "logits",
        classes=recipe.classes,
        targets=tuple(targets),
        presence=data.presence if recipe.task == "multilabel" else None,
        ignore=data.ignore,
        scaling=recipe.model.scaling,
        backbone=BackboneSpec(
            name=recipe.model.backbone, weights=Path(weights).name, sha256=backbone.sha256
        ),
        method=MethodSpec(
            name=recipe.method.name,
            r=r,
            alpha=options.get("alpha") if r else None,
            targets=options.get("targets", ()),
        ),
        trained_on=recipe.trained_on,
        licence=recipe.licence,
    )


def _copy_start(recipe: Recipe, backbone: Backbone) -> dict[str, Tensor]:
    """The weights that adapters will sit on, where they are random or will be taken apart."""
    if not isinstance(recipe.method, Adapter):
        return {}
    if recipe.model.weights != "random" and not recipe.method.changes_base:
        return {}
    return {name: value.detach().clone() for name, value in backbone.encoder.state_dict().items()}


def _measure(
    result: Fit, counts: ParameterCounts, recipe: Recipe, held_out: dict[str, AnyScores]
) -> Metrics:
    return Metrics(
        scores=result.best.scores,
        held_out=held_out,
        best_step=result.best.step,
        steps=len(result.losses),
        trainable_parameters=counts.trainable,
        trainable_backbone_parameters=counts.backbone,
        trainable_head_parameters=counts.head,
        parameters=counts.total,
        seconds=round(result.seconds, 1),
        images_per_s=round(result.images_per_s, 2),
        waiting=round(result.waiting, 4),
        device=result.device,
        processes=result.processes,
        precision=recipe.training.precision,
        versions={name: version(name) for name in ("geodeploy-eo", "torch", "timm", "peft", "numpy")},
        history=tuple(result.history),
    )


def _draw_tiles(
    path: Path, model: TunedModel, tiles: Sequence[LabelledTile], spec: ModelSpec, recipe: Recipe
) -> None:
    # Those with most labels: there is most to compare.
    shown = sorted(tiles, key=lambda item: int((item.codes == IGNORED).sum()))[:_TILES_SHOWN]
    pixels = np.stack([item.pixels for item in shown])
    goal = goal_of(recipe)
    labels = np.stack([goal.labels(item) for item in shown])
    with torch.inference_mode():
        answers = goal.answers(model(torch.from_numpy(pixels)))
    if spec.whole_tiles:
        draw_labels(path, pixels, labels, answers * np.float32(SCALE), spec)
    elif spec.targets:
        draw_values(path, pixels, labels, answers, spec)
    else:
        draw_predictions(path, pixels, labels[:, 0], answers[:, 0], spec)
