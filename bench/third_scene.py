"""What the small network makes of a scene that it was not shown, by what else it was trained on.

    python bench/third_scene.py FOLDER_OF_THE_SCENES      minutes a row on a core

The scene is Sentinel-2 over Brandenburg in February, under cirrus, with labels of our own where the
class is plain (train/labels). One seed, 600 steps, from labels alone: no more than a look. Nothing was
chosen by it.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import geodeploy
from geodeploy.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE, LABELS = ROOT / "train" / "cloud-student.toml", ROOT / "train" / "labels"
SCENE, NAME = "s2-brandenburg-osm/s2_l1c_13band_10m.tif", "brandenburg.tif"
BANDS = ("2", "3", "4", "8", "12", "13")
CLOUDS = ("augmentation.clouds={share=0.5, cloud=4, shadow=0, unshaded=[1]}",)
ROWS = {
    "the two chips, and the three other scenes": (5, ()),
    "the same, and clouds made up over all": (5, CLOUDS),
    "the two chips alone, gains of 0.15 a band": (2, ("augmentation.band_gain=0.15",)),
}
"""How many of the recipe's scenes are left, and further keys."""


def main() -> None:
    """Train each row and print what of each class is found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    root = parser.parse_args().root.resolve()
    recipe = load_recipe(RECIPE)
    others = [scene for scene in recipe.data.scene if Path(scene.image).name != Path(SCENE).name]
    print(
        "| trained on | shadow | water | land | cloud | land called shadow |\n|---|---|---|---|---|---|"
    )
    for title, (count, keys) in ROWS.items():
        scenes = ", ".join(_as_toml(scene, root) for scene in others[:count])
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            overrides = [
                f"data.root={root}",
                f"data.label_root={LABELS}",
                f"data.scene=[{scenes}]",
                *keys,
            ]
            geodeploy.train(RECIPE, run, overrides=[*overrides, "training.steps=600"])
            options = geodeploy.PredictOptions(bands=BANDS, scale=1e-4)
            counts = np.array(
                geodeploy.evaluate(run, root / SCENE, LABELS / NAME, options=options).confusion
            )
        found = np.diagonal(counts) / counts.sum(axis=1)
        cells = [*found, counts[2, 0] / counts[2].sum()]
        print(f"| {title} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)


def _as_toml(scene: object, root: Path) -> str:
    facts = scene.model_dump(exclude_defaults=True, mode="json")  # type: ignore[attr-defined]
    for key in ("image", "labels"):
        path = Path(facts[key])
        within = [base for base in (root, LABELS) if path.is_relative_to(base)]
        facts[key] = str(path.relative_to(within[0])) if within else str(path)
    return "{" + ", ".join(f"{key}={value!r}" for key, value in facts.items()) + "}"


if __name__ == "__main__":
    main()
