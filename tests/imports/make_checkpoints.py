"""Train tiny models with TerraTorch itself, for the tests of their import.

`python tests/imports/make_checkpoints.py [NAME ...]` writes those in checkpoints/ again: a checkpoint
of Lightning, its YAML, and what TerraTorch makes of some pixels. It needs terratorch
(1.2.11 made them) and peft.
"""

import copy
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import yaml
from numpy.typing import NDArray
from rasterio.transform import from_origin

BANDS = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]
MEAN, STD = [0.19, 0.2, 0.21, 0.22, 0.2, 0.18], [0.11, 0.1, 0.12, 0.1, 0.09, 0.1]
SIDE, OTHER_SIDE = 32, 48
_RESHAPE = {"name": "ReshapeTokensToImage"}
_WITHOUT_CLASS = _RESHAPE | {"remove_cls_token": False}
_FROM_ALL = {"name": "SelectIndices", "indices": [2, 5, 8, 11]}
_OF_CLAY = ["blue", "green", "red", "nir08", "swir16", "swir22"]
_LEARNED = {"name": "LearnedInterpolateToPyramidal"}

_PRITHVI: dict[str, Any] = {
    "backbone": "prithvi_eo_v2_300",
    "backbone_pretrained": False,
    "backbone_img_size": SIDE,
    "backbone_bands": BANDS,
    "backbone_patch_size": 8,
    "backbone_embed_dim": 16,
    "backbone_depth": 4,
    "backbone_num_heads": 2,
    "num_classes": 3,
}
_UNET = {"decoder": "UNetDecoder", "decoder_channels": [8, 8, 8, 4]}
_NECKS = [{"name": "SelectIndices", "indices": [0, 1, 2, 3]}, _RESHAPE, _LEARNED]


def _lora(targets: list[str], **more: str) -> dict[str, Any]:
    adapters = {"r": 2, "lora_alpha": 4, "target_modules": targets}
    return {"peft_config": {"method": "LORA", "peft_config_kwargs": adapters, **more}}


