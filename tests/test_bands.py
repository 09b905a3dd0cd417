import pytest

from geodeploy.bands import common_names, landsat_number, match_bands
from geodeploy.errors import BandError

SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]


def match(names: list[str | None], needed: list[str] = SIX, **more: object) -> list[int]:
    """The numbers alone, where nothing is to be warned of."""
    indexes, warnings = match_bands(names, needed, source="scene.tif", **more)
    assert warnings == []
    return indexes


def test_bands_are_found_by_common_name_in_whatever_order_they_lie() -> None:
    assert match(["pan", *SIX[::-1]]) == [7, 6, 5, 4, 3, 2]


@pytest.mark.parametrize(
    ("name", "common"),
    [
        ("Blue", "blue"),
        ("NIR", "nir"),
        ("Red Edge 1", "rededge071"),
        ("red-edge-2", "rededge075"),
        ("rededge078", "rededge078"),
        ("SWIR_1", "swir16"),
        ("swir2", "swir22"),
        ("coastal_aerosol", "coastal"),
        ("NIR narrow", "nir08"),
        ("water vapour", "nir09"),
        ("panchromatic", "pan"),
        ("lwir11", "lwir11"),
        ("chlorophyll", None),
        (None, None),
        ("", None),
    ],
)
def test_a_band_named_in_words_has_one_common_name(name: str | None, common: str | None) -> None:
    assert common_names([name]) == [common]


@pytest.mark.parametrize("names", ["B02 B03 B04 B08 B11 B12", "B2 B3 B4 B8 B8A B11 B12"])
def test_sentinel_2_is_known_by_a_band_that_nothing_else_has(names: str) -> None:
    found = common_names(names.split())
    assert found == [*SIX[:4], *(["nir08"] if "8A" in names else []), *SIX[4:]]


def test_all_thirteen_bands_of_sentinel_2() -> None:
    names = [f"B{number:02d}" for number in (1, 2, 3, 4, 5, 6, 7, 8)] + [
        "B8A",
        "B09",
        "B10",
        "B11",
        "B12",
    ]
    assert common_names(names) == [
        "coastal",
        "blue",
        "green",
        "red",
        "rededge071",
        "rededge075",
        "rededge078",
        "nir",
        "nir08",
        "nir09",
        "cirrus",
        "swir16",
        "swir22",
    ]


def test_two_digit_names_alone_tell_only_the_bands_that_sentinel_2_and_hls_share() -> None:
    # HLS L30 has near infrared in B05 and short wave infrared in B06: red edge in Sentinel-2.
    assert (
        common_names(["B02", "B03", "B04", "B05", "B06", "B07"])
        == ["blue", "green", "red"] + [None] * 3
    )


def test_one_digit_names_alone_tell_nothing() -> None:
    # B2 is blue on Landsat 8 and green on Landsat 5.
    assert common_names(["B2", "B3", "B4"]) == [None] * 3


@pytest.mark.parametrize("prefix", ["B", "SR_B", "TOA_B", "B0", "sr_b"])
def test_landsat_8_and_5_give_the_same_numbers_different_meanings(prefix: str) -> None:
    names = [f"{prefix}{number}" for number in range(1, 8)]
    assert common_names(names, landsat=8) == [
        "coastal",
        "blue",
        "green",
        "red",
        "nir08",
        "swir16",
        "swir22",
    ]
    assert common_names(names, landsat=5) == [
        "blue",
        "green",
        "red",
        "nir08",
        "swir16",
        "lwir",
        "swir22",
    ]


def test_landsat_9_is_as_8_and_7_has_a_panchromatic_band() -> None:
    names = [f"B{number}" for number in range(1, 12)]
    assert common_names(names, landsat=9) == common_names(names, landsat=8)
    assert common_names(["B8"], landsat=7) == ["pan"]
    assert common_names(["B8"], landsat=5) == [None]


@pytest.mark.parametrize(
    ("hints", "number"),
    [
        (["LC08_L1TP_021039_20130422_20170310_01_T1.tif"], 8),
        (["LC09_L2SP_021039_20220422.tif"], 9),
        (["LE07_L2SP.tif"], 7),
        (["LT05_L2SP.tif"], 5),
        (["scene.tif", "LANDSAT_8"], 8),
        (["landsat8_cloudy.tif"], 8),
        (["Landsat-5 TM.tif"], 5),
        (["LC08_x.tif", "LANDSAT_8", "landsat 8"], 8),
        (["LC08_x.tif", "LANDSAT_9"], None),
        (["scene.tif", "Sentinel-2A"], None),
        (["landsat85.tif"], None),
        (["LANDSAT_6"], None),
        (["", ""], None),
    ],
)
def test_the_landsat_is_read_from_names_and_tags_that_agree(
    hints: list[str], number: int | None
) -> None:
    assert landsat_number(*hints) == number


