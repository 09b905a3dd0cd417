"""The shortest way to a map: the scene and the model that come with the package."""

import json
import time
from contextlib import closing
from importlib.resources import files
from pathlib import Path

from geodeploy.pictures import draw_map
from geodeploy.predict import PredictOptions, default_model, predict
from geodeploy.runtime import open_session
from geodeploy.writer import check_output

SCENE = Path(str(files("geodeploy"))) / "assets" / "landsat8_cloudy.tif"


def demo(output: Path) -> str:
    """Map the scene in the package into the folder ``output``; what to tell the user.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    begun = time.perf_counter()
    check_output(output / "map.tif", [], overwrite=True, make_folder=True)
    mapped, picture, facts = output / "map.tif", output / "picture.png", output / "report.json"
    report = predict(SCENE, output=mapped, options=PredictOptions(overwrite=True))
    with closing(open_session(default_model(), device="cpu")) as session:
        draw_map(SCENE, mapped, session.spec.classes, picture)
    facts.write_text(json.dumps(report.model_dump(mode="json"), indent=1) + "\n")
    return "\n".join(
        [
            str(report),
            "",
            f"map      {mapped.resolve()}   (COG: open it in QGIS beside {SCENE})",
            f"picture  {picture.resolve()}",
            f"report   {facts.resolve()}",
            f"{time.perf_counter() - begun:.1f} s in all",
        ]
    )
