"""Scenes on the web, from a server of our own that answers range requests, and STAC items."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.shutil import copy
from rasterio.windows import Window

from geodeploy import PredictOptions, predict
from geodeploy.bands import match_bands
from geodeploy.dataset import as_url, gdal_name
from geodeploy.derived import DerivedOptions
from geodeploy.errors import OutputError, SourceError
from geodeploy.raster import open_raster
from geodeploy.source import find_source, stem

MakeRaster = Callable[..., Path]
SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]


@dataclass
class Site:
    """A folder on the web."""

    folder: Path
    address: str
    asked: list[str] = field(default_factory=list)
    """Of each request, its path."""
    sent: list[int] = field(default_factory=list)
    """Bytes of each answer."""
    broken: list[int] = field(default_factory=list)
    """Bytes that it does not hand out."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/").partition("?")[0]
            made.asked.append(self.path)
            if not path.is_file():
                self.send_error(404)
                return
            content, status = path.read_bytes(), 200
            size = len(content)
            wanted = self.headers.get("Range", "").removeprefix("bytes=")
            if wanted:
                first, _, last = wanted.partition("-")
                content, status = content[int(first) : int(last or size) + 1], 206
                if any(int(first) <= byte < int(first) + len(content) for byte in made.broken):
                    self.send_error(403)
                    return
            self.send_response(status)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            if wanted:
                self.send_header(
                    "Content-Range", f"bytes {first}-{int(first) + len(content) - 1}/{size}"
                )
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
                made.sent.append(len(content))

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Site(folder, f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


def read_all(path: Path | str, names: list[str], **more: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    with open_raster(Path(path), band_names=names, **more) as raster:
        return raster.read_pixels(Window(0, 0, raster.width, raster.height))


def test_urls_are_known_with_one_slash_or_two() -> None:
    for url in ("https://host/a//b.tif?key=1", "https:/host/a//b.tif?key=1"):
        assert gdal_name(url) == "/vsicurl/https://host/a//b.tif?key=1"
        assert as_url(url) == "https://host/a//b.tif?key=1"
    assert gdal_name(Path("/vsicurl/https://host/a.tif")) == "/vsicurl/https://host/a.tif"
    assert gdal_name(Path("s3://bucket/key.tif")) == "/vsis3/bucket/key.tif"
    assert gdal_name("gs://bucket/key.tif") == "/vsigs/bucket/key.tif"
    assert gdal_name("az://container/key.tif") == "/vsiaz/container/key.tif"
    assert gdal_name("NETCDF:/data/file.nc:red") == "NETCDF:/data/file.nc:red"
    assert as_url("/data/file.tif") is None


@pytest.mark.parametrize("bucket", ["", "s3://bucket"])
def test_a_scene_on_the_web_is_mapped_as_the_file_is(
    site: Site,
    real_scene: Path,
    pointwise: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
) -> None:
    for key, value in (
        ("AWS_S3_ENDPOINT", site.address.removeprefix("http://")), ("AWS_HTTPS", "NO"),
        ("AWS_VIRTUAL_HOSTING", "FALSE"), ("AWS_NO_SIGN_REQUEST", "YES"),
    ):  # fmt: skip
        monkeypatch.setenv(key, value)
    (site.folder / "bucket").mkdir()
    for place in ("scene.tif", "bucket/scene.tif"):
        (site.folder / place).write_bytes(real_scene.read_bytes())
    predict(f"{bucket or site.address}/scene.tif", pointwise.path, tmp_path / "web.tif")
    predict(real_scene, pointwise.path, tmp_path / "file.tif")
    assert (tmp_path / "web.tif").read_bytes() == (tmp_path / "file.tif").read_bytes()
    scene = "/bucket/scene.tif" if bucket else "/scene.tif"
    assert site.asked
    assert {path for path in site.asked if not path.startswith(scene)} == set()
    assert not any(path.endswith((".msk", ".aux.xml", ".ovr")) for path in site.asked)


def test_of_a_large_cog_only_what_is_needed_is_fetched(
    site: Site, make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = np.random.default_rng(0).integers(0, 9000, (3, 2048, 1024)).astype(np.uint16)
    plain = make_raster(tmp_path / "plain.tif", stored, names=SIX)
    copy(plain, site.folder / "cog.tif", driver="COG", blocksize=256, compress="deflate")
    size = (site.folder / "cog.tif").stat().st_size
    with open_raster(Path(f"{site.address}/cog.tif"), band_names=SIX[:3]) as raster:
        assert sum(site.sent) < size / 10
        pixels, _ = raster.read_pixels(Window(0, 512, 1024, 256))
    np.testing.assert_array_equal(pixels, stored[:, 512:768])
    assert sum(site.sent) < size / 3


def test_what_the_web_does_not_hand_out_is_left_out_on_demand(
    site: Site, make_raster: MakeRaster, pointwise: Any, tmp_path: Path
) -> None:
    stored = np.random.default_rng(0).uniform(0, 0.5, (6, 300, 500)).astype(np.float32)
    layout = {"tiled": True, "blockxsize": 128, "blockysize": 128}
    scene = make_raster(site.folder / "scene.tif", stored, **layout)
    with rasterio.open(scene) as dataset:
        begin = int(dataset.get_tag_item("BLOCK_OFFSET_2_1", "TIFF", bidx=1))
    predict(scene, pointwise.path, tmp_path / "file.tif")
    site.broken.append(begin + 128 * 128 * 6 * 2)  # the middle of a block
    address = f"{site.address}/scene.tif"
    with pytest.raises(SourceError, match=r"rows \d+ to \d+ cannot be read"):
        predict(address, pointwise.path, tmp_path / "web.tif")
    options = PredictOptions(on_error="skip")
    report = predict(address, pointwise.path, tmp_path / "web.tif", options=options)
    (hole,) = report.holes
    assert (hole.row, hole.column, hole.height, hole.width) == (128, 256, 128, 128)
    with rasterio.open(tmp_path / "web.tif") as web, rasterio.open(tmp_path / "file.tif") as file:
        classes = file.read(1)
        classes[128:256, 256:384] = 255
        np.testing.assert_array_equal(web.read(1), classes)


def test_what_the_web_does_not_have_is_told_in_one_line(site: Site) -> None:
    for name in ("gone.tif", "gone.json", "collections/a/items/gone"):
        with pytest.raises(SourceError, match=r"gone.*(404|not exist)") as caught:
            find_source(Path(f"{site.address}/{name}"))
        assert "\n" not in str(caught.value)
        assert "http://" in str(caught.value)
    (site.folder / "page.tif").write_text("<html>sign in</html>")
    with pytest.raises(SourceError, match=r"page\.tif cannot be read as a raster over the network"):
        find_source(Path(f"{site.address}/page.tif"))
    with pytest.raises(SourceError, match="items are read from https"):
        find_source(Path("s3://bucket/item.json"))


def asset(href: str, name: str, common: str | None, **more: Any) -> dict[str, Any]:
    """An asset as STAC 1.0 has it."""
    tiff = "image/tiff; application=geotiff; profile=cloud-optimized"
    band = {"name": name} | ({"common_name": common} if common else {})
    return {"href": href, "type": tiff, "roles": ["data"], "eo:bands": [band]} | more


def asset_11(href: str, name: str, common: str | None, **more: Any) -> dict[str, Any]:
    """The same as STAC 1.1 has it."""
    tiff = "image/tiff; application=geotiff; profile=cloud-optimized"
    band = {"name": name} | ({"eo:common_name": common} if common else {})
    values = {f"raster:{key}": more.pop(key) for key in ("scale", "offset") if key in more}
    return {"href": href, "type": tiff, "roles": ["data"], "bands": [band]} | values | more


def item(assets: dict[str, Any], **properties: Any) -> str:
    return json.dumps(
        {"type": "Feature", "stac_version": "1.0.0", "id": "S2A_33UUU", "properties": properties,
         "geometry": None, "links": [], "assets": assets}
    )  # fmt: skip


@pytest.fixture
def stored(site: Site, make_raster: MakeRaster) -> dict[str, NDArray[Any]]:
    """Bands of 10 and 20 m in the site's folder."""
    made = {}
    for seed, (name, size) in enumerate((("B04", 10.0), ("B08", 10.0), ("B11", 20.0))):
        side = int(1200 / size)
        values = np.random.default_rng(seed).integers(1, 5000, (1, side, side)).astype(np.uint16)
        values[0, 0, 0] = 0
        grid = Affine(size, 0, 4000, 0, -size, 9000)
        make_raster(site.folder / f"{name}.tif", values, names=[], transform=grid)
        made[name] = values[0]
    return made


@pytest.mark.parametrize("remote", [True, False])
def test_bands_of_an_item_are_found_by_common_name_and_scaled_as_it_says(
    site: Site, stored: dict[str, NDArray[Any]], remote: bool
) -> None:
    raster = [{"nodata": 0, "scale": 0.0001, "offset": -0.1}]
    text = item(
        {
            "thumbnail": {"href": "t.jpg", "type": "image/jpeg", "roles": ["thumbnail"]},
            "visual": asset("TCI.tif", "TCI", None, roles=["visual"]),
            "red-jp2": asset("B04.jp2", "red", "red", type="image/jp2"),
            "red": asset("./B04.tif", "red", "red", **{"raster:bands": raster}),
            "nir": asset(f"{site.address}/B08.tif", "nir", "nir", **{"raster:bands": raster}),
            "swir16": asset("B11.tif", "swir16", "swir16", **{"raster:bands": raster}),
            "scl": asset("SCL.tif", "SCL", None),
        }
    )
    (site.folder / "item.json").write_text(text)
    path = f"{site.address}/item.json" if remote else site.folder / "item.json"
    pixels, valid = read_all(path, ["nir", "red", "swir16"])
    np.testing.assert_allclose(pixels[0], stored["B08"] * 0.0001 - 0.1, atol=1e-6)
    np.testing.assert_allclose(pixels[1], stored["B04"] * 0.0001 - 0.1, atol=1e-6)
    assert pixels.shape == (3, 120, 120)
    assert not valid[:2, :2].any()
    assert valid.sum() == 120 * 120 - 4
    np.testing.assert_array_equal(read_all(path, ["red"], select=["red"])[0], pixels[1:2])


def test_items_of_stac_1_1_say_the_same_elsewhere(site: Site, stored: dict[str, NDArray[Any]]) -> None:
    values = {"scale": 0.0001, "offset": -0.1, "nodata": 0}
    (site.folder / "collections" / "s2" / "items").mkdir(parents=True)
    path = site.folder / "collections" / "s2" / "items" / "S2A_33UUU"
    path.write_text(
        item(
            {
                "B04_10m": asset_11("../../../B04.tif", "B04", "red", **values),
                "B11_20m": asset_11("../../../B11.tif", "B11", "swir16", **values),
            }
        )
    )
    pixels, valid = read_all(f"{site.address}/collections/s2/items/S2A_33UUU", ["red"])
    np.testing.assert_allclose(pixels[0], stored["B04"] * 0.0001 - 0.1, atol=1e-6)
    assert (~valid).sum() == 1


def test_bands_stacked_in_one_asset_are_told_apart(site: Site, make_raster: MakeRaster) -> None:
    values = np.arange(2 * 8 * 8, dtype=np.uint16).reshape(2, 8, 8)
    make_raster(site.folder / "ms.tif", values, names=[])
    bands = [{"name": "G", "common_name": "green"}, {"name": "R", "common_name": "red"}]
    scales = [{"scale": 1.0}, {"scale": 0.5, "offset": 3}]
    text = item({"ms": asset("ms.tif", "", None, **{"eo:bands": bands, "raster:bands": scales})})
    (site.folder / "item.json").write_text(text)
    pixels, _ = read_all(site.folder / "item.json", ["red", "green"])
    np.testing.assert_allclose(pixels[0], values[1] * 0.5 + 3)
    np.testing.assert_allclose(pixels[1], values[0])


def test_an_item_that_promises_more_bands_than_its_file_has_is_refused_in_one_line(
    site: Site, make_raster: MakeRaster
) -> None:
    make_raster(site.folder / "ms.tif", np.ones((1, 8, 8), np.uint16), names=[])
    bands = [{"name": "G", "common_name": "green"}, {"name": "R", "common_name": "red"}]
    text = item({"ms": asset("ms.tif", "", None, **{"eo:bands": bands})})
    (site.folder / "item.json").write_text(text)
    complaint = r"ms\.tif has 1 band, but its STAC item says that R is band 2\. Name the file itself"
    with pytest.raises(SourceError, match=complaint):
        read_all(site.folder / "item.json", ["red", "green"])
    assert read_all(site.folder / "item.json", ["green"])[0].shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"datetime": "2024-05-31T10:20:30Z"}, "2024-05-31T10:20:30Z"),
        ({"datetime": "2024-05-31T12:20:30.5+02:00"}, "2024-05-31T10:20:30.500000Z"),
        (
            {
                "datetime": None,
                "start_datetime": "2024-05-31T10:20:30Z",
                "end_datetime": "2024-05-31T10:20:59Z",
            },
            "2024-05-31T00:00:00Z",
        ),
    ],
)
def test_the_time_of_an_item_is_that_of_the_map_made_of_it(
    site: Site, real_scene: Path, tmp_path: Path, said: dict[str, Any], expected: str
) -> None:
    shutil.copy(real_scene, site.folder / "scene.tif")
    with rasterio.open(real_scene) as dataset:
        bands = [{"name": name} for name in dataset.descriptions]
    text = item({"data": asset("scene.tif", "", None, **{"eo:bands": bands})}, **said)
    (site.folder / "item.json").write_text(text)
    options = PredictOptions(derived=DerivedOptions(stac=True))
    predict(f"{site.address}/item.json", output=tmp_path / "map.tif", options=options)
    properties = json.loads((tmp_path / "map.stac.json").read_text())["properties"]
    assert (properties["datetime"] or properties["start_datetime"]) == expected


