"""The profile of the QGIS plugin Deepness and of GeoDeep: 8-bit bands in, probabilities out.

Both divide a byte by 255 before the graph sees it. The names of the metadata are those that
`model_base.py` of https://github.com/PUTvision/qgis-plugin-deepness and `inference.py` of
https://github.com/uav4geo/GeoDeep look up; every value is JSON.
"""

import json
import logging
import math

from torch import Tensor, nn

from geodeploy.errors import RecipeError
from geodeploy.export.options import ExportOptions
from geodeploy.spec import ModelSpec

log = logging.getLogger(__name__)


class DeepnessModel(nn.Module):
    """``model`` for tiles whose 0 and 1 stand for the ``input_range`` of ``spec``, with a softmax."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.input_range
        self.model = model
        self.low, high = spec.input_range
        self.span = high - self.low

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Probabilities of ``pixels_BCHW``, bytes divided by 255."""
        logits: Tensor = self.model(pixels_BCHW * self.span + self.low)
        return logits.softmax(dim=1)


def deepness_spec(spec: ModelSpec, options: ExportOptions) -> ModelSpec:
    """``spec`` of the model for 8-bit bands.

    Raises:
        RecipeError: a band's mean lies outside the range that 8 bits are to stand for.
    """
    low, high = options.range or _known_range(spec)
    for band in spec.bands:
        if not low < band.mean < high:
            raise RecipeError(
                f"--range {low:g} {high:g}: band {band.name} has its mean outside, {band.mean:.4g} "
                f"{spec.units}. Give what 0 and 255 stand for, in those units."
            )
    if spec.class_values != list(range(len(spec.classes))):
        log.warning(
            "Deepness and GeoDeep number classes by their place: 0 to %d, not %s.",
            len(spec.classes) - 1,
            spec.class_values,
        )
    return spec.model_copy(update={"input_range": (low, high), "output": "probabilities"})


def deepness_metadata(spec: ModelSpec) -> dict[str, str]:
    """What Deepness and GeoDeep read from the ONNX file."""
    metadata = {
        "model_type": "Segmentor",
        "class_names": {str(place): item.name for place, item in enumerate(spec.classes)},
        # Deepness' documentation says tiles_size, its code tile_size.
        "tile_size": spec.tile,
        "tiles_size": spec.tile,
        "tiles_overlap": math.ceil(100 * spec.overlap / spec.tile),
        # Zero for both leaves the class of the greatest probability, and all of its pixels.
        "seg_thresh": 0.0,
        "seg_small_segment": 0,
    }
    if spec.gsd_m:
        metadata["resolution"] = spec.gsd_m * 100
    return {name: json.dumps(value) for name, value in metadata.items()}


def stretch(spec: ModelSpec) -> str:
    """The command that makes a scene what the model takes."""
    assert spec.input_range
    low, high = spec.input_range
    return f"gdal_translate -ot Byte -scale {low:g} {high:g} 0 255"


def _known_range(spec: ModelSpec) -> tuple[float, float]:
    """What all bands lie in, to three digits: people have to type it."""
    lows, highs = zip(*(band.seen or band.valid_range for band in spec.bands), strict=True)
    return float(f"{min(lows):.3g}"), float(f"{max(highs):.3g}")
