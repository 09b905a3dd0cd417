"""What is wrong with the data of a recipe, found before a training that would take a day."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray
from rasterio import Env
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.warp import transform_bounds

from geodeploy.errors import GeodeployError, RecipeError, SourceError
from geodeploy.raster import Raster
from geodeploy.tally import Moments as Values
from geodeploy.tally import add_up
from geodeploy.train.chips import list_scenes
from geodeploy.train.data import (
    TEST,
    TRAINING,
    VALIDATION,
    check_folder,
    check_scaling,
    check_target,
    label_scene,
    open_image,
)
from geodeploy.train.findings import (
    ClassCount,
    DataReport,
    Finding,
    Findings,
    SceneFacts,
    TargetFacts,
)
from geodeploy.train.leaks import common_windows, meeting, shared_pixels
from geodeploy.train.look import Look, Moments, check_names, look_at
from geodeploy.train.recipe import Recipe
from geodeploy.train.swaps import correlation_of, profile, swap_by_others, swap_by_wavelength

_SPLITS = {"train": TRAINING, "validation": VALIDATION, "test": TEST}
_SHOWN = 5
_GSD_RATIO = 1.25
"""Of two sizes of pixels, beyond which it is told."""
_OVERLAP = 0.05
"""Share of a scene beyond which common ground is told."""


def check_recipe(recipe: Recipe) -> DataReport:
    """Read all data of ``recipe``, in stripes, and list what is or may be wrong with it.

    Memory: two bytes a pixel of one scene at a time, or of two that show the same ground.
    """
    findings = Findings()
    try:
        check_folder(recipe.data)
    except SourceError as error:
        findings.say("error", "unreadable", "", str(error))
        return _report(recipe, findings, [])
    looks = list(_look_at_all(recipe, findings))
    _compare_grids(looks, recipe, findings)
    _compare_pixels(looks, findings)
    _compare_ground(looks, recipe, findings)
    _compare_bands(looks, recipe, findings)
    _check_classes(looks, recipe, findings)
    _check_statistics(looks, recipe, findings)
    return _report(recipe, findings, looks)


def _report(recipe: Recipe, findings: Sequence[Finding], looks: Sequence[Look]) -> DataReport:
    counts = _count(looks, recipe)
    ranks = ("error", "warning", "note")
    return DataReport(
        findings=tuple(sorted(findings, key=lambda finding: ranks.index(finding.severity))),
        classes=tuple(
            ClassCount(
                value=item.value,
                name=item.name,
                **{split: int(counts[part, position]) for split, part in _SPLITS.items()},
            )
            for position, item in enumerate(recipe.classes)
        ),
        targets=tuple(_tell_targets(looks, recipe)),
        scenes=tuple(
            SceneFacts(
                where=look.where,
                split=look.split,
                height=look.raster.height,
                width=look.raster.width,
                crs=None if look.raster.crs is None else look.raster.crs.to_string(),
                gsd_m=look.gsd_m,
                nodata_share=1 - look.moments.count / (look.raster.height * look.raster.width),
                means=tuple(float(f"{mean:.5g}") for mean in look.moments.mean)
                if look.moments.count
                else (),
            )
            for look in looks
        ),
    )


def _tell_targets(looks: Sequence[Look], recipe: Recipe) -> Iterator[TargetFacts]:
    for place, target in enumerate(recipe.targets):
        for split, part in _SPLITS.items():
            found = add_up([Values(), *(look.values[part][place] for look in looks)])
            if found.valid:
                yield TargetFacts(
                    name=target.name,
                    unit=target.unit,
                    split=split,
                    pixels=found.valid,
                    mean=found.mean,
                    std=found.deviation,
                    minimum=found.low,
                    maximum=found.high,
                )


def _look_at_all(recipe: Recipe, findings: Findings) -> Iterator[Look]:
    try:
        listed = list_scenes(recipe)
    except GeodeployError as error:
        findings.say("error", "unreadable", "", str(error))
        listed = [(f"data.scene.{number}", scene) for number, scene in enumerate(recipe.data.scene)]
    for place, scene in listed:
        where = f"{place} ({scene.image.name})"
        if scene.labels is None and not recipe.distillation.teachers:
            message = "has no labels: left out, as in a training without distillation.teachers."
            findings.say("note", "labels", where, message)
            continue
        try:
            with open_image(recipe, scene, place) as raster:
                check_names(raster, recipe, scene, where, findings)
                yield look_at(raster, recipe, scene, place, findings)
        except GeodeployError as error:
            findings.say("error", "unreadable", where, str(error))


def _compare_grids(looks: Sequence[Look], recipe: Recipe, findings: Findings) -> None:
    """Say where CRSs and resolutions are mixed."""
    kinds: dict[str, list[Look]] = {"without a CRS": [], "in degrees": [], "projected": []}
    for look in looks:
        crs = look.raster.crs
        kind = "projected" if crs is None or not crs.is_geographic else "in degrees"
        kinds[kind if crs is not None else "without a CRS"].append(look)
    mixed = [f"{len(found)} {kind} ({found[0].where})" for kind, found in kinds.items() if found]
    if len(mixed) > 1:
        message = f"images differ in their CRS: {', '.join(mixed)}."
        if kinds["without a CRS"]:
            message += " Whether those without one show the same ground as others cannot be seen."
        findings.say("warning", "crs", "", message)
    known = sorted({look.raster.crs.to_string() for look in looks if look.raster.crs is not None})
    if len(known) > 1:
        findings.say("note", "crs", "", f"{len(known)} CRSs: {', '.join(known[:_SHOWN])}.")
    sized = [(look.gsd_m, look.where) for look in looks if look.gsd_m is not None]
    wanted = recipe.data.gsd_m
    if wanted is None and sized and max(sized)[0] > min(sized)[0] * _GSD_RATIO:
        (least, fine), (most, coarse) = min(sized), max(sized)
        message = f"pixels are of {least:.4g} m ({fine}) to {most:.4g} m ({coarse})."
        findings.say("note", "resolution", "", message)
    for size, where in sized:
        if wanted is not None and not 1 / _GSD_RATIO < size / wanted < _GSD_RATIO:
            message = f"has pixels of {size:.4g} m; data.gsd_m is {wanted:g}."
            findings.say("warning", "resolution", where, message)


def _compare_pixels(looks: Sequence[Look], findings: Findings) -> None:
    """Say which images hold the same pixels."""
    alike: dict[str, list[Look]] = defaultdict(list)
    for look in looks:
        if look.digest:
            alike[look.digest].append(look)
    for first, *rest in alike.values():
        for look in rest:
            if look.split != first.split or (
                look.split == "blocks" and look.purposes != first.purposes
            ):
                findings.say(
                    "error",
                    "duplicate",
                    look.where,
                    f"holds the same pixels as {first.where}, and the two are in different splits "
                    f"({look.split}, {first.split}): what is scored would have been trained on.",
                )
            else:
                message = f"holds the same pixels as {first.where}: they count twice."
                findings.say("warning", "duplicate", look.where, message)


def _compare_ground(looks: Sequence[Look], recipe: Recipe, findings: Findings) -> None:
    """Say which images of different splits show the same ground, in the same pixels or in others."""
    for look, other, share, one_crs in _overlaps(looks):
        if look.split == other.split != "blocks" or (look.digest and look.digest == other.digest):
            continue
        splits = f"the two are in different splits ({look.split}, {other.split})"
        if one_crs and (pixels := _count_leak(look, other, recipe)):
            findings.say(
                "error",
                "duplicate",
                look.where,
                f"shares {pixels} labelled pixels with {other.where}, and {splits}: they would be "
                "trained on in the one and scored in the other.",
            )
        elif share > (_OVERLAP if one_crs else 4 * _OVERLAP):  # boxes in degrees are larger than scenes
            findings.say(
                "warning",
                "ground",
                look.where,
                f"shows ground of {other.where}, {share:.0%} of the smaller one, and {splits}: scores "
                "would flatter.",
            )


def _overlaps(looks: Sequence[Look]) -> Iterator[tuple[Look, Look, float, bool]]:
    """Two images over one another, what they share of the smaller, and whether they have one CRS."""
    placed = [look for look in looks if look.raster.crs is not None]
    names = [look.raster.crs.to_wkt() for look in looks if look.raster.crs is not None]
    crs = np.unique(names, return_inverse=True)[1]
    boxes = np.array([look.raster.bounds for look in placed]).reshape(-1, 4)
    degrees = np.array([_in_degrees(look.raster) for look in placed]).reshape(-1, 4)
    for number, look in enumerate(placed):
        one_crs = crs[:number] == crs[number]
        near = np.where(
            one_crs,
            meeting(boxes[:number], boxes[number]),
            meeting(degrees[:number], degrees[number]),
        )
        for place in np.flatnonzero(near):
            found = boxes if one_crs[place] else degrees
            yield look, placed[place], _common(found[number], found[place]), bool(one_crs[place])


def _count_leak(one: Look, other: Look, recipe: Recipe) -> int:
    """How many labelled pixels are trained on in the one of the two and scored in the other."""
    if not (one.counts.any() and other.counts.any() and common_windows(one.raster, other.raster)):
        return 0
    with ExitStack() as stack:
        first, second = (
            label_scene(
                recipe,
                look.scene,
                look.place,
                stack.enter_context(open_image(recipe, look.scene, look.place)),
            )
            for look in (one, other)
        )
        return shared_pixels(first, second) + shared_pixels(second, first)


def _in_degrees(raster: Raster) -> tuple[float, ...]:
    """The box around ``raster``; of NaN where its CRS does not say where on Earth it is."""
    try:
        with Env():  # or GDAL prints what it raises
            bounds: tuple[float, ...] = transform_bounds(
                raster.crs, CRS.from_epsg(4326), *raster.bounds
            )
    except CPLE_BaseError:
        return (np.nan,) * 4
    return bounds


def _common(one: Sequence[float], other: Sequence[float]) -> float:
    """What two boxes share, of the smaller."""
    across = max(min(one[2], other[2]) - max(one[0], other[0]), 0)
    down = max(min(one[3], other[3]) - max(one[1], other[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return across * down / min(areas) if min(areas) > 0 else 0.0


def _compare_bands(looks: Sequence[Look], recipe: Recipe, findings: Findings) -> None:
    """Say where bands look swapped: by the order of their wavelengths, and against the other scenes."""
    joined: dict[str, Moments] = {}
    for look in looks:
        joined.setdefault(look.place, Moments(len(recipe.data.bands))).join(look.moments)
    spectra = {
        place: (profile(moments.mean), correlation_of(moments.covariance))
        for place, moments in joined.items()
        if moments.count and (moments.covariance.diagonal() > 0).all() and (moments.mean > 0).all()
    }
    for place, (spectrum, correlation) in spectra.items():
        others = [found for other, found in spectra.items() if other != place]
        swap = swap_by_wavelength(correlation, recipe.data.bands)
        if swap is None and len(others) > 1:
            usual = [np.median(values, axis=0) for values in zip(*others, strict=True)]
            swap = swap_by_others(spectrum, correlation, usual[0], usual[1])
        if swap is not None:
            one, other = (recipe.data.bands[number] for number in swap)
            findings.say(
                "warning",
                "bands",
                place,
                f"bands look out of order: {one} and {other} swapped would fit better. A suspicion, "
                "from how alike the bands are.",
            )


def _check_classes(looks: Sequence[Look], recipe: Recipe, findings: Findings) -> None:
    """Say which classes and quantities no split, or not every split, has pixels of."""
    counts = _count(looks, recipe)
    taught = bool(recipe.distillation.teachers)
    if not counts[TRAINING].any() and not (taught and counts[VALIDATION].any()):
        either = " or to validate on" if taught else ""
        findings.say("error", "classes", "", f"no pixel to train on{either} has a label.")
        return
    if not counts[VALIDATION].any():
        message = "no pixel validates: the weights of the last step are kept, and nothing is scored."
        findings.say("warning", "classes", "", message)
    for place, target in enumerate(recipe.targets):
        learned, scored = (
            add_up([Values(), *(look.values[part][place] for look in looks)])
            for part in (TRAINING, VALIDATION)
        )
        try:
            check_target(place, target, learned)
        except RecipeError as error:
            findings.say("error", "classes", "", str(error))
        if counts[VALIDATION].any() and not scored.valid:
            message = f"no label that validates has {target.name}: it is not scored."
            findings.say("warning", "classes", "", message)
    made_up = recipe.augmentation.clouds.made_up
    for position, item in enumerate(recipe.classes):
        if not (counts[TRAINING, position] or taught or item.value in made_up):
            message = f"no pixel to train on is {item.name}: it cannot be learned."
            findings.say("warning", "classes", "", message)
        elif counts[VALIDATION].any() and not counts[VALIDATION, position]:
            message = f"no pixel that validates is {item.name}: it is not scored."
            findings.say("warning", "classes", "", message)


def _count(looks: Sequence[Look], recipe: Recipe) -> NDArray[np.int64]:
    """(4, K): labelled pixels of each part and class, or fourth of a quantity's range."""
    return sum((look.counts for look in looks), np.zeros((4, recipe.groups), np.int64))


def _check_statistics(looks: Sequence[Look], recipe: Recipe, findings: Findings) -> None:
    """Say where what there is to train on cannot be normalised."""
    learned = Moments(len(recipe.data.bands))
    for look in looks:
        learned.join(look.learned)
    if not learned.count:  # without labels then, or in no file that can be read
        return
    try:
        check_scaling(recipe, recipe.data.statistics or learned.statistics())
    except RecipeError as error:
        findings.say("error", "bands", "", str(error))