def test_an_item_that_does_not_tell_its_time_leaves_the_question_to_the_user(
    site: Site, tmp_path: Path
) -> None:
    options = PredictOptions(derived=DerivedOptions(stac=True))
    for number, said in enumerate(
        (
            {},
            {"datetime": "yesterday"},
            {"start_datetime": "2024-05-01T00:00:00Z", "end_datetime": "2024-06-01T00:00:00Z"},
        )
    ):
        (site.folder / f"{number}.json").write_text(item({}, **said))
        with pytest.raises(OutputError, match=r"\.json does not tell when it was taken.*--acquired"):
            predict(site.folder / f"{number}.json", output=tmp_path / "map.tif", options=options)


def test_an_offset_that_earth_search_says_is_applied_is_not_applied_again(
    site: Site, stored: dict[str, NDArray[Any]]
) -> None:
    raster = [{"nodata": 0, "scale": 0.0001, "offset": -0.1}]
    assets = {"red": asset("B04.tif", "red", "red", **{"raster:bands": raster})}
    (site.folder / "a.json").write_text(item(assets, **{"earthsearch:boa_offset_applied": True}))
    np.testing.assert_allclose(
        read_all(site.folder / "a.json", ["red"])[0][0], stored["B04"] * 0.0001, atol=1e-6
    )


