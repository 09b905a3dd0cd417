"""The main flow of an import: a checkpoint of TerraTorch and its YAML in, a RUN folder out."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from geodeploy.errors import RecipeError, WeightsError, first_line
from geodeploy.imports.card import model_card
from geodeploy.imports.checkpoint import load_checkpoint
from geodeploy.imports.config import read_config
from geodeploy.imports.foundations import Foundation
from geodeploy.imports.network import Network, check_as_trained, read_network
from geodeploy.imports.options import ImportOptions
from geodeploy.imports.recipe import build_recipe
from geodeploy.imports.tiles import cut_real_tiles, find_images
from geodeploy.imports.weights import TrainedWeights, sort_weights
from geodeploy.spec import Backbone as BackboneSpec
from geodeploy.spec import ModelSpec
from geodeploy.train.adapters import quiet
from geodeploy.train.backbone import Backbone, build_backbone
from geodeploy.train.backbones import FAMILIES
from geodeploy.train.backbones.family import Wanted
from geodeploy.train.backbones.prithvi import Prithvi, resample
from geodeploy.train.model import TunedModel, assemble
from geodeploy.train.recipe import Recipe
from geodeploy.train.run import SPEC, new_run, save_recipe, save_tiles, save_weights
from geodeploy.train.terratorch import TerraTorchDecoder
from geodeploy.train.tuning import describe
from geodeploy.train.weights import file_sha256
from geodeploy.writer import check_new_folder


class ImportReport(BaseModel):
    """What was imported, and where it is."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    run: Path
    spec: ModelSpec
    parameters: int
    """Of the whole network."""
    adapters: int
    """Layers with LoRA."""
    scale: float
    """What values stored in images are multiplied with before the model sees them."""
    tiles: int
    """Real tiles that the RUN keeps for the proof of an export."""

    def __str__(self) -> str:
        spec = self.spec
        lora = f", LoRA on {self.adapters} layers" if self.adapters else ""
        scale = f" --scale {self.scale:g}" if self.scale != 1 else ""
        dates = f"{spec.timesteps} dates of " if spec.timesteps > 1 else ""
        return (
            f"{spec.backbone.name if spec.backbone else ''}: {self.parameters:,} parameters{lora}\n"
            f"takes {dates}{', '.join(spec.band_names)} in {spec.units}, tiles of {spec.tile}"
            f"{f'; images of whole numbers may need predict{scale}' if scale else ''}\n"
            f"gives {', '.join(map(str, spec.targets or spec.outputs))}; {self.tiles} real tiles kept\n"
            f"RUN: {self.run}"
        )


def import_checkpoint(
    checkpoint: Path, config_file: Path, output: Path, options: ImportOptions
) -> ImportReport:
    """See `geodeploy.imports.import_terratorch`."""
    check_new_folder(output)
    config = read_config(config_file)
    network = read_network(config)
    found = load_checkpoint(checkpoint)
    check_as_trained(network, config, found.told, str(checkpoint))
    weights = sort_weights(found.tensors, network, str(checkpoint))
    recipe = build_recipe(config, network, weights, output.name, options)
    backbone = _load_backbone(recipe, network, weights, checkpoint)
    start = {name: value.clone() for name, value in backbone.encoder.state_dict().items()}
    statistics = recipe.data.statistics
    assert statistics is not None
    model = assemble(
        recipe,
        backbone,
        mean=statistics.mean * network.timesteps,
        std=statistics.std * network.timesteps,
        targets=recipe.targets,
    )
    _load_adapters(model.backbone, weights, checkpoint)
    _load(model.decoder, weights.decoder, checkpoint)
    model.eval()
    _check_size(model, network)
    seen = [None] * len(recipe.data.bands)
    spec = describe(recipe, statistics, recipe.targets, seen, backbone)
    # TerraTorch's networks were told distances of their own, not those of the images.
    spec = spec.model_copy(update={"backbone": _origin(recipe, checkpoint), "gsd_m": None})
    images = find_images(config, spec, options)
    tiles = cut_real_tiles(images, spec)
    with new_run(output) as folder:
        save_weights(folder, model, recipe, start)
        save_recipe(folder, recipe)
        save_tiles(folder, tiles, spec)
        (folder / SPEC).write_text(spec.to_json() + "\n", encoding="utf-8")
        card = model_card(spec, recipe, model.counts(), images.scale)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return ImportReport(
        run=output,
        spec=spec,
        parameters=model.counts().total,
        adapters=len(weights.adapters),
        scale=images.scale,
        tiles=len(tiles),
    )


