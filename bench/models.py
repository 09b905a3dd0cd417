"""Models for the benchmarks: random weights from a fixed seed, as ONNX with a description inside.

A map made with them means nothing. What they cost does, and so does whether two programs make the same
map with them. Needs the extra ``export``.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from ways import CLASSES, MEANS, STDS, STRIDE, TILE

from geodeploy.spec import METADATA_KEY, Band, ModelSpec, SegmentationClass

_NAMES = ("blue", "green", "red", "nir", "swir16", "swir22")


def make_spec(classes: int) -> ModelSpec:
    """What a model with so many classes says of itself."""
    return ModelSpec(
        name="random weights",
        bands=tuple(
            Band(name=name, mean=mean, std=std, valid_range=(-0.1, 1.6))
            for name, mean, std in zip(_NAMES, MEANS, STDS, strict=True)
        ),
        tile=TILE,
        overlap=TILE - STRIDE,
        classes=tuple(
            SegmentationClass(
                value=value, name=f"class {value}", color=f"#{value * 240 // classes:02x}4080"
            )
            for value in range(classes)
        ),
    )


def make_vit_small(path: Path, classes: int = CLASSES) -> Path:
    """A ViT-S/14 for six bands with a UNet decoder and a stem."""
    if path.exists():
        return path
    import timm

    from geodeploy.export.onnx import write_onnx
    from geodeploy.train.backbone import find_taps
    from geodeploy.train.decoder import UnetDecoder
    from geodeploy.train.model import TunedModel

    vit = timm.create_model(
        "vit_small_patch14_dinov2", img_size=224, in_chans=6, num_classes=0, global_pool=""
    )
    taps = find_taps(vit)
    decoder = UnetDecoder(384, 4, classes, 224, channels=(128, 96, 64, 32), bands=6, stem=True)
    model = TunedModel(vit, decoder, taps=taps, mean=MEANS, std=STDS, scaling="log").eval()
    write_onnx(model, make_spec(classes), path)
    return path


def convolution_weights(channels: Sequence[int]) -> dict[str, NDArray[np.float32]]:
    """Of 3 x 3 convolutions from six bands through ``channels`` to the classes, with ReLU between.

    By name, as a `torch.nn.Sequential` of them calls them.
    """
    random = np.random.default_rng(0)
    sizes = (len(MEANS), *channels, CLASSES)
    weights = {}
    for place, (taken, made) in enumerate(itertools.pairwise(sizes)):
        spread = (2 / (9 * taken)) ** 0.5
        weights[f"{2 * place}.weight"] = random.normal(0, spread, (made, taken, 3, 3)).astype(
            np.float32
        )
        weights[f"{2 * place}.bias"] = np.zeros(made, np.float32)
    return weights


def make_convolutions(path: Path, channels: Sequence[int]) -> Path:
    """`convolution_weights` after (x - mean) / std, and beside the ONNX file in an ``.npz``."""
    from onnx import helper, numpy_helper

    weights = convolution_weights(channels)
    np.savez(path.with_suffix(".npz"), **weights)
    constants = weights | {
        name: np.array(values, np.float32).reshape(1, -1, 1, 1)
        for name, values in (("mean", MEANS), ("std", STDS))
    }
    nodes = [
        helper.make_node("Sub", ["pixels", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normalised"]),
    ]
    last = "normalised"
    for place in range(len(channels) + 1):
        name, made = str(2 * place), "logits" if place == len(channels) else f"convolved {place}"
        nodes.append(
            helper.make_node(
                "Conv", [last, f"{name}.weight", f"{name}.bias"], [made], pads=[1, 1, 1, 1]
            )
        )
        last = f"positive {place}"
        if made != "logits":
            nodes.append(helper.make_node("Relu", [made], [last]))
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return _write(path, nodes, tensors)


def make_null(path: Path, classes: int = CLASSES) -> Path:
    """The bands as they are, again and again, for logits: what a model that costs nothing returns."""
    from onnx import helper, numpy_helper

    places = np.arange(classes) % len(MEANS)
    node = helper.make_node("Gather", ["pixels", "places"], ["logits"], axis=1)
    return _write(path, [node], [numpy_helper.from_array(places, "places")], classes)


def _write(
    path: Path, nodes: Sequence[object], constants: Sequence[object], classes: int = CLASSES
) -> Path:
    from onnx import TensorProto, helper, save

    spec = make_spec(classes)

    def signature(name: str, channels: int) -> object:
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["batch", channels, spec.tile, spec.tile]
        )

    graph = helper.make_graph(
        nodes, "random", [signature("pixels", len(MEANS))], [signature("logits", classes)], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    save(model, path)
    return path