KEPT: dict[str, dict[str, Any]] = {
    "lora-qkv": _PRITHVI
    | {"necks": _NECKS, "head_dropout": 0.1}
    | _UNET
    | _lora(["qkv.q_linear", "qkv.v_linear", "mlp.fc1", "mlp.fc2"], replace_qkv="qkv"),
    "lora": _PRITHVI
    | {"necks": _NECKS, "decoder": "UperNetDecoder", "decoder_channels": 8}
    | _lora(["qkv", "fc1", "proj"]),
    "dates": _PRITHVI
    | {
        "backbone": "prithvi_eo_v2_tiny_tl",
        "backbone_num_frames": 2,
        "necks": [{"name": "SelectIndices", "indices": [1, 3]}, _RESHAPE | {"effective_time_dim": 2}],
        "decoder": "FCNDecoder",
        "decoder_channels": 8,
        "decoder_num_convs": 2,
        "head_channel_list": [6],
    },
    "quantity": _PRITHVI
    | {"necks": _NECKS, "head_channel_list": [6], "head_final_act": "torch.nn.Softplus"}
    | _UNET,
}
"""Models whose checkpoints are kept, by name: ``model_args``."""
QUANTITIES = {"quantity", "plain-quantity"}
"""Those of a regression."""
OTHERS: dict[str, dict[str, Any]] = {
    "full": _PRITHVI | {"necks": _NECKS} | _UNET,
    "auxiliary": _PRITHVI | {"necks": _NECKS} | _UNET,
    "no-necks": _PRITHVI | {"decoder": "FCNDecoder", "decoder_channels": 8},
    "scale-modules": _PRITHVI
    | {"necks": _NECKS[:2], "decoder": "UperNetDecoder", "decoder_channels": 8}
    | {"decoder_scale_modules": True, "decoder_pool_scales": [1, 2]},
    "pooled": _PRITHVI
    | {
        "necks": [
            {"name": "SelectIndices", "indices": [1, 3]},
            _RESHAPE,
            {"name": "MaxpoolToPyramidal"},
        ]
    }
    | {"decoder": "IdentityDecoder", "decoder_out_index": 1},
    "interpolated": _PRITHVI | {"necks": [*_NECKS[:2], {"name": "InterpolateToPyramidal"}]} | _UNET,
    "plain-quantity": _PRITHVI | {"necks": _NECKS, "decoder": "UperNetDecoder", "decoder_channels": 8},
    "linear": _PRITHVI
    | {"necks": _NECKS[:2], "decoder": "LinearDecoder", "decoder_upsampling_size": 8}
    | {"decoder_num_classes": 3, "rescale": False},
    "resnet": {"backbone": "timm_resnet18", "backbone_pretrained": False, "backbone_in_chans": 6}
    | {"necks": [{"name": "SelectIndices", "indices": [1, 2, 3, 4]}], "num_classes": 3}
    | _UNET,
    "decur": {"backbone": "ssl4eos12_resnet50_sentinel2_all_decur", "backbone_pretrained": False}
    | {"backbone_model_bands": BANDS, "backbone_out_indices": [1, 2, 3, 4], "num_classes": 3}
    | _UNET,
    "dofa": {"backbone": "dofa_small_patch16_224", "backbone_pretrained": False}
    | {"backbone_model_bands": BANDS, "backbone_img_size": SIDE}
    | {"backbone_out_indices": [2, 5, 8, 11], "necks": [_RESHAPE, _LEARNED], "num_classes": 3}
    | _UNET,
    "terramind": {"backbone": "terramind_v1_tiny", "backbone_pretrained": False}
    | {"backbone_modalities": ["S2L2A"], "backbone_bands": {"S2L2A": BANDS}, "num_classes": 3}
    | {"necks": [_FROM_ALL, _WITHOUT_CLASS, _LEARNED]}
    | _UNET,
    "terramind-base": {"backbone": "terramind_v1_base", "backbone_pretrained": False}
    | {"backbone_modalities": ["S2L2A"], "backbone_bands": {"S2L2A": BANDS}, "num_classes": 3}
    | {"necks": [_FROM_ALL, _WITHOUT_CLASS, _LEARNED]}
    | {"decoder": "UperNetDecoder", "decoder_channels": 8},
    "clay": {"backbone": "clay_v1_base", "backbone_pretrained": False, "num_classes": 3}
    | {"backbone_bands": _OF_CLAY, "necks": [_FROM_ALL, _RESHAPE, _LEARNED]}
    | {"backbone_img_size": SIDE}
    | _UNET,
    "clay-upper": {"backbone": "clay_v1_base", "backbone_pretrained": False, "num_classes": 3}
    | {"backbone_bands": BANDS, "necks": [{"name": "SelectIndices", "indices": [11]}, _RESHAPE]}
    | {"backbone_img_size": SIDE, "decoder": "FCNDecoder", "decoder_channels": 8},
    "vit": {"backbone": "timm_vit_tiny_patch16_224", "backbone_pretrained": False}
    | {"backbone_in_chans": 6, "backbone_img_size": SIDE, "backbone_out_indices": [1, 3, 5, 7]}
    | {"necks": [_LEARNED], "num_classes": 3}
    | _UNET,
}
"""Models that are trained where TerraTorch is at hand."""