def _load_backbone(recipe: Recipe, network: Network, weights: TrainedWeights, source: Path) -> Backbone:
    """The backbone as it was trained, without adapters."""
    bands, gsd_m = recipe.data.bands, recipe.data.gsd_m
    backbone = build_backbone(recipe.model, bands, gsd_m=gsd_m, load=False)
    encoder: Any = backbone.encoder
    tensors = dict(weights.encoder)
    if network.foundation is not None:
        _load(encoder, _converted(tensors, encoder, recipe, network.foundation, source), source)
        return backbone
    if isinstance(encoder, Prithvi) and "pos_embed" in tensors:
        _check_dates(tensors["pos_embed"], encoder.stacks, source)
        side = encoder.patch_embed.grid_size[0]
        tensors["pos_embed"] = resample(tensors["pos_embed"], encoder.stacks, side)
    if not isinstance(encoder, Prithvi) and hasattr(encoder, "norm"):
        # TerraTorch leaves out the normalisation at the end, and so does its decoder here.
        tensors |= {f"norm.{name}": value for name, value in encoder.norm.state_dict().items()}
    _load(encoder, tensors, source)
    return backbone


def _converted(
    tensors: dict[str, Tensor],
    encoder: nn.Module,
    recipe: Recipe,
    foundation: Foundation,
    source: Path,
) -> dict[str, Tensor]:
    """Tensors of ``encoder`` out of those that have the names of a published file."""
    wanted = Wanted(
        recipe.model,
        recipe.data.bands,
        recipe.data.gsd_m,
        trained=True,
        micrometres=foundation.micrometres,
    )
    published = {name.removeprefix(foundation.prefix): value for name, value in tensors.items()}
    try:
        found = FAMILIES[foundation.name].convert(published, encoder, wanted)
    except (KeyError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{source} is not of the {foundation.name} that its YAML describes ({first_line(error)})."
        ) from error
    # Heads for pretraining may lie beside what is used.
    return {name: found[name] for name in encoder.state_dict() if name in found}


def _check_dates(positions_1ND: Tensor, dates: int, source: Path) -> None:
    patches = positions_1ND.shape[1] - 1
    if patches % dates or math.isqrt(patches // dates) ** 2 * dates != patches:
        raise WeightsError(
            f"{source} has positions for {patches} patches, which are no square of them for each of "
            f"the {dates} dates that its YAML says (backbone_num_frames). Give the YAML that it was "
            "trained by."
        )


def _load_adapters(wrapped: nn.Module, weights: TrainedWeights, source: Path) -> None:
    if not weights.adapters:
        return
    if not isinstance(wrapped, peft.PeftModel):
        raise WeightsError(
            f"{source} has adapters, and its YAML no peft_config. Give the YAML that it was trained by."
        )
    state = {
        f"base_model.model.{layer}.lora_{which}.weight": matrix
        for layer, pair in weights.adapters.items()
        for which, matrix in pair.items()
    }
    needed = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if odd := sorted(needed ^ set(state)):
        raise WeightsError(
            f"{source} has not the same adapters in every block: {len(odd)} differ, the first is "
            f"{odd[0]}."
        )
    try:
        with quiet():
            peft.set_peft_model_state_dict(wrapped, state)
    except RuntimeError as error:  # of other shapes
        raise WeightsError(
            f"{source} has adapters of another rank than its YAML says ({first_line(error)})."
        ) from error


def _load(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    needed = module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in needed.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = sorted(name for name in shapes.keys() | found if shapes.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise WeightsError(
            f"{source} is not of the model that its YAML describes: {len(wrong)} tensors differ, the "
            f"first is {name} (found {found.get(name, 'none')}, needed {shapes.get(name, 'none')})."
        )
    module.load_state_dict(tensors)


def _check_size(model: TunedModel, network: Network) -> None:
    """Refuse a decoder that does not end at the tile's size where TerraTorch would not resize it."""
    decoder = model.decoder
    assert isinstance(decoder, TerraTorchDecoder)
    if not network.resized and decoder.side != decoder.tile:
        raise RecipeError(
            f"rescale is false, and the decoder gives maps of {decoder.side} for tiles of "
            f"{decoder.tile}: such a model gives no class to every pixel."
        )


def _origin(recipe: Recipe, checkpoint: Path) -> BackboneSpec:
    return BackboneSpec(
        name=recipe.model.backbone, weights=checkpoint.name, sha256=file_sha256(checkpoint)
    )
