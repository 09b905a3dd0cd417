import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from geodeploy.errors import ModelError, OutputError, RecipeError, WeightsError
from geodeploy.spec import ModelSpec
from geodeploy.train import train
from geodeploy.train.goals import goal_of
from geodeploy.train.recipe import load_recipe
from geodeploy.train.run import Run, load_run, new_run

Tune = Callable[..., Path]
METHODS = ("method.name=lora", "method.name=linear", "method.name=full")


def logits(run: Run, backbone: object = None) -> np.ndarray:
    if backbone is not None:
        run.model.backbone = backbone
    with torch.inference_mode():
        return run.model(torch.from_numpy(run.tiles.pixels[:3])).numpy()


def broken(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / "copy"))


def test_a_run_has_just_the_files_that_its_method_needs(tune: Tune) -> None:
    always = {
        "head.safetensors", "backbone.safetensors", "spec.json", "recipe.toml", "metrics.json",
        "curves.png", "predictions.png", "split.png", "README.md", "tiles.npz",
    }  # fmt: skip
    adapter = {"adapter_model.safetensors", "adapter_config.json"}
    assert {path.name for path in tune(*METHODS[:1]).iterdir()} == always | adapter
    assert {path.name for path in tune(*METHODS[2:]).iterdir()} == always


@pytest.mark.parametrize("method", METHODS)
def test_a_run_reloads_as_it_was_trained(tune: Tune, method: str) -> None:
    path = tune(method)
    run, again = load_run(path), load_run(path)
    assert not run.model.training
    assert run.sha256 == again.sha256
    assert run.spec == ModelSpec.read(path / "spec.json")
    np.testing.assert_array_equal(logits(run), logits(again))
    # What it scored when it was trained is what it still says of its tiles: the picture shows the same.
    assert run.tiles.pixels.shape == (len(run.tiles.labels), 6, 32, 32)
    assert set(np.unique(run.tiles.labels)) <= {0, 1, 2, 255}
    assert (run.tiles.labels != 255).any(axis=(1, 2)).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_saved_are_those_that_validated_best(
    recipe_file: Path, tune: Tune, method: str
) -> None:
    from geodeploy.train.data import open_scenes
    from geodeploy.train.validation import validate

    run = load_run(tune(method))
    metrics = json.loads((run.path / "metrics.json").read_text())
    with open_scenes(run.recipe) as scenes, torch.inference_mode():
        scores = validate(
            run.model,
            scenes,
            goal_of(run.recipe),
            tile=32,
            overlap=8,
            batch=2,
            mean=np.array([band.mean for band in run.spec.bands], np.float32),
        )
    assert scores.model_dump(mode="json") == metrics["scores"]
    assert metrics["scores"]["miou"] == max(check["scores"]["miou"] for check in metrics["history"])


def test_a_run_loads_in_plain_peft_with_equal_logits(tune: Tune) -> None:
    path = tune(METHODS[0])
    run = load_run(path)
    needed = logits(run)
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, in_chans=6, num_classes=0, global_pool="",
        embed_dim=32, depth=2, num_heads=2, patch_size=8,
    )  # fmt: skip
    vit.load_state_dict(load_file(path / "backbone.safetensors"))
    wrapped = peft.PeftModel.from_pretrained(vit, path)
    np.testing.assert_array_equal(logits(run, wrapped.eval()), needed)
    # And merges there, to what fp32 leaves of a sum in another order.
    np.testing.assert_allclose(logits(run, wrapped.merge_and_unload()), needed, atol=1e-5)


def test_training_changed_the_adapter_and_the_patch_embedding(tune: Tune) -> None:
    path = tune(METHODS[0])
    adapter = load_file(path / "adapter_model.safetensors")
    assert all(value.any() for name, value in adapter.items() if "lora_B" in name)
    (tuned,) = (value for name, value in adapter.items() if name.endswith("patch_embed.proj.weight"))
    start = load_file(path / "backbone.safetensors")["patch_embed.proj.weight"]
    assert not torch.equal(tuned, start)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    recipe_file: Path, tmp_path: Path, tune: Tune, method: str
) -> None:
    first = tune(method)
    train(recipe_file, tmp_path / "again", overrides=[method])
    train(recipe_file, tmp_path / "other", overrides=[method, "seed=4"])
    names = [path.name for path in first.glob("*.safetensors")]
    for name in names:
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (first / name).read_bytes() != (tmp_path / "other" / name).read_bytes()
    for name in ("spec.json", "tiles.npz"):
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_recipe_in_a_run_is_the_one_that_ran(recipe_file: Path, tune: Tune) -> None:
    path = tune("method.name=full")
    assert load_recipe(path / "recipe.toml") == load_recipe(recipe_file, ["method.name=full"])