def train_tiny(name: str, folder: Path) -> None:
    """Write ``model.ckpt``, ``config.yaml`` and ``told.npz`` of the model ``name`` into ``folder``.

    The last holds pixels as values times the scale, (1, C, SIDE, SIDE) or, with T dates,
    (1, C, T, SIDE, SIDE), and TerraTorch's logits or quantities; Prithvi's for OTHER_SIDE too.
    """
    import lightning
    from terratorch import datamodules, tasks
    from terratorch.models.model import AuxiliaryHead

    # TerraTorch asks for less when it is imported, and gets bfloat16 where the processor has it.
    torch.set_float32_matmul_precision("highest")
    folder.mkdir(exist_ok=True)
    network = (KEPT | OTHERS)[name]
    dates = network.get("backbone_num_frames", 1)
    random = np.random.default_rng(5)
    _write_chips(folder / "chips", random)
    task_arguments = {
        "model_factory": "EncoderDecoderFactory",
        "model_args": network,
        "loss": "ce",
        "class_weights": [1.0, 2.0, 1.0],
        "lr": 0.01,
        "optimizer": "AdamW",
        "ignore_index": -1,
        "class_names": ["land", "water", "cloud"],
        "plot_on_val": False,
        "tiled_inference_parameters": {"h_crop": SIDE, "h_stride": 24, "w_crop": SIDE, "w_stride": 24},
    }
    data_arguments = {
        "batch_size": 2,
        "num_workers": 0,
        "num_classes": 3,
        **{f"{split}_data_root": "chips" for split in ("train", "val")},
        **{f"{split}_label_data_root": "chips" for split in ("train", "val")},
        "img_grep": "*_image.tif",
        "label_grep": "*_label.tif",
        "means": MEAN,
        "stds": STD,
        "constant_scale": 0.0001,
        "dataset_bands": [*BANDS[::-1], "CIRRUS"],
        "output_bands": BANDS,
        "no_data_replace": 0,
    }
    task_class, data_class = "SemanticSegmentationTask", "GenericNonGeoSegmentationDataModule"
    if name in QUANTITIES:
        task_class, data_class = "PixelwiseRegressionTask", "GenericNonGeoPixelwiseRegressionDataModule"
        task_arguments["loss"] = "mse"
        data_arguments["test_data_root"] = "chips"  # without which that module cannot be made
        network = {key: value for key, value in network.items() if key != "num_classes"}
        task_arguments["model_args"] = network
        for table, key in (
            (task_arguments, "class_weights"),
            (task_arguments, "class_names"),
            (data_arguments, "num_classes"),
        ):
            del table[key]
    document = {
        "data": {"class_path": data_class, "init_args": data_arguments},
        "model": {"class_path": f"terratorch.tasks.{task_class}", "init_args": task_arguments},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    beside: dict[str, Any] = {}
    if name == "auxiliary":
        beside["aux_heads"] = [AuxiliaryHead("deep", "FCNDecoder", {"decoder_channels": 8})]
        beside["aux_loss"] = {"deep": 0.4}
    with _quiet():
        lightning.seed_everything(5, verbose=False)
        task = getattr(tasks, task_class)(**copy.deepcopy(task_arguments), **beside)
        roots = {key: str(folder / "chips") for key in data_arguments if key.endswith("_data_root")}
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        if dates == 1:
            module = getattr(datamodules, data_class)(**copy.deepcopy(data_arguments) | roots)
            trainer.fit(task, module)
        else:
            _fit_dates(task, dates)
            trainer.strategy.connect(task)
        trainer.save_checkpoint(folder / "model.ckpt", weights_only=True)
        told = {}
        for side in (SIDE, OTHER_SIDE) if "prithvi" in network["backbone"] else (SIDE,):
            shape = (1, 6, side, side) if dates == 1 else (1, 6, dates, side, side)
            pixels = (random.integers(5, 128, shape) / 256).astype(np.float32)  # they pack well
            told |= {f"pixels_{side}": pixels, f"logits_{side}": logits_of(task, pixels)}
        np.savez_compressed(folder / "told.npz", **told)


def logits_of(task: Any, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """What TerraTorch's task makes of pixels (B, C, H, W) or (B, C, T, H, W): (B, K, H, W)."""
    shape = (1, -1) + (1,) * (pixels.ndim - 2)
    mean, std = (torch.tensor(numbers).reshape(shape) for numbers in (MEAN, STD))
    with torch.no_grad():
        logits: NDArray[np.float32] = task.eval()(
            (torch.from_numpy(pixels) - mean) / std
        ).output.numpy()
    return logits if logits.ndim == 4 else logits[:, np.newaxis]  # one quantity comes without its axis


def _fit_dates(task: Any, dates: int) -> None:
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.01)
    for _ in range(4):
        pixels = torch.rand(2, 6, dates, SIDE, SIDE) - 0.5
        loss = torch.nn.functional.cross_entropy(
            task.train()(pixels).output, (pixels[:, 3, -1] > 0).long()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _write_chips(folder: Path, random: np.random.Generator) -> None:
    folder.mkdir(exist_ok=True)
    for number in range(4):
        # A band more than the model takes, and in another order.
        pixels = random.uniform(200, 5000, (7, SIDE, SIDE)).astype(np.uint16)
        labels = (pixels[2] > 2500).astype(np.int16) + (pixels[5] > 4000)
        for kind, values in (("image", pixels), ("label", labels[np.newaxis].astype(np.int16))):
            with rasterio.open(
                folder / f"{number}_{kind}.tif",
                "w",
                driver="GTiff",
                height=SIDE,
                width=SIDE,
                count=len(values),
                dtype=values.dtype,
                crs="EPSG:32632",
                transform=from_origin(500_000 + 400 * number, 5_000_000, 10, 10),
            ) as dataset:
                dataset.write(values)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or KEPT:
        folder = Path(__file__).parent / "checkpoints" / name
        train_tiny(name, folder)
        shutil.rmtree(folder / "chips")