def test_the_broad_and_the_narrow_near_infrared_stand_in_for_each_other_with_a_warning() -> None:
    names: list[str | None] = [f"SR_B{number}" for number in range(2, 8)]
    indexes, warnings = match_bands(names, SIX, source="LC08.tif", landsat=8)
    assert indexes == [1, 2, 3, 4, 5, 6]
    assert warnings == ["LC08.tif: SR_B5 (nir08) stands in for nir."]
    assert match_bands(["nir"], ["nir08"], source="")[1]
    # Where both are there, each is itself.
    assert match(["nir08", "nir"], ["nir", "nir08"]) == [2, 1]


def test_a_name_that_the_model_uses_itself_wins_over_an_alias() -> None:
    assert match(["B5", "elevation"], ["elevation", "B5"]) == [2, 1]
    assert match(["Blue", "blue"], ["blue"]) == [2]


def test_bands_without_names_are_taken_in_order_when_their_number_fits_and_the_user_is_told() -> None:
    indexes, warnings = match_bands([None] * 6, SIX, source="scene.tif")
    assert indexes == [1, 2, 3, 4, 5, 6]
    assert warnings == [
        "scene.tif: its bands have no names; taken in order as blue, green, red, nir, swir16, swir22."
    ]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            [None] * 8,
            r"8 bands without names, the model needs 6: .*--bands which they are, .* of blue first",
        ),
        ([None] * 3, r"3 bands without names, the model needs 6: .*Add the missing ones"),
        ([None], r"1 band without names"),
        (["blue", "green", "red"], r"3 bands \(blue, green, red\), among which nir is not found"),
        (["B2", "B3", "B4", "B5", "B6", "B7"], r"blue is not found \(B2 means different bands on"),
        (["x1", "x2", "x3", "x4", "x5", None], r"\(x1, .*band 6\), among which blue .*--bands"),
        ([*SIX, "blue"], None),
        ([*SIX[:-1], "SWIR2", "swir-22"], r"swir22 more than once \(bands 6, 7 of"),
    ],
)
def test_bands_that_cannot_be_told_are_listed_with_what_is_needed(
    names: list[str | None], complaint: str | None
) -> None:
    with pytest.raises(BandError, match=complaint or r"blue more than once \(bands 1, 7 of") as caught:
        match_bands(names, SIX, source="scene.tif")
    assert str(caught.value).startswith("scene.tif has ")
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in SIX)


def test_advice_to_use_bands_is_given_only_where_it_can_help() -> None:
    with pytest.raises(BandError) as caught:
        match_bands([None] * 3, SIX, source="scene.tif")
    assert "--bands" not in str(caught.value)


def test_the_user_picks_bands_by_name_or_number_in_the_models_order() -> None:
    assert match(["a", "b", "c"], ["red", "nir"], select=["c", "1"]) == [3, 1]
    # One band may stand for several where there are too few, and for its twin.
    assert match([None], ["red", "nir"], select=["1", "1"]) == [1, 1]
    assert match([None, None, None], ["red", "nir", "nir08"], select=["1", "2", "2"]) == [1, 2, 2]
    # A band called 2 is meant before the second one.
    assert match(["2", "1"], ["red"], select=["2"]) == [1]


@pytest.mark.parametrize(
    ("select", "complaint"),
    [
        (["a"], r"--bands names 1 \(a\), the model needs 2: red, nir"),
        (["a", "z"], r"--bands z: scene.tif has no such band; it has a, b, b.*numbers 1 to 3"),
        (["a", "4"], r"--bands 4: .*no such band"),
        (["a", "0"], r"--bands 0: "),
        (["a", "-1"], r"--bands -1: "),
        (["a", "b"], r"--bands b: scene.tif has more than one such band"),
        (["a", ""], r"--bands '': "),
        (["a", "²"], r"--bands ²: "),
        (
            ["a", "1"],
            r"--bands names 1 twice, for red and for nir; scene\.tif has 3 bands\. Name another",
        ),
    ],
)
def test_a_band_picked_in_vain_is_named_with_what_there_is(select: list[str], complaint: str) -> None:
    with pytest.raises(BandError, match=complaint):
        match_bands(["a", "b", "b"], ["red", "nir"], source="scene.tif", select=select)