def test_the_report_counts_and_scores(recipe_file: Path, tmp_path: Path) -> None:
    report = train(recipe_file, tmp_path / "run", overrides=["training.steps=2"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == report.metrics.steps == 2
    assert f"{metrics['trainable_parameters']:,} of" in str(report)
    assert "cirrus" in str(report)
    assert "mean IoU" in (tmp_path / "run" / "README.md").read_text()


def test_without_validation_pixels_the_last_step_is_kept_and_nothing_is_scored(
    recipe_file: Path, tmp_path: Path
) -> None:
    overrides = ["data.scene.0.split=train", "training.patience=1", "training.validate_every=1"]
    report = train(recipe_file, tmp_path / "run", overrides=overrides)
    assert report.metrics.scores is None
    assert report.metrics.best_step == 4
    assert "not scored" in str(report)
    assert len(load_run(tmp_path / "run").tiles.labels) == 16


def test_a_run_on_weights_of_a_file_names_and_needs_just_those(
    recipe_file: Path, tune: Tune, tmp_path: Path
) -> None:
    weights = tmp_path / "start.safetensors"
    shutil.copy(tune("method.name=full") / "backbone.safetensors", weights)
    run = tmp_path / "run"
    train(recipe_file, run, overrides=[f"model.weights={weights}", "training.steps=1"])
    assert not (run / "backbone.safetensors").exists()
    backbone = load_run(run).spec.backbone
    assert backbone is not None
    assert backbone.weights == "start.safetensors"

    altered = load_file(weights)
    altered["norm.bias"] += 1
    save_file(altered, weights)
    with pytest.raises(WeightsError, match=str(backbone.sha256)):
        load_run(run)
    weights.unlink()
    with pytest.raises(WeightsError, match=r"start\.safetensors do not exist"):
        load_run(run)


@pytest.mark.parametrize(
    "name", ["spec.json", "recipe.toml", "head.safetensors", "tiles.npz", "backbone.safetensors",
             "adapter_model.safetensors", "adapter_config.json"]
)  # fmt: skip
def test_a_run_that_lacks_a_file_names_it(tune: Tune, tmp_path: Path, name: str) -> None:
    copy = broken(tune(METHODS[0]), tmp_path)
    (copy / name).unlink()
    with pytest.raises(ModelError, match=f"it has no {name}"):
        load_run(copy)


@pytest.mark.parametrize(
    "name", ["head.safetensors", "tiles.npz", "backbone.safetensors", "adapter_model.safetensors",
             "adapter_config.json"]
)  # fmt: skip
def test_a_broken_file_is_an_error_in_one_line(tune: Tune, tmp_path: Path, name: str) -> None:
    copy = broken(tune(METHODS[0]), tmp_path)
    (copy / name).write_bytes(b"junk")
    with pytest.raises(ModelError) as caught:
        load_run(copy)
    assert "\n" not in str(caught.value)


def test_weights_of_another_recipe_are_refused(tune: Tune, tmp_path: Path) -> None:
    copy = broken(tune(METHODS[0]), tmp_path)
    text = (copy / "recipe.toml").read_text()
    (copy / "recipe.toml").write_text(text.replace('decoder = "unet"', 'decoder = "linear"'))
    with pytest.raises(ModelError, match=r"head\.safetensors does not hold the tensors"):
        load_run(copy)
    (copy / "recipe.toml").write_text(text.replace("tile = 32", "tile = 40"))
    with pytest.raises(ModelError, match=r"spec\.json has tile 32, recipe\.toml has 40"):
        load_run(copy)


def test_a_run_that_exists_is_not_overwritten(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        train(recipe_file, tmp_path)


def test_a_run_in_a_folder_that_is_missing_is_refused_before_any_work(
    recipe_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="mkdir -p"):
        train(recipe_file, tmp_path / "absent" / "too" / "run", overrides=["data.root=nowhere"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_knows_what_it_saw_whether_its_statistics_are_computed_or_given(
    recipe_file: Path, tmp_path: Path, tune: Tune
) -> None:
    from geodeploy.train.data import open_scenes
    from geodeploy.train.seen import compute_seen

    with open_scenes(load_recipe(recipe_file)) as scenes:
        needed = compute_seen(scenes, 6)
    assert tuple(band.seen for band in ModelSpec.read(tune() / "spec.json").bands) == needed
    given = f"data.statistics={{mean={[0.2] * 6}, std={[0.1] * 6}}}"
    train(recipe_file, tmp_path / "run", overrides=[given, "training.steps=1"])
    spec = ModelSpec.read(tmp_path / "run" / "spec.json")
    assert [band.mean for band in spec.bands] == [0.2] * 6
    assert tuple(band.seen for band in spec.bands) == needed
    low, high = needed[0]
    assert f"| {low:.4g} to {high:.4g} |" in (tmp_path / "run" / "README.md").read_text()


def test_a_mistake_in_the_recipe_leaves_nothing(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        train(recipe_file, tmp_path / "run", overrides=["training.step=1"])
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_no_half_run(tmp_path: Path) -> None:
    def write_and_stop() -> None:
        with new_run(tmp_path / "run") as folder:
            (folder / "recipe.toml").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", [METHODS[0], "method.targets=['attn.q', 'attn.v']"])
def test_the_cards_own_code_loads_the_adapter(tune: Tune, override: str) -> None:
    path = tune(override)
    card = (path / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace('"RUN', f'"{path}')
    names: dict[str, object] = {}
    exec(code, names)
    run = load_run(path)
    np.testing.assert_array_equal(logits(run), logits(load_run(path), names["tuned"]))


def test_a_run_without_a_place_goes_under_runs_by_the_recipes_name(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = train(recipe_file, overrides=["training.steps=1"])
    assert report.run == Path("runs/tiny")
    assert (tmp_path / "runs" / "tiny" / "head.safetensors").exists()
