"""The model card of an imported RUN: what it is, and what is not known of it."""

from geodeploy.spec import ModelSpec
from geodeploy.train.card import describe_input, describe_use
from geodeploy.train.methods import ParameterCounts
from geodeploy.train.recipe import Recipe


def model_card(spec: ModelSpec, recipe: Recipe, counts: ParameterCounts, scale: float) -> str:
    """Markdown for the RUN's ``README.md``."""
    backbone = spec.backbone
    assert backbone is not None
    classes = ", ".join(f"{item.name} ({item.value})" for item in spec.classes)
    does = f"Segments imagery into {classes}" if classes else f"Maps {spec.targets[0]} from imagery"
    parts = [
        f"# {spec.name}\n\n{does}.",
        describe_input(spec),
        f"Values as stored in images are multiplied with {scale:g} to get these units.",
        f"## Method\n\nTuned by TerraTorch, imported from `{backbone.weights}` (sha256 "
        f"`{backbone.sha256}`). Backbone `{backbone.name}`; {recipe.method}; {counts.total:,} "
        "parameters.",
        "## Scores\n\nNot known here: score it on a scene of its own with `geodeploy evaluate`.",
        describe_use(),
        "## Licence\n\nNot known here: that of the weights it was tuned from, and of its data.",
    ]
    return "\n\n".join(parts) + "\n"