def test_the_red_edges_of_sentinel_2_are_told_apart_by_their_names(site: Site) -> None:
    assets = {
        band: asset(f"{band}.tif", band, common)
        for band, common in (
            ("B04", "red"), ("B05", "rededge"), ("B06", "rededge"), ("B07", "rededge"), ("B8A", "nir08")
        )
    }  # fmt: skip
    (site.folder / "item.json").write_text(item(assets, platform="sentinel-2a"))
    source = find_source(site.folder / "item.json")
    indexes, _ = match_bands(
        [asset.name for asset in source.assets],
        ["rededge075", "red", "rededge071"],
        source="item",
        known=[asset.common_name for asset in source.assets],
    )
    assert [source.assets[index - 1].name for index in indexes] == ["B06", "B04", "B05"]


def test_assets_lie_where_their_addresses_say(tmp_path: Path) -> None:
    places = {
        "s3://bucket/a/B02.tif": "/vsis3/bucket/a/B02.tif",
        "https://host/B03.tif?sig=a%2Fb": "/vsicurl/https://host/B03.tif?sig=a%2Fb",
        "/vsis3/bucket/B04.tif": "/vsis3/bucket/B04.tif",
        "../over there/B05.tif": str(tmp_path / "over there" / "B05.tif"),
        (tmp_path / "B06.tif").as_uri(): str(tmp_path / "B06.tif"),
    }
    (tmp_path / "items").mkdir()
    path = tmp_path / "items" / "item.json"
    path.write_text(item({href: asset(href, href[-7:-4], None) for href in places}))
    assert {asset.path for asset in find_source(path).assets} == set(places.values())
    assert stem(path) == "item"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is a document without a type; a STAC item is needed"),
        ('{"type": "Collection", "links": []}', "is a Collection; a STAC item is needed"),
        ('{"type": "Feature", "assets": {"a": {"type": "image/tiff"}}}', "is not a valid STAC item"),
        ('{"type": "Feature", "assets": {"a": 3}}', "is not a valid STAC item"),
        ('{"type": "Feature", "assets": {}}', "names no raster among its assets"),
    ],
)
def test_what_is_no_item_is_refused_in_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "item.json").write_text(text)
    with pytest.raises(SourceError, match=complaint) as caught:
        find_source(tmp_path / "item.json")
    assert "\n" not in str(caught.value)


def test_an_item_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"item\.json does not exist"):
        find_source(tmp_path / "item.json")
    with rasterio.Env(), pytest.raises(SourceError, match=r"cannot be read"):
        find_source(Path("http://127.0.0.1:9/item.json"))
